"""A Gaussian mixture over all training images, held by the text and a graph, after TransCLIP (arXiv 2406.01837).

Blocks of the objective are minimised one after the other: assignments z, means mu, one diagonal covariance for all
classes. Different here: neighbours are searched among labelled images too, and new images are predicted by text and
mixture, without the graph. Published: 3 neighbours, lambda 0.5, scale 100, gamma (`labeled_weight`) among 0.1, 0.5, 1
and 10 by validation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ulfine_fast.config import FitConfig, option
from ulfine_fast.core.heads import Tensors, cosine_logits
from ulfine_fast.core.types import Pool, State, Trials
from ulfine_fast.methods.base import Method
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.graph import nearest, spread, symmetric
from ulfine_fast.ops.prototypes import normalize

_ROUNDS, _INNER = 10, 5  # as released
_TEMPER = 50.0  # the released code divides the log-likelihood by it
_SMALLEST = 1e-8


class _Images(NamedTuple):
    """All M training images of T trials, labelled ones first.

    Attributes:
        features: (T, M, D).
        labels: one-hot (T, M, K), zero where not labelled.
        present: bool (T, M).
        mass: weight of each in means and variance (T, M), 0 for padding.
        graph: W + W^T of their nearest neighbours (T M, T M).
    """

    features: Tensor
    labels: Tensor
    present: Tensor
    mass: Tensor
    graph: Tensor


@dataclass(frozen=True)
class MixtureOptions:
    """Options of :class:`Mixture`."""

    neighbors: int = option(
        5, "nearest neighbours that an image is linked to", low=1, structural=True, search=[3, 5, 7, 10, 15, 25]
    )
    anchor: float = option(
        0.5, "weight lambda of the text's log probabilities", low=0.0, search={"low": 0.05, "high": 5.0, "log": True}
    )
    labeled_weight: float = option(
        1.0,
        "weight of all labelled images in means and covariance, the unlabelled ones having 1",
        low=0.0,
        search={"low": 0.1, "high": 10.0, "log": True},
    )


@register("gmm", options=MixtureOptions, source="after TransCLIP, arXiv 2406.01837")
class Mixture(Method):
    """z_i ~ text(x_i)^lambda exp(log p(x_i | mu_k, Sigma) / 50 + mean of its neighbours' z); labelled z_i are known."""

    uses_unlabeled_pool = True
    trains = False
    uses_unlabeled = False
    uses_pool = True
    uses_threshold = False

    def pool_values(self, config: FitConfig, images: int, views: int, dim: int, classes: int) -> int:
        """Rows and logits, and the neighbours of each row."""
        return super().pool_values(config, images, views, dim, classes) + 64 * images * config.neighbors

    def start(self, trials: Trials) -> State:
        """Means (T, K, D) at the text, the shared variance (T, D) at 1 / D."""
        prototypes = trials.prototypes
        variance = torch.full_like(prototypes[:, 0], 1.0 / prototypes.shape[-1])
        return State({}, {"prototypes": prototypes.clone(), "means": prototypes.clone(), "variance": variance})

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        """Ten rounds of assignments, means and variance, from the labelled class means on."""
        images = _images(trials, pool)
        memory = state.memory
        memory["means"] = _means(images.labels, images.features, memory["means"])
        assigned = _clamp(torch.softmax(_text(trials, memory, images.features), -1), images)
        for _ in range(_ROUNDS):
            assigned = self._assign(trials, memory, images, assigned)
            weights = assigned * images.mass.unsqueeze(-1)  # (T, M, K)
            memory["means"] = _means(weights, images.features, memory["means"])
            memory["variance"] = _variance(weights, images.features, memory["means"])
        assigned = self._assign(trials, memory, images, assigned)
        state.scratch["assigned"] = assigned[:, pool.labels.shape[1] :]

    def pool_probabilities(self, trials: Trials, state: State) -> Tensor | None:
        """Assignments z of the unlabelled images (T, N, K)."""
        return state.scratch["assigned"]

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Lambda log text(x) + log p(x | mu_k, Sigma) / 50, up to a constant of the row, (T, B, K)."""
        anchor = trials.values["anchor"].view(-1, 1, 1) * torch.log_softmax(_text(trials, tensors, features), -1)
        return anchor + _log_likelihood(tensors, features) / _TEMPER

    def _assign(self, trials: Trials, tensors: Tensors, images: _Images, assigned: Tensor) -> Tensor:
        """Assignments (T, M, K) by a few fixed-point steps, since neighbours move together."""
        logits = self.logits(trials, tensors, images.features)
        for _ in range(_INNER):
            neighbor_mean = spread(images.graph, assigned) / (2 * trials.config.neighbors)
            assigned = _clamp(torch.softmax(logits + neighbor_mean, -1), images)
        return assigned


def _images(trials: Trials, pool: Pool) -> _Images:
    # features and labels
    rows = torch.cat([pool.labeled_rows, pool.unlabeled_rows], 1)  # (T, M)
    labeled = pool.labels >= 0
    present = torch.cat([labeled, pool.present], 1)
    features = pool.features.rows(rows)
    one_hot = F.one_hot(pool.labels.clamp(min=0), trials.log_prior.shape[1]) * labeled.unsqueeze(-1)
    labels = F.pad(one_hot.to(features.dtype), (0, 0, 0, pool.present.shape[1]))

    # weights: gamma / L for each labelled image, 1 / N for each of the others
    parts = [part / part.sum(1, keepdim=True).clamp(min=1) for part in (labeled.float(), pool.present.float())]
    mass = torch.cat([trials.values["labeled_weight"].view(-1, 1) * parts[0], parts[1]], 1)

    # graph: padding is no one's neighbour already, and must have none either
    links = nearest(features, features, present, trials.config.neighbors, skip_self=True)
    links = links._replace(weight=links.weight * present.unsqueeze(-1))
    return _Images(features, labels, present, mass, symmetric(links, rows.shape[1]))


def _clamp(assigned: Tensor, images: _Images) -> Tensor:
    """Labelled images keep their label, padding belongs to no class."""
    known = images.labels.sum(-1, keepdim=True) > 0
    return torch.where(known, images.labels, assigned) * images.present.unsqueeze(-1)


def _means(weights: Tensor, features: Tensor, before: Tensor) -> Tensor:
    """Unit means (T, K, D) of images (T, M, D) by weight (T, M, K); a class without weight keeps its mean."""
    sums = weights.transpose(1, 2) @ features
    total = weights.sum(1).unsqueeze(-1)
    return torch.where(total > _SMALLEST, normalize(sums / total.clamp(min=_SMALLEST)), before)


def _variance(weights: Tensor, features: Tensor, means: Tensor) -> Tensor:
    """Weighted mean of (x - mu_k)^2 over images and classes, (T, D)."""
    total = weights.sum(1)  # (T, K)
    squares = (weights.sum(-1, keepdim=True) * features.square()).sum(1)
    crossed = ((weights.transpose(1, 2) @ features) * means).sum(1)
    # multiplied out: the differences themselves would be (T, M, K, D)
    deviation = squares - 2 * crossed + (total.unsqueeze(-1) * means.square()).sum(1)
    return (deviation / total.sum(1, keepdim=True).clamp(min=_SMALLEST)).clamp(min=_SMALLEST)


def _text(trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
    return cosine_logits(features, tensors["prototypes"], trials.values["scale"])


def _log_likelihood(tensors: Tensors, features: Tensor) -> Tensor:
    """-1/2 sum_d (x - mu_k)^2 / sigma_d^2 without the part that all classes share, (T, B, K)."""
    scaled = tensors["means"] / tensors["variance"].unsqueeze(1)  # (T, K, D)
    return features @ scaled.transpose(1, 2) - 0.5 * (scaled * tensors["means"]).sum(-1).unsqueeze(1)
