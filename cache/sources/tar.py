"""Images in tar files, as webdataset and img2dataset write them."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from fsspec.core import url_to_fs
from PIL import Image

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import refuse_irregular_file
from ulfine_fast.cache.sources.image import UnreadableImage, image_suffixes, load_image
from ulfine_fast.cache.sources.labels import Labels, needed_labels
from ulfine_fast.cache.sources.rows import UNKNOWN, Part, Row
from ulfine_fast.cache.sources.streams import (
    PARALLEL_REQUESTS,
    File,
    fetch,
    files_sha256,
    is_hidden,
    is_local,
    list_files,
    local_path,
    parts_of_files,
    plain_id,
    remove_copy,
    store_errors,
)

SUFFIX = ".tar"
_LABEL_SUFFIXES = (".cls", ".json")
_MAX_LABEL_BYTES = 16 << 20  # of a .cls or .json
_PEEKED_MEMBERS = 64  # members read for the label of a file's first sample
_PEEK_BYTES = 2**16  # requested together for that, of a remote file


class TarSource:
    """Tar files of samples: consecutive files that share their name up to the first dot are one sample.

    A sample's image is its file with an image's suffix; of several, the one with a single suffix (`0.jpg` beside
    `0.depth.png`). Its label is in `.cls` (a class index or name) or in `.json` as `label` or `class`; hidden and other
    files are ignored. A file's split is in its folder or the beginning of its
    name, else it is "train" where its first sample has a label and "unlabeled" where not. Members are never written to
    the disk. A remote file is copied whole to a temporary one while its part is open.

    Attributes:
        kind: "tar".
        where: what the user named: a file, a folder, a pattern with braces or stars, or any URL that fsspec knows.
        class_names: names for the text tower, in the order of the class indices.
        files: the tar files.
        notes: see `Source`.
    """

    kind = "tar"

    def __init__(
        self, where: str, *, class_names_file: Path | None = None, class_names: list[str] | None = None
    ) -> None:
        """Lists the files; no image is opened.

        Args:
            where: see the class.
            class_names_file: one name a line.
            class_names: instead of a file; an empty list leaves all labels unknown.

        Raises:
            InputError: no such files, or no class names.
        """
        self.where = where if not is_local(where) else os.path.abspath(os.path.expanduser(local_path(where)))
        if class_names is None:
            self.class_names, self._labels = needed_labels(class_names_file, "a tar file")
        else:
            self.class_names, self._labels = class_names, Labels(class_names)
        self.files = list_files(self.where, SUFFIX)
        self._by_name = {file.name: file for file in self.files}
        self._copies: dict[int, str] = {}

    @cached_property
    def _parts(self) -> list[Part]:
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            return parts_of_files(self.files, pool.map(self._split_of, self.files))

    @cached_property
    def notes(self) -> list[str]:
        """Which split the files have whose names say none."""
        unnamed = {file.name for file in self.files if file.split is None}
        notes = []
        for split, has in (("train", "has a"), ("unlabeled", "has no")):
            names = [part.name for part in self._parts if part.name in unnamed and part.split == split]
            if names:
                what = f"{names[0]} says" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more say"
                notes.append(f"the name of {what} no split; taken as {split}, since the first sample {has} label")
        return notes

    def plan(self, shard_size: int) -> list[Part]:
        """One part for each tar file, however many images it holds."""
        return self._parts

    def open(self, part: Part) -> list[Row]:
        """The samples of a tar file, by its headers; raises InputError where it is truncated or not a tar file."""
        file = self._by_name[part.name]
        if not is_local(file.url) and part.number not in self._copies:
            self._copies[part.number] = fetch(file)
        path = self._copies.get(part.number, local_path(file.url))
        rows: list[Row] = []
        with _tar_errors(file):
            refuse_irregular_file(path)
        with _tar_errors(file), tarfile.open(path, "r:") as tar, open(path, "rb") as data:
            seen: set[str] = set()
            for members in _samples(_complete_members(tar, data)):
                if any(_is_read(member.name) for member in members):
                    key, _ = _split_name(members[0].name)
                    if key in seen:
                        raise InputError(
                            f"{file.url}: the files of the sample {key!r} are not in a row, or it is there twice; sort "
                            "the tar by name (tar --sort=name), and keep one"
                        )
                    seen.add(key)
                row = self._row(members, file, path, part.split, data)
                if row is not None:
                    rows.append(row)
        return rows

    def close(self, part: Part) -> None:
        """Removes the copy of a remote file."""
        copy = self._copies.pop(part.number, None)
        if copy is not None:
            remove_copy(copy)

    def read(self, row: Row) -> Image.Image:
        """The image of `row` as RGB, straight from its offset in the tar file; raises UnreadableImage."""
        path, offset, size = row.location.split("\0")
        if not path:
            raise UnreadableImage(size)
        with open(path, "rb") as file:
            file.seek(int(offset))
            return load_image(file.read(int(size)))

    def describe(self) -> dict[str, Any]:
        """Kind and location, for the manifest."""
        return {"kind": self.kind, "path": self.where}

    def fingerprint(self) -> str:
        """Hex sha256 over names, splits and sizes of the tar files."""
        return files_sha256(self.files, self._parts)

    def _split_of(self, file: File) -> str:
        """The split of a file's name, else by whether its first sample has a label."""
        if file.split is not None:
            return file.split
        texts: dict[str, bytes] = {}
        with store_errors(file), _tar_errors(file), _open_beginning(file) as tar:
            first = None
            members = (member for member in tar if not _is_hidden(member.name))
            for _, member in zip(range(_PEEKED_MEMBERS), members, strict=False):
                key, suffix = _split_name(member.name)
                first = key if first is None else first
                if key != first:
                    break
                if suffix in _LABEL_SUFFIXES and member.isreg() and member.size <= _MAX_LABEL_BYTES:
                    content = tar.extractfile(member)
                    texts[suffix] = content.read() if content else b""
        return "unlabeled" if self._labels.index(_label_in(texts), file.name) == UNKNOWN else "train"

    def _row(self, members: list[tarfile.TarInfo], file: File, path: str, split: str, data: BinaryIO) -> Row | None:
        """The row of one sample; None for a sample without an image.

        Args:
            members: of the sample.
            file: the tar file.
            path: of it, or of its copy.
            split: of its rows.
            data: the open file.
        """
        image = _choose(members, image_suffixes(), file)
        if image is None:
            return None

        # An image that cannot be read: its row says why.
        name = plain_id(file.stem, _split_name(image.name)[0])
        if name is None or not image.isreg():
            reason = "its name leads out of the tar file" if image.isreg() else "it is a link or a device"
            return Row(f"{file.stem}/member-{image.offset}", UNKNOWN, split, f"\0\0{reason}", 0)

        texts = {}
        for suffix in _LABEL_SUFFIXES:
            member = _choose(members, {suffix}, file)
            if member is not None and member.isreg():
                if member.size > _MAX_LABEL_BYTES:
                    raise InputError(f"{file.url}: {member.name} has {member.size} bytes, too many for a label; fix it")
                data.seek(member.offset_data)
                texts[suffix] = data.read(member.size)
        label = self._labels.index(_label_in(texts), f"{file.name}, {image.name}")
        return Row(name, label, split, f"{path}\0{image.offset_data}\0{image.size}", image.size)


def _split_name(name: str) -> tuple[str, str]:
    """The key of a member's sample, up to the first dot of its file name, and its last suffix in lower case."""
    folder, slash, last = name.rpartition("/")
    stem, dot, rest = last.partition(".")
    # `a.left.png` is an image of the sample `a`, since its last suffix is that of an image.
    return folder + slash + stem, f".{rest.rpartition('.')[2]}".lower() if dot else ""


def _is_hidden(name: str) -> bool:
    """Whether a member, or a folder it is in, is hidden."""
    return any(is_hidden(part) for part in name.split("/"))


def _is_read(name: str) -> bool:
    """Whether a member is an image or a label."""
    suffix = _split_name(name)[1]
    return suffix in _LABEL_SUFFIXES or suffix in image_suffixes()


def _choose(members: Sequence[tarfile.TarInfo], suffixes: Container[str], file: File) -> tarfile.TarInfo | None:
    """The member of a sample with one of these suffixes; None without any.

    Raises:
        InputError: there are several, and not exactly one has a single suffix.
    """
    fitting = [member for member in members if _split_name(member.name)[1] in suffixes]
    if len(fitting) > 1:
        plain = [member for member in fitting if member.name.rpartition("/")[2].count(".") == 1]
        if len(plain) != 1:
            names = ", ".join(member.name for member in fitting)
            raise InputError(
                f"{file.url}: the sample {_split_name(fitting[0].name)[0]!r} holds {names}, and it is not known which "
                "is meant; keep one, or one whose name has a single suffix"
            )
        fitting = plain
    return fitting[0] if fitting else None


def _samples(members: Iterator[tarfile.TarInfo]) -> Iterator[list[tarfile.TarInfo]]:
    """Consecutive members that share a key.

    A name that comes again begins another sample; the key that the two share is refused later. Hidden files, such as
    the `._0.jpg` that a Mac puts beside each `0.jpg`, and folders are left out.
    """
    sample: list[tarfile.TarInfo] = []
    for member in members:
        if member.isdir() or _is_hidden(member.name):
            continue
        if sample:
            other_key = _split_name(member.name)[0] != _split_name(sample[0].name)[0]
            if other_key or member.name in {one.name for one in sample}:
                yield sample
                sample = []
        sample.append(member)
    if sample:
        yield sample


@contextmanager
def _open_beginning(file: File) -> Iterator[tarfile.TarFile]:
    """A tar file of which little is fetched."""
    system, path = url_to_fs(file.url)
    # Some web servers send no part from the middle of a file, but every transfer can be ended early.
    streamed = file.url.startswith("http")
    with (
        system.open(path, "rb", block_size=0 if streamed else _PEEK_BYTES) as raw,
        tarfile.open(fileobj=raw, mode="r|") if streamed else tarfile.open(fileobj=raw, mode="r:") as tar,
    ):
        yield tar


def _complete_members(tar: tarfile.TarFile, data: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Members, after checks that each is there to its end and that the mark of zeros follows the last one.

    `tarfile` takes a truncated or damaged header after the first for the end, and a truncated image for a whole one.
    """
    size = data.seek(0, os.SEEK_END)
    for member in tar:
        if member.offset_data + member.size > size:
            raise tarfile.ReadError(f"it ends inside the member {member.name!r} at byte {member.offset}")
        yield member
    data.seek(tar.offset)
    if data.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"after byte {tar.offset} comes neither another member nor the mark of the end")


def _label_in(texts: dict[str, bytes]) -> Any:
    """The label of a sample as it is written; None where there is none.

    Args:
        texts: contents of its files by suffix, ".cls" and ".json".
    """
    if ".cls" in texts:
        return texts[".cls"]
    try:
        # Not by the reader of our own files: downloaders write NaN, which is no JSON, for numbers that are missing.
        values = json.loads(texts.get(".json", b"{}"))
    # A damaged note of a downloader is no reason to lose the image.
    except (ValueError, RecursionError):
        return None
    return (
        next((values[name] for name in ("label", "class") if name in values), None)
        if isinstance(values, dict)
        else None
    )


@contextmanager
def _tar_errors(file: File) -> Iterator[None]:
    """Turns the errors of a file that is truncated or not a tar file into one sentence."""
    try:
        yield
    except (tarfile.TarError, EOFError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{file.url} cannot be read as a tar file ({reason}); fetch it again or leave it out, and unpack it first "
            "if it is compressed"
        ) from error
