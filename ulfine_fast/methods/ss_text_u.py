"""SS-Text-U (arXiv 2603.02959): prototypes of text, labelled and transported unlabelled images, in closed form.

Rounds alternate between a transport plan of the unlabelled images onto the labelled class frequencies and the
prototypes that minimise the objective under it. As published: three rounds of ten scalings; text counts the less the
more labels a class has; a class without labels has a quarter of the rarest one's frequency; the temperature of plan and
prototypes is one over CLIP's logit scale. Ours: `text_weight` and `unlabeled_weight`, both one in the paper. Without
weight of the unlabelled images the method is SS-Text (arXiv 2506.17500); without labels too it is `zero_shot`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.config import option
from ulfine_fast.core.heads import Tensors, cosine_logits
from ulfine_fast.core.types import Pool, State, Trials
from ulfine_fast.methods.base import StreamedMethod
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.class_totals import class_totals, label_weights
from ulfine_fast.ops.distributions import filled_prior
from ulfine_fast.ops.transport import class_potentials, held

_ROUNDS = 3
_SCALINGS = 10


@dataclass(frozen=True)
class SSTextUOptions:
    """Options of :class:`SSTextU`."""

    plan_scale: float = option(
        100.0,
        "logit scale sigma of plan and prototypes; the smaller, the more the text counts",
        low=0.01,
        search={"low": 10.0, "high": 200.0, "log": True},
    )
    text_weight: float = option(
        1.0,
        "weight of the text in the prototypes",
        low=0.0,
        search={"low": 0.1, "high": 10.0, "log": True},
    )
    unlabeled_weight: float = option(
        1.0,
        "weight of the unlabelled images in the prototypes; 0 is SS-Text",
        low=0.0,
        search={"low": 0.1, "high": 10.0, "log": True},
    )


@register("ss_text_u", options=SSTextUOptions, source="SS-Text-U, arXiv 2603.02959")
class SSTextU(StreamedMethod):
    """w_k = t_k + sigma n_k / (2 L) sum_i x_i + sigma / N sum_u q_uk x_u, with i over the n_k labelled images of k."""

    def start(self, trials: Trials) -> State:
        """Prototypes (T, K, D) at the text, potentials (T, K) of the plan at zero."""
        return State({}, {"prototypes": trials.prototypes.clone(), "potential": torch.zeros_like(trials.log_prior)})

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        """Three rounds of plan and prototypes, from text and labelled images on."""
        texts, scale = trials.prototypes, trials.values["plan_scale"]
        log_prior = torch.log(filled_prior(trials.log_prior))
        width = max(texts.shape[1:])
        chunks = pool.unlabeled_chunks

        # text and labelled images
        labeled = class_totals(pool.labeled_chunks, label_weights(pool.labels, texts.shape[1]), texts)
        total = labeled.mass.sum(1, keepdim=True).clamp(min=1)  # (T, 1)
        pace = scale.view(-1, 1) * labeled.mass / (2 * total)  # (T, K)
        supervised = trials.values["text_weight"].view(-1, 1, 1) * texts + pace.unsqueeze(-1) * labeled.sums

        # plan and prototypes
        prototypes = supervised
        count = chunks.present.sum(1).clamp(min=1)  # (T,)
        weight = (trials.values["unlabeled_weight"] * scale / count).view(-1, 1, 1)

        def scores() -> Iterator[tuple[Tensor, Tensor]]:
            for _, rows, present in chunks.split(width):
                yield cosine_logits(rows, prototypes, scale), present

        def plan(position: slice, rows: Tensor) -> Tensor:
            return torch.softmax(cosine_logits(rows, prototypes, scale) + potential.unsqueeze(1), -1)

        potential = class_potentials(held(scores), log_prior, _SCALINGS)
        for number in range(_ROUNDS):
            prototypes = supervised + weight * class_totals(chunks, plan, texts).sums
            potential = class_potentials(held(scores), log_prior, _SCALINGS)
            pool.report((number + 1) / _ROUNDS)
        state.memory |= {"prototypes": prototypes, "potential": potential}

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Sigma * cos(x, w_k), shape (T, B, K)."""
        return cosine_logits(features, tensors["prototypes"], trials.values["scale"])

    def pseudo_logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Log of the plan up to a constant of the row (T, B, K)."""
        logits = cosine_logits(features, tensors["prototypes"], trials.values["plan_scale"])
        return logits + tensors["potential"].unsqueeze(1)
