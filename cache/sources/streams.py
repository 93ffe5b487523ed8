"""What streams of pictures share: files here or far away, splits by their names, labels as classes, plain ids."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from braceexpand import braceexpand
from fsspec.core import url_to_fs

from ulfine_fast.cache.errors import InputError
from ulfine_fast.cache.prompts import read_class_names_alone
from ulfine_fast.cache.sources.rows import SPLITS, UNKNOWN, Part

# Names people give to splits, those of data set libraries among them.
_SAME_AS = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}
_SAME_AS |= {"unlabelled": "unlabeled", "unsupervised": "unlabeled"}


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
        """The name without its suffix: the first part of its pictures' ids."""
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
        InputError: no label at all.
    """
    texts = {str(label) for label in labels if label is not None and label != "" and label == label}
    numbers = {int(float(text)) for text in texts if _is_whole(text)}
    if len(numbers) == len(texts) and max(numbers, default=-1) >= 0:
        return [str(number) for number in range(max(numbers) + 1)]
    if not texts or len(numbers) == len(texts):
        raise InputError(f"{where} has no label in any row; give class names with --class-names FILE")
    return sorted(texts)


def list_files(where: str, suffix: str) -> list[File]:
    """The files that a path, a folder, a pattern with braces or stars, or a URL names, sorted by name.

    Args:
        where: such as `pictures/`, `train-{000..031}.tar`, `s3://bucket/pictures`.
        suffix: of the files in a folder, with the dot.

    Raises:
        InputError: nothing there, or the store refuses.
    """
    found: dict[str, File] = {}
    for one in braceexpand(where):
        for file in _listed(one, suffix):
            found[file.url] = file
    if not found:
        raise InputError(f"no {suffix} files in {where}")
    files = list(found.values())
    names = [file.name for file in files]
    # Files of one name in two folders would give pictures of one id, so they are told apart by more of their path.
    if len(set(names)) < len(names):
        files = [File(file.url.split("://")[-1].lstrip("/"), file.url, file.bytes) for file in files]
    return sorted(files, key=lambda file: file.name)


def _listed(where: str, suffix: str) -> Iterable[File]:
    try:
        system, root = url_to_fs(where)
        if any(sign in root for sign in "*?["):
            paths = system.glob(root)
        elif system.isdir(root):
            paths = [path for path in system.find(root) if path.endswith(suffix)]
        else:
            paths = [root] if system.isfile(root) else []
        below = root.rstrip("/") + "/" if system.isdir(root) else None
        for path in paths:
            name = path.removeprefix(below) if below else PurePosixPath(path).name
            if not PurePosixPath(name).name.startswith("."):
                yield File(name, system.unstrip_protocol(path), int(system.size(path)))
    # every store has errors of its own: botocore's, aiohttp's, those of a missing package
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{where} cannot be listed ({reason}); check the address and your credentials") from error


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
    try:
        system, remote = url_to_fs(file.url)
        system.get_file(remote, path)
    except BaseException as error:
        os.unlink(path)
        if not isinstance(error, Exception):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{file.url} cannot be fetched ({reason}); run again: finished shards stay") from error
    return path


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


def planned(files: Sequence[File], split_of: Any) -> list[Part]:
    """One part for each file, split by split in the order of `SPLITS`, by name inside a split."""
    named = [(split_of(file), file.name) for file in files]
    ordered = sorted(named, key=lambda pair: (SPLITS.index(pair[0]), pair[1]))
    return [Part(number, split, None, None, name) for number, (split, name) in enumerate(ordered)]


def files_sha256(files: Sequence[File], parts: Sequence[Part]) -> str:
    """Hex digest over name, split and size of the files, in the order of the parts."""
    sizes = {file.name: file.bytes for file in files}
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.name}\0{part.split}\0{sizes[part.name.partition('#')[0]]}\n".encode())
    return digest.hexdigest()
