"""Channel-ensemble (arXiv 2403.18407): M heads over parts of the channels, whose mean draws the pseudo-labels.

The losses are a reconstruction from the paper's description. Not reproduced over a cache: training of a shared encoder
by the heads; they share at most the adapter.

The heads are folded into the rows of a batch, row b of head m at b M + m: then the losses of the underlying methods are
means over heads. `full_gradient` gives every head the gradient that it has alone, and the adapter the mean over heads.
So M identical heads train as one does, and no gain is a hidden learning rate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ulfine_fast.config import FitConfig, option
from ulfine_fast.core.heads import Tensors, apply_adapter
from ulfine_fast.core.types import Batch, Losses, State, Trials
from ulfine_fast.methods.base import PseudoLabelOptions
from ulfine_fast.methods.fixmatch import FixMatch
from ulfine_fast.methods.freematch import FreeMatch, FreeMatchOptions
from ulfine_fast.methods.registry import register
from ulfine_fast.methods.ulfine import ULFine, ULFineOptions
from ulfine_fast.ops.losses import PseudoLabels
from ulfine_fast.related.channel_ensemble.channels import channel_logits, draw_channels, low_bias, low_variance


@dataclass(frozen=True)
class EnsembleOptions:
    """Options of all ensembles."""

    ensemble_heads: int = option(
        3, "heads over random channels, whose mean gives the pseudo-labels", low=1, high=64, structural=True, off=0
    )
    ensemble_fraction: float = option(
        0.5, "fraction of the channels that a head of the ensemble sees", low=0.01, high=1.0, was=("ensemble_share",)
    )
    low_bias: float = option(0.0, "weight of the correlation between errors of the ensemble's heads", low=0.0)
    low_variance: float = option(0.0, "weight of the ensemble's squared error on labelled images", low=0.0)


@dataclass(frozen=True)
class ChannelFixMatchOptions(EnsembleOptions, PseudoLabelOptions):
    """Options of :class:`ChannelFixMatch`."""


@dataclass(frozen=True)
class ChannelFreeMatchOptions(EnsembleOptions, FreeMatchOptions):
    """Options of :class:`ChannelFreeMatch`."""


@dataclass(frozen=True)
class ChannelULFineOptions(EnsembleOptions, ULFineOptions):
    """Options of :class:`ChannelULFine`."""

    threshold: float = option(
        0.9, "smallest probability of a pseudo-label that trains", low=0.0, high=1.0, search={"low": 0.5, "high": 0.98}
    )


_SOURCE = "Channel-Ensemble, arXiv 2403.18407"
_DEFAULTS = {"lr": 0.03}


@register("channel_fixmatch", options=ChannelFixMatchOptions, source=_SOURCE, replaces="fixmatch", defaults=_DEFAULTS)
class ChannelFixMatch(FixMatch):
    """FixMatch with M heads on a shared adapter."""

    def heads(self, config: FitConfig) -> int:
        """M."""
        return int(config.ensemble_heads)

    def start(self, trials: Trials) -> State:
        """Heads (T, M, K, D) at the textual prototypes, the channels of each (T, M, D), and what one head needs."""
        return with_heads(trials, super().start(trials))

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """The method's losses, a mean over heads, and both terms of the ensemble in the regularizer."""
        losses = super().losses(trials, state, folded(trials, batch))
        if losses.pseudo is not None:
            # the same for all heads
            pseudo = PseudoLabels(*(part[:, :: heads_in(trials)] for part in losses.pseudo))
            losses = losses._replace(pseudo=pseudo)
        return with_terms(trials, state, batch, losses)

    def linear_logits(self, trials: Trials, state: State, features: Tensor) -> Tensor:
        """All heads' logits, folded (T, B M, K)."""
        return all_heads(trials, state.tensors, features).flatten(1, 2)

    def pseudo_labels(self, trials: Trials, state: State, batch: Batch) -> PseudoLabels:
        """The ensemble's pseudo-labels, the same for all heads (T, U M)."""
        return repeated(trials, super().pseudo_labels(trials, state, batch))

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Mean logits of the heads (T, B, K)."""
        return all_heads(trials, tensors, features).mean(2)


@register(
    "channel_freematch", options=ChannelFreeMatchOptions, source=_SOURCE, replaces="freematch", defaults=_DEFAULTS
)
class ChannelFreeMatch(ChannelFixMatch, FreeMatch):
    """FreeMatch with M heads on a shared adapter."""


@register("channel_ulfine", options=ChannelULFineOptions, source=_SOURCE, replaces="ulfine", defaults=_DEFAULTS)
class ChannelULFine(ULFine):
    """ULFine with M linear heads beside one similarity head, fused with it one by one."""

    def heads(self, config: FitConfig) -> int:
        """M."""
        return int(config.ensemble_heads)

    def start(self, trials: Trials) -> State:
        """Linear heads (T, M, K, D) at the textual prototypes, their channels (T, M, D), and the rest of ULFine."""
        return with_heads(trials, super().start(trials))

    def losses(self, trials: Trials, state: State, batch: Batch) -> Losses:
        """ULFine's, a mean over heads, and both terms of the ensemble in the regularizer."""
        return with_terms(trials, state, batch, super().losses(trials, state, folded(trials, batch)))

    def pseudo_logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Mean over heads of the fused logits (T, B, K)."""
        return _mean(trials, super().pseudo_logits(trials, tensors, features))

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Mean over heads of the logits that `predict_from` names (T, B, K)."""
        return _mean(trials, super().logits(trials, tensors, features))

    def both_logits(self, trials: Trials, tensors: Tensors, adapted: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of all linear heads, and of the similarity head once for each, both folded (T, B M, K)."""
        _, similarity = super().both_logits(trials, {**tensors, "linear": tensors["linear"][:, 0]}, adapted)
        heads = head_logits(trials, tensors, adapted).flatten(1, 2)
        return heads, similarity.repeat_interleave(heads_in(trials), 1)

    def unlabeled_loss(self, trials: Trials, state: State, strong: Tensor, pseudo: PseudoLabels) -> Tensor:
        """ULFine's, with the pseudo-labels once for every head."""
        return super().unlabeled_loss(trials, state, strong, repeated(trials, pseudo))

    def orthogonality_penalty(self, trials: Trials, state: State, adapted: Tensor, labels: Tensor) -> Tensor:
        """ULFine's; it reads rows before the heads, with one label each."""
        return super().orthogonality_penalty(trials, state, adapted, labels[:, :: heads_in(trials)])


def heads_in(trials: Trials) -> int:
    """M."""
    return int(trials.config.ensemble_heads)


def with_heads(trials: Trials, state: State) -> State:
    """A method's first state with M linear heads instead of one."""
    linear, heads = state.parameters["linear"], heads_in(trials)
    state.parameters["linear"] = linear.unsqueeze(1).repeat(1, heads, 1, 1)
    fraction = trials.values["ensemble_fraction"]
    state.memory["channels"] = draw_channels(trials.seeds, heads, linear.shape[-1], fraction)
    return state


def all_heads(trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
    """Logits (T, B, M, K) of unit features (T, B, D) or tokens."""
    return head_logits(trials, tensors, apply_adapter(tensors, features, trials.values["adapter_scale"]))


def head_logits(trials: Trials, tensors: Tensors, adapted: Tensor) -> Tensor:
    """Logits (T, B, M, K) of adapted rows (T, B, D)."""
    weights = full_gradient(tensors["linear"], heads_in(trials))
    return channel_logits(adapted, weights, tensors["channels"], trials.values["scale"])


def full_gradient(weights: Tensor, heads: int) -> Tensor:
    """The weights with M times the gradient: a mean over heads then moves each as its own loss would."""
    fixed = weights.detach()
    return fixed + heads * (weights - fixed)


def folded(trials: Trials, batch: Batch) -> Batch:
    """The batch with the label of each row once for every head (T, B M)."""
    return replace(batch, labels=batch.labels.repeat_interleave(heads_in(trials), 1))


def repeated(trials: Trials, pseudo: PseudoLabels) -> PseudoLabels:
    """Pseudo-labels once for every head, (T, U M)."""
    return PseudoLabels(*(part.repeat_interleave(heads_in(trials), 1) for part in pseudo))


def with_terms(trials: Trials, state: State, batch: Batch, losses: Losses) -> Losses:
    """Add `low_variance` times that term of labelled rows, and `low_bias` times that of strong views."""
    values = trials.values
    labeled = all_heads(trials, state.tensors, batch.labeled)  # (T, B, M, K)
    added = losses.regularizer + values["low_variance"] * low_variance(labeled, batch.labels)
    if batch.strong is not None and losses.pseudo is not None:
        strong = all_heads(trials, state.tensors, batch.strong)  # (T, U, M, K)
        added = added + values["low_bias"] * low_bias(strong, losses.pseudo.labels)
    return losses._replace(regularizer=added)


def _mean(trials: Trials, rows: Tensor) -> Tensor:
    """Mean over heads (T, B, K) of folded logits (T, B M, K)."""
    return rows.unflatten(1, (-1, heads_in(trials))).mean(2)
