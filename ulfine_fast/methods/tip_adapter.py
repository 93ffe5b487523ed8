"""Tip-Adapter: a key-value cache of labelled images beside the text's logits, without training (arXiv 2111.03930).

Different here: a key is the plain view, where the paper averages ten random crops.
Published: alpha 1, beta 5.5, scale 100; alpha and beta searched on validation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.config import option
from ulfine_fast.core.heads import Tensors, cosine_logits
from ulfine_fast.core.types import Pool, State, Trials
from ulfine_fast.methods.base import BalancedVotesOptions, Method
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.margins import balanced_one_hot
from ulfine_fast.ops.prototypes import normalize


@dataclass(frozen=True)
class TipAdapterOptions(BalancedVotesOptions):
    """Options of :class:`TipAdapter`."""

    cache_weight: float = option(
        1.0, "weight alpha of the cache beside the text", low=0.0, search={"low": 0.1, "high": 30.0, "log": True}
    )
    cache_sharpness: float = option(
        5.5,
        "sharpness beta of a key's affinity, exp(-beta (1 - cos))",
        low=0.0,
        search={"low": 1.0, "high": 50.0, "log": True},
    )


@register("tip_adapter", options=TipAdapterOptions, source="Tip-Adapter, arXiv 2111.03930")
class TipAdapter(Method):
    """Logits sigma x t_k + alpha sum_i exp(-beta (1 - x f_i)) L_ik over labelled images i (its section 3).

    The paper has as many images of each class, where L is one-hot. In a long tail frequent classes would outvote the
    others: here L_ik = (L / (K n_k))^tau for y_i = k, which is one-hot in balanced data and for tau = 0.
    """

    trains = False
    uses_unlabeled = False
    uses_pool = True

    def start(self, trials: Trials) -> State:
        """The textual prototypes (T, K, D); the cache comes with the pool."""
        return State({}, {"prototypes": trials.prototypes.clone()})

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        """Fill keys (T, L, D) and values (T, L, K), which are zero for padding."""
        # a later refresh would undo what a subclass has trained
        if step == 0:
            values = balanced_one_hot(pool.labels, trials.log_prior, trials.values["tau"])
            state.memory |= {"keys": pool.labeled, "values": values}

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Text and cache together (T, B, K)."""
        values = trials.values
        alpha, beta = values["cache_weight"].view(-1, 1, 1), values["cache_sharpness"].view(-1, 1, 1)
        text = cosine_logits(features, tensors["prototypes"], values["scale"])
        # unit keys bound the affinity by one, however far training has moved them
        affinity = torch.exp(beta * (features @ normalize(tensors["keys"]).transpose(1, 2) - 1))  # (T, B, L)
        return text + alpha * (affinity @ tensors["values"])
