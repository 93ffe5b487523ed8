"""Arrays and tables larger than memory, written piece by piece; a file gets its name when it is whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike
from pyarrow import parquet

from ulfine_fast.cache.io.files import atomic_file, refused_writes


@contextmanager
def array_writer(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[Callable[[ArrayLike], None]]:
    """Writes a .npy file; gives a function that appends rows.

    Args:
        path: final name.
        shape: of the whole array; as many rows must be appended.
        dtype: of its values.

    Raises:
        InputError: the disk refuses; names the file.
    """
    with atomic_file(path) as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)

        def append(rows: ArrayLike) -> None:
            # refused here, since several writers may be open and the error belongs to this one
            with refused_writes(path):
                file.write(np.ascontiguousarray(rows, dtype=dtype).tobytes())

        yield append


@contextmanager
def table_writer(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """Writes a parquet file; gives a function that appends a table as a row group.

    Args:
        path: final name.
        schema: of its columns.

    Raises:
        InputError: the disk refuses; names the file.
    """
    with atomic_file(path) as file:
        writer = parquet.ParquetWriter(file, schema)

        def append(rows: pa.Table) -> None:
            with refused_writes(path):
                writer.write_table(rows)

        try:
            yield append
        except BaseException:
            # What ended the work says more than what follows from it.
            with suppress(OSError):
                writer.close()
            raise
        writer.close()
