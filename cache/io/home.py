"""Where this tool keeps what it builds or downloads once."""

from __future__ import annotations

import os
from pathlib import Path


def cache_home() -> Path:
    """The folder for built models and downloaded data sets; it need not exist yet.

    Returns:
        `$ULFINE_FAST_HOME` if set, else `$XDG_CACHE_HOME/ulfine-fast`, else `~/.cache/ulfine-fast`; always absolute.
    """
    folder = os.environ.get("ULFINE_FAST_HOME")
    if folder:
        return Path(folder).expanduser().absolute()
    parent = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(parent).expanduser().absolute() / "ulfine-fast"
