"""Files of streams, on this machine or in a remote store: listing, copying, splits by name, ids of their images."""

from __future__ import annotations

import atexit
import hashlib
import itertools
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from fsspec.core import url_to_fs

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.sources.rows import SPLITS, Part

# Other names of splits, those of data set libraries among them.
_SPLIT_SYNONYMS = {
    "training": "train",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "testing": "test",
    "unlabelled": "unlabeled",
    "unsupervised": "unlabeled",
}
_MAX_NAMES = 1_000_000  # of one pattern
_RANGE = re.compile(r"(?<=[{.])\d+(?=\.\.|})")  # a number at either end of {0..9}
PARALLEL_REQUESTS = 16  # a remote store answers slowly, but many requests together
# Copies of remote files, removed at exit so that none outlives a process that was interrupted.
_copies: set[str] = set()


@dataclass(frozen=True, slots=True)
class File:
    """One file of a stream.

    Attributes:
        name: path below what the user named, with forward slashes.
        url: what fsspec opens.
        bytes: its size.
    """

    name: str
    url: str
    bytes: int

    @property
    def stem(self) -> str:
        """The name without its suffix: the first part of its images' ids."""
        return str(PurePosixPath(self.name).with_suffix(""))

    @property
    def split(self) -> str | None:
        """The split in a folder's name or at the beginning of the file's: `test/000.tar`, `val-0001.parquet`."""
        for part in PurePosixPath(self.name).with_suffix("").parts:
            split = split_named(part.replace("_", "-").split("-")[0].rstrip("0123456789"))
            if split is not None:
                return split
        return None


def is_hidden(name: str) -> bool:
    """Whether a file or folder is one that its system hides, or what a Mac's archive leaves beside the content."""
    return (name.startswith(".") and name not in (".", "..")) or name == "__MACOSX"


def split_named(word: str) -> str | None:
    """The split that a word means ("validation" is val), None for any other word."""
    split = _SPLIT_SYNONYMS.get(word.lower(), word.lower())
    return split if split in SPLITS else None


def list_files(location: str, suffix: str) -> list[File]:
    """The files that a path, a folder, a pattern with braces or stars, or a URL names, sorted by name.

    Args:
        location: such as `images/`, `train-{000..031}.tar`, `s3://bucket/images`.
        suffix: of the files in a folder, with the dot.

    Raises:
        InputError: no such files, or the store refuses.
    """
    from braceexpand import braceexpand  # imported on use: a folder of images needs none of it

    # What exists under the very name that was given is not a pattern.
    try:
        # The library makes all numbers of a range before the first name.
        exists = os.path.exists(location)
        few = exists or all(len(number) < len(str(_MAX_NAMES)) for number in _RANGE.findall(location))
        names = braceexpand(location) if few else []
        locations = [location] if exists else list(itertools.islice(names, _MAX_NAMES))
    except ValueError as error:
        raise InputError(f"the pattern {location} has a brace without its other half") from error
    if not few or len(locations) == _MAX_NAMES:
        raise InputError(f"the pattern {location} names {_MAX_NAMES:,} files or more; name their folder instead")
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        listings = pool.map(lambda one: _list_one(one, suffix), locations)
        files = list({file.url: file for listing in listings for file in listing}.values())
    if not files:
        raise InputError(f"no {suffix} files in {location}")
    # Files of one name in two folders would give images of one id, so their names get more of their paths.
    if len({file.name for file in files}) < len(files):
        files = [File(file.url.split("://")[-1].lstrip("/"), file.url, file.bytes) for file in files]
    return sorted(files, key=lambda file: file.name)


def _list_one(location: str, suffix: str) -> list[File]:
    """The files of one path, pattern or URL without braces."""
    try:
        system, root = url_to_fs(location)
        folder = None
        infos: dict[str, dict[str, Any]]
        # A file first, since every request to a remote store takes its time.
        if root.endswith(suffix) and system.isfile(root):
            infos = {root: system.info(root)}
        elif any(sign in root for sign in "*?[") and not system.exists(root):
            infos = system.glob(root, detail=True)
        elif system.isdir(root):
            folder = root.rstrip("/") + "/"
            infos = {path: info for path, info in system.find(root, detail=True).items() if path.endswith(suffix)}
        else:
            infos = {root: system.info(root)} if system.isfile(root) else {}

        files = []
        for path, info in infos.items():
            name = path.removeprefix(folder) if folder else PurePosixPath(path).name
            if not any(is_hidden(part) for part in PurePosixPath(name).parts):
                if info.get("type") == "other":
                    raise InputError(f"{path} is a pipe or a device, not a file; remove it")
                # Listings of web servers have no sizes.
                size = int(info.get("size") or system.size(path) or 0)
                files.append(File(name, system.unstrip_protocol(path), size))
        return files
    except InputError:
        raise
    # Every store has errors of its own: botocore's, aiohttp's, those of a missing package.
    except Exception as error:
        raise InputError(
            f"{location} cannot be listed ({_reason(error)}); check the address and your credentials"
        ) from error


def is_local(url: str) -> bool:
    """Whether the file is on this machine."""
    return "://" not in url or url.startswith(("file://", "local://"))


def local_path(url: str) -> str:
    """Path of a local file."""
    return url.split("://", 1)[-1]


def fetch(file: File) -> str:
    """Copies a remote file to a temporary one, chunk by chunk; returns its path.

    Raises:
        InputError: the store refuses, or the disk does.
    """
    handle, path = tempfile.mkstemp(prefix="ulfine-fast-", suffix=PurePosixPath(file.name).suffix)
    os.close(handle)
    _copies.add(path)
    try:
        with store_errors(file):
            system, remote = url_to_fs(file.url)
            system.get_file(remote, path)
    except BaseException:
        remove_copy(path)
        raise
    return path


def remove_copy(path: str) -> None:
    """Removes a file that `fetch` made."""
    _copies.discard(path)
    with suppress(FileNotFoundError):
        os.unlink(path)


@atexit.register
def _remove_copies() -> None:
    for path in list(_copies):
        remove_copy(path)


@contextmanager
def store_errors(file: File) -> Iterator[None]:
    """Turns whatever a store raises for a file into one sentence.

    Raises:
        InputError: the store refuses, or the disk does.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{file.url} cannot be fetched ({_reason(error)}); run again: finished shards stay") from error


def _reason(error: Exception) -> str:
    """The beginning of an error's text in one line; its type where it has no text."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def plain_id(stem: str, key: str) -> str | None:
    """`stem/key`, None where the key leads out of its file or holds characters that do not print."""
    path = PurePosixPath(key)
    if not key or path.is_absolute() or ".." in path.parts or not key.isprintable():
        return None
    return f"{stem}/{path}"


def parts_of_files(files: Sequence[File], splits: Iterable[str]) -> list[Part]:
    """One part for each file, split by split in the order of `SPLITS`, by name inside a split."""
    named = [(split, file.name) for split, file in zip(splits, files, strict=True)]
    named.sort(key=lambda pair: (SPLITS.index(pair[0]), pair[1]))
    return [Part(number, split, None, None, name) for number, (split, name) in enumerate(named)]


def files_sha256(files: Sequence[File], parts: Sequence[Part]) -> str:
    """Hex digest over name, split and size of the files, in the order of the parts."""
    sizes = {file.name: file.bytes for file in files}
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.name}\0{part.split}\0{sizes[part.name.partition('#')[0]]}\n".encode())
    return digest.hexdigest()
