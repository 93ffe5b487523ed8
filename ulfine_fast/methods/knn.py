"""Weighted nearest neighbours among labelled images, without training (InstDisc, arXiv 1805.01978, section 3.4).

DINO's evaluation has the same weights (arXiv 2104.14294, k = 20). Published: temperature 0.07, k = 200 among a million
labelled images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.config import FitConfig, option
from ulfine_fast.core.heads import Tensors
from ulfine_fast.core.types import Pool, State, Trials
from ulfine_fast.methods.base import BalancedVotesOptions, Method
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.graph import nearest
from ulfine_fast.ops.margins import balanced_one_hot
from ulfine_fast.ops.prototypes import normalize

_NO_VOTE = 1e-12  # added to all votes, so that the logarithm of none is finite


@dataclass(frozen=True)
class NearestNeighborsOptions(BalancedVotesOptions):
    """Options of :class:`NearestNeighbors`."""

    neighbors: int = option(5, "nearest labelled images that vote", low=1, structural=True, search=[1, 5, 20, 50])
    vote_temperature: float = option(
        0.07,
        "temperature t of a neighbour's vote, exp((cos - 1) / t)",
        low=0.001,
        search={"low": 0.01, "high": 1.0, "log": True},
    )


@register("knn", options=NearestNeighborsOptions, source="InstDisc, arXiv 1805.01978")
class NearestNeighbors(Method):
    """Logits log sum_i exp((x f_i - 1) / t) L_ik over the k labelled images i nearest to x.

    The papers count votes of balanced data. In a long tail frequent classes would outvote the others: here, for
    y_i = k, L_ik = (L / (K n_k))^tau, which is one-hot in balanced data and for tau = 0.
    """

    uses_texts = False
    trains = False
    uses_unlabeled = False
    uses_pool = True

    def pool_values(self, config: FitConfig, images: int, views: int, dim: int, classes: int) -> int:
        """Rows and logits, and the neighbours of each row."""
        return super().pool_values(config, images, views, dim, classes) + 64 * images * config.neighbors

    def start(self, trials: Trials) -> State:
        """The textual prototypes (T, K, D), by which a saved run knows D; the votes come with the pool."""
        return State({}, {"prototypes": trials.prototypes.clone()})

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        """Keep keys (T, L, D) and their votes (T, L, K), which are zero for padding."""
        votes = balanced_one_hot(pool.labels, trials.log_prior, trials.values["tau"])
        state.memory |= {"keys": normalize(pool.labeled), "votes": votes, "present": pool.labels >= 0}

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Log of the votes (T, B, K)."""
        near = nearest(features, tensors["keys"], tensors["present"], trials.config.neighbors)  # (T, B, k)
        weight = torch.exp((near.weight - 1) / trials.values["vote_temperature"].view(-1, 1, 1))
        trial = torch.arange(len(features), device=features.device).view(-1, 1)
        # one neighbour of every row at a time: all of them would take k times the logits' memory
        votes = torch.zeros(
            *features.shape[:2], tensors["votes"].shape[-1], dtype=features.dtype, device=features.device
        )
        for index, vote in zip(near.indices.unbind(-1), weight.unbind(-1), strict=True):
            votes += vote.unsqueeze(-1) * tensors["votes"][trial, index]  # (T, B, K)
        return torch.log(votes + _NO_VOTE)
