"""Where images come from; each source gives its rows in a fixed, recorded order.

`folder`, `table` and `torchvision_sets` list all rows in memory; `tar`, `parquet_images` and `huggingface` are streams.
`rows` has the types they share, `streams` the files of streams, `labels` the classes, `image` the decoding, `opening`
finds the source that is meant.

Public names are imported on first use (PEP 562): a cache is read with the types of `rows` alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ulfine_fast.cache.sources.folder import FolderSource, ImageFolder
    from ulfine_fast.cache.sources.huggingface import HuggingFaceSource
    from ulfine_fast.cache.sources.image import UnreadableImage, load_image
    from ulfine_fast.cache.sources.opening import open_source, reopen_source
    from ulfine_fast.cache.sources.parquet_images import ParquetSource
    from ulfine_fast.cache.sources.rows import SPLITS, ListedSource, Part, Row, Source, StreamedSource, fingerprint
    from ulfine_fast.cache.sources.table import ImageTable, TableSource
    from ulfine_fast.cache.sources.tar import TarSource

_HOMES = {
    "SPLITS": "rows",
    "FolderSource": "folder",
    "HuggingFaceSource": "huggingface",
    "ImageFolder": "folder",
    "ImageTable": "table",
    "ListedSource": "rows",
    "ParquetSource": "parquet_images",
    "Part": "rows",
    "Row": "rows",
    "Source": "rows",
    "StreamedSource": "rows",
    "TableSource": "table",
    "TarSource": "tar",
    "UnreadableImage": "image",
    "fingerprint": "rows",
    "load_image": "image",
    "open_source": "opening",
    "reopen_source": "opening",
}

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
