"""ULFine's two heads without its confirmation bias: clusters anchored by a probe, weighed by labels they have not seen.

The parts are those of ULFine (arXiv 2505.05062): prototypes fitted to the images (PAF), logits of both heads fused
(DLF). The rest is ours, each choice with its measured effect in docs/method.md. Nothing is carried from mini-batch to
mini-batch: the linear head is a probe on labels alone, the prototypes are clusters of all images at once, and how
far they are believed is decided by labelled images held out of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ulfine_fast.config import FitConfig, option
from ulfine_fast.core.heads import Tensors
from ulfine_fast.core.types import Pool, State, Trials
from ulfine_fast.methods.base import Method
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.clustering import Clusters, Evidence, Schedule, fit_clusters
from ulfine_fast.ops.evidence import fold_numbers, held_out_scores, starting_shares
from ulfine_fast.ops.mixture import Metric, Rows, Whitening, cosines, products, view_scatter, whitening
from ulfine_fast.ops.probe import fit_probe

_PROBE_STEPS, _PROBE_RATE = 200, 0.1
# scale, and whether strong views train too: encoders differ in how much their features bear
_PROBES = ((10.0, True), (25.0, True), (25.0, False))
_ROUNDS, _INNER, _HELD = 10, 3, 2
_TOGETHER = 4096


@dataclass(frozen=True)
class ULFinePlusOptions:
    """Options of :class:`ULFinePlus`."""

    folds: int = option(4, "folds of the labels that are held out one by one", low=2, structural=True)
    probe_weight: float = option(
        1.0,
        "weight of the labelled-only probe in the clusters' logits",
        low=0.0,
        search={"low": 0.3, "high": 2.0, "log": True},
        was=("lean",),
    )
    label_weight: float = option(
        10.0,
        "weight of a labelled image in its class's center",
        low=0.0,
        search={"low": 3.0, "high": 30.0, "log": True},
    )
    view_weight: float = option(
        1.0,
        "weight of the scatter between views in the whitening",
        low=0.0,
        search={"low": 0.3, "high": 3.0, "log": True},
    )
    shrinkage: float = option(
        0.05,
        "fraction of the scatter that is spread evenly over all directions",
        low=0.0,
        search={"low": 0.02, "high": 0.3, "log": True},
        was=("shrink",),
    )
    sharpness_start: float = option(
        10.0, "sharpness of the cluster probabilities in the first round", low=0.1, was=("blunt",)
    )
    sharpness_end: float = option(
        30.0,
        "sharpness of the cluster probabilities in the last round",
        low=0.1,
        search={"low": 15.0, "high": 50.0, "log": True},
        was=("sharp",),
    )
    prior_pseudo_count: float = option(
        0.3,
        "pseudo-count of the starting class prior, in sizes of the unlabelled set",
        low=0.0,
        search={"low": 0.1, "high": 1.0, "log": True},
        was=("pull",),
    )
    evidence_temperature: float = option(
        20.0,
        "factor on held-out log-likelihoods by which candidates are weighed",
        low=0.0,
        search={"low": 5.0, "high": 50.0, "log": True},
        was=("trust",),
    )


@register("ulfine_plus", options=ULFinePlusOptions, source="this package, after ULFine, arXiv 2505.05062")
class ULFinePlus(Method):
    """A labelled-only probe, and candidate clusterings that start from different class shares, mixed by evidence.

    Candidate s of fold j is fitted without the labels of that fold (all labels for j = 0) from the class shares s.
    """

    uses_unlabeled_pool = True
    trains = False
    uses_unlabeled = False
    uses_pool = True
    thresholds = False

    def pool_values(self, config: FitConfig, images: int, views: int, dim: int, classes: int) -> int:
        """All views and plain rows, and logits for every start and fold."""
        candidates = 5 * (1 + config.folds)
        return 2 * images * ((2 * views + 6) * dim + 8 * candidates * classes) + 8 * dim * dim

    def start(self, trials: Trials) -> State:
        """The textual prototypes (T, K, D), until the pool has been seen."""
        return State({}, {"linear": trials.prototypes.clone()})

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        """Fit probe and clusters with all labels and without each fold of them; weigh them by what they say of it."""
        classes = trials.prototypes.shape[1]
        folds = fold_numbers(trials.seeds, pool.labels, classes, trials.config.folds)  # (T, L)
        targets = _targets(pool.labels, folds, classes, trials.config.folds)  # (T, L, J, K)
        heads = _probes(pool, trials, targets, folds)  # (T, J, K, D)
        space = _space(pool, trials.values)
        starts = starting_shares(targets[:, :, 0].sum(1))  # (T, S, K)
        similar, whole = [], None
        # a fold at a time: what all candidates hold of every image at once is the most memory that training takes
        for evidence in _evidence(trials, pool, space, heads, targets, starts):
            clusters = fit_clusters(evidence, _schedule(trials))
            similar.append(clusters.cosines(evidence.labeled))
            whole = clusters if whole is None else whole
        assert whole is not None
        scores, temperatures = _judge(trials, pool, torch.stack(similar, dim=2), heads, folds)
        weights = torch.softmax(trials.values["evidence_temperature"].view(-1, 1) * scores, dim=1)  # (T, 1 + S)
        state.memory |= {"linear": heads[:, 0], "mean": space.mean, "map": space.map, **_kept(whole)}
        state.memory |= {"weights": weights, "temperature": temperatures}
        state.scratch["plan"] = _plan(pool, heads, whole, weights, temperatures)

    def drawn(self, trials: Trials, state: State) -> Tensor | None:
        """The mixture of the candidates' probabilities for the unlabelled images (T, N, K)."""
        return state.scratch.get("plan")

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Log of the mixed class probabilities (T, B, K)."""
        linear = _linear(features, tensors["linear"].unsqueeze(1))  # (T, B, 1, K)
        if "centers" not in tensors:
            return linear.squeeze(2)
        metric = Metric(tensors["factors"], tensors["core"])
        rows = Rows.under(Whitening(tensors["mean"], tensors["map"])(features), metric)
        fused = _fused(trials, cosines(rows, tensors["centers"], metric), linear)  # (T, B, S, K)
        return _mixed(torch.cat([linear, fused], dim=2), tensors["weights"], tensors["temperature"])


def _probes(pool: Pool, trials: Trials, targets: Tensor, folds: Tensor) -> Tensor:
    """Labelled-only heads (T, J, K, D) of the kind that held-out labels prefer, as long as their scale."""
    views, classes = pool.labeled_views, targets.shape[-1]
    easy = pool.features.easy
    found, scores = [], []
    for scale, strong in _PROBES:
        sigma = trials.zeros() + scale
        seen = views if strong else views[:, :, :easy]
        unit = fit_probe(seen, targets, trials.prototypes, sigma, _PROBE_RATE, _PROBE_STEPS)
        found.append(scale * unit)
        logits = _linear(pool.labeled, found[-1])  # (T, L, J, K)
        own = _own_fold(logits, folds)  # (T, L, K)
        scores.append(held_out_scores(own.unsqueeze(2), pool.labels, folds > 0, classes)[0].squeeze(1))
    best = torch.stack(scores).argmax(0)  # (T,)
    return torch.stack(found, dim=1)[torch.arange(len(best), device=best.device), best]


def _own_fold(values: Tensor, folds: Tensor) -> Tensor:
    """From values (T, L, J, ...) of every fold's fit, each row's by the fit that left it out (T, L, ...)."""
    own = folds.view(*folds.shape, *(1,) * (values.dim() - 2))
    return values.gather(2, own.expand(-1, -1, 1, *values.shape[3:])).squeeze(2)


def _targets(labels: Tensor, folds: Tensor, classes: int, count: int) -> Tensor:
    """One-hot labels with fold j left out (T, L, 1 + folds, K); nothing is left out of the first."""
    member = F.one_hot(labels.clamp(min=0), classes) * (labels >= 0).unsqueeze(-1)  # (T, L, K)
    numbers = torch.arange(count + 1, device=labels.device)
    kept = (numbers == 0) | (folds.unsqueeze(-1) != numbers)  # (T, L, 1 + folds)
    return (member.unsqueeze(2) * kept.unsqueeze(-1)).float()


def _space(pool: Pool, values: Tensors) -> Whitening:
    """Whitening by all training images and by what the views change."""
    rows = torch.cat([pool.labeled, pool.unlabeled], dim=1)
    present = torch.cat([pool.labels >= 0, pool.present], dim=1)
    nuisance = None
    if pool.features.views.shape[1] > 1:
        index = torch.cat([pool.labeled_rows, pool.unlabeled_rows], dim=1)
        # a share of the rows at a time: all views in float32 are many times what the cache holds
        parts = zip(index.split(_TOGETHER, dim=1), present.split(_TOGETHER, dim=1), strict=True)
        found = [view_scatter(pool.features.all_views(part), there) * _share(there, present) for part, there in parts]
        nuisance = torch.stack(found).sum(0)
    return whitening(rows, present, nuisance, values["shrinkage"], values["view_weight"])


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Present rows in a part (T, n) of the whole (T, N), as a share (T, 1, 1)."""
    return (part.sum(1) / whole.sum(1).clamp(min=1)).view(-1, 1, 1)


def _evidence(
    trials: Trials, pool: Pool, space: Whitening, heads: Tensor, targets: Tensor, starts: Tensor
) -> Iterator[Evidence]:
    """What the candidates of each fold are fitted to."""
    candidates = starts.shape[1]
    probe_weight = trials.values["probe_weight"].view(-1, 1, 1, 1)
    weight = trials.values["label_weight"].view(-1, 1, 1, 1)
    labeled, hidden = space(pool.labeled), space(pool.unlabeled) * pool.present.unsqueeze(-1)
    for fold in range(heads.shape[1]):
        given, head = targets[:, :, fold : fold + 1], heads[:, fold : fold + 1]
        anchor = probe_weight * _linear(pool.unlabeled, head)
        yield Evidence(
            labeled=labeled,
            given=(weight * given).expand(-1, -1, candidates, -1),
            hidden=hidden,
            present=pool.present,
            anchor=anchor.expand(-1, -1, candidates, -1),
            start=starts,
        )


def _schedule(trials: Trials) -> Schedule:
    values = trials.values
    sharpness = values["sharpness_start"], values["sharpness_end"]
    return Schedule(_ROUNDS, _INNER, _HELD, *sharpness, values["prior_pseudo_count"])


def _linear(features: Tensor, heads: Tensor) -> Tensor:
    """The probes' logits: unit rows (T, n, D) and heads (T, J, K, D) give (T, n, J, K)."""
    return products(features, heads)


def _fused(trials: Trials, similarity: Tensor, linear: Tensor) -> Tensor:
    """Both heads' logits of equal class shares (T, n, S, K), from cosines (T, n, S, K) and the probe's logits."""
    sharpness = trials.values["sharpness_end"].view(-1, 1, 1, 1)
    return sharpness * similarity + trials.values["probe_weight"].view(-1, 1, 1, 1) * linear


def _judge(trials: Trials, pool: Pool, similarity: Tensor, heads: Tensor, folds: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and temperatures (T, 1 + S) of the probe and of every start, each row judged by those that left it out.

    The cosines of labelled rows come as (T, L, J, S, K).
    """
    linear = _linear(pool.labeled, heads)  # (T, L, J, K)
    fused = _fused(trials, similarity.flatten(2, 3), linear.repeat_interleave(similarity.shape[3], dim=2))
    both = torch.cat([linear.unsqueeze(3), fused.unflatten(2, similarity.shape[2:4])], dim=3)  # (T, L, J, 1 + S, K)
    return held_out_scores(_own_fold(both, folds), pool.labels, folds > 0, heads.shape[2])


def _kept(clusters: Clusters) -> Tensors:
    """The candidates fitted with all labels, as tensors to keep."""
    metric = clusters.metric
    return {"centers": clusters.centers, "factors": metric.factors, "core": metric.core, "shares": clusters.shares}


def _plan(pool: Pool, heads: Tensor, clusters: Clusters, weights: Tensor, temperatures: Tensor) -> Tensor:
    """Mixed probabilities of the unlabelled images (T, N, K), with their estimated class shares."""
    linear = torch.log_softmax(_linear(pool.unlabeled, heads[:, :1]), -1)
    plan = torch.log(clusters.plan.clamp(min=1e-12))
    return torch.exp(_mixed(torch.cat([linear, plan], dim=2), weights, temperatures))


def _mixed(logits: Tensor, weights: Tensor, temperatures: Tensor) -> Tensor:
    """Log of the weighted mean of the candidates' probabilities: (T, n, 1 + S, K) to (T, n, K)."""
    log_probabilities = torch.log_softmax(logits / temperatures[:, None, :, None], dim=-1)
    return torch.logsumexp(log_probabilities + torch.log(weights + 1e-12)[:, None, :, None], dim=2)
