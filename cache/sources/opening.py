"""A source from what the user named, or from what a manifest describes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.names import did_you_mean
from ulfine_fast.cache.sources.folder import FolderSource, ImageFolder, holds_labelled_images
from ulfine_fast.cache.sources.huggingface import PREFIX as HF
from ulfine_fast.cache.sources.huggingface import HuggingFaceSource, is_saved
from ulfine_fast.cache.sources.parquet_images import SUFFIX as PARQUET
from ulfine_fast.cache.sources.parquet_images import ParquetSource, holds_images
from ulfine_fast.cache.sources.rows import Source
from ulfine_fast.cache.sources.table import SUFFIXES, TableSource
from ulfine_fast.cache.sources.tar import SUFFIX as TAR
from ulfine_fast.cache.sources.tar import TarSource

# Archives that cannot be read in place.
_PACKED = (".gz", ".tgz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".rar")


def open_source(where: str | Path, *, class_names_file: Path | None = None) -> Source:
    """Opens what the user named: a folder, a table, tar files, or a data set by name.

    Args:
        where: a folder of images or of tar files, a `.csv`, `.tsv` or `.parquet` table, a `.tar` file, pattern or URL,
            or one of cifar10, cifar100, fashion_mnist, food101, stl10, svhn. A folder of that name wins.
        class_names_file: names for the text tower, see `read_class_names`.

    Raises:
        InputError: none of these, or the source is empty or inconsistent.
    """
    name, path = str(where), Path(where).expanduser()
    if not name.strip():  # an unset variable of a script, of which Path would make the current folder
        raise InputError(
            "the source is an empty text; name a folder (. for this one), a table, a tar file or a data set"
        )
    # os.path says False where pathlib raises, such as for a name that is too long.
    left_over = is_saved(path) or _is_parquet_with_images(name) or _is_tar(name)
    if left_over and os.path.isdir(path) and holds_labelled_images(path):
        # Files that were left in class folders do not turn these into something else; the source names them.
        return FolderSource(path, class_names_file=class_names_file)
    # hf://datasets/... is the address of files, like s3://...
    if (name.startswith(HF) and not name.startswith(f"{HF}//")) or is_saved(path):
        return HuggingFaceSource(name.removeprefix(HF), class_names_file=class_names_file)
    if _is_parquet_with_images(name):
        return ParquetSource(name, class_names_file=class_names_file)
    if _is_tar(name):
        return TarSource(name, class_names_file=class_names_file)
    if os.path.isdir(path):
        return FolderSource(path, class_names_file=class_names_file)
    if path.suffix.lower() in SUFFIXES:
        return TableSource(path, class_names_file=class_names_file)
    if os.path.isfile(path) and path.suffix.lower() in _PACKED:
        raise InputError(f"{where} is a compressed archive; unpack it and name the folder or the .tar file in it")
    # Takes seconds to import, and most runs do not need it.
    from ulfine_fast.cache.sources.torchvision_sets import NAMES, TorchvisionSource

    if name in NAMES:
        return TorchvisionSource(name, class_names_file=class_names_file)
    # A name close to a known one is a typo; otherwise the user most likely meant a path.
    hint = did_you_mean(name, NAMES, f"data sets by name are {', '.join(NAMES)}")
    raise InputError(f"no such folder or table: {where}{hint}")


def reopen_source(description: Mapping[str, Any]) -> Source:
    """Opens again the source that a manifest describes, for showing its images.

    Args:
        description: the manifest's `source`.

    Raises:
        InputError: it is gone, or of an unknown kind.
    """
    kind, path = description.get("kind"), description.get("path")
    if kind == "folder" and path:
        return FolderSource(Path(path))
    if kind == "table" and path:
        return TableSource(Path(path))
    # The labels are in the cache already, and without class names these need no list of them.
    if kind == "tar" and path:
        return TarSource(path, class_names=[])
    if kind == "parquet" and path:
        return ParquetSource(path, class_names=[])
    if kind == "huggingface" and path:
        return HuggingFaceSource(path, class_names=[])
    if kind == "pictures" and path:
        return ImageFolder(Path(path))
    if kind == "torchvision":
        # Imported late, as in `open_source`.
        from ulfine_fast.cache.sources.torchvision_sets import FASHION_MNIST_FOLDER, TorchvisionSource

        return TorchvisionSource(description["name"], idx_folder=Path(path) if path else FASHION_MNIST_FOLDER)
    if kind == "import":
        raise InputError("the features were imported, and a cache of imported features names no images")
    raise InputError(f"cannot reopen a source of kind {kind!r}")


def _is_parquet_with_images(where: str) -> bool:
    """Whether parquet files with images in them are named: a file, a pattern, a folder or a URL."""
    if "://" in where or any(sign in where for sign in "{*"):
        return where.endswith(PARQUET)
    path = Path(where).expanduser()
    if os.path.isdir(path):
        first = next(iter(sorted([*path.glob(f"*{PARQUET}"), *path.glob(f"*/*{PARQUET}")])), None)
        # A downloader leaves tables beside its tar files.
        return first is not None and not any(first.parent.glob(f"*{TAR}")) and holds_images(first)
    return where.endswith(PARQUET) and os.path.isfile(path) and holds_images(path)


def _is_tar(where: str) -> bool:
    """Whether tar files are named: by suffix, by a URL of a folder, or by a folder that holds some."""
    if where.endswith(TAR) or "://" in where:
        return True
    folder = Path(where).expanduser()
    return os.path.isdir(folder) and (any(folder.glob(f"*{TAR}")) or any(folder.glob(f"*/*{TAR}")))
