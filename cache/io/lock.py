"""One writer a cache: a process that writes holds the folder's lock and leaves a note that names it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import msgspec
from filelock import FileLock, Timeout

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import make_folder, remove_partial_files, write_atomically, write_error
from ulfine_fast.cache.io.json_files import read_json
from ulfine_fast.cache.io.paths import RemotePath
from ulfine_fast.cache.io.terminal import printable

NAME = ".writer"
_NOTE = ".writer.json"
FILES = (NAME, _NOTE, f"{_NOTE}.tmp")


@dataclass(frozen=True)
class _Holder:
    """What the note says.

    Attributes:
        host: name of the writer's machine.
        process: its process id.
        since: when it began.
    """

    host: str
    process: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
    since: str


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
    # The lock's file is emptied, and a link would empty another one.
    if (cache / NAME).is_symlink():
        raise InputError(f"{cache / NAME} is a symbolic link, which a cache does not have; remove it")
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
        # A link of the note's name is replaced, not written through.
        write_atomically(note, _this_process())
        yield
    finally:
        # The lock's own file stays: removing it would let two processes lock two files of one name.
        with suppress(OSError):
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
        holder = _read(note)
        if holder.host != socket.gethostname() or holder.process == os.getpid():
            return False
        os.kill(holder.process, 0)
    except ProcessLookupError:
        return True
    except (OSError, InputError):
        return False
    return False


def _this_process() -> bytes:
    """The content of the note: host, process id and time."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return (json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": now}) + "\n").encode()


def _writer_in(note: Path | RemotePath) -> str:
    """The process that a note names, as part of a sentence; "" where the note cannot be read."""
    try:
        holder = _read(note)
    except InputError:
        return ""
    return f" (process {holder.process} on {printable(holder.host)}, since {printable(holder.since)})"


def _read(note: Path | RemotePath) -> _Holder:
    return read_json(note, _Holder, fix="remove it")
