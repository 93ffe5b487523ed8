"""ULFine's two heads without its confirmation bias: clusters anchored by a probe, weighted by held-out labels.

The parts are those of ULFine (arXiv 2505.05062): prototypes fitted to the images (PAF), logits of both heads fused
(DLF). The rest is ours, each choice with its measured effect in docs/method.md. Nothing is learned from mini-batches:
the linear head is a probe on labels alone, the prototypes are clusters of all images, and labelled images that were
held out of both decide the weight of each.
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
from ulfine_fast.ops.clustering import Clusters, Evidence, Schedule, fit_clusters
from ulfine_fast.ops.evidence import fold_numbers, held_out_scores, starting_priors
from ulfine_fast.ops.mixture import Metric, Rows, Whitening, cosines, products, view_scatter, whitening
from ulfine_fast.ops.probe import fit_probe

_PROBE_STEPS = 200
_PROBE_RATE = 0.1
# candidates: scale, and whether strong views train too; which of them is best depends on the encoder
_PROBES = ((10.0, True), (25.0, True), (25.0, False))
# of the clustering: rounds, EM steps in each, and first rounds in which the starting prior is held
_ROUNDS = 10
_STEPS = 3
_HELD_ROUNDS = 2
# images whose views are converted to float32 together
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
    """A labelled-only probe and clusterings that start from several class priors, mixed by held-out likelihood.

    Candidate s of fold j starts from prior s and is fitted without the labels of fold j; with all labels for j = 0.
    """

    uses_unlabeled_pool = True
    trains = False
    uses_unlabeled = False
    uses_pool = True
    uses_threshold = False

    def pool_values(self, config: FitConfig, images: int, views: int, dim: int, classes: int) -> int:
        """All views and plain rows, and logits for every prior and fold."""
        candidates = 5 * (1 + config.folds)
        return 2 * images * ((2 * views + 6) * dim + 8 * candidates * classes) + 8 * dim * dim

    def start(self, trials: Trials) -> State:
        """The textual prototypes (T, K, D), until the pool has been seen."""
        return State({}, {"linear": trials.prototypes.clone()})

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        """Fit probes and clusters with all labels and without each fold of them; weigh them by the held-out labels."""
        values = trials.values
        classes = trials.prototypes.shape[1]

        # folds of the labels; from fold 0 nothing is held out
        folds = fold_numbers(trials.seeds, pool.labels, classes, trials.config.folds)  # (T, L)
        targets = _targets(pool.labels, folds, classes, trials.config.folds)  # (T, L, J, K)
        priors = starting_priors(targets[:, :, 0].sum(1))  # (T, S, K)

        # probes, and features whitened
        heads = _probes(pool, trials, targets, folds)  # (T, J, K, D)
        space = _space(pool, values)
        labeled = space(pool.labeled)
        unlabeled = space(pool.unlabeled) * pool.present.unsqueeze(-1)

        schedule = Schedule(
            rounds=_ROUNDS,
            steps=_STEPS,
            held_rounds=_HELD_ROUNDS,
            sharpness_start=values["sharpness_start"],
            sharpness_end=values["sharpness_end"],
            prior_pseudo_count=values["prior_pseudo_count"],
        )

        def clusters_without(fold: int) -> Clusters:
            """The candidates of a fold."""
            weights = values["label_weight"].view(-1, 1, 1, 1) * targets[:, :, fold : fold + 1]
            anchor = values["probe_weight"].view(-1, 1, 1, 1) * products(pool.unlabeled, heads[:, fold : fold + 1])
            evidence = Evidence(
                labeled=labeled,
                label_weights=weights.expand(-1, -1, priors.shape[1], -1),
                unlabeled=unlabeled,
                present=pool.present,
                anchor=anchor.expand(-1, -1, priors.shape[1], -1),
                prior=priors,
            )
            return fit_clusters(evidence, schedule)

        # clusters, a fold at a time, as the candidates' probabilities of all images take the most memory
        clusters = clusters_without(0)
        similarity = [clusters.cosines(labeled)]
        similarity += [clusters_without(fold).cosines(labeled) for fold in range(1, heads.shape[1])]

        # the probe and each candidate, scored on labels that they were fitted without
        linear = products(pool.labeled, heads).unsqueeze(3)  # (T, L, J, 1, K)
        fused = _fused(values, torch.stack(similarity, dim=2), linear)  # (T, L, J, S, K)
        held_out = _held_out(torch.cat([linear, fused], dim=3), folds)  # (T, L, 1 + S, K)
        scores, temperatures = held_out_scores(held_out, pool.labels, folds > 0, classes)
        weights = torch.softmax(values["evidence_temperature"].view(-1, 1) * scores, dim=1)  # (T, 1 + S)

        # what predicts: the probe and the candidates fitted with all labels
        state.memory |= {
            "linear": heads[:, 0],
            "mean": space.mean,
            "map": space.map,
            "centers": clusters.centers,
            "factors": clusters.metric.factors,
            "core": clusters.metric.core,
            "shares": clusters.prior,
            "weights": weights,
            "temperature": temperatures,
        }
        linear = torch.log_softmax(products(pool.unlabeled, heads[:, :1]), -1)
        candidates = torch.log(clusters.probabilities.clamp(min=1e-12))
        mixed = _log_mixture(torch.cat([linear, candidates], dim=2), weights, temperatures)
        state.scratch["probabilities"] = torch.exp(mixed)

    def pool_probabilities(self, trials: Trials, state: State) -> Tensor | None:
        """The candidates' mixed probabilities of the unlabelled images (T, N, K), by their estimated class prior."""
        return state.scratch.get("probabilities")

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Log of the mixed class probabilities (T, B, K), of equal class priors."""
        linear = products(features, tensors["linear"].unsqueeze(1))  # (T, B, 1, K)
        if "centers" not in tensors:
            return linear.squeeze(2)
        metric = Metric(tensors["factors"], tensors["core"])
        rows = Rows.under(Whitening(tensors["mean"], tensors["map"])(features), metric)
        fused = _fused(trials.values, cosines(rows, tensors["centers"], metric), linear)  # (T, B, S, K)
        return _log_mixture(torch.cat([linear, fused], dim=2), tensors["weights"], tensors["temperature"])


def _targets(labels: Tensor, folds: Tensor, classes: int, count: int) -> Tensor:
    """One-hot labels with fold j left out (T, L, 1 + folds, K); nothing is left out of the first."""
    member = F.one_hot(labels.clamp(min=0), classes) * (labels >= 0).unsqueeze(-1)  # (T, L, K)
    numbers = torch.arange(count + 1, device=labels.device)
    kept = (numbers == 0) | (folds.unsqueeze(-1) != numbers)  # (T, L, 1 + folds)
    return (member.unsqueeze(2) * kept.unsqueeze(-1)).float()


def _held_out(values: Tensor, folds: Tensor) -> Tensor:
    """From values (T, L, J, ...) of every fold's fit, each row's by the fit without it (T, L, ...)."""
    index = folds.view(*folds.shape, *(1,) * (values.dim() - 2))
    return values.gather(2, index.expand(-1, -1, 1, *values.shape[3:])).squeeze(2)


def _probes(pool: Pool, trials: Trials, targets: Tensor, folds: Tensor) -> Tensor:
    """Labelled-only heads (T, J, K, D) of the kind that held-out labels prefer, as long as their scale."""
    views, classes = pool.labeled_views, targets.shape[-1]
    heads, scores = [], []
    for scale, with_strong in _PROBES:
        seen = views if with_strong else views[:, :, : pool.features.easy]
        unit = fit_probe(seen, targets, trials.prototypes, trials.zeros() + scale, _PROBE_RATE, _PROBE_STEPS)
        heads.append(scale * unit)
        logits = _held_out(products(pool.labeled, heads[-1]), folds)  # (T, L, K)
        scores.append(held_out_scores(logits.unsqueeze(2), pool.labels, folds > 0, classes)[0].squeeze(1))
    best = torch.stack(scores).argmax(0)  # (T,)
    return torch.stack(heads, dim=1)[torch.arange(len(best), device=best.device), best]


def _space(pool: Pool, values: Tensors) -> Whitening:
    """Whitening by the scatter of all training images and of their views."""
    rows = torch.cat([pool.labeled, pool.unlabeled], dim=1)
    present = torch.cat([pool.labels >= 0, pool.present], dim=1)
    nuisance = None
    if pool.features.views.shape[1] > 1:
        # some of the rows at a time: all views in float32 are many times what the cache holds
        index = torch.cat([pool.labeled_rows, pool.unlabeled_rows], dim=1)
        total = present.sum(1).clamp(min=1)  # (T,)
        scatters = []
        for part, part_present in zip(index.split(_TOGETHER, dim=1), present.split(_TOGETHER, dim=1), strict=True):
            fraction = (part_present.sum(1) / total).view(-1, 1, 1)
            scatters.append(view_scatter(pool.features.all_views(part), part_present) * fraction)
        nuisance = torch.stack(scatters).sum(0)
    return whitening(rows, present, nuisance, values["shrinkage"], values["view_weight"])


def _fused(values: Tensors, similarity: Tensor, linear: Tensor) -> Tensor:
    """Logits of equal class priors from cosines (T, ..., S, K) and the probe's logits (T, ..., 1, K)."""
    shape = (-1,) + (1,) * (similarity.dim() - 1)
    return values["sharpness_end"].view(shape) * similarity + values["probe_weight"].view(shape) * linear


def _log_mixture(logits: Tensor, weights: Tensor, temperatures: Tensor) -> Tensor:
    """Log of the weighted mean of the candidates' probabilities: (T, n, 1 + S, K) to (T, n, K)."""
    log_probabilities = torch.log_softmax(logits / temperatures[:, None, :, None], dim=-1)
    return torch.logsumexp(log_probabilities + torch.log(weights + 1e-12)[:, None, :, None], dim=2)
