"""SOTA, first called OTFusion (arXiv 2506.13723): one transport plan shared by the posteriors of several sources.

The plan Q has equal rows and equal classes and maximises <Q, sum_e a_e P^e> plus its entropy. A source with texts has
the posterior P of its zero-shot classifier, one without has that of a Gaussian mixture whose means and variance follow
the plan. The weight a_e of a source is the fraction of images whose most probable class is the plan's, divided by the
mean of all sources. Here a cache's encoder is both sources: its text, and a mixture of its images.

Ours: rounds, scalings and `plan_entropy`; one diagonal variance for all classes, log-likelihoods divided by
`likelihood_temperature`; labelled images are rows of the plan that have their label (the paper has none), each as heavy
in the mixture as `labeled_weight` others, and they vote on the sources' weights; the mixture starts from them, and from
the zero-shot assignments where a class has none; new images get the plan's potential, without the log prior of
`plan_prior`. The defaults of these two options were chosen on held-out training images of CIFAR-10.

Where the mixture has no weight (`mixture_weight` 0) the plan is the entropic one of the zero-shot posteriors alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ulfine_fast.config import option
from ulfine_fast.core.heads import Tensors, cosine_logits
from ulfine_fast.core.types import Pool, State, Trials
from ulfine_fast.methods.base import LikelihoodOptions, StreamedMethod
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.class_totals import ClassTotals, class_totals, label_weights
from ulfine_fast.ops.distributions import filled_prior
from ulfine_fast.ops.transport import class_potentials, held

_ROUNDS = 10
_SCALINGS = 10
_SMALLEST = 1e-8


@dataclass(frozen=True)
class OTFusionOptions(LikelihoodOptions):
    """Options of :class:`OTFusion`."""

    plan_prior: str = option(
        "uniform",
        "class prior of the unlabelled images in the plan: uniform as published, or that of the labelled ones",
        choices=("uniform", "labeled"),
        structural=True,
    )
    plan_entropy: float = option(
        0.1,
        "entropy of the plan, in probabilities; near 0 every image has one class",
        low=0.01,
        search={"low": 0.03, "high": 1.0, "log": True},
    )
    mixture_weight: float = option(
        1.0,
        "factor on the weight of the images' mixture beside the text",
        low=0.0,
        search={"low": 0.3, "high": 3.0, "log": True},
    )


@register("otfusion", options=OTFusionOptions, source="SOTA (OTFusion), arXiv 2506.13723")
class OTFusion(StreamedMethod):
    """Logits (a_1 text(x) + a_2 mixture(x)) / entropy + potential, of which the plan is the softmax."""

    def start(self, trials: Trials) -> State:
        """Means (T, K, D) at the text, variance (T, D) of 1 / D, source weights (T, 2), potential and prior (T, K)."""
        texts = trials.prototypes
        zeros = torch.zeros_like(trials.log_prior)
        return State(
            {},
            {
                "prototypes": texts.clone(),
                "means": texts.clone(),
                "variance": torch.full_like(texts[:, 0], 1.0 / texts.shape[-1]),
                "sources": _factors(trials),
                "potential": zeros,
                "log_target": zeros.clone(),
            },
        )

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        """Ten rounds of mixture, plan and source weights."""
        texts, memory = trials.prototypes, state.memory
        chunks = pool.unlabeled_chunks
        prior = filled_prior(trials.log_prior)
        if trials.config.plan_prior == "uniform":
            prior = torch.full_like(prior, 1.0 / prior.shape[1])
        log_prior = torch.log(prior)
        one_hot = label_weights(pool.labels, texts.shape[1])
        labeled = class_totals(pool.labeled_chunks, one_hot, texts)

        # the mixture starts at the labelled images, where there are none of a class at the zero-shot assignments
        guessed = class_totals(chunks, lambda _, rows: _text(trials, memory, rows), texts)
        _fit(memory, labeled + guessed * (labeled.mass == 0))
        memory["sources"] = _factors(trials)

        def scores() -> Iterator[tuple[Tensor, Tensor]]:
            for _, rows, present in chunks.split(max(texts.shape[1:])):
                yield self._scores(trials, memory, rows), present

        def plan(position: slice, rows: Tensor) -> Tensor:
            return torch.softmax(self.pseudo_logits(trials, memory, rows), -1)

        for number in range(_ROUNDS):
            memory["potential"] = class_potentials(held(scores), log_prior, _SCALINGS)
            totals = class_totals(chunks, plan, texts)
            memory["sources"] = _factors(trials) * self._agreement(trials, memory, pool)
            _fit(memory, totals + labeled * trials.values["labeled_weight"].view(-1, 1))
            pool.report((number + 1) / _ROUNDS)
        memory["potential"] = class_potentials(held(scores), log_prior, _SCALINGS)
        memory["log_target"] = torch.where(pool.present.any(1, keepdim=True), log_prior, 0.0)

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Scores and potentials, less the log prior of the plan (T, B, K)."""
        return self.pseudo_logits(trials, tensors, features) - tensors["log_target"].unsqueeze(1)

    def pseudo_logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Log of the plan up to a constant of the row (T, B, K)."""
        return self._scores(trials, tensors, features) + tensors["potential"].unsqueeze(1)

    def _scores(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Weighted sum of the sources' posteriors over the entropy (T, B, K)."""
        weights = tensors["sources"] / trials.values["plan_entropy"].view(-1, 1)  # (T, 2)
        text, mixture = _text(trials, tensors, features), _mixture(trials, tensors, features)
        return weights[:, 0].view(-1, 1, 1) * text + weights[:, 1].view(-1, 1, 1) * mixture

    def _agreement(self, trials: Trials, tensors: Tensors, pool: Pool) -> Tensor:
        """Fractions of images whose most probable class by each source is the plan's, over their mean (T, 2)."""
        right = torch.zeros_like(tensors["sources"])
        width = max(trials.prototypes.shape[1:])
        for _, rows, present in pool.unlabeled_chunks.split(width):
            classes = self.pseudo_logits(trials, tensors, rows).argmax(-1)
            right = right + _hits(trials, tensors, rows, torch.where(present, classes, -1))
        for position, rows, _ in pool.labeled_chunks.split(width):
            right = right + _hits(trials, tensors, rows, pool.labels[:, position])
        return right / right.mean(1, keepdim=True).clamp(min=_SMALLEST)


def _factors(trials: Trials) -> Tensor:
    """Factors on the weights of text and mixture (T, 2)."""
    return torch.stack([trials.zeros() + 1, trials.values["mixture_weight"]], dim=1)


def _text(trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
    """Zero-shot probabilities (T, B, K)."""
    return torch.softmax(cosine_logits(features, tensors["prototypes"], trials.values["scale"]), -1)


def _mixture(trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
    """Probabilities (T, B, K) of Gaussians of one diagonal variance and equal priors."""
    scaled = tensors["means"] / tensors["variance"].unsqueeze(1)  # (T, K, D)
    likelihood = features @ scaled.transpose(1, 2) - 0.5 * (scaled * tensors["means"]).sum(-1).unsqueeze(1)
    return torch.softmax(likelihood / trials.values["likelihood_temperature"].view(-1, 1, 1), -1)


def _hits(trials: Trials, tensors: Tensors, features: Tensor, classes: Tensor) -> Tensor:
    """How many rows (T, B) each source puts into their class (T, 2); rows of class -1 count nowhere."""
    sources = (_text(trials, tensors, features), _mixture(trials, tensors, features))
    return torch.stack([(source.argmax(-1) == classes).sum(1) for source in sources], 1).to(features.dtype)


def _fit(tensors: Tensors, totals: ClassTotals) -> None:
    """Means (T, K, D) of the classes and their common variance (T, D)."""
    mass = totals.mass.unsqueeze(-1)
    means = torch.where(mass > _SMALLEST, totals.sums / mass.clamp(min=_SMALLEST), tensors["means"])
    squares = (totals.squares - 2 * means * totals.sums + mass * means.square()).sum(1)  # (T, D)
    tensors["means"] = means
    tensors["variance"] = (squares / mass.sum(1).clamp(min=_SMALLEST)).clamp(min=_SMALLEST)
