"""Columns of a parquet file, made without pandas.

`pyarrow.array` imports pandas, where it is installed, to ask whether the values are its own, which takes as long as a
short fit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike


def text_column(values: Sequence[str]) -> pa.StringArray:
    """A column of texts, none of them missing."""
    encoded = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, encoded)]).astype(np.int32)
    return pa.StringArray.from_buffers(len(encoded), pa.py_buffer(ends), pa.py_buffer(b"".join(encoded)))


def number_column(values: ArrayLike, dtype: type[np.number]) -> pa.Array:
    """A column of numbers (n,), or of lists of equally many numbers (n, m)."""
    array = np.ascontiguousarray(values, dtype=dtype)
    flat = pa.Array.from_buffers(pa.from_numpy_dtype(dtype), array.size, [None, pa.py_buffer(array)])
    if array.ndim == 1:
        return flat
    ends = number_column(np.arange(len(array) + 1) * array.shape[1], np.int32)
    return pa.ListArray.from_arrays(ends, flat)
