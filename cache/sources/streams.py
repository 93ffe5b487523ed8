"""What streams of images share: files here or far away, splits by their names, labels as classes, plain ids."""

from __future__ import annotations

import atexit
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from braceexpand import braceexpand
from fsspec.core import url_to_fs

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.models.prompts import read_class_names_alone
from ulfine_fast.cache.sources.rows import SPLITS, UNKNOWN, Part

# Names people give to splits, those of data set libraries among them.
_SAME_AS = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}
_SAME_AS |= {"unlabelled": "unlabeled", "unsupervised": "unlabeled"}
# More classes than any prompt list has; labels beyond are numbers of something else, such as of the image.
_MOST_CLASSES = 1_000_000
ASKED_AT_ONCE = 16  # questions to a store: a far one answers slowly, but many
# Copies of remote files, so that none outlives a process that was interrupted.
_COPIES: set[str] = set()


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
        """The split that a folder or the beginning of the name says: `test/000.tar`, `val-0001.parquet`; else None."""
        for part in PurePosixPath(self.name).with_suffix("").parts:
            found = split_named(part.replace("_", "-").split("-")[0].rstrip("0123456789"))
            if found is not None:
                return found
        return None


def split_named(word: str) -> str | None:
    """The split that a word means ("validation" is val), None for any other word."""
    found = _SAME_AS.get(word.lower(), word.lower())
    return found if found in SPLITS else None


def classes_of(labels: Iterable[Any], where: str) -> list[str]:
    """Class names from the labels that occur: names sorted, or all numbers up to the largest.

    Raises:
        InputError: no label at all, or numbers too large for classes.
    """
    texts = {str(label) for label in labels if label is not None and label != "" and label == label}
    numbers = {int(float(text)) for text in texts if _is_whole(text)}
    if len(numbers) == len(texts) and max(numbers, default=-1) >= _MOST_CLASSES:
        raise InputError(f"{where} has the label {max(numbers)}, too large for a class; give names with --class-names")
    if len(numbers) == len(texts) and max(numbers, default=-1) >= 0:
        return [str(number) for number in range(max(numbers) + 1)]
    if not texts or len(numbers) == len(texts):
        raise InputError(f"{where} has no label in any row; give class names with --class-names FILE")
    return sorted(texts)


def list_files(where: str, suffix: str) -> list[File]:
    """The files that a path, a folder, a pattern with braces or stars, or a URL names, sorted by name.

    Args:
        where: such as `images/`, `train-{000..031}.tar`, `s3://bucket/images`.
        suffix: of the files in a folder, with the dot.

    Raises:
        InputError: nothing there, or the store refuses.
    """
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        listed = pool.map(lambda one: _listed(one, suffix), _expanded(where))
        files = list({file.url: file for some in listed for file in some}.values())
    if not files:
        raise InputError(f"no {suffix} files in {where}")
    names = [file.name for file in files]
    # Files of one name in two folders would give images of one id, so they are told apart by more of their path.
    if len(set(names)) < len(names):
        files = [File(file.url.split("://")[-1].lstrip("/"), file.url, file.bytes) for file in files]
    return sorted(files, key=lambda file: file.name)


def _expanded(where: str) -> list[str]:
    """A pattern with braces as all that it stands for; what is there under its very name is no pattern."""
    if os.path.exists(where):
        return [where]
    try:
        return list(braceexpand(where))
    except ValueError as error:
        raise InputError(f"the pattern {where} has a brace without its other half") from error


def _listed(where: str, suffix: str) -> list[File]:
    try:
        system, root = url_to_fs(where)
        below, found = _found(system, root, suffix)
        names = [path.removeprefix(below) if below else PurePosixPath(path).name for path in found]
        return [
            # listings of web servers say no sizes
            File(name, system.unstrip_protocol(path), int(told.get("size") or system.size(path) or 0))
            for name, (path, told) in zip(names, found.items(), strict=True)
            if not PurePosixPath(name).name.startswith(".")
        ]
    # every store has errors of its own: botocore's, aiohttp's, those of a missing package
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{where} cannot be listed ({reason}); check the address and your credentials") from error


def _found(system: Any, root: str, suffix: str) -> tuple[str | None, dict[str, dict[str, Any]]]:
    """The folder that names are told from, if any, and what a store says of each file."""
    # First what most are, since every question to a far store takes its time.
    if root.endswith(suffix) and system.isfile(root):
        return None, {root: system.info(root)}
    if any(sign in root for sign in "*?[") and not system.exists(root):
        return None, system.glob(root, detail=True)
    if system.isdir(root):
        files = system.find(root, detail=True).items()
        return root.rstrip("/") + "/", {path: told for path, told in files if path.endswith(suffix)}
    return None, {root: system.info(root)} if system.isfile(root) else {}


def is_local(url: str) -> bool:
    """Whether the file lies on this machine."""
    return "://" not in url or url.startswith(("file://", "local://"))


def local_path(url: str) -> str:
    """Path of a local file."""
    return url.split("://", 1)[-1]


def fetch(file: File) -> str:
    """Copies a remote file to a temporary one, piece by piece; returns its path.

    Raises:
        InputError: the store refuses, or the disk does.
    """
    handle, path = tempfile.mkstemp(prefix="ulfine-fast-", suffix=PurePosixPath(file.name).suffix)
    os.close(handle)
    _COPIES.add(path)
    try:
        with reached(file):
            system, remote = url_to_fs(file.url)
            system.get_file(remote, path)
    except BaseException:
        forget(path)
        raise
    return path


def forget(copy: str) -> None:
    """Removes a file that `fetch` made."""
    _COPIES.discard(copy)
    with suppress(FileNotFoundError):
        os.unlink(copy)


@atexit.register
def _forget_all() -> None:
    for copy in list(_COPIES):
        forget(copy)


@contextmanager
def reached(file: File) -> Iterator[None]:
    """Whatever a store makes of being asked for a file, as one sentence.

    Raises:
        InputError: the store refuses, or the disk does.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{file.url} cannot be fetched ({reason}); run again: finished shards stay") from error


class Labels:
    """Labels as they are written in samples, to class indices.

    Args:
        names: (K,) class names in order; without any, every label is unknown.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._index = {name: place for place, name in enumerate(names)}

    def of(self, value: Any, where: str) -> int:
        """The class index of a number or a name; -1 for nothing.

        Raises:
            InputError: no such class; says where it stands.
        """
        if value is None or value == "" or value != value or not self.names:  # NaN is the one that differs from itself
            return UNKNOWN
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        text = str(value).strip()
        if text in self._index:
            return self._index[text]
        number = int(float(text)) if _is_whole(text) else None
        if number is None or not -1 <= number < len(self.names):
            raise InputError(
                f"{where}: the label {text!r} is no class; there are {len(self.names)} in the list of names"
            )
        return number


def _is_whole(text: str) -> bool:
    try:
        return float(text).is_integer()
    except ValueError:
        return False


def names_or_refuse(class_names_file: Any, kind: str) -> list[str]:
    """Class names from the user's file, one a line, in the order of the class indices.

    Raises:
        InputError: no file was given; a stream cannot be searched for its classes.
    """
    if class_names_file is None:
        raise InputError(f"{kind} does not say its classes; give them with --class-names FILE, one name a line")
    return read_class_names_alone(class_names_file)


def plain_id(stem: str, key: str) -> str | None:
    """`stem/key`, None where the key leads elsewhere or holds characters that do not print."""
    path = PurePosixPath(key)
    if not key or path.is_absolute() or ".." in path.parts or not key.isprintable():
        return None
    return f"{stem}/{path}"


def planned(files: Sequence[File], splits: Iterable[str]) -> list[Part]:
    """One part for each file, split by split in the order of `SPLITS`, by name inside a split."""
    named = [(split, file.name) for split, file in zip(splits, files, strict=True)]
    ordered = sorted(named, key=lambda pair: (SPLITS.index(pair[0]), pair[1]))
    return [Part(number, split, None, None, name) for number, (split, name) in enumerate(ordered)]


def files_sha256(files: Sequence[File], parts: Sequence[Part]) -> str:
    """Hex digest over name, split and size of the files, in the order of the parts."""
    sizes = {file.name: file.bytes for file in files}
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.name}\0{part.split}\0{sizes[part.name.partition('#')[0]]}\n".encode())
    return digest.hexdigest()
