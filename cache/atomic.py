"""Files that are either complete or absent, whatever instant the process dies in."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ulfine_fast.cache.errors import InputError


def write_atomically(path: Path, data: bytes) -> None:
    """Writes beside the final name, flushes to the disk and renames.

    Args:
        path: final name; what is written first is `path` + ".tmp", a leftover of that name is overwritten.
        data: the whole file.

    Raises:
        InputError: the file system refused (full, read-only, too large); names the file and the reason.
    """
    temporary = path.with_name(path.name + ".tmp")
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


def make_folder(path: Path) -> None:
    """Makes a folder and its parents; fine when it is there already.

    Raises:
        InputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error


def write_error(path: Path, error: OSError) -> InputError:
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
