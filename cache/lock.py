"""One writer a cache: whoever writes holds its folder, and says so."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from ulfine_fast.cache.atomic import make_folder, write_error
from ulfine_fast.cache.errors import InputError

NAME = ".writer"
_HOLDER = ".writer.json"
FILES = (NAME, _HOLDER)


@contextmanager
def writer(cache: Path) -> Iterator[None]:
    """Holds a cache's folder for writing, and makes it where it is missing.

    The system itself lets go of the lock when the process ends, however that happens: what a killed one leaves behind
    holds nobody back. Readers need no lock, since every file appears whole.

    Args:
        cache: the folder.

    Raises:
        InputError: another process writes there; says which, where and since when. Or the folder cannot be written.
    """
    make_folder(cache)
    lock = FileLock(cache / NAME, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"another process writes to {cache}{_who(cache)}; wait for it or end it, or choose another folder"
        ) from error
    except OSError as error:
        raise write_error(cache / NAME, error) from error
    try:
        _sign(cache)
        yield
    finally:
        # The lock's own file stays: removing it would let two others lock two files of one name.
        (cache / _HOLDER).unlink(missing_ok=True)
        lock.release()


def _sign(cache: Path) -> None:
    """Notes who holds the lock, for whoever finds it held."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    told = {"host": socket.gethostname(), "process": os.getpid(), "since": now}
    try:
        (cache / _HOLDER).write_text(json.dumps(told) + "\n", encoding="utf-8")
    except OSError as error:
        raise write_error(cache / _HOLDER, error) from error


def _who(cache: Path) -> str:
    """The holder as part of a sentence; nothing where it could not say."""
    try:
        told = json.loads((cache / _HOLDER).read_text(encoding="utf-8"))
        return f" (process {int(told['process'])} on {told['host']}, since {told['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
