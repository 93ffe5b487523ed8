"""Files that grow piece by piece and get their name when they are whole: arrays and tables larger than memory."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from ulfine_fast.cache.io.files import write_error


class _File:
    """Written beside its final name and renamed on leaving the context, if nothing went wrong inside."""

    def __init__(self, path: Path) -> None:
        self.path, self._temporary = path, path.with_name(path.name + ".tmp")

    def _open(self) -> None:
        try:
            # closed by __exit__
            self._file = open(self._temporary, "wb")  # noqa: SIM115
        except OSError as error:
            raise write_error(self.path, error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
            if kind is None:
                os.replace(self._temporary, self.path)
        except OSError as refused:
            # What ended the work says more than what followed from it.
            if kind is None:
                raise write_error(self.path, refused) from refused
        finally:
            # On a full disk the beginnings would take the room that the user is about to make.
            self._temporary.unlink(missing_ok=True)


class GrowingArray(_File):
    """A .npy file whose rows are appended.

    Args:
        path: final name.
        shape: of the whole array; as many rows must be appended.
        dtype: of its values.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        super().__init__(path)
        self.shape, self.dtype = shape, dtype

    def __enter__(self) -> GrowingArray:
        self._open()
        said = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(self._file, said)
        return self

    def append(self, rows: NDArray[Any]) -> None:
        """Writes the next rows; raises InputError where the disk refuses."""
        try:
            self._file.write(np.ascontiguousarray(rows, dtype=self.dtype).tobytes())
        except OSError as error:
            raise write_error(self.path, error) from error


class GrowingTable(_File):
    """A parquet file whose row groups are appended.

    Args:
        path: final name.
        schema: of its columns.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        super().__init__(path)
        self.schema = schema

    def __enter__(self) -> GrowingTable:
        self._open()
        self._writer = parquet.ParquetWriter(self._file, self.schema)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        refused: BaseException | None = error
        try:
            self._writer.close()
        except OSError as at_end:
            refused = refused or at_end
        super().__exit__(type(refused) if refused else None, refused, trace)
        if refused is not error and isinstance(refused, OSError):
            raise write_error(self.path, refused) from refused

    def append(self, rows: pa.Table) -> None:
        """Writes the next rows as a group; raises InputError where the disk refuses."""
        try:
            self._writer.write_table(rows)
        except OSError as error:
            raise write_error(self.path, error) from error
