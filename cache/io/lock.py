"""One writer a cache: a process that writes holds the folder's lock and leaves a note that names it."""

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
from ulfine_fast.cache.io.files import make_folder, refused_writes, remove_partial_files, write_error
from ulfine_fast.cache.io.paths import RemotePath

NAME = ".writer"
_NOTE = ".writer.json"
FILES = (NAME, _NOTE)


@contextmanager
def writer(cache: Path) -> Iterator[None]:
    """Holds a cache's folder for writing, and makes it where it is missing.

    The system releases the lock when the process ends, however that happens, so a killed process blocks no other.
    Readers need no lock, since every file appears whole.

    A store behind a URL has no such locks: there the note itself is the lock. A note left by a killed process of this
    machine is recognised and removed; one of another machine has to be removed by hand.

    Args:
        cache: the folder.

    Raises:
        InputError: another process writes there; says which, where and since when. Or the folder cannot be written.
    """
    if isinstance(cache, RemotePath):
        with _remote_writer(cache / _NOTE):
            yield
        return
    make_folder(cache)
    note = cache / _NOTE
    lock = FileLock(cache / NAME, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"another process writes to {cache}{_writer_in(note)}; wait for it or end it, or choose another folder"
        ) from error
    except OSError as error:
        raise write_error(cache / NAME, error) from error
    try:
        remove_partial_files(cache)
        with refused_writes(note):
            note.write_bytes(_this_process())
        yield
    finally:
        # The lock's own file stays: removing it would let two processes lock two files of one name.
        note.unlink(missing_ok=True)
        lock.release()


@contextmanager
def _remote_writer(note: RemotePath) -> Iterator[None]:
    """Holds a lock in a store for as long as the note exists."""
    if _is_stale(note):
        note.unlink(missing_ok=True)
    try:
        note.create(_this_process())
    except FileExistsError as error:
        raise InputError(
            f"another process writes to {note.parent}{_writer_in(note)}; wait for it, or, if it is gone, remove {note}"
        ) from error
    except OSError as error:
        raise write_error(note, error) from error
    try:
        yield
    finally:
        # a store that is out of reach now keeps the note, and the next run of this machine removes it
        with suppress(OSError):
            note.unlink(missing_ok=True)


def _is_stale(note: RemotePath) -> bool:
    """Whether the note was left by a process of this machine that is gone."""
    try:
        holder = json.loads(note.read_text())
        if holder["host"] != socket.gethostname() or int(holder["process"]) == os.getpid():
            return False
        os.kill(int(holder["process"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return False


def _this_process() -> bytes:
    """The content of the note: host, process id and time."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return (json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": now}) + "\n").encode()


def _writer_in(note: Path | RemotePath) -> str:
    """The process that a note names, as part of a sentence; "" where the note cannot be read."""
    try:
        holder = json.loads(note.read_text(encoding="utf-8"))
        return f" (process {int(holder['process'])} on {holder['host']}, since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
