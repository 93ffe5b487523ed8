"""One optimiser step of T trials without autograd: the same arithmetic as a method's losses and their gradients.

It covers methods with an optional residual adapter below one or two cosine heads, trained on labelled rows and on
pseudo-labelled strong views. A method overrides the hooks in which it differs.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ulfine_fast.core.batches import BatchSource, Draws
from ulfine_fast.core.fused.adapter import AdapterRows, FusedAdapter
from ulfine_fast.core.fused.arithmetic import FLOAT32, Arithmetic
from ulfine_fast.core.fused.buffers import Buffers, unflatten
from ulfine_fast.core.fused.cuda_graph import Captured
from ulfine_fast.core.fused.heads import FusedHeads, HeadRows
from ulfine_fast.core.fused.loss import cross_entropy_gradient_
from ulfine_fast.core.types import State, Trials
from ulfine_fast.ops import native
from ulfine_fast.ops.losses import PseudoLabels, pseudo_labels
from ulfine_fast.ops.philox import Purpose
from ulfine_fast.ops.sgd import decay_velocity_

# multiply-adds of a block's strong views, from which on skipping rows pays for finding out which
_WORTH_SKIPPING = 20e6
# and the fraction of strong views that trained in the last step, in the trial with most of them, up to which it pays
_FEW = 0.75

_Fields = TypeVar("_Fields", AdapterRows, HeadRows)


class Flat(NamedTuple):
    """Parameters and velocities of T trials, each one buffer (T, P) that the tensors of the state are views of."""

    parameters: Tensor
    velocity: Tensor


class Rows(NamedTuple):
    """Memory for n rows of each trial; without an adapter the heads read the features themselves."""

    features: Tensor
    adapter: AdapterRows | None
    heads: HeadRows


class FusedStep:
    """Forward, backward and update of T trials.

    Rows are in memory as weak views, labelled rows, strong views: the first two and the last two are each one slice.

    Args:
        trials: their options.
        state: its parameters are views of `flat`.
        flat: parameters and velocities.
        batches: where rows are gathered from.
        buffers: activations; shared with other steps of as many trials that run before or after.
        arithmetic: how it computes.

    Attributes:
        heads: names of the parameters that are linear heads.
    """

    heads: tuple[str, ...] = ("linear",)

    def __init__(
        self,
        trials: Trials,
        state: State,
        flat: Flat,
        batches: BatchSource,
        buffers: Buffers,
        *,
        arithmetic: Arithmetic = FLOAT32,
    ) -> None:
        self.trials = trials
        self.arithmetic = arithmetic
        self.compiled = arithmetic.compiled
        self.state = state
        self.flat = flat
        self.batches = batches
        self.buffers = buffers
        self.classes = trials.log_prior.shape[-1]
        self.weak = batches.unlabeled_size
        self.labeled = batches.config.batch_labeled

        # the trained parts
        values = trials.values
        self.velocity = unflatten(flat.velocity, state.parameters)
        self.class_heads = FusedHeads(
            weights=self._class_vectors(flat.parameters),
            velocity=self._class_vectors(flat.velocity),
            scale=values["scale"],
            learns=self.learning(),
            buffers=buffers,
            arithmetic=arithmetic,
        )
        self.adapter: FusedAdapter | None = None
        if "adapter.up" in state.parameters:
            self.adapter = FusedAdapter(
                state.parameters, self.velocity, values["adapter_scale"], buffers, arithmetic=arithmetic
            )

        # a momentum that all trials share is applied inside a matrix product
        momentum = values["momentum"]
        self.momentum = float(momentum[0]) if bool((momentum == momentum[0]).all()) else None
        self.decay = values["weight_decay"].unsqueeze(1)
        self.skips = self._skips()
        self.kept_fraction = 0.0
        self.tally = flat.parameters.new_zeros(len(flat.parameters), 3)  # (T, 3)
        self.recorded = Captured()
        self._allocate()

    # -- what differs between methods

    def labeled_adjustment(self) -> Tensor:
        """Added to the labelled rows' logits (T, H, K); called once."""
        return (self.trials.values["tau"].view(-1, 1) * self.trials.log_prior).unsqueeze(1)

    def unlabeled_adjustment(self) -> Tensor:
        """Added to the strong views' logits (T, H, K)."""
        return torch.zeros_like(self.trials.log_prior).unsqueeze(1)

    def pseudo_labels(self, logits: Tensor) -> PseudoLabels:
        """Pseudo-labels from the weak views' logits (T, U, H, K)."""
        values = self.trials.values
        return pseudo_labels(logits[:, :, 0], values["threshold"], values["sharpen"])

    def learning(self) -> Tensor | None:
        """Which class vectors get a gradient, 1 or 0 (T, H K); None for all of them; called once."""
        return None

    def regularize(self) -> Tensor | None:
        """Add the gradient of the regularizer, if any, to `velocity`; returns its value (T,)."""
        return None

    def after_step(self, labeled: HeadRows, labels: Tensor, pseudo: PseudoLabels | None) -> None:
        """Move the memory; the labelled rows (T, B, ...) are as the step saw them."""

    # -- the step

    def advance(self, step: int, draws: Draws, rate: Tensor, ramp: Tensor) -> None:
        """One step, see :meth:`run`; on a GPU recorded and replayed."""
        inputs = [*draws, rate, ramp]
        if self.batches.any_noise:
            # a recording reads the number from the device
            inputs.append(torch.full((1,), step, device=rate.device))
        self.recorded(self._run_of_tensors, *inputs)

    def _run_of_tensors(self, *inputs: Tensor) -> None:
        """:meth:`run` of the tensors that :meth:`advance` makes; only noise depends on the step's number."""
        count = len(Draws._fields)
        rate, ramp, *step = inputs[count:]
        self.run(step[0] if step else 0, Draws(*inputs[:count]), rate, ramp)

    @torch.inference_mode()
    def run(self, step: int | Tensor, draws: Draws, rate: Tensor, ramp: Tensor) -> None:
        """One step; its losses are added to `tally` (T, 3): labelled, unlabelled, regularizer.

        Args:
            step: its number, for the noise; an int, or a tensor (1,).
            draws: rows of this step's mini-batches.
            rate: learning rates (T,).
            ramp: factor of the unlabelled losses (T, 1).
        """
        labeled = self.labeled
        self.class_heads.prepare()
        if self.adapter is not None:
            self.adapter.prepare()

        # weak views and labelled rows; pseudo-labels and the strong views that train
        self.row_labels[:, :labeled] = draws.labels
        pseudo, count = self._forward_all(step, draws)
        end = labeled + count
        if pseudo is not None:
            torch.mul(self.row_weights[:, labeled:end], ramp, out=self.gradient_weights[:, labeled:end])

        # cross-entropies and their gradients by the logits
        rows = self._rows(self.weak, self.weak + end)
        logits = self.by_head[:, self.weak :]
        gradient = self.buffers.lend("logit_gradient", *rows.heads.logits.shape)
        by_head = gradient.unflatten(2, (len(self.heads), -1))  # (T, B + count, H, K)
        if self.compiled:
            log_probabilities = self._cross_entropies(logits, by_head)  # (T, n, H)
        else:
            torch.add(logits[:, :labeled], self.adjustment, out=by_head[:, :labeled])
            if count:
                torch.add(logits[:, labeled:end], self.unlabeled_adjustment().unsqueeze(1), out=by_head[:, labeled:])
            log_probabilities = cross_entropy_gradient_(
                by_head, self.row_labels[:, :end], self.gradient_weights[:, :end]
            )
        losses = log_probabilities.sum(2).mul_(self.row_weights[:, :end])
        self.tally[:, 0] -= losses[:, :labeled].sum(1)
        self.tally[:, 1] -= losses[:, labeled:].sum(1)

        # the velocity: momentum and weight decay of all that the heads do not decay themselves, then gradients
        values, first = self.trials.values, self.class_heads.weights[0].numel()
        velocity, parameters = self.flat.velocity, self.flat.parameters
        if not self.compiled:
            decay_velocity_(velocity[:, first:], parameters[:, first:], values["momentum"], values["weight_decay"])
        if self.momentum is None:
            moved = velocity if self.compiled else velocity[:, :first]
            moved.mul_(values["momentum"].unsqueeze(1))
        momentum = 1.0 if self.momentum is None else self.momentum
        adapted_gradient = None
        if self.adapter is not None:
            adapted_gradient = self.buffers.lend("adapted_gradient", *rows.features.shape)
        self.class_heads.backward(
            rows=rows.heads,
            logit_gradient=gradient,
            rows_gradient=adapted_gradient,
            momentum=momentum,
            decay=self.decay,
        )
        if self.adapter is not None and rows.adapter is not None and adapted_gradient is not None:
            self.adapter.backward(rows.adapter, adapted_gradient, momentum)
        regularizer = self.regularize()
        if regularizer is not None:
            self.tally[:, 2] += regularizer

        # the update, and the method's memory
        if self.compiled:
            dim = rows.features.shape[-1]
            native.update_(parameters, velocity, self.class_heads.factors, self.decay, dim, rate)
        else:
            parameters.addcmul_(velocity, rate.unsqueeze(1), value=-1.0)
        self.after_step(self._rows(self.weak, self.weak + labeled).heads, draws.labels, pseudo)

    def losses(self) -> Tensor:
        """The losses since the last call (3, T)."""
        losses = self.tally.t().clone()
        self.tally.zero_()
        return losses

    def _cross_entropies(self, logits: Tensor, gradient: Tensor) -> Tensor:
        """Gradients (T, n, H, K) by adjusted logits, from logits of at least as many rows; log softmax_y (T, n, H)."""
        trials, rows, heads, _ = gradient.shape
        log_probabilities = self.buffers.lend("log_probabilities", trials, rows, heads)
        parts = [(0, self.labeled, self.adjustment.squeeze(1))]
        if rows > self.labeled:
            parts.append((self.labeled, rows, self.unlabeled_adjustment()))
        for start, stop, adjustment in parts:
            native.cross_entropy_gradient(
                logits[:, start:stop],
                adjustment,
                self.row_labels[:, start:stop],
                self.gradient_weights[:, start:stop],
                gradient[:, start:stop],
                log_probabilities[:, start:stop],
            )
        return log_probabilities

    def _forward_all(self, step: int | Tensor, draws: Draws) -> tuple[PseudoLabels | None, int]:
        """Gather and forward all rows; returns the pseudo-labels, and how many strong views of each trial train."""
        weak, stop = self.weak, self.weak + self.labeled
        self._gather(torch.cat([draws.weak, draws.labeled], dim=1), 0, stop)
        self._add_noise(self._rows(weak, stop).features, step, Purpose.LABELED_NOISE)
        if not weak:
            self._forward(self._rows(0, stop))
            return None, 0

        # weak views and labelled rows, with all strong views unless many may be skipped
        skips = self.skips and self.kept_fraction < _FEW
        if not skips:
            self._read_strong(step, draws.strong)
        self._forward(self._rows(0, stop if skips else stop + weak))
        pseudo = self.pseudo_labels(self.by_head[:, :weak])

        # strong views that train, first; the sort is stable, so that the order does not depend on other trials
        labels, mask, count = pseudo.labels, pseudo.mask, weak
        if self.skips:
            most = int(mask.count_nonzero(1).max())
            self.kept_fraction = most / weak
        if skips:
            count = most
            order = mask.argsort(dim=1, descending=True, stable=True)[:, :count]  # (T, count)
            labels, mask = labels.gather(1, order), mask.gather(1, order)
            self._read_strong(step, draws.strong.gather(1, order))
            self._forward(self._rows(stop, stop + count))
        end = self.labeled + count
        self.row_labels[:, self.labeled : end] = labels
        torch.mul(mask, self.unlabeled_weight, out=self.row_weights[:, self.labeled : end])
        return pseudo, count

    def _read_strong(self, step: int | Tensor, slots: Tensor) -> None:
        """Gather strong views (T, n)."""
        stop = self.weak + self.labeled
        self._gather(slots, stop, stop + slots.shape[1])
        self._add_noise(self._rows(stop, stop + slots.shape[1]).features, step, Purpose.STRONG_NOISE)

    def _gather(self, slots: Tensor, start: int, stop: int) -> None:
        """Read views (T, n) into rows [start, stop)."""
        rows, store = self._rows(start, stop), self.batches.features
        if self.compiled and store.unit:
            copy = rows.features if rows.adapter is None else rows.adapter.adapted
            native.gather(store.views, slots, rows.features, copy, self.means[:, start:stop])
        else:
            store.at_into(slots, rows.features)

    def _add_noise(self, features: Tensor, step: int | Tensor, purpose: Purpose) -> None:
        if self.batches.any_noise:
            features.copy_(self.batches.noisy(features, step, purpose))

    def _forward(self, rows: Rows) -> None:
        """Logits, and all that the backward computation needs beside them."""
        if self.adapter is not None and rows.adapter is not None:
            if self.compiled and (self.batches.any_noise or not self.batches.features.unit):
                rows.adapter.adapted.copy_(rows.features)
                torch.mean(rows.features, -1, keepdim=True, out=rows.adapter.mean)
            self.adapter.forward(rows.adapter)
        self.class_heads.forward(rows.heads)

    # -- memory

    def _allocate(self) -> None:
        """Memory for all rows of a step, and the constants in it."""
        trials, _, dim = self.class_heads.weights.shape
        lend, trained = self.buffers.lend, self.labeled + self.weak

        # features, adapted features and logits
        features = lend("features", trials, self.weak + trained, dim)
        adapter, adapted = None, features
        if self.adapter is not None:
            adapted = lend("adapted", *features.shape)
            adapter = self.adapter.rows(features, adapted)
        self.all_rows = Rows(features, adapter, self.class_heads.rows(adapted))
        self.by_head = self.all_rows.heads.logits.unflatten(2, (len(self.heads), -1))  # (T, n, H, K)
        self.means = lend("means", trials, self.weak + trained, 1) if adapter is None else adapter.mean
        self.slices: dict[tuple[int, int], Rows] = {}

        # labels, and weights in the loss and in its gradient, where those of unlabelled rows have the ramp too
        self.adjustment = self.labeled_adjustment().unsqueeze(1)
        self.row_labels = lend("row_labels", trials, trained, dtype=torch.int64)
        self.row_weights = lend("row_weights", trials, trained)
        self.gradient_weights = lend("gradient_weights", trials, trained)
        self.row_weights[:, : self.labeled] = 1.0 / self.labeled
        self.gradient_weights[:, : self.labeled] = 1.0 / self.labeled
        if self.weak:
            self.unlabeled_weight = (self.trials.values["lambda_u"] / self.weak).unsqueeze(1)

    def _rows(self, start: int, stop: int) -> Rows:
        """Memory of rows [start, stop)."""
        if (start, stop) not in self.slices:
            everything = self.all_rows
            self.slices[start, stop] = Rows(
                features=everything.features[:, start:stop],
                adapter=None if everything.adapter is None else _slice_rows(everything.adapter, start, stop),
                heads=_slice_rows(everything.heads, start, stop),
            )
        return self.slices[start, stop]

    def _class_vectors(self, flat: Tensor) -> Tensor:
        """The class vectors of all heads as one view (T, H K, D): they are the first parameters, in this order."""
        first = self.state.parameters[self.heads[0]]
        return flat[:, : len(self.heads) * first[0].numel()].unflatten(1, (-1, first.shape[-1]))

    def _skips(self) -> bool:
        """Whether strong views without a pseudo-label are left out of the computation.

        Their number is known on the device alone: reading it would stop a GPU. Noise is drawn for all rows together.
        """
        trials, total, dim = self.class_heads.weights.shape
        rank = 0 if self.adapter is None else self.adapter.up.shape[1]
        work = 6 * trials * self.weak * dim * (total + rank)
        return not (self.flat.parameters.is_cuda or self.batches.any_noise) and work > _WORTH_SKIPPING


class UnadjustedStep(FusedStep):
    """Plain cross-entropy on labelled rows."""

    def labeled_adjustment(self) -> Tensor:
        """Zeros (T, H, K)."""
        return torch.zeros_like(self.trials.log_prior).unsqueeze(1)


def _slice_rows(rows: _Fields, start: int, stop: int) -> _Fields:
    """Rows [start, stop) of every field (T, n, ...)."""
    return type(rows)(*(tensor[:, start:stop] for tensor in rows))
