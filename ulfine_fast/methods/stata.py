"""StatA (arXiv 2501.03729): one Gaussian for each class, anchored in mean and variance at the text.

The objective is the images' likelihood, less the divergence of their assignments z from the zero-shot ones p, less
`anchor_weight` alpha times the divergence of each class's Gaussian from its anchor N(t_k, Sigma_0); Gaussians are
diagonal. The M-step has a closed form: with n_k the mass of class k, b_k = n_k / (n_k + alpha), mean m_k and variance
S_k of its images,

    mu_k = b_k m_k + (1 - b_k) t_k,    Sigma_k = b_k S_k(mu_k) + (1 - b_k) (Sigma_0 + (t_k - mu_k)^2),

and z ~ p N(x; mu_k, Sigma_k). There is no class prior. Ours: labelled images are images whose z is their label
(the paper has none), each as heavy as `labeled_weight` others; Sigma_0 is the same in all dimensions, the mean squared
distance of the unlabelled images from their anchors by zero-shot assignment; log-likelihoods are divided by
`likelihood_temperature`, since dimensions are not independent; ten rounds; no graph of neighbours. Both defaults were
chosen on held-out training images of CIFAR-10.

With an infinite anchor all classes keep text and Sigma_0, whose likelihood orders them as the cosine does: the
predictions are those of `zero_shot`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.config import option
from ulfine_fast.core.heads import Tensors, cosine_logits
from ulfine_fast.core.types import Pool, State, Trials
from ulfine_fast.methods.base import LikelihoodOptions, StreamedMethod
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.class_totals import ClassTotals, class_totals, label_weights

_ROUNDS = 10
_SMALLEST = 1e-8


@dataclass(frozen=True)
class StatAOptions(LikelihoodOptions):
    """Options of :class:`StatA`."""

    anchor_weight: float = option(
        1.0,
        "images that the text of a class counts for in its mean and variance",
        low=0.0,
        search={"low": 0.1, "high": 100.0, "log": True},
    )


@register("stata", options=StatAOptions, source="StatA, arXiv 2501.03729")
class StatA(StreamedMethod):
    """Log p(k | x) by the text plus log N(x; mu_k, Sigma_k), whose parameters the anchor holds where images are few."""

    def start(self, trials: Trials) -> State:
        """Means (T, K, D) at the text, equal variances (T, K, D) of 1 / D."""
        texts = trials.prototypes
        variance = torch.full_like(texts, 1.0 / texts.shape[-1])
        return State({}, {"prototypes": texts.clone(), "means": texts.clone(), "variance": variance})

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        """Ten rounds of Gaussians and assignments, from the zero-shot assignments on."""
        texts, memory = trials.prototypes, state.memory
        alpha = trials.values["anchor_weight"].view(-1, 1)
        labeled = class_totals(pool.labeled_chunks, label_weights(pool.labels, texts.shape[1]), texts)
        labeled = labeled * trials.values["labeled_weight"].view(-1, 1)

        # the anchor: variance around the texts by zero-shot assignments
        totals = class_totals(
            pool.unlabeled_chunks, lambda _, rows: torch.softmax(_text(trials, memory, rows), -1), texts
        )
        around = _squares_around(totals, texts).sum((1, 2)) / texts.shape[-1]
        total = totals.mass.sum(1)
        # without unlabelled images what the start has
        anchor = torch.where(total > 0, around / total.clamp(min=1), 1.0 / texts.shape[-1]).view(-1, 1, 1)

        def assigned(position: slice, rows: Tensor) -> Tensor:
            return torch.softmax(self.logits(trials, state.memory, rows), -1)

        for number in range(_ROUNDS):
            # Gaussians
            totals = totals + labeled
            weight = (totals.mass + alpha).clamp(min=_SMALLEST).unsqueeze(-1)  # (T, K, 1)
            pulled = alpha.unsqueeze(-1)
            means = (totals.sums + pulled * texts) / weight
            spread = _squares_around(totals, means) + pulled * (anchor + (texts - means).square())
            memory |= {"means": means, "variance": (spread / weight).clamp(min=_SMALLEST)}
            # assignments
            totals = class_totals(pool.unlabeled_chunks, assigned, texts)
            pool.report((number + 1) / _ROUNDS)

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Log p(k | x) + log N(x; mu_k, Sigma_k) / temperature, up to a constant of the row (T, B, K)."""
        means, precision = tensors["means"], 1 / tensors["variance"]
        # multiplied out: the differences themselves would be (T, B, K, D)
        distance = features.square() @ precision.transpose(1, 2) - 2 * features @ (means * precision).transpose(1, 2)
        constant = (means.square() * precision - torch.log(precision)).sum(-1)  # (T, K)
        likelihood = -0.5 * (distance + constant.unsqueeze(1))
        temperature = trials.values["likelihood_temperature"].view(-1, 1, 1)
        return torch.log_softmax(_text(trials, tensors, features), -1) + likelihood / temperature


def _text(trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
    return cosine_logits(features, tensors["prototypes"], trials.values["scale"])


def _squares_around(totals: ClassTotals, centers: Tensor) -> Tensor:
    """Weighted sums of (x - c_k)^2 (T, K, D) around centers (T, K, D)."""
    squares = totals.squares - 2 * centers * totals.sums + totals.mass.unsqueeze(-1) * centers.square()
    return squares.clamp(min=0)
