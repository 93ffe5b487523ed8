"""One writer a cache: whoever writes holds its folder, and says so."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import make_folder, remove_beginnings, write_error
from ulfine_fast.cache.io.paths import RemotePath

NAME = ".writer"
_HOLDER = ".writer.json"
FILES = (NAME, _HOLDER)


@contextmanager
def writer(cache: Path) -> Iterator[None]:
    """Holds a cache's folder for writing, and makes it where it is missing.

    The system itself lets go of the lock when the process ends, however that happens: what a killed one leaves behind
    holds nobody back. Readers need no lock, since every file appears whole.

    Behind a URL there is no such system: the holder's note itself is the lock. One that a killed process of this
    machine has left is known as such; one of another machine has to be removed by hand.

    Args:
        cache: the folder.

    Raises:
        InputError: another process writes there; says which, where and since when. Or the folder cannot be written.
    """
    if isinstance(cache, RemotePath):
        with _signed(cache / _HOLDER):
            yield
        return
    make_folder(cache)
    lock = FileLock(cache / NAME, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"another process writes to {cache}{_who(cache / _HOLDER)}; wait for it or end it, or choose another folder"
        ) from error
    except OSError as error:
        raise write_error(cache / NAME, error) from error
    try:
        remove_beginnings(cache)
        _sign(cache)
        yield
    finally:
        # The lock's own file stays: removing it would let two others lock two files of one name.
        (cache / _HOLDER).unlink(missing_ok=True)
        lock.release()


@contextmanager
def _signed(note: RemotePath) -> Iterator[None]:
    """Holds a lock in a store, as long as nobody removes it."""
    if _is_left_behind(note):
        note.unlink(missing_ok=True)
    try:
        note.create(_told())
    except FileExistsError as error:
        raise InputError(
            f"another process writes to {note.parent}{_who(note)}; wait for it, or, if it is gone, remove {note}"
        ) from error
    except OSError as error:
        raise write_error(note, error) from error
    try:
        yield
    finally:
        # a store that is out of reach now leaves the note, and the next run of this machine removes it
        with suppress(OSError):
            note.unlink(missing_ok=True)


def _is_left_behind(note: RemotePath) -> bool:
    """Whether the holder was a process of this machine that is no more."""
    try:
        told = json.loads(note.read_text())
        if told["host"] != socket.gethostname() or int(told["process"]) == os.getpid():
            return False
        os.kill(int(told["process"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return False


def _sign(cache: Path) -> None:
    """Notes who holds the lock, for whoever finds it held."""
    try:
        (cache / _HOLDER).write_bytes(_told())
    except OSError as error:
        raise write_error(cache / _HOLDER, error) from error


def _told() -> bytes:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    told = {"host": socket.gethostname(), "process": os.getpid(), "since": now}
    return (json.dumps(told) + "\n").encode()


def _who(note: Path | RemotePath) -> str:
    """The holder as part of a sentence; nothing where it could not say."""
    try:
        told = json.loads(note.read_text(encoding="utf-8"))
        return f" (process {int(told['process'])} on {told['host']}, since {told['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
