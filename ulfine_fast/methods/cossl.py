"""CoSSL (arXiv 2112.04564; as its code has it): a balanced head learns on enhanced tail features and teaches FixMatch.

Published: threshold 0.95, lambda_u 1, smallest labelled fraction 0.6, weights averaged by 0.999 over 50,000 steps (here
`weight_average`, shorter). Different here: the balanced head starts at the textual prototypes, not from a training of
its own; labelled images weigh by the inverse frequency of their class, which has the gradient of class-balanced
sampling on average; an image is blended with the batch's strong views, which are of unlabelled images alone. Not
reproduced over a cache: as for FixMatch, and a second strong view.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.config import option
from ulfine_fast.core.heads import Tensors, apply_adapter, cosine_logits
from ulfine_fast.core.types import Batch, Losses, State, Trials
from ulfine_fast.methods.base import PseudoLabelOptions
from ulfine_fast.methods.fixmatch import FixMatch, plain_cross_entropy
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.philox import Purpose, words
from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.ops.thresholds import running

_AVERAGED = "averaged."


@dataclass(frozen=True)
class CoSSLOptions(PseudoLabelOptions):
    """Options of :class:`CoSSL`."""

    least_labeled: float = option(0.6, "smallest fraction of a labelled image in a blended feature", low=0.0, high=1.0)
    weight_average: float = option(0.98, "momentum of the averaged adapter and balanced head", low=0.0, high=0.9999)


@register("cossl", options=CoSSLOptions, source="arXiv 2112.04564")
class CoSSL(FixMatch):
    """FixMatch whose teacher is a balanced head on averaged features; that head's own average predicts."""

    # the averaged adapter would need the encoder's frozen end beside it
    takes_tokens = False

    def start(self, trials: Trials) -> State:
        """Two heads (T, K, D) at the textual prototypes, adapter; averages of head two and adapter; the step (T,)."""
        state = super().start(trials)
        state.parameters["balanced"] = trials.prototypes.clone()
        averaged = {name: tensor for name, tensor in state.parameters.items() if name != "linear"}
        state.memory = {_AVERAGED + name: tensor.clone() for name, tensor in averaged.items()}
        state.scratch["step"] = torch.zeros_like(trials.seeds)
        return state

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """FixMatch's losses, and the balanced head's on enhanced features, by which the adapter is not moved."""
        main = super().losses(trials, state, batch)
        rows = self.enhanced(trials, state, batch)
        logits = cosine_logits(rows, state.parameters["balanced"], trials.values["scale"])
        weights = balanced_weights(trials.log_prior).gather(1, batch.labels)
        balanced = (weights * plain_cross_entropy(logits, batch.labels)).mean(-1)
        return main._replace(labeled=main.labeled + balanced)

    @torch.no_grad()
    def enhanced(self, trials: Trials, state: State, batch: Batch) -> Tensor:
        """Averaged unit features (T, B, D) of labelled rows, those of rarer classes blended with unlabelled ones.

        x <- l x + (1 - l) u with probability (N_max - N_y) / N_max, l uniform in [least, 1]; the label stays
        (section 3.3, tail-class feature enhancement).
        """
        rows = self.averaged(trials, state.tensors, batch.labeled)
        if batch.strong is None:
            return rows
        count = rows.shape[1]
        partners = self.averaged(trials, state.tensors, batch.strong)
        # as many partners as labelled rows, whichever batch is the larger
        partners = partners[:, torch.arange(count, device=rows.device) % partners.shape[1]]
        drawn = words(trials.seeds, state.scratch["step"][:1], Purpose.BLEND, 2 * count)[0].to(rows.dtype) / 2**32
        chosen = drawn[:, :count] < blend_chances(trials.log_prior).gather(1, batch.labels)
        strength = (1 - trials.values["least_labeled"].view(-1, 1)) * drawn[:, count:] * chosen  # 1 - l, (T, B)
        return normalize(rows + strength.unsqueeze(-1) * (partners - rows))

    def averaged(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Unit features (T, B, D) by the averaged adapter."""
        averages = {
            name.removeprefix(_AVERAGED): tensor for name, tensor in tensors.items() if name.startswith(_AVERAGED)
        }
        return apply_adapter(averages, features, trials.values["adapter_scale"])

    @torch.no_grad()
    def after_step(self, trials: Trials, state: State, batch: Batch, losses: Losses) -> None:
        """Move the averages and count the step."""
        for name, tensor in state.memory.items():
            newest = state.parameters[name.removeprefix(_AVERAGED)]
            tensor.copy_(running(tensor, newest, trials.values["weight_average"]))
        state.scratch["step"] += 1

    def pseudo_logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """The balanced head's newest weights on averaged features (T, B, K)."""
        return cosine_logits(self.averaged(trials, tensors, features), tensors["balanced"], trials.values["scale"])

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """The balanced head's averaged weights on averaged features (T, B, K)."""
        weights = tensors[_AVERAGED + "balanced"]
        return cosine_logits(self.averaged(trials, tensors, features), weights, trials.values["scale"])


def blend_chances(log_prior: Tensor) -> Tensor:
    """(N_max - N_k) / N_max (T, K) of log class frequencies (T, K): 0 for the most frequent class."""
    return 1 - torch.exp(log_prior - log_prior.amax(-1, keepdim=True))


def balanced_weights(log_prior: Tensor) -> Tensor:
    """Weights 1 / (K' pi_k) of the K' labelled classes, by which all count the same on average (T, K).

    Args:
        log_prior: log class frequencies (T, K); under 1e-7 a class counts as one without labels.
    """
    labeled = log_prior.exp() > 1e-7
    return torch.exp(-log_prior) * labeled / labeled.sum(-1, keepdim=True)
