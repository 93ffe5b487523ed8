"""OTTER (arXiv 2404.08461): zero-shot labels moved onto an estimated class prior by optimal transport.

As published: the cost of an image in a class is minus the log of its zero-shot probability, images weigh the same, and
classes have the estimated prior of the unlabelled images. Labelled images serve that estimate alone: by default it
inverts the confusions of the zero-shot classifier on them (black-box shift estimation, arXiv 1802.03916).

Ours: confusions are mean probabilities, and the estimate is drawn to the labelled frequencies, since a class of one or
two labels has no confusions to speak of; a class without labels counts as recognised, with a quarter of the rarest
other one's frequency. The plan is entropic at a small `transport_entropy`, reached by halving it from one; at zero it
is the paper's. Its potential, which is added to a class's logits, extends it to new images; predictions of equal class
priors leave the log prior out.

With `label_prior` "own", the zero-shot classifier's own frequencies, at entropy one nothing moves: the plan is that of
`zero_shot`.
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
from ulfine_fast.ops.class_totals import label_weights
from ulfine_fast.ops.distributions import filled_prior
from ulfine_fast.ops.transport import class_potentials, held

_SCALINGS = 20  # at each entropy
_LEAST_PRIOR = 0.01  # smallest class prior, in units of an even one


@dataclass(frozen=True)
class OTTEROptions:
    """Options of :class:`OTTER`."""

    label_prior: str = option(
        "estimated",
        "class prior of the unlabelled images; own is the zero-shot classifier's",
        choices=("estimated", "labeled", "uniform", "own"),
        structural=True,
        search=["estimated", "labeled", "uniform"],
    )
    prior_shrinkage: float = option(
        0.01,
        "how far the estimated prior is drawn to the labelled frequencies",
        low=1e-6,
        search={"low": 1e-4, "high": 1.0, "log": True},
    )
    transport_entropy: float = option(
        0.1,
        "entropy of the plan, in logits; near 0 every image has one class",
        low=0.01,
        high=1.0,
        structural=True,
        search=[0.03, 0.1, 0.3, 1.0],
    )


@register("otter", options=OTTEROptions, source="OTTER, arXiv 2404.08461")
class OTTER(StreamedMethod):
    """Plan of least cost -log p(k | x) of zero-shot probabilities, its columns an estimated class prior."""

    def start(self, trials: Trials) -> State:
        """The textual prototypes (T, K, D); potential and log prior (T, K) are zero, which is zero-shot."""
        zeros = torch.zeros_like(trials.log_prior)
        return State({}, {"prototypes": trials.prototypes.clone(), "potential": zeros, "log_target": zeros.clone()})

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        """Estimate the prior, then solve the transport at ever smaller entropy."""
        chunks = pool.unlabeled_chunks

        def scores() -> Iterator[tuple[Tensor, Tensor]]:
            for _, rows, present in chunks.split(max(trials.prototypes.shape[1:])):
                logits = cosine_logits(rows, trials.prototypes, trials.values["scale"])
                yield torch.log_softmax(logits, -1), present

        parts = held(scores)
        total = torch.zeros_like(trials.log_prior)
        for part, present in parts():
            total = total + (part.exp() * present.unsqueeze(-1)).sum(1)
        own = total / total.sum(1, keepdim=True).clamp(min=1e-12)
        log_prior = torch.log(self._prior(trials, pool, own).clamp(min=1e-12))

        entropies = [1.0]
        while entropies[-1] > trials.config.transport_entropy:
            entropies.append(max(entropies[-1] / 2, trials.config.transport_entropy))
        potential = torch.zeros_like(log_prior)
        for number, entropy in enumerate(entropies):

            def scaled(entropy: float = entropy) -> Iterator[tuple[Tensor, Tensor]]:
                for part, present in parts():
                    yield part / entropy, present

            potential = entropy * class_potentials(scaled, log_prior, _SCALINGS, potential / entropy)
            pool.report((number + 1) / len(entropies))

        # a trial without unlabelled images stays zero-shot
        known = pool.present.any(1, keepdim=True)
        state.memory |= {"potential": potential, "log_target": torch.where(known, log_prior, 0.0)}

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Log p(k | x) and the potential, less the log prior (T, B, K)."""
        return self._plan(trials, tensors, features) - tensors["log_target"].unsqueeze(1)

    def pseudo_logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Log of the plan up to a constant of the row (T, B, K)."""
        return self._plan(trials, tensors, features) / trials.config.transport_entropy

    def _plan(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        logits = cosine_logits(features, tensors["prototypes"], trials.values["scale"])
        return torch.log_softmax(logits, -1) + tensors["potential"].unsqueeze(1)

    def _prior(self, trials: Trials, pool: Pool, own: Tensor) -> Tensor:
        """Class prior (T, K) of the unlabelled images, whose mean zero-shot probability is `own`."""
        labeled = filled_prior(trials.log_prior)
        match trials.config.label_prior:
            case "own":
                return own
            case "labeled":
                return labeled
            case "uniform":
                return torch.full_like(labeled, 1.0 / labeled.shape[1])
        # rows: classes of images, columns: mean probabilities that they get
        confusion = torch.zeros_like(labeled.unsqueeze(-1) * labeled.unsqueeze(1))
        count = torch.zeros_like(labeled)
        one_hot = label_weights(pool.labels, labeled.shape[1])
        for position, rows, _ in pool.labeled_chunks.split(max(trials.prototypes.shape[1:])):
            members = one_hot(position, rows)  # (T, n, K)
            probabilities = torch.softmax(cosine_logits(rows, trials.prototypes, trials.values["scale"]), -1)
            confusion = confusion + members.transpose(1, 2) @ probabilities
            count = count + members.sum(1)
        recognised = torch.eye(labeled.shape[1], device=labeled.device).expand_as(confusion)
        confusion = torch.where(count.unsqueeze(-1) > 0, confusion / count.clamp(min=1).unsqueeze(-1), recognised)
        return shifted_prior(confusion, own, labeled, trials.values["prior_shrinkage"])


def shifted_prior(confusion: Tensor, observed: Tensor, start: Tensor, shrinkage: Tensor) -> Tensor:
    """The prior r that minimises ||C^T r - q||^2 + s ||r - r_0||^2, made positive (T, K).

    Args:
        confusion: C, mean probabilities that images of each class get (T, K, K).
        observed: q, mean probabilities of images of unknown class (T, K).
        start: r_0 (T, K).
        shrinkage: s, above 0 (T,).
    """
    missing = observed - (confusion.transpose(1, 2) @ start.unsqueeze(-1)).squeeze(-1)
    identity = torch.eye(start.shape[1], device=start.device, dtype=start.dtype)
    system = confusion @ confusion.transpose(1, 2) + shrinkage.view(-1, 1, 1) * identity
    lower = torch.linalg.cholesky_ex(system).L
    moved = torch.cholesky_solve(confusion @ missing.unsqueeze(-1), lower).squeeze(-1)
    prior = (start + moved).clamp(min=_LEAST_PRIOR / start.shape[1])
    return prior / prior.sum(1, keepdim=True)
