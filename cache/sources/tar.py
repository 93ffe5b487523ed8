"""Images in tar files, as webdataset and img2dataset write them."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from fsspec.core import url_to_fs
from PIL import Image

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.sources.image import UnreadableImage, image_suffixes, load_image
from ulfine_fast.cache.sources.rows import UNKNOWN, Part, Row
from ulfine_fast.cache.sources.streams import (
    ASKED_AT_ONCE,
    File,
    Labels,
    fetch,
    files_sha256,
    forget,
    is_local,
    list_files,
    local_path,
    names_or_refuse,
    plain_id,
    planned,
    reached,
)

SUFFIX = ".tar"
_TO_PEEK = 64  # members looked at for a first sample's label
_PEEK_BYTES = 2**16  # fetched at once for that, of a remote file


class TarSource:
    """Tar files of samples: files in a row that share their name up to the first dot are one sample.

    A sample's image is its first file with an image's suffix; its label stands in `.cls` (a class index or name) or
    in `.json` as `label` or `class`; other files are left aside. A file's split is what its folder or the beginning of
    its name says, else "train" where its first sample has a label and "unlabeled" where not. Members are never written
    to the disk. A remote file is copied whole to a temporary one while it is worked on.

    Attributes:
        kind: "tar".
        where: what the user named: a file, a folder, a pattern with braces or stars, or any URL that fsspec knows.
        class_names: names for the text tower, in the order of the class indices.
        files: the tar files.
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
            InputError: nothing there, or no class names.
        """
        self.where = where if not is_local(where) else os.path.abspath(os.path.expanduser(local_path(where)))
        self.class_names = names_or_refuse(class_names_file, "a tar file") if class_names is None else class_names
        self.files = list_files(self.where, SUFFIX)
        self._by_name = {file.name: file for file in self.files}
        self._labels = Labels(self.class_names)
        self._copies: dict[int, str] = {}

    @cached_property
    def _parts(self) -> list[Part]:
        with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
            return planned(self.files, pool.map(self._split_of, self.files))

    def plan(self, shard_size: int) -> list[Part]:
        """One part for each tar file, however many images it holds."""
        return self._parts

    def open(self, part: Part) -> list[Row]:
        """The samples of a tar file, by its headers; raises InputError where it is cut or no tar file."""
        file = self._by_name[part.name]
        if not is_local(file.url) and part.number not in self._copies:
            self._copies[part.number] = fetch(file)
        path = self._copies.get(part.number, local_path(file.url))
        rows: list[Row] = []
        with _reading(file), tarfile.open(path, "r:") as tar, open(path, "rb") as data:
            for members in _samples(_checked(tar, data)):
                row = self._row(members, file, path, part.split, data)
                if row is not None:
                    rows.append(row)
        return rows

    def close(self, part: Part) -> None:
        """Removes the copy of a remote file."""
        copy = self._copies.pop(part.number, None)
        if copy is not None:
            forget(copy)

    def read(self, row: Row) -> Image.Image:
        """The image of `row` as RGB, straight from its place in the tar file; raises UnreadableImage."""
        path, offset, size = row.location.split("\0")
        if not path:
            raise UnreadableImage(size)
        with open(path, "rb") as file:
            file.seek(int(offset))
            return load_image(file.read(int(size)))

    def describe(self) -> dict[str, Any]:
        """Kind and place, for the manifest."""
        return {"kind": self.kind, "path": self.where}

    def fingerprint(self) -> str:
        """Hex sha256 over names, splits and sizes of the tar files."""
        return files_sha256(self.files, self._parts)

    def _split_of(self, file: File) -> str:
        return file.split or ("train" if self._first_label(file) != UNKNOWN else "unlabeled")

    def _first_label(self, file: File) -> int:
        """Label of the first sample, from the beginning of the file alone."""
        with reached(file), _reading(file), _peeking(file) as tar:
            sample: dict[str, bytes] = {}
            first = None
            for _, member in zip(range(_TO_PEEK), tar, strict=False):
                key, suffix = _key(member.name)
                first = key if first is None else first
                if key != first:
                    break
                if suffix in (".cls", ".json") and member.isreg():
                    content = tar.extractfile(member)
                    sample[suffix] = content.read() if content else b""
        return self._labels.of(_label(sample), file.name)

    def _row(self, members: list[tarfile.TarInfo], file: File, path: str, split: str, data: BinaryIO) -> Row | None:
        """One sample; None without an image, and a row that cannot be read where its name leads elsewhere."""
        images = [member for member in members if _key(member.name)[1] in image_suffixes()]
        if not images:
            return None
        image = images[0]
        name = plain_id(file.stem, _key(image.name)[0])
        if name is None or not image.isreg():
            why = "its name leads out of the tar file" if image.isreg() else "it is a link or a device"
            return Row(f"{file.stem}/member-{image.offset}", UNKNOWN, split, f"\0\0{why}", 0)
        beside = {_key(member.name)[1]: member for member in members if member.isreg()}
        texts = {suffix: _bytes(data, one) for suffix, one in beside.items() if suffix in (".cls", ".json")}
        label = self._labels.of(_label(texts), f"{file.name}, {image.name}")
        return Row(name, label, split, f"{path}\0{image.offset_data}\0{image.size}", image.size)


def _key(name: str) -> tuple[str, str]:
    """A member's sample and its suffix in lower case: the name is cut at the first dot of its last part."""
    head, slash, last = name.rpartition("/")
    stem, dot, rest = last.partition(".")
    # `a.left.png` is an image of the sample `a`: what it is, the last suffix says
    return head + slash + stem, f".{rest.rpartition('.')[2]}".lower() if dot else ""


def _samples(members: Iterator[tarfile.TarInfo]) -> Iterator[list[tarfile.TarInfo]]:
    """Neighbours that share a key; a name that comes again begins another, whose id is then known to be there twice."""
    group: list[tarfile.TarInfo] = []
    for member in members:
        if member.isdir():
            continue
        if group and (_key(member.name)[0] != _key(group[0].name)[0] or member.name in {one.name for one in group}):
            yield group
            group = []
        group.append(member)
    if group:
        yield group


@contextmanager
def _peeking(file: File) -> Iterator[tarfile.TarFile]:
    """A tar file of which little is fetched."""
    system, path = url_to_fs(file.url)
    # Some web servers give no piece from the middle; of all of them one may stop listening.
    streamed = file.url.startswith("http")
    with (
        system.open(path, "rb", block_size=0 if streamed else _PEEK_BYTES) as raw,
        tarfile.open(fileobj=raw, mode="r|") if streamed else tarfile.open(fileobj=raw, mode="r:") as tar,
    ):
        yield tar


def _checked(tar: tarfile.TarFile, data: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Members, the last of which must be there to its end, and the mark of zeros behind it.

    `tarfile` takes a cut or damaged header after the first for the end, and an image without its end for whole.
    """
    size = data.seek(0, os.SEEK_END)
    for member in tar:
        if member.offset_data + member.size > size:
            raise tarfile.ReadError(f"it ends inside the member {member.name!r} at byte {member.offset}")
        yield member
    data.seek(tar.offset)
    if data.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"after byte {tar.offset} comes neither another member nor the mark of the end")


def _bytes(data: BinaryIO, member: tarfile.TarInfo) -> bytes:
    data.seek(member.offset_data)
    return data.read(member.size)


def _label(texts: dict[str, bytes]) -> Any:
    """The label of a sample as it is written; None where there is none."""
    if ".cls" in texts:
        return texts[".cls"]
    try:
        told = json.loads(texts.get(".json", b"{}"))
    except ValueError:  # what downloaders note of an image is no reason to lose it
        return None
    return next((told[name] for name in ("label", "class") if name in told), None) if isinstance(told, dict) else None


@contextmanager
def _reading(file: File) -> Iterator[None]:
    """Whatever a file that is no tar file, or only a part of one, makes of reading it, as one sentence."""
    try:
        yield
    except (tarfile.TarError, EOFError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{file.url} cannot be read as a tar file ({reason}); fetch it again or leave it out, and unpack it first "
            "if it is compressed"
        ) from error
