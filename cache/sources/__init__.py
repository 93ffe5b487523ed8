"""Where pictures come from: class folders, tables, data sets by name; each gives rows in a fixed, recorded order."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ulfine_fast.cache.errors import InputError
from ulfine_fast.cache.sources.folder import FolderSource, PictureFolder
from ulfine_fast.cache.sources.picture import UnreadablePicture, load_picture
from ulfine_fast.cache.sources.rows import SPLITS, Row, Source, fingerprint
from ulfine_fast.cache.sources.table import SUFFIXES, TableSource

__all__ = [
    "SPLITS",
    "FolderSource",
    "PictureFolder",
    "Row",
    "Source",
    "TableSource",
    "UnreadablePicture",
    "fingerprint",
    "load_picture",
    "open_source",
    "reopen_source",
]


def open_source(where: str | Path, *, class_names_file: Path | None = None) -> Source:
    """Opens what the user named: a folder, a `.csv` or `.parquet` table, or a torchvision data set.

    Args:
        where: a path, or one of cifar10, cifar100, fashion_mnist, food101, stl10, svhn. A folder of that name wins.
        class_names_file: names for the text tower, see `read_class_names`.

    Raises:
        InputError: none of these, or the source is empty or inconsistent.
    """
    path = Path(where).expanduser()
    # os.path says False where pathlib raises, such as for a name that is too long.
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
    """Opens again what a manifest describes, for showing its pictures.

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
    if kind == "pictures" and path:
        return PictureFolder(Path(path))
    if kind == "torchvision":
        # As above, only when asked for.
        from ulfine_fast.cache.sources.torchvision_sets import FASHION_MNIST_FOLDER, TorchvisionSource

        return TorchvisionSource(described["name"], idx_folder=Path(path) if path else FASHION_MNIST_FOLDER)
    raise InputError(f"cannot reopen a source of kind {kind!r}")
