"""Cosine heads without autograd: all heads of a trial in one product, without storing normalised vectors.

The specification is :func:`ulfine_fast.core.heads.cosine_logits` on normalised rows. With n_b = 1 / ||y_b|| and
w_k = 1 / ||v_k||, logits are z = sigma n_b w_k (y_b . v_k), and with G = dz sigma n_b w_k

    dv_k = sum_b G_bk y_b - w_k^2 (sum_b dz_bk z_bk) v_k,    dy_b = sum_k G_bk v_k - n_b^2 (sum_k dz_bk z_bk) y_b.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ulfine_fast.core.fused.arithmetic import FLOAT32, Arithmetic
from ulfine_fast.core.fused.buffers import Buffers
from ulfine_fast.ops import kernels, native

# the square root of the specification's epsilon, under which a row counts as zero
_SHORTEST = 1e-6


class HeadRows(NamedTuple):
    """What the heads read and write for n rows of each trial.

    Attributes:
        adapted: rows of any length (T, n, D), read.
        inverse: 1 / length (T, n, 1).
        row_scale: sigma / length (T, n, 1).
        logits: (T, n, M).
    """

    adapted: Tensor
    inverse: Tensor
    row_scale: Tensor
    logits: Tensor


class FusedHeads:
    """Class vectors of T trials, M = heads x classes of them.

    Args:
        weights: (T, M, D).
        velocity: the same shape, to which :meth:`backward` adds the gradients.
        scale: sigma (T,).
        learns: 1 for vectors that get a gradient, 0 for others, (T, M); None for all.
        buffers: where activations go.
        arithmetic: how it computes.
    """

    def __init__(
        self,
        weights: Tensor,
        velocity: Tensor,
        scale: Tensor,
        learns: Tensor | None,
        buffers: Buffers,
        *,
        arithmetic: Arithmetic = FLOAT32,
    ) -> None:
        self.arithmetic = arithmetic
        self.compiled = arithmetic.compiled
        self.weights = weights
        self.velocity = velocity
        self.scale = scale.view(-1, 1, 1)
        self.learns = learns
        self.buffers = buffers
        # batched products of bfloat16 need memory that is contiguous over all trials
        self.dense = weights
        if arithmetic.compiled and arithmetic.bfloat16:
            self.dense = buffers.lend("dense", *weights.shape)
        self.transposed = self.dense.transpose(1, 2)
        self.inverse = buffers.lend("vector_inverse", weights.shape[0], weights.shape[1])
        self.column_scale = self.inverse.unsqueeze(1)  # (T, 1, M)
        # with compiled passes: what backward leaves to the update, the velocity's multiples of the vectors
        self.factors = torch.zeros_like(self.inverse)

    def prepare(self) -> None:
        """Measure the class vectors; once a step, before :meth:`forward`."""
        if self.compiled and self.arithmetic.bfloat16:
            native.copy_and_measure(self.weights, self.dense, self.inverse)
            return
        if self.compiled:
            native.inverse_lengths(self.weights, self.inverse)
            return
        inverse_lengths(self.weights, out=self.inverse)

    def rows(self, adapted: Tensor) -> HeadRows:
        """Memory for :meth:`forward` and :meth:`backward` of rows (T, n, D)."""
        trials, rows, _ = adapted.shape
        lend = self.buffers.lend
        return HeadRows(
            adapted=adapted,
            inverse=lend("inverse", trials, rows, 1),
            row_scale=lend("row_scale", trials, rows, 1),
            logits=lend("logits", trials, rows, self.weights.shape[1]),
        )

    def forward(self, rows: HeadRows) -> None:
        """Logits of the rows."""
        if self.compiled:
            native.inverse_lengths(rows.adapted, rows.inverse)
        else:
            inverse_lengths(rows.adapted, out=rows.inverse.squeeze(2))
        torch.mul(rows.inverse, self.scale, out=rows.row_scale)
        self.arithmetic.multiply(rows.adapted, self.transposed, out=rows.logits)
        if self.compiled:
            native.scale_logits_(rows.logits, rows.row_scale, self.column_scale)
            return
        rows.logits.mul_(rows.row_scale).mul_(self.column_scale)

    def backward(
        self, rows: HeadRows, logit_gradient: Tensor, rows_gradient: Tensor | None, momentum: float, decay: Tensor
    ) -> None:
        """Move the velocity to momentum * velocity + gradient + decay * weights; the gradient of the rows.

        Args:
            rows: of :meth:`forward`.
            logit_gradient: dL / dz (T, n, M); overwritten.
            rows_gradient: written, (T, n, D); None where nothing below the heads learns.
            momentum: of all trials.
            decay: weight decay (T, 1).
        """
        if self.compiled:
            self._backward(rows, logit_gradient, rows_gradient, momentum, decay)
            return
        shared = torch.mul(logit_gradient, rows.logits, out=self.buffers.lend("shared", *rows.logits.shape))
        along = shared.sum(1).mul_(self.inverse).mul_(self.inverse)  # (T, M)
        logit_gradient.mul_(rows.row_scale).mul_(self.column_scale)
        if rows_gradient is not None:
            self.arithmetic.multiply(logit_gradient, self.weights, out=rows_gradient)
            along_rows = shared.sum(2, keepdim=True).mul_(rows.inverse).mul_(rows.inverse)  # (T, n, 1)
            rows_gradient.addcmul_(rows.adapted, along_rows, value=-1.0)
        if self.learns is not None:
            logit_gradient.mul_(self.learns.unsqueeze(1))
            along.mul_(self.learns)
        self.arithmetic.add(logit_gradient.transpose(1, 2), rows.adapted, out=self.velocity, kept=momentum)
        # weight decay and the part of the gradient along a vector are multiples of it: one product for both
        self.velocity.addcmul_(self.weights, (decay - along).unsqueeze(2))

    def _backward(
        self, rows: HeadRows, logit_gradient: Tensor, rows_gradient: Tensor | None, momentum: float, decay: Tensor
    ) -> None:
        """:meth:`backward` in compiled passes, but for the multiples of the vectors, which are left in `factors`."""
        trials, count, vectors = logit_gradient.shape
        along = self.buffers.lend("along", trials, vectors)
        along_rows = self.buffers.lend("along_rows", trials, count, 1)
        native.logit_gradient_(logit_gradient, rows.logits, rows.row_scale, self.column_scale, along, along_rows)
        if rows_gradient is not None:
            self.arithmetic.multiply(logit_gradient, self.dense, out=rows_gradient)
            native.subtract_rows_(rows_gradient, rows.adapted, along_rows, rows.inverse)
        if self.learns is not None:
            logit_gradient.mul_(self.learns.unsqueeze(1))
            along.mul_(self.learns)
        self.arithmetic.add(logit_gradient.transpose(1, 2), rows.adapted, out=self.velocity, kept=momentum)
        self.factors = torch.addcmul(decay, along, self.inverse.square(), value=-1.0)  # (T, M)


def inverse_lengths(rows: Tensor, out: Tensor | None = None) -> Tensor:
    """1 / ||x|| of rows (..., D), shape (...); a zero row gives a finite number, so that it stays zero."""
    return torch.linalg.vector_norm(rows, dim=-1, out=out).clamp_(min=_SHORTEST).reciprocal_()


def add_orthogonality_gradient(
    vectors: Tensor,
    inverse: Tensor,
    weight: Tensor,
    velocity: Tensor,
    buffers: Buffers,
    *,
    arithmetic: Arithmetic = FLOAT32,
) -> Tensor:
    """Add the gradient of weight * || U U^T - I ||_F^2 / K^2, U the vectors at unit length.

    The specification is :func:`ulfine_fast.ops.prototypes.orthogonality`.

    Args:
        vectors: C (T, K, D).
        inverse: 1 / length (T, K).
        weight: (T,).
        velocity: added to, (T, K, D).
        buffers: where the Gram matrix goes.
        arithmetic: how it computes.

    Returns:
        The penalties without their weight (T,).
    """
    trials, classes, _ = vectors.shape
    if arithmetic.compiled or kernels.usable(vectors):
        gram = buffers.lend("gram", trials, classes, classes)
        arithmetic.multiply(vectors, vectors.transpose(1, 2), out=gram)
        passes = native if arithmetic.compiled else kernels
        penalty: Tensor = passes.orthogonality_gradient_(gram, inverse, weight)
        arithmetic.add(gram, vectors, out=velocity)
        return penalty
    scales = inverse.unsqueeze(2) * inverse.unsqueeze(1)  # (T, K, K)
    gram = buffers.lend("gram", trials, classes, classes)
    gradient = buffers.lend("gram_gradient", trials, classes, classes)
    arithmetic.multiply(vectors, vectors.transpose(1, 2), out=gram).mul_(scales)
    gradient.copy_(gram).diagonal(dim1=1, dim2=2).sub_(1.0)
    penalty = torch.linalg.vector_norm(gradient, dim=(1, 2)).square_().div_(classes**2)
    # the gradient by the Gram matrix, without the part along the vectors, which only changes their length
    gradient.mul_((4.0 / classes**2 * weight).view(-1, 1, 1))
    along = gram.mul_(gradient).sum(2)  # (T, K)
    gradient.mul_(scales).diagonal(dim1=1, dim2=2).addcmul_(along, inverse.square(), value=-1.0)
    arithmetic.add(gradient, vectors, out=velocity)
    return penalty
