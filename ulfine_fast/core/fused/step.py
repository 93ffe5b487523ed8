"""One optimiser step of T trials without an autograd graph: the same arithmetic as a method's losses, by hand.

It covers methods with an optional residual adapter below one or two cosine heads, trained on labelled rows and on
pseudo-labelled strong views. What differs between them are the hooks below, which a method's own step replaces.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ulfine_fast.core.batches import BatchSource, Draws
from ulfine_fast.core.fused.adapter import AdapterRows, FusedAdapter
from ulfine_fast.core.fused.buffers import Buffers, unflatten
from ulfine_fast.core.fused.cuda_graph import Captured
from ulfine_fast.core.fused.heads import FusedHeads, HeadRows
from ulfine_fast.core.fused.loss import cross_entropy_gradient_
from ulfine_fast.core.types import State, Trials
from ulfine_fast.ops.losses import PseudoLabels, pseudo_labels
from ulfine_fast.ops.philox import Purpose
from ulfine_fast.ops.sgd import decay_velocity_

# multiply-adds of a block's strong views from which leaving rows out costs less than finding out which
_WORTH_SKIPPING = 20e6

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

    Rows lie in memory as weak views, labelled rows, strong views: the first two and the last two are each one slice.

    Args:
        trials: what the trials are given.
        state: its parameters are views of `flat`.
        flat: parameters and velocities.
        batches: where rows are gathered from.
        buffers: activations; shared with other steps of as many trials that run before or after.
    """

    heads: tuple[str, ...] = ("linear",)

    def __init__(self, trials: Trials, state: State, flat: Flat, batches: BatchSource, buffers: Buffers) -> None:
        self.trials, self.state, self.flat, self.batches, self.buffers = trials, state, flat, batches, buffers
        self.velocity = unflatten(flat.velocity, state.parameters)
        self.classes = trials.log_prior.shape[-1]
        vectors = (self._class_vectors(flat.parameters), self._class_vectors(flat.velocity))
        self.class_heads = FusedHeads(*vectors, trials.values["scale"], self.learning(), buffers)
        self.adapter: FusedAdapter | None = None
        if "adapter.up" in state.parameters:
            self.adapter = FusedAdapter(state.parameters, self.velocity, trials.values["adapter_scale"], buffers)
        self.momentum, self.decay = self._paces()
        self.weak, self.labeled = batches.unlabeled_size, batches.config.batch_labeled
        self.skips = self._skips()
        self.tally = flat.parameters.new_zeros(len(flat.parameters), 3)  # (T, 3)
        self.recorded = Captured(lambda *told: self.run(0, Draws(*told[:-2]), *told[-2:]))
        self._lay_out()

    # -- what differs between methods

    def labeled_adjustment(self) -> Tensor:
        """Added to the labelled rows' logits (T, H, K); asked once."""
        return (self.trials.values["tau"].view(-1, 1) * self.trials.log_prior).unsqueeze(1)

    def unlabeled_adjustment(self) -> Tensor:
        """Added to the strong views' logits (T, H, K)."""
        return torch.zeros_like(self.trials.log_prior).unsqueeze(1)

    def pseudo_labels(self, logits: Tensor) -> PseudoLabels:
        """Pseudo-labels from the weak views' logits (T, U, H, K)."""
        values = self.trials.values
        return pseudo_labels(logits[:, :, 0], values["threshold"], values["sharpen"])

    def learning(self) -> Tensor | None:
        """Which class vectors get a gradient, 1 or 0 (T, H K); None for all of them; asked once."""
        return None

    def regularize(self) -> Tensor | None:
        """Add the gradient of what is no cross-entropy to `velocity`; returns its value (T,)."""
        return None

    def after_step(self, labeled: HeadRows, labels: Tensor, pseudo: PseudoLabels | None) -> None:
        """Move the memory; the labelled rows (T, B, ...) are as the step saw them."""

    # -- the step

    def advance(self, step: int, draws: Draws, rate: Tensor, ramp: Tensor) -> None:
        """One step, see :meth:`run`; on a GPU recorded and replayed, unless noise is drawn for its number."""
        if self.batches.any_noise:
            self.run(step, draws, rate, ramp)
        else:
            self.recorded(*draws, rate, ramp)

    @torch.inference_mode()
    def run(self, step: int, draws: Draws, rate: Tensor, ramp: Tensor) -> None:
        """One step; its losses are added to `tally` (T, 3): labelled, unlabelled, regularizer.

        Args:
            step: its number, for the noise.
            draws: rows of this step's mini-batches.
            rate: learning rates (T,).
            ramp: factor of the unlabelled losses (T, 1).
        """
        self.class_heads.prepare()
        if self.adapter is not None:
            self.adapter.prepare()
        pseudo, count = self._look(step, draws, ramp)
        self._decay_velocity()
        self._backward(count)
        regularizer = self.regularize()
        if regularizer is not None:
            self.tally[:, 2] += regularizer
        self.flat.parameters.addcmul_(self.flat.velocity, rate.unsqueeze(1), value=-1.0)
        self.after_step(self._rows(self.weak, self.weak + self.labeled).heads, draws.labels, pseudo)

    def losses(self) -> Tensor:
        """The losses since they were last asked for (3, T)."""
        losses = self.tally.t().clone()
        self.tally.zero_()
        return losses

    def _look(self, step: int, draws: Draws, ramp: Tensor) -> tuple[PseudoLabels | None, int]:
        """Gather and forward all rows; the pseudo-labels, and how many strong views of each trial train."""
        weak, stop = self.weak, self.weak + self.labeled
        self.row_labels[:, : self.labeled] = draws.labels
        first = self._rows(0, stop)
        self._gather(first.features, torch.cat([draws.weak, draws.labeled], dim=1))
        self._shake(self._rows(weak, stop).features, step, Purpose.LABELED_NOISE)
        if weak and not self.skips:
            self._strong(step, draws.strong)
            first = self._rows(0, stop + weak)
        self._forward(first)
        if not weak:
            return None, 0
        pseudo = self.pseudo_labels(self.by_head[:, :weak])
        labels, mask, count = pseudo.labels, pseudo.mask, weak
        if self.skips:
            count = int(mask.sum(1).max())
            # stable, so that a trial's rows come in one order whoever its neighbours are
            order = mask.argsort(dim=1, descending=True, stable=True)[:, :count]  # (T, count)
            labels, mask = labels.gather(1, order), mask.gather(1, order)
            self._strong(step, draws.strong.gather(1, order))
            self._forward(self._rows(stop, stop + count))
        end = self.labeled + count
        self.row_labels[:, self.labeled : end] = labels
        torch.mul(mask, self.unlabeled_weight, out=self.row_weights[:, self.labeled : end])
        torch.mul(self.row_weights[:, self.labeled : end], ramp, out=self.row_pulls[:, self.labeled : end])
        return pseudo, count

    def _strong(self, step: int, slots: Tensor) -> None:
        """Read the strong views (T, n)."""
        stop = self.weak + self.labeled
        features = self._rows(stop, stop + slots.shape[1]).features
        self._gather(features, slots)
        self._shake(features, step, Purpose.STRONG_NOISE)

    def _gather(self, out: Tensor, slots: Tensor) -> None:
        """Read features (T, n) into `out` (T, n, D)."""
        self.batches.features.at_into(slots, out)

    def _shake(self, features: Tensor, step: int, purpose: Purpose) -> None:
        if self.batches.any_noise:
            features.copy_(self.batches.noisy(features, step, purpose))

    def _forward(self, rows: Rows) -> None:
        """Logits, and all that the backward pass needs beside them."""
        if self.adapter is not None and rows.adapter is not None:
            self.adapter.forward(rows.adapter)
        self.class_heads.forward(rows.heads)

    def _backward(self, count: int) -> None:
        """Write all gradients of the cross-entropies of labelled rows and `count` strong views."""
        labeled, end = self.labeled, self.labeled + count
        rows = self._rows(self.weak, self.weak + end)
        gradient = self.buffers.lend("logit_gradient", *rows.heads.logits.shape)
        by_head = gradient.unflatten(2, (len(self.heads), -1))  # (T, B + count, H, K)
        logits = self.by_head[:, self.weak :]
        torch.add(logits[:, :labeled], self.adjustment, out=by_head[:, :labeled])
        if count:
            torch.add(logits[:, labeled:end], self.unlabeled_adjustment().unsqueeze(1), out=by_head[:, labeled:])
        found = cross_entropy_gradient_(by_head, self.row_labels[:, :end], self.row_pulls[:, :end])  # (T, n, H)
        losses = found.sum(2).mul_(self.row_weights[:, :end])
        self.tally[:, 0] -= losses[:, :labeled].sum(1)
        self.tally[:, 1] -= losses[:, labeled:].sum(1)
        self._descend(rows, gradient)

    def _descend(self, rows: Rows, logit_gradient: Tensor) -> None:
        """Add the gradients that follow from dL / dz (T, n, H K) to the velocity."""
        kept = 1.0 if self.momentum is None else self.momentum
        below = None if rows.adapter is None else self.buffers.lend("adapted_gradient", *rows.features.shape)
        self.class_heads.backward(rows.heads, logit_gradient, below, kept, self.decay)
        if self.adapter is not None and rows.adapter is not None and below is not None:
            self.adapter.backward(rows.adapter, below)

    def _paces(self) -> tuple[float | None, Tensor]:
        """The momentum where all trials share it, so that it rides along in a product; the weight decay (T, 1)."""
        momentum = self.trials.values["momentum"]
        shared = float(momentum[0]) if bool((momentum == momentum[0]).all()) else None
        return shared, self.trials.values["weight_decay"].unsqueeze(1)

    def _decay_velocity(self) -> None:
        """Momentum, and what weight decay adds, for all that the heads do not decay themselves."""
        values, first = self.trials.values, self.class_heads.weights[0].numel()
        velocity, parameters = self.flat.velocity, self.flat.parameters
        decay_velocity_(velocity[:, first:], parameters[:, first:], values["momentum"], values["weight_decay"])
        if self.momentum is None:
            velocity[:, :first].mul_(values["momentum"].unsqueeze(1))

    # -- memory

    def _lay_out(self) -> None:
        """Memory for all rows of a step, and what of it never changes."""
        trials, _, dim = self.class_heads.weights.shape
        lend, trained = self.buffers.lend, self.labeled + self.weak
        features = lend("features", trials, self.weak + trained, dim)
        adapter, adapted = None, features
        if self.adapter is not None:
            adapted = lend("adapted", *features.shape)
            adapter = self.adapter.rows(features, adapted)
        self.all = Rows(features, adapter, self.class_heads.rows(adapted))
        self.by_head = self.all.heads.logits.unflatten(2, (len(self.heads), -1))  # (T, n, H, K)
        self.slices: dict[tuple[int, int], Rows] = {}
        self.adjustment = self.labeled_adjustment().unsqueeze(1)
        self.row_labels = lend("row_labels", trials, trained, dtype=torch.int64)
        # in the loss, and in its gradient: there the unlabelled rows have the ramp too
        self.row_weights, self.row_pulls = lend("row_weights", trials, trained), lend("row_pulls", trials, trained)
        self.row_weights[:, : self.labeled] = self.row_pulls[:, : self.labeled] = 1.0 / self.labeled
        if self.weak:
            self.unlabeled_weight = (self.trials.values["lambda_u"] / self.weak).unsqueeze(1)

    def _rows(self, start: int, stop: int) -> Rows:
        """Memory of rows [start, stop)."""
        found = self.slices.get((start, stop))
        if found is None:
            adapter = None if self.all.adapter is None else _slice_rows(self.all.adapter, start, stop)
            found = Rows(self.all.features[:, start:stop], adapter, _slice_rows(self.all.heads, start, stop))
            self.slices[start, stop] = found
        return found

    def _class_vectors(self, flat: Tensor) -> Tensor:
        """The class vectors of all heads as one view (T, H K, D): they are the first parameters, in this order."""
        first = self.state.parameters[self.heads[0]]
        return flat[:, : len(self.heads) * first[0].numel()].unflatten(1, (-1, first.shape[-1]))

    def _skips(self) -> bool:
        """Whether strong views without a pseudo-label are left out of the computation.

        Which rows these are is known on the device: asking a GPU for their number would stop it. Noise is drawn for
        all rows at once.
        """
        trials, total, dim = self.class_heads.weights.shape
        rank = 0 if self.adapter is None else self.adapter.up.shape[1]
        work = 6 * trials * self.weak * dim * (total + rank)
        return not (self.flat.parameters.is_cuda or self.batches.any_noise) and work > _WORTH_SKIPPING


class UnadjustedStep(FusedStep):
    """Plain cross-entropy on labelled rows, whatever `tau` says."""

    def labeled_adjustment(self) -> Tensor:
        """Nothing (T, H, K)."""
        return torch.zeros_like(self.trials.log_prior).unsqueeze(1)


def _slice_rows(rows: _Fields, start: int, stop: int) -> _Fields:
    """Rows [start, stop) of every field (T, n, ...)."""
    return type(rows)(*(tensor[:, start:stop] for tensor in rows))
