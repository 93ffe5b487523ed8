"""Fused steps of a whole trial batch, in blocks of trials that a processor spreads over its cores."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ulfine_fast.cache.io.device import upload
from ulfine_fast.core.batches import BatchSource
from ulfine_fast.core.fused.buffers import Buffers, flatten
from ulfine_fast.core.fused.step import Flat, FusedStep
from ulfine_fast.core.threads import interleaved
from ulfine_fast.core.types import State, Trials
from ulfine_fast.ops.sgd import cosine_rate

# float32 values of parameters and activations in a block of trials, 64 MB: larger blocks are not faster
_BLOCK_VALUES = 16 << 20
# and so many that another core pays for them
_CORE_VALUES = 3 << 20


class FusedSteps:
    """The steps of a trial batch, a block of trials at a time.

    On a processor each core works on its own blocks, many steps of one before the next, with one memory for their
    activations; trials do not depend on each other, so the order is free.

    Args:
        step: the method's fused step.
        trials: of the trial batch.
        state: of the trial batch; parameters become views of one buffer.
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
        # all parameters in one buffer, class vectors first
        order = [*step.heads, *(name for name in state.parameters if name not in step.heads)]
        flat = Flat(parameters=_flatten(state.parameters, order), velocity=_flatten(velocity, order))
        self.trials = trials
        self.steps = steps

        # sizes: a GPU takes all trials together
        count = len(trials.seeds)
        values = _values(step, state, batches)
        on_gpu = flat.parameters.is_cuda
        cores = torch.get_num_threads() if threads and not on_gpu else 1
        workers = min(cores, count, max(1, count * values // _CORE_VALUES))
        largest = count if on_gpu else max(1, _BLOCK_VALUES // values)
        # blocks as even as they can be: a last one of few trials would cost as much as a full one
        blocks = workers * math.ceil(count / (workers * largest))
        size = math.ceil(count / blocks)
        # to split small matrices between cores costs more than it brings
        self.one_core_each = workers > 1 or (cores > 1 and count * values < _CORE_VALUES)

        # blocks that run one after another, by worker
        self.queues: list[list[tuple[slice, FusedStep]]] = [[] for _ in range(workers)]
        buffers_of: dict[tuple[int, int], Buffers] = {}
        for i, start in enumerate(range(0, count, size)):
            stop = min(start + size, count)
            # blocks of one size that run in one worker share their memory
            buffers = buffers_of.setdefault((i % workers, stop - start), Buffers(flat.parameters))
            block_step = step(
                trials=trials.part(start, stop),
                state=state.part(start, stop),
                flat=Flat(flat.parameters[start:stop], flat.velocity[start:stop]),
                batches=batches.part(start, stop),
                buffers=buffers,
            )
            self.queues[i % workers].append((slice(start, stop), block_step))
        self.parts = math.ceil(count / size)

    def run(self, start: int, stop: int) -> Iterator[Tensor]:
        """Make steps [start, stop), one block after another; see :meth:`ulfine_fast.engine.steps.Steps.run`."""
        peak, warmup = self.trials.values["lr"], self.trials.values["warmup"]
        schedule = [(cosine_rate(step, self.steps), (step + 1) / self.steps) for step in range(start, stop)]
        factors, done = (
            upload(torch.tensor(schedule, dtype=torch.float64), peak.device).unsqueeze(2).unbind(1)
        )  # (S, 1)
        rates = (factors * peak).to(peak)  # (S, T)
        ramps = (done / warmup.clamp(min=1e-9)).clamp(max=1.0).to(peak)  # (S, T)
        works = [self._work(blocks, range(start, stop), rates, ramps) for blocks in self.queues]
        yield from interleaved(works) if self.one_core_each else works[0]

    def _work(
        self, blocks: list[tuple[slice, FusedStep]], steps: range, rates: Tensor, ramps: Tensor
    ) -> Iterator[Tensor]:
        """The steps of some blocks, with learning rates and ramps (S, T)."""
        zeros = torch.zeros(3, len(self.trials.seeds), dtype=rates.dtype, device=rates.device)
        for position, block in blocks:
            block_rates = rates[:, position].unbind(0)
            block_ramps = ramps[:, position].unsqueeze(2).unbind(0)
            draws_of_steps = block.batches.draws(steps.start, steps.stop)
            for (step, draws), rate, ramp in zip(draws_of_steps, block_rates, block_ramps, strict=True):
                block.advance(step, draws, rate, ramp)
                if step < steps.stop - 1:
                    yield zeros
            losses = zeros.clone()
            losses[:, position] = block.losses()
            yield losses


def _flatten(tensors: dict[str, Tensor], order: list[str]) -> Tensor:
    """Replace tensors by views of one buffer, in this order; returns the buffer."""
    flat, views = flatten({name: tensors[name] for name in order})
    tensors.clear()
    tensors.update(views)
    return flat


def _values(step: type[FusedStep], state: State, batches: BatchSource) -> int:
    """How many values the parameters and activations of one trial have, gradients and velocities included."""
    dim = batches.features.views.shape[-1]
    vectors = batches.trials.log_prior.shape[-1] * len(step.heads)
    rows = batches.config.batch_labeled + 2 * batches.unlabeled_size
    # features, adapted rows, logits, and the gradients of both
    return 3 * sum(tensor[0].numel() for tensor in state.tensors.values()) + 3 * rows * (dim + vectors)
