"""What a path holds, by the names and first lines of files: a cache, a run, a sweep, images."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ulfine_fast.cache.io.files import read_regular_file

Content = Literal["cache", "run", "runs", "sweep", "export", "images", "image", "table", "nothing", "unknown"]
"""Of a folder or a file; "runs" is a folder of several, as a fit of several seeds writes, "nothing" is no such path."""

IN_WORDS: dict[Content, str] = {
    "cache": "a cache",
    "run": "a run",
    "runs": "a folder of runs",
    "sweep": "the folder of a sweep",
    "export": "an exported classifier",
    "images": "a folder of images",
    "image": "an image",
    "table": "a table",
}

_TABLES = (".csv", ".tsv", ".parquet")
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".avif")
# the files that name a format, and what the formats are of
_FORMATS: dict[str, dict[str, Content]] = {
    "manifest.json": {"ulfine-fast-cache": "cache"},
    "sweep.json": {"ulfine-fast-sweep": "sweep"},
    "config.json": {"ulfine-fast-run": "run", "ulfine-fast-model": "export"},
}
_MAX_BYTES = 64 << 20
_LOOKED_AT = 500  # files and folders of a folder, before it is taken for one without images


def content_of(path: Path) -> Content:
    """What is at a path; reads no more than one file of JSON, and the names of some others."""
    suffix = path.suffix.lower()
    if not os.path.lexists(path):
        return "nothing"
    if not os.path.isdir(path):
        return "image" if suffix in _IMAGES else "table" if suffix in _TABLES else "unknown"
    for name, formats in _FORMATS.items():
        kind = formats.get(str(read_object(path / name).get("format")))
        if kind is not None:
            return kind
    if any(content_of(folder) == "run" for folder in sorted(path.glob("seed-*"))[:1]):
        return "runs"
    names = (name for number, name in enumerate(_files(path)) if number < _LOOKED_AT)
    return "images" if any(name.lower().endswith(_IMAGES) for name in names) else "unknown"


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none."""
    try:
        content = json.loads(read_regular_file(path, _MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def find_folders(root: Path, *, depth: int = 3, most: int = 2_000) -> Iterator[tuple[Path, Content]]:
    """Caches, runs and sweeps at or below a folder, in the order of their names.

    Args:
        root: the folder.
        depth: how many folders deep to look.
        most: how many folders to look at.
    """
    waiting, seen = [(root, 0)], 0
    while waiting and seen < most:
        folder, level = waiting.pop()
        seen += 1
        kind = content_of(folder) if _has_format(folder) else "unknown"
        if kind in ("cache", "run", "sweep"):
            yield folder, kind
        # a cache has no folder of interest in it
        if level < depth and kind in ("sweep", "unknown"):
            waiting += [(inner, level + 1) for inner in sorted(_folders(folder), reverse=True)]


def _has_format(folder: Path) -> bool:
    return any(os.path.isfile(folder / name) for name in _FORMATS)


def _folders(folder: Path) -> list[Path]:
    """Folders in a folder; hidden ones and links are none."""
    try:
        with os.scandir(folder) as entries:
            return [Path(one.path) for one in entries if one.is_dir(follow_symlinks=False) and one.name[0] != "."]
    except OSError:
        return []


def _files(folder: Path) -> Iterator[str]:
    """Names of files at any depth."""
    for _, _, names in os.walk(folder):
        yield from names
