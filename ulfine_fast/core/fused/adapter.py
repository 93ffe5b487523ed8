"""The residual adapter without autograd: forward into buffers, gradients added to the velocity.

The specification is :func:`ulfine_fast.core.heads.apply_adapter`. Inputs are cached features that need no gradient, so
the normalised rows are never stored. With m and r a row's mean and inverse deviation, a and b the norm's scale and
shift,

    LN(x) W = r (x (a W)) - m r sum_d (a W)_d + b W,

and the gradients of a, b and W all follow from Q = sum_rows (x - m) r dh (D, rank) and the sums of dh.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ulfine_fast.core.fused.arithmetic import FLOAT32, Arithmetic
from ulfine_fast.core.fused.buffers import Buffers
from ulfine_fast.ops import native

_LN_EPS = 1e-5


class AdapterRows(NamedTuple):
    """What the adapter reads and writes for n rows of each trial.

    Attributes:
        features: unit rows (T, n, D), read.
        hidden: relu(...) (T, n, r).
        mean: m (T, n, 1).
        shifted: m r (T, n, 1).
        inverse: r (T, n, 1).
        adapted: x + s W_up hidden (T, n, D), not normalised.
    """

    features: Tensor
    hidden: Tensor
    mean: Tensor
    shifted: Tensor
    inverse: Tensor
    adapted: Tensor


class FusedAdapter:
    """Adapters of T trials.

    Args:
        tensors: "adapter.scale" and "adapter.shift" (T, D), "adapter.down" (T, D, r), "adapter.up" (T, r, D).
        velocity: tensors of the same names and shapes, to which :meth:`backward` adds the gradients.
        strength: s (T,).
        buffers: where activations go.
        arithmetic: how it computes.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        velocity: dict[str, Tensor],
        strength: Tensor,
        buffers: Buffers,
        *,
        arithmetic: Arithmetic = FLOAT32,
    ) -> None:
        self.arithmetic = arithmetic
        self.compiled = arithmetic.compiled
        self.velocity = velocity
        self.buffers = buffers
        self.strength = strength.view(-1, 1, 1)
        self.down = tensors["adapter.down"]
        self.up = tensors["adapter.up"]
        self.scale = tensors["adapter.scale"].unsqueeze(2)
        self.shift = tensors["adapter.shift"].unsqueeze(2)
        trials, dim, rank = self.down.shape
        self.first = buffers.lend("first", trials, dim, rank)
        self.second = buffers.lend("second", trials, rank, dim)
        # unit rows: their mean square is 1 / D
        self.mean_square = torch.full_like(self.strength, 1.0 / dim + _LN_EPS)
        self.sums = buffers.lend("sums", trials, 1, rank)
        self.offset = buffers.lend("offset", trials, 1, rank)

    def prepare(self) -> None:
        """Fold the norm's scale and s into the products; once a step, before :meth:`forward`."""
        if self.compiled:
            self.second.copy_(self.up)
            native.adapter_prepare(self.down, self.scale, self.shift, self.first, self.sums, self.offset)
            return
        torch.mul(self.down, self.scale, out=self.first)
        torch.mul(self.up, self.strength, out=self.second)
        self.sums = self.first.sum(1, keepdim=True)  # (T, 1, r)
        self.offset = self.shift.transpose(1, 2) @ self.down  # (T, 1, r)

    def rows(self, features: Tensor, adapted: Tensor) -> AdapterRows:
        """Memory for :meth:`forward` and :meth:`backward` of rows (T, n, D)."""
        trials, rows, _ = features.shape
        lend = self.buffers.lend
        return AdapterRows(
            features=features,
            hidden=lend("hidden", trials, rows, self.up.shape[1]),
            mean=lend("mean", trials, rows, 1),
            shifted=lend("shifted", trials, rows, 1),
            inverse=lend("spread", trials, rows, 1),
            adapted=adapted,
        )

    def forward(self, rows: AdapterRows) -> None:
        """The rows x + s W_up relu(W_down LN(x)), before they are normalised.

        Compiled passes find the rows' means in place, and the features in `adapted` too.
        """
        if self.compiled:
            self.arithmetic.multiply(rows.features, self.first, out=rows.hidden)
            mean_square = 1.0 / self.down.shape[1] + _LN_EPS
            native.adapter_hidden_(
                rows.hidden,
                rows.mean,
                rows.inverse,
                rows.shifted,
                self.sums,
                self.offset,
                self.strength,
                mean_square,
            )
            self.arithmetic.add(rows.hidden, self.second, out=rows.adapted)
            return
        torch.mean(rows.features, -1, keepdim=True, out=rows.mean)
        torch.addcmul(self.mean_square, rows.mean, rows.mean, value=-1.0, out=rows.inverse).rsqrt_()
        torch.mul(rows.mean, rows.inverse, out=rows.shifted)
        self.arithmetic.multiply(rows.features, self.first, out=rows.hidden).mul_(rows.inverse).add_(self.offset)
        rows.hidden.addcmul_(rows.shifted, self.sums, value=-1.0).relu_()
        self._residual(rows)

    def _residual(self, rows: AdapterRows) -> None:
        """Write x + s W_up hidden."""
        if self.arithmetic.bfloat16:
            # the features themselves are not rounded
            rows.adapted.copy_(rows.features)
            self.arithmetic.add(rows.hidden, self.second, out=rows.adapted)
        else:
            torch.baddbmm(rows.features, rows.hidden, self.second, out=rows.adapted)

    def backward(self, rows: AdapterRows, adapted_gradient: Tensor, momentum: float = 1.0) -> None:
        """Move the velocities of the four tensors to momentum * velocity + gradient, from dL / d adapted (T, n, D)."""
        velocity, lend = self.velocity, self.buffers.lend
        if self.compiled:
            self._backward(rows, adapted_gradient, momentum)
            return
        inner = lend("inner", *rows.hidden.shape)
        quotient = lend("quotient", *self.down.shape)
        self.arithmetic.multiply(adapted_gradient, self.second.transpose(1, 2), out=inner)
        # one kernel for relu's gradient, where a comparison and a product are three
        torch.ops.aten.threshold_backward.grad_input(inner, rows.hidden, 0.0, grad_input=inner)  # (T, n, r)
        scaled = torch.mul(rows.hidden, self.strength, out=lend("scaled", *rows.hidden.shape))
        self.arithmetic.add(scaled.transpose(1, 2), adapted_gradient, out=velocity["adapter.up"])
        sums = inner.sum(1, keepdim=True)  # (T, 1, r)
        drift = rows.shifted.transpose(1, 2) @ inner  # (T, 1, r)
        self.arithmetic.multiply(rows.features.transpose(1, 2), inner.mul_(rows.inverse), out=quotient).sub_(drift)  # Q
        velocity["adapter.down"].addcmul_(quotient, self.scale).addcmul_(self.shift, sums)
        velocity["adapter.scale"].add_(quotient.mul_(self.down).sum(2))
        velocity["adapter.shift"].unsqueeze(2).baddbmm_(self.down, sums.transpose(1, 2))

    def _backward(self, rows: AdapterRows, adapted_gradient: Tensor, momentum: float) -> None:
        """:meth:`backward` in compiled passes; `hidden` has the factor s."""
        velocity, lend, multiply = self.velocity, self.buffers.lend, self.arithmetic.multiply
        trials, _, rank = self.down.shape
        sums, drift = lend("inner_sums", trials, 1, rank), lend("drift", trials, 1, rank)
        inner = multiply(adapted_gradient, self.second.transpose(1, 2), out=lend("inner", *rows.hidden.shape))
        native.adapter_hidden_gradient_(inner, rows.hidden, rows.inverse, rows.shifted, self.strength, sums, drift)
        self.arithmetic.add(rows.hidden.transpose(1, 2), adapted_gradient, out=velocity["adapter.up"], kept=momentum)
        quotient = multiply(rows.features.transpose(1, 2), inner, out=lend("quotient", *self.down.shape))
        learned = [velocity[f"adapter.{name}"] for name in ("down", "scale", "shift")]
        native.adapter_gradients(quotient, drift, sums, (self.down, self.scale, self.shift), learned, momentum)
