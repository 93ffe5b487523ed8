"""How a fused step computes: where its passes come from, and how its matrix products round."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.cache.io.device import float32_products


@dataclass(frozen=True)
class Arithmetic:
    """Products of T trials, and which passes surround them.

    Attributes:
        compiled: whether passes are those of :mod:`ulfine_fast.ops.native`, for float32 on a processor.
        bfloat16: whether inputs of products are rounded to bfloat16. Sums are in float32, and so is all else.
    """

    compiled: bool = False
    bfloat16: bool = False

    def multiply(self, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        """Write left right, of (T, n, D) and (T, D, m), to `out`; returns it."""
        # what `out` held is not read at a factor of zero, be it not finite
        self.add(left, right, out, kept=0.0)
        return out

    def add(self, left: Tensor, right: Tensor, out: Tensor, kept: float = 1.0) -> None:
        """Write kept out + left right to `out`."""
        if not self.bfloat16 or (_rounds(left.device) and _are_dense(left, right, out)):
            out.baddbmm_(left, right, beta=kept)
        elif _rounds(left.device):
            # one trial's matrices are contiguous; batched products of bfloat16 copy what is not so over all trials
            for a, b, c in zip(left.unbind(0), right.unbind(0), out.unbind(0), strict=True):
                c.addmm_(a, b, beta=kept)
        else:
            out.baddbmm_(_rounded(left), _rounded(right), beta=kept)

    @contextmanager
    def applied(self, device: torch.device) -> Iterator[None]:
        """Let the device round inputs of products, if asked for; a setting of the whole process on a processor."""
        if not self.bfloat16:
            yield
        elif device.type == "cuda":
            # what is rounded to bfloat16 is exact in TF32
            with float32_products(device, tf32=True):
                yield
        else:
            with _rounding_products():
                yield


FLOAT32 = Arithmetic()
"""Plain PyTorch and float32 products."""


def _are_dense(*matrices: Tensor) -> bool:
    """Whether matrices (T, n, m), or their transposes, are contiguous over all trials."""
    return all(matrix.is_contiguous() or matrix.transpose(1, 2).is_contiguous() for matrix in matrices)


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.bfloat16().to(tensor.dtype)


@contextmanager
def _rounding_products() -> Iterator[None]:
    """Products of float32 may round their inputs to bfloat16 on a processor that has such products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@functools.cache
def _rounds(device: torch.device) -> bool:
    """Whether the device itself rounds under :func:`_rounding_products`: PyTorch leaves it to the processor."""
    if device.type != "cpu":
        return False
    # 1 + 2^-12 is 1 in bfloat16
    matrix = torch.full((64, 64), 1.0 + 2.0**-12)
    with _rounding_products():
        product = matrix @ torch.eye(64)
    return bool((product == 1.0).all())
