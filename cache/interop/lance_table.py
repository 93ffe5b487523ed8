"""Tables in the Lance format, which LanceDB searches; needs the extra `lance`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from ulfine_fast.cache.io.errors import InputError, one_line

LANCE = "features.lance"
"""The data set in the folder of an export; LanceDB calls its table "features"."""


def is_lance(folder: Path) -> bool:
    """Whether a folder is a Lance data set."""
    return (folder / "_versions").is_dir()


def open_lance(folder: Path) -> Any:
    """The newest version of a data set, a `lance.LanceDataset`.

    Raises:
        InputError: the package is missing, or the folder is damaged.
    """
    lance = require_lance()
    try:
        return lance.dataset(str(folder))
    # the library raises ValueError, OSError and errors of its own
    except Exception as error:
        raise InputError(f"{folder} cannot be read as Lance: {one_line(error)}") from error


def write_lance(folder: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Writes tables as one data set, in place of one that is there.

    Raises:
        InputError: the package is missing, or the disk refuses.
    """
    lance = require_lance()

    def batches() -> Iterator[pa.RecordBatch]:
        for table in tables:
            yield from table.to_batches()

    reader = pa.RecordBatchReader.from_batches(schema, batches())
    try:
        lance.write_dataset(reader, str(folder), schema=schema, mode="overwrite")
    except OSError as error:
        raise InputError(
            f"cannot write {folder} ({one_line(error)}); make room, then run the same command again"
        ) from error


def require_lance() -> Any:
    """The package.

    Raises:
        InputError: it is missing.
    """
    try:
        import lance
    except ImportError as error:
        raise InputError('Lance needs a package: pip install "ulfine-fast[lance]"') from error
    return lance
