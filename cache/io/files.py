"""Files that are either complete or absent, whatever instant the process dies in."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.paths import RemotePath, is_remote

_PARTIAL = re.compile(r"[\w.-]+\.(h5|json)(\.\d+)?\.tmp")


@contextmanager
def atomic_file(path: Path, *, concurrent: bool = False) -> Iterator[BinaryIO]:
    """A file that gets its name when it is whole.

    It is written beside the final name, flushed to the disk and renamed when the context ends without an error. After
    an error nothing is left of it.

    Args:
        path: final name on this machine. The temporary name is `path` + ".tmp"; a leftover of that name is overwritten.
        concurrent: whether another process may write the same file; the process id then comes before ".tmp".

    Raises:
        InputError: the file system refused (full, read-only, too large); names the file and the reason.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp" if concurrent else f"{path.name}.tmp")
    with refused_writes(path):
        file = open(temporary, "wb")  # noqa: SIM115 - closed below, before the rename
        try:
            yield file
            file.flush()
            # Without this the rename may reach the disk before the content does, and a power cut leaves an empty file.
            os.fsync(file.fileno())
            file.close()
            os.replace(temporary, path)
            flush_folder(path.parent)
        except BaseException:
            # On a full disk the partial file would take the room that the user is about to make.
            with suppress(OSError):
                file.close()
            with suppress(OSError):
                temporary.unlink()
            raise


def write_atomically(path: Path, data: bytes, *, concurrent: bool = False) -> None:
    """Writes a whole file, so that a reader sees the old content or the new one; into a store it goes in one upload.

    Args:
        path: final name, here or in a store.
        data: the whole file.
        concurrent: see `atomic_file`.

    Raises:
        InputError: the file system or the store refused; names the file and the reason.
    """
    if is_remote(path):
        _upload(path, data)
        return
    with atomic_file(path, concurrent=concurrent) as file:
        file.write(data)


@contextmanager
def opened_regular_file(path: Path) -> Iterator[BinaryIO]:
    """A regular file, or a link to one, open for reading.

    A folder, a pipe or a device of that name is refused, and never waited for.

    Raises:
        OSError: no such file, or not a regular one.
    """
    # without the flag, opening a pipe waits for a writer
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _refuse_mode(os.fstat(handle).st_mode, path)
        with open(handle, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(handle)


def refuse_irregular_file(path: str | Path) -> None:
    """Refuses a folder, a pipe or a device, for libraries that open a file by its name and would wait for a pipe.

    Raises:
        OSError: no such file, or not a regular one.
    """
    _refuse_mode(os.stat(path).st_mode, path)


def _refuse_mode(mode: int, path: str | Path) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_regular_file(path: Path, max_bytes: int) -> bytes:
    """The whole content of a regular file, or of a link to one.

    Raises:
        OSError: no such file, not a regular one, or one of more than `max_bytes`.
    """
    with opened_regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise OSError(errno.EFBIG, f"{size} bytes, at most {max_bytes} are read", str(path))
        return file.read(size)  # not max_bytes, which python would allocate


@contextmanager
def refused_writes(path: Path | RemotePath) -> Iterator[None]:
    """Turns a write that the system refuses inside the context into one sentence that names `path`.

    Raises:
        InputError: for any OSError.
    """
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


def write_error(path: Path | RemotePath, error: OSError) -> InputError:
    """The sentence for a write that the system refused."""
    return InputError(
        f"cannot write {path} ({error.strerror or error}); make room or choose a folder that can be written, "
        "then run the same command again: what is finished stays"
    )


def make_folder(path: Path) -> None:
    """Makes a folder and its parents; does nothing where it exists.

    Raises:
        InputError: it cannot be made.
    """
    with refused_writes(path):
        path.mkdir(parents=True, exist_ok=True)


def remove_partial_files(cache: Path) -> None:
    """Removes the temporary files of killed writers; call it only while holding the cache's lock."""
    for folder in (cache, cache / "shards"):
        for path in folder.glob("*.tmp"):
            if _PARTIAL.fullmatch(path.name) and (path.is_symlink() or not path.is_dir()):
                path.unlink(missing_ok=True)


def _upload(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    # a store may refuse with anything
    except Exception as error:
        raise InputError(
            f"cannot write {path} ({' '.join(str(error).split())[:200] or type(error).__name__}); check the store and "
            "run the same command again: what is finished stays"
        ) from error


def flush_folder(folder: Path) -> None:
    """Makes the rename itself survive a power cut; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
