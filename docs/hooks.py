"""For the documentation's builder: three folders as the one package that an installation makes of them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

_ROOT = Path(__file__).parents[1]
_TREE = tempfile.TemporaryDirectory()


@event_priority(100)
def on_config(config: Any) -> Any:
    """Shows mkdocstrings the tree, before it collects anything."""
    package = Path(_TREE.name) / "ulfine_fast"
    if not package.exists():
        package.mkdir()
        for path in (_ROOT / "ulfine_fast").iterdir():
            (package / path.name).symlink_to(path)
        for folder in ("cache", "cli"):
            (package / folder).symlink_to(_ROOT / folder)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_TREE.name]
    return config
