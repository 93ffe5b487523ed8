"""Files that are either complete or absent, whatever instant the process dies in."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.paths import RemotePath, is_remote

_BEGINNING = re.compile(r"[\w.-]+\.(h5|json)(\.\d+)?\.tmp")


def write_atomically(path: Path, data: bytes, *, several: bool = False) -> None:
    """Writes beside the final name, flushes to the disk and renames; into a store it goes as one whole.

    Args:
        path: final name; what is written first is `path` + ".tmp", a leftover of that name is overwritten.
        data: the whole file.
        several: whether another process may be at the same file; the process's number then stands before ".tmp".

    Raises:
        InputError: the file system refused (full, read-only, too large); names the file and the reason.
    """
    if is_remote(path):
        _upload(path, data)
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp" if several else f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            # Without this the rename may reach the disk before the content does, and a power cut leaves an empty file.
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        # On a full disk the beginnings of the file would take the room that the user is about to make.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise write_error(path, error) from error


def _upload(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    # a store may refuse with anything
    except Exception as error:
        raise InputError(
            f"cannot write {path} ({' '.join(str(error).split())[:200] or type(error).__name__}); check the store and "
            "run the same command again: what is finished stays"
        ) from error


def make_folder(path: Path) -> None:
    """Makes a folder and its parents; fine when it is there already.

    Raises:
        InputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error


def remove_beginnings(cache: Path) -> None:
    """Removes what killed writers have left of files; only for who holds the cache's lock."""
    for folder in (cache, cache / "shards"):
        for path in folder.glob("*.tmp"):
            if _BEGINNING.fullmatch(path.name):
                path.unlink(missing_ok=True)


def write_error(path: Path | RemotePath, error: OSError) -> InputError:
    """The sentence for a write that the system refused."""
    return InputError(
        f"cannot write {path} ({error.strerror or error}); make room or choose a folder that can be written, "
        "then run the same command again: what is finished stays"
    )


def _flush_folder(folder: Path) -> None:
    """Makes the rename itself survive a power cut; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
