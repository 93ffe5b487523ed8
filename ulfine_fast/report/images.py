"""Images behind a run's row ids: from the source of its cache, or from a location that the user names."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from PIL import Image

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.home import cache_home
from ulfine_fast.cache.io.json_files import check_schema, read_json
from ulfine_fast.cache.io.paths import names_another_machine, to_path
from ulfine_fast.cache.io.tables import read_table
from ulfine_fast.runs.files import RunFiles

if TYPE_CHECKING:
    from ulfine_fast.cache.sources import Row, Source, StreamedSource

UNREADABLE = (OSError, ValueError, KeyError, Image.DecompressionBombError)
"""What a reader of images may raise for one that is missing or damaged."""

# what torchvision leaves of each data set in its folder
_DOWNLOADED = {
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "fashion_mnist": "FashionMNIST/raw",
    "food101": "food-101",
    "stl10": "stl10_binary",
    "svhn": "train_32x32.mat",
}
_PART_ROWS = 1024  # rows opened together to find an image of a stream
_FEW_PIXELS = 64  # longer side up to which an image is kept lossless


def find_images(
    runs: Sequence[RunFiles], location: str | None = None
) -> tuple[Callable[[str], Image.Image] | None, str]:
    """Open the images of the runs.

    Nothing is fetched that a file names: a manifest of another person could make this machine send requests. Images of
    a cache or a source on another machine are shown only where the user names their location.

    Args:
        runs: the runs; the manifests of their caches say where the images came from.
        location: a folder, table, URL or data set name to use instead.

    Returns:
        A function from row id to image, which raises KeyError for an unknown id and OSError for a damaged image, or
        None when no source can be opened; and the reason why not, or "".

    Raises:
        InputError: `location` is given and cannot be opened.
    """
    # loaded on use: a page without images needs no source
    from ulfine_fast.cache.sources import open_source, reopen_source

    if location is not None:
        return _image_reader([("", open_source(location))]), ""
    sources, reasons = [], []
    for cache in dict.fromkeys(run.cache for run in runs):
        try:
            for prefix, description in _source_parts(_source_description(cache)):
                _refuse_remote(description)
                sources.append((prefix, reopen_source(description)))
        except (InputError, OSError) as error:
            reasons.append(str(error))
        # a manifest of another program: its description may hold anything
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reasons.append(f"the manifest of {cache} describes no source of images ({error})")
    return (_image_reader(sources), "") if sources else (None, reasons[0])


def read_attributes(path: Path) -> dict[str, str]:
    """Image id -> group, from a table with the columns id and group.

    Raises:
        InputError: not such a table (see `read_table`), one without rows, or two groups of one image.
    """
    table = read_table(path, ["id", "group"], fill=True)
    if not len(table):
        raise InputError(f"{path} has no line; give each image a line with its id and group")
    groups: dict[str, str] = {}
    for row, (name, group) in enumerate(zip(table.texts("id", strip=False), table.texts("group"), strict=True)):
        if groups.setdefault(name, group) != group:
            raise InputError(f"{table.where(row)} puts {name!r} into {group!r}, not {groups[name]!r}; keep one line")
    return groups


def encode_preview(image: Image.Image, side: int, quality: int) -> tuple[bytes, str]:
    """A small copy of an image as a file, and its type, "png" where it has few pixels, else "jpeg".

    Args:
        image: of any size and mode.
        side: most pixels of the longer side.
        quality: of the JPEG, 1..95.
    """
    small = image.convert("RGB")
    small.thumbnail((side, side))
    # pasted on a blank image: the file's metadata (location, camera, profile) must not follow it into a page
    clean = Image.new("RGB", small.size)
    clean.paste(small)
    buffer = io.BytesIO()
    kind = "png" if max(clean.size) <= _FEW_PIXELS else "jpeg"
    clean.save(buffer, kind, optimize=True, quality=quality)  # PNG ignores the quality
    return buffer.getvalue(), kind


class _SourcePart(msgspec.Struct):
    """What a manifest says about a source: its kind, and those that a merge or an append added."""

    kind: str
    caches: list[dict[str, Any]] = []
    appended: list[dict[str, Any]] = []


class _MergedCache(msgspec.Struct):
    """A cache that was merged, as the manifest of the merged one describes it."""

    source: dict[str, Any]
    prefix: str = ""


class _Manifest(msgspec.Struct):
    """manifest.json of a cache, as far as the images are concerned."""

    source: dict[str, Any]


def _source_description(cache: str | None) -> dict[str, Any]:
    """What a cache's manifest says about the source of its images."""
    if cache is None:
        raise InputError("the run was made from features in memory, without a cache")
    if names_another_machine(cache):
        raise InputError(f"the cache {cache} is on another machine, from which a report fetches nothing")
    file = to_path(cache) / "manifest.json"
    fix = "it is truncated or not a cache's manifest"
    return read_json(file, _Manifest, fix=fix, missing=f"the cache {cache} is gone").source


def _source_parts(description: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The prefix of the row ids and the description of each source: of every merged cache, of every append."""
    name, fix = "the manifest", "it is not a cache's manifest"
    known = check_schema(description, _SourcePart, name=name, fix=fix)
    for cache in known.caches:
        merged = check_schema(cache, _MergedCache, name=name, fix=fix)
        yield from _source_parts(merged.source, prefix + merged.prefix)
    if known.kind != "merged":
        yield prefix, description
    for appended in known.appended:
        yield prefix, appended


def _refuse_remote(description: dict[str, Any]) -> None:
    """Refuse a source that is opened by a request to another machine.

    Raises:
        InputError: names it.
    """
    kind, path = description.get("kind"), description.get("path")
    named = path if isinstance(path, str) else ""
    # a data set by name is loaded from a hub, unless it is a folder here
    if kind == "huggingface" and not os.path.isdir(named):
        raise InputError(f"the images are those of {named!r} on a hub, from which a report fetches nothing")
    if names_another_machine(named):
        raise InputError(f"the images are at {named}, from which a report fetches nothing")
    if kind == "torchvision":
        name = str(description.get("name"))
        folders = [cache_home() / "datasets" / _DOWNLOADED.get(name, name)]
        if name == "fashion_mnist":
            folders.append(Path(named or "/usr/share/datasets/fashion-mnist"))
        if not any(folder.exists() for folder in folders):
            raise InputError(f"the images are those of {name}, not on this machine, and a report fetches nothing")


def _image_reader(sources: Sequence[tuple[str, Source]]) -> Callable[[str], Image.Image]:
    from ulfine_fast.cache.pipeline.plan import is_listed
    from ulfine_fast.cache.sources import UnreadableImage

    listed = {prefix + row.id: (source, row) for prefix, source in sources if is_listed(source) for row in source.rows}
    streams = [_StreamIndex(source, prefix) for prefix, source in sources if not is_listed(source)]

    def read(row_id: str) -> Image.Image:
        """The image of one row id."""
        match: tuple[Source, Row] | None = listed.get(row_id)
        for stream in streams:
            match = match or stream.find(row_id)
        if match is None:
            raise KeyError(row_id)
        source, row = match
        try:
            return source.read(row)
        except UnreadableImage as error:
            raise OSError(str(error)) from error

    return read


class _StreamIndex:
    """Rows of a stream by id; a part is opened when the first of its images is needed, and stays open."""

    def __init__(self, source: StreamedSource, prefix: str) -> None:
        self.source, self.prefix = source, prefix
        # the size of a part only decides how long files are split, not which images are in them
        self.parts = source.plan(_PART_ROWS)
        self.rows: dict[int, dict[str, Row]] = {}

    def find(self, row_id: str) -> tuple[Source, Row] | None:
        """The source and the row; None where no part has it."""
        if not row_id.startswith(self.prefix):
            return None
        row_id = row_id.removeprefix(self.prefix)
        for part in self.parts:
            # the ids of a part start with the name of its file
            if not row_id.startswith(part.name.partition("#")[0].rpartition(".")[0] or part.split):
                continue
            if part.number not in self.rows:
                self.rows[part.number] = {row.id: row for row in self.source.open(part)}
            row = self.rows[part.number].get(row_id)
            if row is not None:
                return self.source, row
        return None
