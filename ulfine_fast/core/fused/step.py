"""One optimiser step of T trials without an autograd graph: the same arithmetic as a method's losses, by hand.

It covers methods with an optional residual adapter below one or two cosine heads, trained on labelled rows and on
pseudo-labelled strong views. What differs between them are the hooks below, which a method's own step replaces.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ulfine_fast.core.batches import BatchSource, Draws
from ulfine_fast.core.fused.adapter import AdapterRows, FusedAdapter
from ulfine_fast.core.fused.buffers import Buffers, flatten, unflatten
from ulfine_fast.core.fused.cuda_graph import Captured
from ulfine_fast.core.fused.heads import FusedHeads, HeadRows
from ulfine_fast.core.fused.loss import cross_entropy_gradient_
from ulfine_fast.core.threads import side_by_side
from ulfine_fast.core.types import State, Trials
from ulfine_fast.ops.losses import PseudoLabels, pseudo_labels
from ulfine_fast.ops.philox import Purpose
from ulfine_fast.ops.sgd import cosine_rate, decay_velocity_

# values (float32) of parameters and activations in a block of trials, 64 MB: in larger blocks nothing runs faster
_BLOCK_VALUES = 16 << 20
# and so many that another core is worth waking for them
_CORE_VALUES = 3 << 20
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
        vectors = (self._side_by_side(flat.parameters), self._side_by_side(flat.velocity))
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
        self.unlabeled_weight = (self.trials.values["lambda_u"] / max(1, self.weak)).unsqueeze(1)

    def _rows(self, start: int, stop: int) -> Rows:
        """Memory of rows [start, stop)."""
        found = self.slices.get((start, stop))
        if found is None:
            adapter = None if self.all.adapter is None else _cut(self.all.adapter, start, stop)
            found = Rows(self.all.features[:, start:stop], adapter, _cut(self.all.heads, start, stop))
            self.slices[start, stop] = found
        return found

    def _side_by_side(self, flat: Tensor) -> Tensor:
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


class FusedSteps:
    """The steps of a pass, a block of trials at a time.

    On a processor each core works on blocks of its own, many steps of one before the next, with the same activations'
    memory for all of them; trials do not depend on each other, so the order is free.

    Args:
        step: the method's own step.
        trials: of the pass.
        state: of the pass; parameters become views of one buffer.
        velocity: by the names of the parameters; they become views of another.
        batches: the mini-batches.
        steps: length of the schedule.
        threads: whether cores work on different blocks; otherwise all of them on one.
    """

    def __init__(
        self,
        step: type[FusedStep],
        trials: Trials,
        state: State,
        velocity: dict[str, Tensor],
        batches: BatchSource,
        steps: int,
        threads: bool = True,
    ) -> None:
        order = [*step.heads, *(name for name in state.parameters if name not in step.heads)]
        flat = Flat(*(_flatten(tensors, order) for tensors in (state.parameters, velocity)))
        self.trials, self.steps = trials, steps
        count, values = len(trials.seeds), _values(step, state, batches)
        cores = torch.get_num_threads() if threads and not flat.parameters.is_cuda else 1
        workers = min(cores, count, max(1, count * values // _CORE_VALUES))
        # a GPU takes all trials at once
        block = count if flat.parameters.is_cuda else max(1, _BLOCK_VALUES // values)
        size = min(block, math.ceil(count / workers))
        # blocks that run one after another, by worker
        self.queues: list[list[tuple[slice, FusedStep]]] = [[] for _ in range(workers)]
        held: dict[tuple[int, int], Buffers] = {}
        for i, start in enumerate(range(0, count, size)):
            stop = min(start + size, count)
            # fewer trials lie otherwise in the same memory
            buffers = held.setdefault((i % workers, stop - start), Buffers(flat.parameters))
            part = Flat(flat.parameters[start:stop], flat.velocity[start:stop])
            made = step(trials.part(start, stop), state.part(start, stop), part, batches.part(start, stop), buffers)
            self.queues[i % workers].append((slice(start, stop), made))
        self.parts = math.ceil(count / size)

    def run(self, start: int, stop: int) -> Iterator[Tensor]:
        """Make steps [start, stop), one block after another; see :meth:`ulfine_fast.engine.steps.Steps.run`."""
        peak, warmup = (self.trials.values[name] for name in ("lr", "warmup"))
        paces = [(cosine_rate(step, self.steps), (step + 1) / self.steps) for step in range(start, stop)]
        factors, done = torch.tensor(paces, dtype=torch.float64).to(peak.device).unsqueeze(2).unbind(1)  # (S, 1)
        rates, ramps = (factors * peak).to(peak), (done / warmup.clamp(min=1e-9)).clamp(max=1.0).to(peak)  # (S, T)
        works = [self._work(blocks, range(start, stop), rates, ramps) for blocks in self.queues]
        yield from works[0] if len(works) == 1 else side_by_side(works)

    def _work(
        self, blocks: list[tuple[slice, FusedStep]], steps: range, rates: Tensor, ramps: Tensor
    ) -> Iterator[Tensor]:
        """The steps of some blocks, with learning rates and ramps (S, T)."""
        nothing = torch.zeros(3, len(self.trials.seeds), dtype=rates.dtype, device=rates.device)
        for place, block in blocks:
            both = zip(rates[:, place].unbind(0), ramps[:, place].unsqueeze(2).unbind(0), strict=True)
            for (step, draws), pace in zip(block.batches.draws(steps.start, steps.stop), both, strict=True):
                block.advance(step, draws, *pace)
                if step < steps.stop - 1:
                    yield nothing
            losses = nothing.clone()
            losses[:, place] = block.losses()
            yield losses


def _flatten(tensors: dict[str, Tensor], order: list[str]) -> Tensor:
    """Replace tensors by views of one buffer, in the given order."""
    flat, views = flatten({name: tensors[name] for name in order})
    tensors.clear()
    tensors.update(views)
    return flat


def _cut(rows: _Fields, start: int, stop: int) -> _Fields:
    """Rows [start, stop) of every field (T, n, ...)."""
    return type(rows)(*(tensor[:, start:stop] for tensor in rows))


def _values(step: type[FusedStep], state: State, batches: BatchSource) -> int:
    """Parameters and activations of one trial, gradients and velocities among them."""
    dim, vectors = batches.features.views.shape[-1], batches.trials.log_prior.shape[-1] * len(step.heads)
    rows = batches.config.batch_labeled + 2 * batches.unlabeled_size
    # features, adapted rows and their gradient, logits and theirs
    return 3 * sum(tensor[0].numel() for tensor in state.tensors.values()) + 3 * rows * (dim + vectors)
