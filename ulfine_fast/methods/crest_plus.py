"""CReST+ (arXiv 2102.09559) in one generation: class-rebalanced pseudo-labels with distribution alignment.

Published: sampling power 1/3, alignment power falling from 1 to 0.5, threshold 0.95, six generations of training, after
each of which confident images join the labelled ones, rare classes at higher rates. Different here: one generation; the
rates are weights in the unlabelled loss, which are 1 at first and reached at the end, as is the alignment's power; the
labelled loss is adjusted by tau, 0 in the paper. Not reproduced over a cache: as for FixMatch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.config import option
from ulfine_fast.core.heads import Tensors
from ulfine_fast.core.types import Batch, Losses, State, Trials
from ulfine_fast.methods.base import LabeledOptions, PseudoLabelOptions, RunningOptions
from ulfine_fast.methods.fixmatch import FixMatch
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.distributions import aligned, reversed_ranks
from ulfine_fast.ops.losses import PseudoLabels
from ulfine_fast.ops.thresholds import running

_EPS = 1e-12


@dataclass(frozen=True)
class CReSTPlusOptions(PseudoLabelOptions, RunningOptions, LabeledOptions):
    """Options of :class:`CReSTPlus`."""

    sampling_power: float = option(
        0.3333333333333333, "power of a class's rate, the relative count of the class of the opposite rank", low=0.0
    )
    align_power: float = option(
        0.5, "last power of the labelled distribution that pseudo-labels are aligned to", low=0.0, high=1.0
    )


@register("crest_plus", options=CReSTPlusOptions, source="CReST+, arXiv 2102.09559")
class CReSTPlus(FixMatch):
    """FixMatch with aligned pseudo-labels, which weigh more the rarer their class is among the labels."""

    adjusted = True

    def start(self, trials: Trials) -> State:
        """Adapter and head; mean prediction (T, K), uniform, and the fraction of the steps done (T,)."""
        state = super().start(trials)
        uniform = torch.full_like(trials.log_prior, 1.0 / trials.log_prior.shape[1])
        state.memory |= {"shares": uniform, "done": trials.zeros()}
        return state

    def pseudo_labels(self, trials: Trials, state: State, batch: Batch) -> PseudoLabels:
        """Confident pseudo-labels after alignment, weighted by their class's rate."""
        pseudo = super().pseudo_labels(trials, state, batch)
        rates = self.rates(trials, state.memory["done"])
        return pseudo._replace(mask=pseudo.mask * rates.gather(1, pseudo.labels))

    def rates(self, trials: Trials, done: Tensor) -> Tensor:
        """Weight of each class (T, K): 1 at first, and at last (n of the opposite rank / largest n)^power."""
        prior = trials.log_prior.exp()
        power = trials.values["sampling_power"].view(-1, 1)
        last = (reversed_ranks(prior) / prior.amax(-1, keepdim=True)) ** power
        return 1 - done.view(-1, 1) * (1 - last)

    @torch.no_grad()
    def after_step(self, trials: Trials, state: State, batch: Batch, losses: Losses) -> None:
        """Count the step, and move the mean prediction by the batch's predictions before alignment."""
        memory = state.memory
        memory["done"] += 1.0 / trials.config.steps
        if batch.weak is not None:
            mean = self._probabilities(trials, state.tensors, batch.weak).mean(1)
            memory["shares"].copy_(running(memory["shares"], mean, trials.values["rho"]))

    def pseudo_logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Logits (T, B, K) of the probabilities aligned to the labelled distribution, to a power that falls."""
        power = 1 - tensors["done"] * (1 - trials.values["align_power"])
        target = torch.exp(power.view(-1, 1) * trials.log_prior)
        probabilities = aligned(self._probabilities(trials, tensors, features), target, tensors["shares"])
        # the caller divides by the temperature, and must get the aligned probabilities back
        return trials.values["sharpen"].view(-1, 1, 1) * torch.log(probabilities + _EPS)

    def _probabilities(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """The head's probabilities (T, B, K)."""
        return torch.softmax(self.logits(trials, tensors, features) / trials.values["sharpen"].view(-1, 1, 1), -1)
