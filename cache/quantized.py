"""Features as whole numbers of one byte: each row is codes times its own scale."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST = 127  # symmetric: -128 stays unused, so that a row and its negative have opposite codes


def quantized(rows: NDArray[Any]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes and scales of rows.

    The largest component of a row is restored exactly, so that quantising restored rows again changes nothing more.

    Args:
        rows: floats (..., D), finite.

    Returns:
        Codes (..., D) in -127..127 and scales (...), max |x| / 127; 0 for a row of zeros.
    """
    wide = rows.astype(np.float32)
    scales = np.abs(wide).max(axis=-1, initial=0.0) / np.float32(LARGEST)  # (...)
    codes = np.rint(wide / np.where(scales > 0, scales, np.float32(1))[..., None])
    # A scale so small that it lost digits would lead past the largest code.
    return codes.clip(-LARGEST, LARGEST).astype(np.int8), scales.astype(np.float32)


def restored(codes: NDArray[np.int8], scales: NDArray[np.float32]) -> NDArray[np.float16]:
    """Rows (..., D) from codes (..., D) and scales (...): each number is code times scale, rounded to float16."""
    rows = np.empty(codes.shape, dtype=np.float16)
    # A damaged scale may be too large for float16; the caller looks for values that are not finite.
    with np.errstate(over="ignore", invalid="ignore"):
        # With `out` numpy works in blocks, and no whole array of float32 is made.
        np.multiply(codes, scales[..., None], out=rows, dtype=np.float32, casting="unsafe")
    return rows
