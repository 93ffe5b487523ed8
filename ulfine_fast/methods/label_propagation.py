"""Label propagation over texts and images, after ZLaP (arXiv 2404.04072); nothing is trained.

Nodes are the K textual prototypes and all training images. Different here: labelled images are sources beside the texts
(the paper is zero-shot), a class's sources weighted against its frequency, and a new image is compared with images and
texts by all their scores, not by sparsified ones. Published: 5 neighbours, alpha 0.3, gamma 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ulfine_fast.config import FitConfig, option
from ulfine_fast.core.heads import Tensors
from ulfine_fast.core.types import Pool, State, Trials
from ulfine_fast.methods.base import Method
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.graph import Neighbors, nearest, normalized, propagate, symmetric
from ulfine_fast.ops.margins import balanced_one_hot
from ulfine_fast.ops.prototypes import normalize


@dataclass(frozen=True)
class LabelPropagationOptions:
    """Options of :class:`LabelPropagation`."""

    tau: float = option(
        1.0, "power of the weights that count rare classes' labelled images more; 0 is one-hot", low=0.0
    )
    neighbors: int = option(
        5, "nearest neighbours that an image is linked to", low=1, structural=True, search=[3, 5, 7, 10, 15, 25]
    )
    propagation: float = option(
        0.3,
        "how far labels travel, alpha in (I - alpha S) z = y",
        low=0.0,
        high=0.99,
        search={"low": 0.05, "high": 0.95},
    )
    text_power: float = option(
        5.0, "power gamma of cosines between images and texts", low=0.0, search={"low": 1.0, "high": 10.0}
    )


@register("label_propagation", options=LabelPropagationOptions, source="after ZLaP, arXiv 2404.04072")
class LabelPropagation(Method):
    """(I - alpha S) z = y over a graph of nearest neighbours; edges to texts weigh cos^gamma (`text_power`)."""

    uses_unlabeled_pool = True
    trains = False
    uses_unlabeled = False
    uses_pool = True
    uses_threshold = False

    def pool_values(self, config: FitConfig, images: int, views: int, dim: int, classes: int) -> int:
        """Rows and logits, and the neighbours of each row."""
        return super().pool_values(config, images, views, dim, classes) + 64 * images * config.neighbors

    def start(self, trials: Trials) -> State:
        """The textual prototypes (T, K, D); the graph comes with the pool."""
        return State({}, {"prototypes": trials.prototypes.clone()})

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        """Build the graph and solve it: scores (T, M + K, K) of M images, labelled ones first, and K texts."""
        rows = torch.cat([pool.labeled_rows, pool.unlabeled_rows], 1)  # (T, M)
        present = torch.cat([pool.labels >= 0, pool.present], 1)
        # as stored, which halves what a run keeps
        state.memory |= {"pictures": pool.features.plain[rows], "present": present}
        links = self._links(trials, state.tensors, pool.features.rows(rows), skip_self=True)
        # padding is no one's neighbour already, and must have none either
        links = links._replace(weight=links.weight * present.unsqueeze(-1))
        sources = _sources(trials, pool.labels, rows.shape[1])
        graph = normalized(symmetric(links, sources.shape[1]))
        # rounding alone makes a score negative
        scores = propagate(graph, sources, trials.values["propagation"]).clamp(min=0)
        state.memory["scores"] = scores
        labeled = pool.labels.shape[1]
        state.scratch["probabilities"] = torch.softmax(_log(scores[:, labeled : rows.shape[1]]), -1)

    def pool_probabilities(self, trials: Trials, state: State) -> Tensor | None:
        """Scores of the unlabelled images' own nodes as probabilities (T, N, K)."""
        return state.scratch["probabilities"]

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Log of the scores summed over a new image's neighbours by weight (T, B, K), the paper's dual solution."""
        links = self._links(trials, tensors, features)
        trial = torch.arange(len(features), device=features.device).view(-1, 1)
        # one neighbour of every row at a time: all of them would take k times the logits' memory
        summed = sum(
            weight.unsqueeze(-1) * tensors["scores"][trial, index]  # (T, B, K)
            for index, weight in zip(links.indices.unbind(-1), links.weight.unbind(-1), strict=True)
        )
        return _log(torch.as_tensor(summed))

    def _links(self, trials: Trials, tensors: Tensors, rows: Tensor, *, skip_self: bool = False) -> Neighbors:
        """The k nearest images and the k nearest texts of unit rows (T, B, D), as nodes of the graph."""
        images = normalize(tensors["pictures"].to(rows.dtype))
        texts = tensors["prototypes"]
        count = trials.config.neighbors
        near_images = nearest(rows, images, tensors["present"], count, skip_self=skip_self)
        near_texts = nearest(rows, texts, torch.ones_like(texts[..., 0], dtype=torch.bool), count)
        # cosines of text and image are on another scale than those of two images; 0^0 would be an edge
        power = near_texts.weight ** trials.values["text_power"].view(-1, 1, 1)
        text_weight = torch.where(near_texts.weight > 0, power, near_texts.weight)
        index = torch.cat([near_images.indices, images.shape[1] + near_texts.indices], -1)
        return Neighbors(index, torch.cat([near_images.weight, text_weight], -1))


def _sources(trials: Trials, labels: Tensor, images: int) -> Tensor:
    """Sources y (T, M + K, K): (L / (K n_k))^tau at a labelled image of class k, 1 at the text of class k."""
    labeled = balanced_one_hot(labels, trials.log_prior, trials.values["tau"])
    texts = torch.eye(labeled.shape[-1], device=labels.device).expand(len(labels), -1, -1)
    return torch.cat([F.pad(labeled, (0, 0, 0, images - labels.shape[1])), texts], 1)


def _log(scores: Tensor) -> Tensor:
    """Logits whose softmax is the scores over their sum; uniform for an image without neighbours."""
    return torch.log(scores + 1e-12)
