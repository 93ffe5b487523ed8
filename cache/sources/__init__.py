"""Where images come from: class folders, tables, data sets by name; each gives rows in a fixed, recorded order."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.sources.folder import FolderSource, ImageFolder
from ulfine_fast.cache.sources.huggingface import PREFIX as HF
from ulfine_fast.cache.sources.huggingface import HuggingFaceSource, is_saved
from ulfine_fast.cache.sources.image import UnreadableImage, load_image
from ulfine_fast.cache.sources.parquet_images import SUFFIX as PARQUET
from ulfine_fast.cache.sources.parquet_images import ParquetSource, holds_images
from ulfine_fast.cache.sources.rows import SPLITS, ListedSource, Part, Row, Source, StreamedSource, fingerprint
from ulfine_fast.cache.sources.table import SUFFIXES, ImageTable, TableSource
from ulfine_fast.cache.sources.tar import SUFFIX as TAR
from ulfine_fast.cache.sources.tar import TarSource

__all__ = [
    "SPLITS",
    "FolderSource",
    "HuggingFaceSource",
    "ImageFolder",
    "ImageTable",
    "ListedSource",
    "ParquetSource",
    "Part",
    "Row",
    "Source",
    "StreamedSource",
    "TableSource",
    "TarSource",
    "UnreadableImage",
    "fingerprint",
    "load_image",
    "open_source",
    "reopen_source",
]


def open_source(where: str | Path, *, class_names_file: Path | None = None) -> Source:
    """Opens what the user named: a folder, a table, tar files, or a data set by name.

    Args:
        where: a folder of images or of tar files, a `.csv` or `.parquet` table, a `.tar` file, pattern or URL, or one
            of cifar10, cifar100, fashion_mnist, food101, stl10, svhn. A folder of that name wins.
        class_names_file: names for the text tower, see `read_class_names`.

    Raises:
        InputError: none of these, or the source is empty or inconsistent.
    """
    path = Path(where).expanduser()
    # os.path says False where pathlib raises, such as for a name that is too long.
    if str(where).startswith(HF) or is_saved(path):
        return HuggingFaceSource(str(where).removeprefix(HF), class_names_file=class_names_file)
    if _holds_parquet(str(where)):
        return ParquetSource(str(where), class_names_file=class_names_file)
    if _is_tars(str(where)):
        return TarSource(str(where), class_names_file=class_names_file)
    if os.path.isdir(path):
        return FolderSource(path, class_names_file=class_names_file)
    if path.suffix.lower() in SUFFIXES:
        return TableSource(path, class_names_file=class_names_file)
    # Takes seconds to import, and most runs do not need it.
    from ulfine_fast.cache.sources.torchvision_sets import NAMES, TorchvisionSource

    if str(where) in NAMES:
        return TorchvisionSource(str(where), class_names_file=class_names_file)
    # A name close to a known one is a typo; otherwise the user most likely meant a path.
    near = difflib.get_close_matches(str(where), NAMES, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; data sets by name are {', '.join(NAMES)}"
    raise InputError(f"no such folder or table: {where}{hint}")


def reopen_source(described: Mapping[str, Any]) -> Source:
    """Opens again what a manifest describes, for showing its images.

    Args:
        described: the manifest's `source`.

    Raises:
        InputError: it is gone, or of an unknown kind.
    """
    kind, path = described.get("kind"), described.get("path")
    if kind == "folder" and path:
        return FolderSource(Path(path))
    if kind == "table" and path:
        return TableSource(Path(path))
    # labels are in the cache already, and without names they need no list
    if kind == "tar" and path:
        return TarSource(path, class_names=[])
    if kind == "parquet" and path:
        return ParquetSource(path, class_names=[])
    if kind == "huggingface" and path:
        return HuggingFaceSource(path, class_names=[])
    if kind == "pictures" and path:
        return ImageFolder(Path(path))
    if kind == "torchvision":
        # As above, only when asked for.
        from ulfine_fast.cache.sources.torchvision_sets import FASHION_MNIST_FOLDER, TorchvisionSource

        return TorchvisionSource(described["name"], idx_folder=Path(path) if path else FASHION_MNIST_FOLDER)
    raise InputError(f"cannot reopen a source of kind {kind!r}")


def _holds_parquet(where: str) -> bool:
    """Whether parquet files with images in them are named: a file, a pattern, a folder or a URL."""
    if "://" in where or any(sign in where for sign in "{*"):
        return where.endswith(PARQUET)
    path = Path(where).expanduser()
    if os.path.isdir(path):
        first = next(iter(sorted([*path.glob(f"*{PARQUET}"), *path.glob(f"*/*{PARQUET}")])), None)
        # a downloader's tables lie beside its tar files
        return first is not None and not any(first.parent.glob(f"*{TAR}")) and holds_images(first)
    return where.endswith(PARQUET) and os.path.isfile(path) and holds_images(path)


def _is_tars(where: str) -> bool:
    """Whether tar files are named: by suffix, by a URL of a folder, or by a folder that holds some."""
    if where.endswith(TAR) or "://" in where:
        return True
    folder = Path(where).expanduser()
    return os.path.isdir(folder) and (any(folder.glob(f"*{TAR}")) or any(folder.glob(f"*/*{TAR}")))
