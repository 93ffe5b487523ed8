"""The path of a cache: a folder of this machine, or one behind a URL that fsspec knows, such as s3://bucket/cache."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar, cast

from ulfine_fast.cache.io.errors import InputError

# A path keeps only one of a URL's slashes. A single letter is a drive.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)
_LOCAL = ("file", "local")
# Stores of these kinds have no folders; asked for one they might make a bucket of that name.
_WITHOUT_FOLDERS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "r2")
_Result = TypeVar("_Result")


def to_path(location: str | Path) -> Path:
    """The path of a folder, on this machine or in a store.

    Args:
        location: path or URL. A path made of a URL, which has lost a slash, is understood too.

    Returns:
        A `Path`; for a URL a `RemotePath`, which has all of its methods that a cache is read and written by.

    Raises:
        InputError: no such kind of store, a package for it is missing, or the store refuses: no such bucket, no
            credentials, no way to it.
    """
    if isinstance(location, RemotePath):
        return location
    url = _URL.fullmatch(str(location))
    if url is None:
        return Path(location)
    if url[1] in _LOCAL:
        return Path("/" + url[2])
    return cast(Path, _connect(f"{url[1]}://{url[2].rstrip('/')}"))


def names_another_machine(location: str) -> bool:
    """Whether opening a location may send a request to another machine: a URL, or a chain or pattern with one in it.

    A location that a file names is asked so before it is opened; nothing is sent for the answer.
    """
    url = _URL.match(location)
    return "::" in location or ("{" in location and ":" in location) or (url is not None and url[1] not in _LOCAL)


def is_remote(path: Path) -> bool:
    """Whether a path leads to another machine's store."""
    return isinstance(path, RemotePath)


def _connect(url: str) -> RemotePath:
    """The path, once the store has answered: a wrong address should not cost an hour of encoding."""
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(url)
        remote = RemotePath(system, path)
        bucket = path.strip("/").partition("/")[0]
        if remote.has_no_folders and not system.exists(bucket):
            raise FileNotFoundError(f"there is no bucket {bucket}")
        system.exists(path)
    # every store has errors of its own, and a missing package is an ImportError
    except Exception as error:
        raise InputError(f"{url} cannot be used ({_reason(error)}); check the address and your credentials") from error
    return remote


@dataclass(frozen=True)
class RemotePath:
    """A path in a store, with the methods of `pathlib.Path` that a cache needs; every refusal is an OSError.

    Attributes:
        system: fsspec's file system.
        path: in that file system.
    """

    system: Any
    path: str

    @property
    def has_no_folders(self) -> bool:
        """Whether the store is one of objects alone."""
        protocol = self.system.protocol
        names = [protocol] if isinstance(protocol, str) else protocol
        return any(name in _WITHOUT_FOLDERS for name in names)

    @property
    def name(self) -> str:
        """The last part."""
        return PurePosixPath(self.path).name

    @property
    def stem(self) -> str:
        """The last part without its suffix."""
        return PurePosixPath(self.path).stem

    @property
    def suffix(self) -> str:
        """The last part's suffix, with the dot."""
        return PurePosixPath(self.path).suffix

    @property
    def parent(self) -> RemotePath:
        """The folder it is in."""
        return RemotePath(self.system, self.path.rpartition("/")[0])

    def __truediv__(self, other: str | os.PathLike[str]) -> RemotePath:
        return RemotePath(self.system, f"{self.path}/{other}")

    def __str__(self) -> str:
        return str(self.system.unstrip_protocol(self.path))

    def __lt__(self, other: RemotePath) -> bool:
        return self.path < other.path

    def with_name(self, name: str) -> RemotePath:
        """Another file of the same folder."""
        return self.parent / name

    def with_suffix(self, suffix: str) -> RemotePath:
        """The same name with another suffix."""
        return self.with_name(self.stem + suffix)

    def absolute(self) -> RemotePath:
        """Itself: a URL always is."""
        return self

    def resolve(self) -> RemotePath:
        """Itself: a store follows no links."""
        return self

    def expanduser(self) -> RemotePath:
        """Itself."""
        return self

    def exists(self) -> bool:
        """Whether anything has this path."""
        return bool(self._call(lambda: self.system.exists(self.path)))

    def is_file(self) -> bool:
        """Whether it is a file."""
        return bool(self._call(lambda: self.system.isfile(self.path)))

    def is_dir(self) -> bool:
        """Whether it is a folder, or the beginning of other names."""
        return bool(self._call(lambda: self.system.isdir(self.path)))

    def iterdir(self) -> Iterator[RemotePath]:
        """What the folder holds, new files of other processes included."""
        listed = self._call(lambda: self.system.ls(self.path, detail=False, refresh=True))
        names = [name.rstrip("/") for name in listed]
        return iter([RemotePath(self.system, name) for name in names if name != self.path])

    def rglob(self, pattern: str) -> Iterator[RemotePath]:
        """All files below; the pattern must be "*"."""
        assert pattern == "*"
        return iter([RemotePath(self.system, name) for name in self._call(lambda: self.system.find(self.path))])

    def stat(self) -> os.stat_result:
        """Only its `st_size` is meaningful."""
        size = int(self._call(lambda: self.system.size(self.path)) or 0)
        return os.stat_result((0, 0, 0, 0, 0, 0, size, 0, 0, 0))

    def open(self, mode: str = "rb") -> BinaryIO:
        """The file for reading; only the bytes that are read are transferred."""
        return cast(BinaryIO, self._call(lambda: self.system.open(self.path, mode)))

    def read_bytes(self) -> bytes:
        """The whole file."""
        return cast(bytes, self._call(lambda: self.system.cat_file(self.path)))

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole file as text."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> int:
        """Uploads the whole file."""
        self._make_parent()
        self._call(lambda: self.system.pipe_file(self.path, data))
        return len(data)

    def create(self, data: bytes) -> None:
        """Uploads a file that must not exist yet.

        Raises:
            FileExistsError: it exists.
        """
        self._make_parent()
        try:
            self._call(lambda: self.system.pipe_file(self.path, data, mode="create"))
        # a store that cannot promise it: another process may write between the check and the upload
        except (TypeError, NotImplementedError, ValueError):
            if self.exists():
                raise FileExistsError(str(self)) from None
            self.write_bytes(data)

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes the file."""
        try:
            self._call(lambda: self.system.rm_file(self.path))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Makes a folder where the store has folders."""
        if not self.has_no_folders:
            self._call(lambda: self.system.makedirs(self.path, exist_ok=exist_ok))

    def _make_parent(self) -> None:
        self.parent.mkdir(parents=True, exist_ok=True)

    def _call(self, request: Callable[[], _Result]) -> _Result:
        """Runs a request to the store; what the store raises becomes an OSError."""
        try:
            return request()
        except (OSError, TypeError, NotImplementedError, ValueError):
            raise
        # stores have errors of their own: botocore's, aiohttp's, google's
        except Exception as error:
            raise OSError(f"{self}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
