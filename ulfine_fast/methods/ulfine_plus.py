"""ULFine's two heads without its confirmation bias: clusters anchored by a probe, weighted by held-out labels.

The parts are those of ULFine (arXiv 2505.05062): prototypes fitted to the images (PAF), logits of both heads fused
(DLF). The rest is ours, each choice with its measured effect in docs/method.md. Nothing is learned from mini-batches:
the linear head is a probe on labels alone, the prototypes are clusters of all images, and labelled images that were
held out of both decide the weight of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.config import FitConfig, option
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.core.heads import Tensors, frozen_end, last_norm
from ulfine_fast.core.types import Inputs, Pool, Report, State, Trials
from ulfine_fast.data.splits import Split
from ulfine_fast.methods.base import Method
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.clustering import Clusters, Evidence, RowChunks, Schedule, cosines, fit_clusters
from ulfine_fast.ops.evidence import (
    balanced_gain,
    class_sums,
    fold_numbers,
    held_out_scores,
    label_likelihoods,
    starting_priors,
)
from ulfine_fast.ops.mixture import (
    Metric,
    Scatter,
    Whitening,
    leading_directions,
    products,
    view_scatter,
    whitening,
)
from ulfine_fast.ops.philox import Purpose, uniforms
from ulfine_fast.ops.probe import class_starts, fit_probe
from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.ops.softmax import log_softmax, softmax

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache

# dimensions of the feature before the projection that are kept beside the projected one, and of a second encoder
WIDE = 192
# candidates: the length of a second encoder's feature in the joined one, beside leaving it out; the first stays unless
# another one is more likely than by chance
SECOND_WEIGHTS = (0.5, 0.5**0.5, 0.75**0.5)
# candidates: sharpness of the weights of a class's prompts and descriptions by their cosine with its cluster, beside
# its prompts alone
TEXT_SHARPNESS = (0.0, 10.0)
# of the assignment that these clusters come from
TEXT_SCALE = 25.0
PROBE_RATE = 0.2
# candidates: scale of the cosines, and step at which the probe is read; the earlier, the nearer to the texts
PROBE_SCALES = (10.0, 25.0)
PROBE_STOPS = (4, 20, 100)
# starting priors of the clusters
STARTS = 5
# of the clustering: rounds, fewer where candidates are only judged, EM steps in each, and first rounds in which the
# starting prior is held
ROUNDS = 6
JUDGED_ROUNDS = 4
STEPS = 2
HELD_ROUNDS = 2
# unlabelled images that the clusters begin with, of which candidates are judged: at least so many, and so many a class
SAMPLE = 2000
SAMPLE_PER_CLASS = 10
# rounds over all images, where there are more
LAST_ROUNDS = 2
# a candidate of less weight is left out
LEAST_WEIGHT = 0.01
# an image fits no class where so small a fraction of held-out labelled images is as far from all classes
NO_CLASS = 0.01
# images whose views are converted to float32 together
TOGETHER = 4096


@dataclass(frozen=True)
class ULFinePlusOptions:
    """Options of :class:`ULFinePlus`."""

    feature: str = option(
        "projected",
        "what is classified; pre-projection puts what the encoder has before its projection beside the projected "
        "feature, and needs a cache made by extract --features pre-projection or last-block",
        choices=("projected", "pre-projection"),
        structural=True,
        tokens="pre-projection",
    )
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
    # each candidate has its temperature by all held-out labels; a few validation images would only spoil it
    calibrates = True
    takes_tokens = True
    takes_second = True

    def check(self, cache: FeatureCache, config: FitConfig, split: Split) -> None:
        """Refuse a feature that the cache does not hold."""
        if config.feature == "pre-projection" and not cache.trainable_tokens:
            raise InputError(
                "feature pre-projection reads what the encoder has before its projection, which this cache does not "
                "hold; extract again with --features pre-projection, or take feature projected"
            )

    def pool_values(self, config: FitConfig, images: int, views: int, dim: int, classes: int) -> int:
        """A sample of the images, class sums for every prior and fold, a chunk of rows, and the labelled views."""
        sample = min(images, max(SAMPLE, SAMPLE_PER_CLASS * classes))
        candidates = STARTS * config.folds
        clusters = candidates * classes * (6 * dim + 2 * min(classes, dim))
        probes = (2 + len(PROBE_STOPS)) * len(PROBE_SCALES) * (1 + config.folds) * classes * dim
        labeled = min(images, sample) * (views + 2) * dim
        return sample * (dim + candidates) + clusters + probes + labeled + 4 * TOGETHER * views * dim + 8 * dim * dim

    def inputs(self, cache: FeatureCache, splits: Sequence[Split], device: torch.device) -> Inputs:
        """What held-out labels judge of the cache: texts, descriptions of classes, and a second encoder.

        "has_text", "second", the length of the second encoder's rows, and of classes that are described "texts" (M, D),
        all prompts and sentences, and their classes "text_labels" (M,).
        """
        second = 0 if cache.second is None else cache.second.dim
        shared = {"has_text": torch.tensor(cache.prototypes is not None), "second": torch.tensor(second)}
        if cache.descriptions is not None and cache.text_features is not None:
            classes, prompts = cache.text_features.shape[:2]
            labels = torch.from_numpy(cache.descriptions.labels(cache.class_names))
            texts = torch.cat(
                [torch.from_numpy(cache.text_features).flatten(0, 1), torch.from_numpy(cache.descriptions.features)]
            )
            of_prompts = torch.arange(classes).repeat_interleave(prompts)
            shared |= {"texts": texts.to(device), "text_labels": torch.cat([of_prompts, labels]).to(device)}
        return Inputs(shared=shared)

    def start(self, trials: Trials) -> State:
        """The textual prototypes (T, K, D), until the pool has been seen."""
        return State({}, {"linear": trials.prototypes.clone()})

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        """Fit the clusters; of several readings of the cache, held-out labels choose one for each trial."""
        readings = _readings(trials)
        if len(readings) == 1:
            self._fit(trials, state, pool, readings[0])
            return
        fits = []
        for number, reading in enumerate(readings):

            def report(fraction: float, number: int = number) -> None:
                pool.report((number + fraction) / len(readings))

            fits.append(State({}))
            self._fit(trials, fits[-1], replace(pool, report=report), reading)

        # the reading under which held-out labels are most likely, where they are more so than by chance; the usual one
        # leaves descriptions aside and reads a second encoder, which was asked for, at its first weight
        classes = trials.prototypes.shape[1]
        known = fits[0].scratch["held_out_probabilities"].isfinite()  # (T, L)
        likelihoods = torch.stack([_log_likelihoods(one.scratch) for one in fits])  # (V, T, L)
        weights = [reading.weight or 0.0 for reading in readings]
        usual = 1 if any(weights) else 0
        others = [number for number in range(len(readings)) if number != usual]
        gains = torch.stack(
            [balanced_gain(one - likelihoods[usual], pool.labels, known, classes) for one in likelihoods]
        )
        best, best_gain = _best_gain(gains, others)
        chosen = torch.where(_exceeds_error(best_gain), best, usual)  # (T,)
        state.memory |= _of_variant([one.memory for one in fits], chosen)
        state.scratch |= _of_variant([one.scratch for one in fits], chosen)

        # what each addition is worth by itself, as it is read, or at its best where it is not
        rights = torch.stack([one.scratch["held_out_right"] for one in fits]).nan_to_num()  # (V, T, L)
        described = [float(reading.sharpness is not None) for reading in readings]
        for name, strength, other in (("second", weights, described), ("descriptions", described, weights)):
            added = [number for number in range(len(readings)) if strength[number] and not other[number]]
            if added:
                is_read = torch.isin(chosen, torch.tensor(added, device=chosen.device))
                shown = torch.where(is_read, chosen, _best_gain(gains, added)[0])
                right = rights[shown, torch.arange(len(shown), device=shown.device)]
                state.scratch[f"gain_{name}"] = balanced_gain(right - rights[0], pool.labels, known, classes)
                state.scratch[f"weight_of_{name}"] = torch.tensor(strength, device=chosen.device)[chosen].square()

    def _fit(self, trials: Trials, state: State, pool: Pool, reading: _Reading) -> None:
        """Judge the starting priors by labels that are held out, then fit those that are worth it with all labels."""
        values = trials.values
        classes = trials.prototypes.shape[1]

        images = pool.present.shape[1]
        sample_size = min(images, max(SAMPLE, SAMPLE_PER_CLASS * classes))
        work = _Work(
            {
                "probes": len(PROBE_SCALES) * max(PROBE_STOPS) * (1 + trials.config.folds) * pool.labels.shape[1],
                "folds": JUDGED_ROUNDS * STEPS * STARTS * trials.config.folds * sample_size,
                "sample": ROUNDS * STEPS * STARTS * sample_size,
                "all": LAST_ROUNDS * STEPS * STARTS * images if images > sample_size else 0,
            },
            pool.report,
        )

        # the feature before the projection, or of a second encoder, in main directions, which a sample shows
        index, present = _sample_rows(trials.seeds, pool, sample_size)
        joining: Tensors = {}
        texts_mean = trials.prototypes.mean(1, keepdim=True)
        if trials.config.feature == "pre-projection" or reading.weight is not None:
            rows = torch.cat([pool.labeled_rows, index], dim=1)
            joining = _joining(
                trials, pool.features, rows, torch.cat([pool.labels >= 0, present], dim=1), reading.weight
            )
            pool = replace(pool, features=_Joined.of(pool.features, joining))
            trials = replace(trials, prototypes=_joined_texts(trials.prototypes, joining))

        # folds of the labels; from fold 0 nothing is held out
        folds = fold_numbers(trials.seeds, pool.labels, classes, trials.config.folds)  # (T, L)
        numbers = torch.arange(trials.config.folds + 1, device=folds.device)
        kept = ((numbers == 0) | (folds.unsqueeze(-1) != numbers)) & (pool.labels >= 0).unsqueeze(-1)  # (T, L, J)

        # probes, and features whitened
        views = pool.labeled_views  # (T, L, V, D)
        has_text = bool(trials.inputs.shared["has_text"])
        if reading.sharpness is not None:
            starts = _described(trials, pool, joining, kept, index, present, texts_mean, reading.sharpness)
        elif has_text:
            starts = trials.prototypes.unsqueeze(1).expand(-1, kept.shape[2], -1, -1)  # (T, J, K, D)
        else:
            # class means of all labels would know what a fold holds out
            starts = class_starts(pool.labeled, pool.labels, kept, classes)
        scales = starts.new_tensor(PROBE_SCALES).expand(len(starts), -1)
        heads, scale_weights = _probes(pool, views, trials, scales, kept, folds, starts, work.part("probes"))
        space = _space(pool, values)
        whitened, offsets = space.linear(values["probe_weight"].view(-1, 1, 1, 1) * heads)
        everything = RowChunks(
            pool.present, lambda first, last: space(pool.features.rows(pool.unlabeled_rows[:, first:last]))
        )
        sample = RowChunks.of(space(pool.features.rows(index)), present)
        counts = class_sums((pool.labels >= 0).to(trials.log_prior.dtype), pool.labels, classes)
        evidence = Evidence(
            labeled=space(pool.labeled),
            labels=pool.labels,
            label_weights=values["label_weight"].view(-1, 1, 1) * kept,
            unlabeled=sample,
            heads=whitened,
            offsets=offsets,
            prior=starting_priors(counts),  # (T, S, K)
        )
        schedule = Schedule(
            rounds=ROUNDS,
            steps=STEPS,
            held_rounds=HELD_ROUNDS,
            sharpness_start=values["sharpness_start"],
            sharpness_end=values["sharpness_end"],
            prior_pseudo_count=values["prior_pseudo_count"],
        )

        # candidates without the labels of each fold, scored on these labels beside the probe
        brief = replace(schedule, rounds=JUDGED_ROUNDS)
        judged = fit_clusters(_fits(evidence, slice(1, None)), brief, report=work.part("folds"))
        likelihoods, similarities = [], []
        for position, logits, largest in _held_out_logits(values, pool, heads, judged, evidence, folds):
            likelihoods.append(label_likelihoods(logits, pool.labels[:, position]))
            similarities.append(largest)
        scores, temperatures = held_out_scores(torch.cat(likelihoods, dim=1), pool.labels, folds > 0, classes)
        weights = torch.softmax(values["evidence_temperature"].view(-1, 1) * scores, dim=1)  # (T, 1 + S)

        # those worth fitting with all labels: on the sample, then on all images
        weights = torch.where(weights < LEAST_WEIGHT, 0.0, weights)
        weights = weights / weights.sum(1, keepdim=True)
        count = max(1, int((weights[:, 1:] > 0).sum(1).max()))
        best = torch.topk(weights[:, 1:], count, dim=1).indices  # (T, S')
        chosen = replace(
            _fits(evidence, slice(0, 1)), prior=evidence.prior.gather(1, best.unsqueeze(-1).expand(-1, -1, classes))
        )
        clusters = fit_clusters(chosen, schedule, report=work.part("sample"))
        if sample_size < images:
            last = replace(schedule, rounds=LAST_ROUNDS, sharpness_start=schedule.sharpness_end)
            clusters = fit_clusters(replace(chosen, unlabeled=everything), last, clusters, work.part("all"))

        # what predicts
        columns = torch.cat([torch.zeros_like(best[:, :1]), best + 1], dim=1)  # (T, 1 + S')
        state.memory |= {
            **joining,
            "linear": heads[:, 0],
            "mean": space.mean,
            "map": space.map,
            "centers": clusters.centers,
            "factors": clusters.metric.factors,
            "shares": clusters.prior,
            "weights": weights.gather(1, columns),
            "temperature": temperatures.gather(1, columns),
        }

        # what it says of itself
        known = folds > 0
        by_probe, by_mixture, own_probabilities, own_scores = [], [], [], []
        for position, logits, _ in _held_out_logits(values, pool, heads, judged, evidence, folds):
            labels = pool.labels[:, position]
            mixture = _log_mixture(logits, weights, temperatures)  # (T, n, K)
            by_probe.append(logits[:, :, 0].argmax(-1) == labels)
            by_mixture.append(mixture.argmax(-1) == labels)
            own = softmax(mixture).gather(-1, labels.clamp(min=0).unsqueeze(-1))
            own_probabilities.append(own.squeeze(-1))
            own_scores.append(torch.logsumexp(_mixed_logits(logits, weights, temperatures), dim=-1))
        right = torch.cat(by_probe, dim=1).to(weights.dtype)  # (T, L)
        right_by_mixture = torch.cat(by_mixture, dim=1).to(weights.dtype)
        gain = right_by_mixture - right
        state.scratch["held_out_right"] = torch.where(known, right_by_mixture, torch.nan)
        state.scratch["held_out"] = known.sum(1)
        for name, columns_of in (("probabilities", own_probabilities), ("scores", own_scores)):
            state.scratch[f"held_out_{name}"] = torch.where(known, torch.cat(columns_of, dim=1), torch.nan)
        state.scratch["gain_unlabeled"] = balanced_gain(gain, pool.labels, known, classes)
        if has_text:
            # of the scale that predicts held-out labels best
            scale = scales.gather(1, scale_weights.argmax(1, keepdim=True))
            blind = _right_without_text(pool, views, trials, scale, kept[:, :, 1:], folds, classes)
            state.scratch["gain_text"] = balanced_gain(right - blind, pool.labels, known, classes)
        own = state.memory["weights"][:, 1:]  # (T, S')
        prior = (own.unsqueeze(-1) * clusters.prior).sum(1) + 1e-12
        state.scratch["estimated_prior"] = prior / prior.sum(1, keepdim=True)
        state.scratch["weight_of_probe"] = weights[:, 0]
        least = _least_similarity(torch.cat(similarities, dim=1), known).gather(1, best)
        state.scratch["no_class"] = _far_from_all(everything, clusters, own, least)

    def evidence(self, trials: Trials, state: State) -> Tensors:
        """Gains on held-out labels, with intervals, and what the unlabelled images are like."""
        names = (
            *("held_out", "gain_unlabeled", "gain_text", "gain_second", "weight_of_second", "gain_descriptions"),
            *("weight_of_descriptions", "weight_of_probe", "no_class", "estimated_prior"),
        )
        return {name: state.scratch[name] for name in names if name in state.scratch}

    def held_out(self, trials: Trials, state: State) -> Tensors:
        """The labelled images as the fits without their folds see them."""
        return {name: state.scratch[f"held_out_{name}"] for name in ("probabilities", "scores")}

    def known_logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """The candidates' logits (T, B, K), mixed before they are made probabilities, which sum to one everywhere."""
        logits = self._candidates(trials, tensors, features)
        if "centers" not in tensors:
            return logits.squeeze(2)
        return _mixed_logits(logits, tensors["weights"], tensors["temperature"])

    def logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Log of the mixed class probabilities (T, B, K), of equal class priors."""
        return self._mixture(trials, tensors, features, prior=None)

    def pseudo_logits(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """The same by the estimated class prior of the unlabelled images."""
        return self._mixture(trials, tensors, features, prior=tensors.get("shares"))

    def _mixture(self, trials: Trials, tensors: Tensors, features: Tensor, prior: Tensor | None) -> Tensor:
        logits = self._candidates(trials, tensors, features)
        if "centers" not in tensors:
            return logits.squeeze(2)
        if prior is not None:
            # the probe, which is first, knows no prior
            logits = torch.cat([logits[:, :, :1], logits[:, :, 1:] + torch.log(prior).unsqueeze(1)], dim=2)
        return _log_mixture(logits, tensors["weights"], tensors["temperature"])

    def _candidates(self, trials: Trials, tensors: Tensors, features: Tensor) -> Tensor:
        """Logits of the probe and of each clustering (T, B, 1 + S, K), of equal class priors."""
        features = _join(tensors, features)
        linear = products(features, tensors["linear"].unsqueeze(1))  # (T, B, 1, K)
        if "centers" not in tensors:
            return linear
        factors = tensors["factors"]
        if "core" in tensors:
            # a run of version 0.1 has a matrix between the factors
            factors = torch.linalg.cholesky_ex(tensors["core"]).L.transpose(-1, -2) @ factors
        rows = Whitening(tensors["mean"], tensors["map"])(features)
        fused = _fused(trials.values, cosines(rows, tensors["centers"], Metric(factors)), linear)  # (T, B, S, K)
        return torch.cat([linear, fused], dim=2)


@dataclass(frozen=True)
class _Reading:
    """One way of reading the cache, that held-out labels judge.

    Attributes:
        weight: length of the second encoder's feature in the joined one; None without a second encoder.
        sharpness: of the weights of a class's prompts and descriptions; None for its prompts alone.
    """

    weight: float | None = None
    sharpness: float | None = None


def _readings(trials: Trials) -> list[_Reading]:
    """All readings of what the cache holds, the plainest first."""
    shared = trials.inputs.shared
    second = "second" in shared and int(shared["second"]) > 0
    return [
        _Reading(weight, sharpness)
        for sharpness in ((None, *TEXT_SHARPNESS) if "texts" in shared else (None,))
        for weight in ((0.0, *SECOND_WEIGHTS) if second else (None,))
    ]


class _Work:
    """How much of a fit is done: parts of known relative length, one after the other."""

    def __init__(self, lengths: Mapping[str, int], report: Report) -> None:
        self._lengths, self._report = lengths, report

    def part(self, name: str) -> Report:
        """What is to be called with the fraction done of a part."""
        names = list(self._lengths)
        before = sum(self._lengths[other] for other in names[: names.index(name)])
        total = max(sum(self._lengths.values()), 1)
        return lambda fraction: self._report((before + fraction * self._lengths[name]) / total)


def _fits(evidence: Evidence, fits: slice) -> Evidence:
    """The evidence of some of the fits, each from every starting prior."""
    heads = evidence.heads[:, fits]
    return replace(
        evidence,
        label_weights=evidence.label_weights[:, :, fits],
        heads=heads,
        offsets=evidence.offsets[:, fits],
        prior=evidence.prior.repeat(1, heads.shape[1], 1),
    )


def _sample_rows(seeds: Tensor, pool: Pool, most: int) -> tuple[Tensor, Tensor]:
    """Rows of at most so many unlabelled images of each trial, drawn from its seed, and which are present (T, n)."""
    index, present = pool.unlabeled_rows, pool.present
    if index.shape[1] > most:
        order = uniforms(seeds, 0, Purpose.UNLABELED, index.shape[1]).masked_fill(~present, 2.0)
        # in the cache's order, as a trial with fewer images has them
        drawn = order.argsort(dim=1)[:, :most].sort(dim=1).values
        index, present = index.gather(1, drawn), present.gather(1, drawn)
    return index, present


def _joining(trials: Trials, features: DeviceFeatures, index: Tensor, present: Tensor, weight: float | None) -> Tensors:
    """What :func:`_join` needs, from training rows (T, n) that are present (T, n), and the encoder's end.

    Without a second encoder `weight` is None; with one it is the length of its feature in the joined one, at least 0.
    """

    def parts(read: Callable[[Tensors, Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for rows, rows_present in zip(index.split(TOGETHER, 1), present.split(TOGETHER, 1), strict=True):
            yield read(tensors, features.rows(rows)), rows_present

    tensors: Tensors = {}
    trial_count = len(index)
    if weight is not None:
        # its length says where the second feature begins
        width = int(trials.inputs.shared["second"])
        tensors["second_center"] = trials.zeros().view(-1, 1, 1).expand(-1, 1, width)
    if trials.config.feature == "pre-projection":
        if "ln_post_weight" in trials.head:
            # two tokens of the last block, from before the encoder's last norm
            tensors |= frozen_end(trials.head, trial_count)
        else:
            tensors["projection"] = trials.head["projection"].expand(trial_count, -1, -1)
        scatter = Scatter.of(parts(_wide)).covariance
        tensors["center"] = Scatter.of(parts(_projected)).mean
        tensors["basis"] = leading_directions(scatter, min(WIDE, scatter.shape[-1]))
    if weight:
        scatter_of_second = Scatter.of(parts(_second))
        if "center" not in tensors:
            tensors["center"] = Scatter.of(parts(_projected)).mean
        tensors |= {
            "second_center": scatter_of_second.mean,
            "second_basis": leading_directions(scatter_of_second.covariance, min(WIDE, width)),
            "second_weight": trials.zeros() + weight,
        }
    return tensors


def _split(tensors: Tensors, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the first encoder (T, B, ...) and features of the second (T, B, E), where E may be 0."""
    width = tensors["second_center"].shape[-1] if "second_center" in tensors else 0
    return rows[..., : rows.shape[-1] - width], rows[..., rows.shape[-1] - width :]


def _second(tensors: Tensors, rows: Tensor) -> Tensor:
    """Unit features of the second encoder (T, B, E)."""
    return normalize(_split(tensors, rows)[1])


def _wide(tensors: Tensors, rows: Tensor) -> Tensor:
    """The feature before the projection (T, B, W), of any length, from tokens (T, B, S W)."""
    tokens = _split(tensors, rows)[0]
    if "backbone.projection" not in tensors:
        return tokens
    return last_norm(tensors, tokens, tokens.new_zeros(len(tokens)))


def _projected(tensors: Tensors, rows: Tensor) -> Tensor:
    """Unit features (T, B, D) from tokens (T, B, S W), or from features where there is no projection."""
    wide = _wide(tensors, rows)
    for name in ("projection", "backbone.projection"):
        if name in tensors:
            wide = wide @ tensors[name]
    return normalize(wide)


def _join(tensors: Tensors, features: Tensor) -> Tensor:
    """Unit rows of what is classified, side by side (T, B, D + R).

    Projected features around their mean; with a "basis" half of the row is the wider feature in main directions; with a
    "second_basis" a part as long as the second weight is the second encoder's feature around its mean, likewise.

    Args:
        tensors: "center" (T, 1, D), "basis" (T, W, R), the encoder's end, "second_center" (T, 1, E), "second_basis"
            (T, E, R), "second_weight" (T,), as far as there are any; without them features stay as they are.
        features: unit features (T, B, D), or tokens (T, B, S W), each with the second encoder's feature behind it.
    """
    if "center" not in tensors:
        return normalize(_split(tensors, features)[0]) if "second_center" in tensors else features
    own = normalize(_projected(tensors, features) - tensors["center"])
    if "basis" in tensors:
        own = torch.cat([own, normalize(_wide(tensors, features) @ tensors["basis"])], dim=-1) * 0.5**0.5
    if "second_basis" not in tensors:
        return own
    second = normalize((_second(tensors, features) - tensors["second_center"]) @ tensors["second_basis"])
    return _weighed(own, second, tensors["second_weight"])


def _weighed(own: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Unit rows (T, n, D + R) of unit rows (T, n, D) and (T, n, R), the second of length weight (T,)."""
    weight = weight.view(-1, 1, 1)
    return torch.cat([(1 - weight.square()).sqrt() * own, weight * second], dim=-1)


def _joined_texts(prototypes: Tensor, tensors: Tensors) -> Tensor:
    """Prototypes (T, K, D) around their mean, zero in the wider features' directions (T, K, D + R).

    Of two encoders (T, K, D + E), where those of an encoder without texts are zero.
    """
    texts, second = _split(tensors, prototypes)
    if "center" not in tensors:
        return normalize(texts)
    own = normalize(texts - texts.mean(1, keepdim=True))
    if "basis" in tensors:
        own = F.pad(own, (0, tensors["basis"].shape[-1]))
    if "second_basis" not in tensors:
        return own
    turned = normalize((second - second.mean(1, keepdim=True)) @ tensors["second_basis"])
    return normalize(_weighed(own, turned, tensors["second_weight"]))


def _log_likelihoods(scratch: Tensors) -> Tensor:
    """Log-likelihood of each label by the fit without it (T, L), zero where no fit was without it."""
    return torch.log(scratch["held_out_probabilities"].nan_to_num(1.0).clamp(min=1e-12))


def _best_gain(gains: Tensor, among: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The reading of the largest mean gain among some (T,), and its gain (T, 3).

    Args:
        gains: mean, lower and upper end (V, T, 3), NaN where there are too few labels.
        among: readings.
    """
    chosen = torch.tensor(list(among), device=gains.device)
    best = chosen[gains[chosen, :, 0].nan_to_num(-torch.inf).argmax(0)]
    return best, gains[best, torch.arange(len(best), device=best.device)]


def _exceeds_error(gain: Tensor) -> Tensor:
    """Whether a gain (T, 3) is larger than its standard error (T,); one of too few labels is not."""
    return gain[:, 0] > (gain[:, 2] - gain[:, 0]) / 1.96


def _of_variant(variants: Sequence[Tensors], chosen: Tensor) -> Tensors:
    """Each trial's tensors (T, ...) from the variant that was chosen for it (T,).

    Shorter tensors are padded to the longest: zeros behind a feature change no product, and a candidate without weight
    has the temperature and the prior of one.
    """
    result = {}
    trials = torch.arange(len(chosen), device=chosen.device)
    for name in dict.fromkeys(name for tensors in variants for name in tensors):
        shapes = [tensors[name].shape[1:] for tensors in variants if name in tensors]
        shape = [max(sizes) for sizes in zip(*shapes, strict=True)]
        padded = []
        for tensors in variants:
            like = next(other[name] for other in variants if name in other)
            filled = like.new_full((len(chosen), *shape), 1.0 if name in ("temperature", "shares") else 0.0)
            if name in tensors:
                filled[tuple(slice(size) for size in tensors[name].shape)] = tensors[name]
            padded.append(filled)
        result[name] = torch.stack(padded)[chosen, trials]
    return result


@dataclass(frozen=True)
class _Joined(DeviceFeatures):
    """Features as :func:`_join` makes them of tokens.

    Attributes:
        joining: its tensors.
    """

    joining: Tensors = field(default_factory=dict)

    @classmethod
    def of(cls, features: DeviceFeatures, joining: Tensors) -> _Joined:
        """The same images."""
        return cls(**{spec.name: getattr(features, spec.name) for spec in fields(features)}, joining=joining)

    def rows(self, index: Tensor) -> Tensor:
        """Plain features of rows (T, n), one set for each trial: unit rows (T, n, D + R)."""
        return _join(self.joining, super().rows(index))

    def all_views(self, index: Tensor) -> Tensor:
        """Plain, weak and strong views (T, B, V, D + R) of rows (T, B) that have views."""
        views = super().all_views(index)
        return _join(self.joining, views.flatten(1, 2)).unflatten(1, views.shape[1:3])


def _held_out_logits(
    values: Tensors, pool: Pool, heads: Tensor, judged: Clusters, evidence: Evidence, folds: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Chunks of labelled images, as the probe and the candidates see them that were fitted without them.

    Each with its position, logits (T, n, 1 + S, K), and largest cosines with a class (T, n, S).
    """
    fits, starts, classes = heads.shape[1] - 1, evidence.prior.shape[1], heads.shape[2]
    chunks = RowChunks.of(evidence.labeled, pool.labels >= 0)
    for position, rows, _ in chunks.split(heads.shape[1] * (1 + starts) * classes):
        linear = products(pool.features.rows(pool.labeled_rows[:, position]), heads).unsqueeze(3)  # (T, n, J, 1, K)
        similarity = judged.cosines(rows).unflatten(2, (fits, starts))  # (T, n, J - 1, S, K)
        # fold 0 is held out of no fit, and its scores count nowhere
        fold = folds[:, position]
        own_linear = _of_fold(linear, fold)  # (T, n, 1, K)
        own_similarity = _of_fold(similarity, (fold - 1).clamp(min=0))  # (T, n, S, K)
        logits = torch.cat([own_linear, _fused(values, own_similarity, own_linear)], dim=2)
        yield position, logits, own_similarity.amax(-1)


def _of_fold(values: Tensor, fold: Tensor) -> Tensor:
    """From values (T, n, J, ...) of every fold's fit, each row's by the fit of its fold (T, n, ...)."""
    index = fold.view(*fold.shape, *(1,) * (values.dim() - 2))
    return values.gather(2, index.expand(-1, -1, 1, *values.shape[3:])).squeeze(2)


def _probes(
    pool: Pool,
    views: Tensor,
    trials: Trials,
    scales: Tensor,
    kept: Tensor,
    folds: Tensor,
    starts: Tensor,
    report: Report | None = None,
) -> tuple[Tensor, Tensor]:
    """Labelled-only heads (T, J, K, D), each the mean of its candidates, and the weights of their scales (T, S).

    A head is as long as its scale, so that the mean of heads is that of their logits. The better a candidate predicts
    held-out labels, the more it weighs.

    Args:
        pool: with labels (T, L).
        views: unit rows of the labelled images (T, L, V, D).
        trials: with their options.
        scales: of the candidates (T, S); each is read at every stop.
        kept: which images each head is fitted to (T, L, J); the last heads are each without one fold.
        folds: of the labelled images (T, L).
        starts: prototypes that heads start from (T, J, K, D).
        report: called with the fraction done.
    """
    fits, classes = starts.shape[1:3]
    count = scales.shape[1]
    of_heads = scales.repeat_interleave(fits, dim=1)  # (T, S J)
    heads = fit_probe(
        views,
        pool.labels,
        kept.repeat(1, 1, count),
        starts.repeat(1, count, 1, 1),
        scale=of_heads,
        rate=PROBE_RATE,
        stops=PROBE_STOPS,
        report=report,
    )
    heads.mul_(of_heads[:, None, :, None, None])
    candidates = heads.unflatten(2, (count, fits)).flatten(1, 2).unbind(1)  # stop by stop

    scores = []
    for candidate in candidates:
        likelihoods = [
            label_likelihoods(logits.unsqueeze(2), pool.labels[:, part])
            for part, logits in _probe_logits(pool, candidate[:, -trials.config.folds :], folds)
        ]
        scores.append(held_out_scores(torch.cat(likelihoods, dim=1), pool.labels, folds > 0, classes)[0])
    weights = torch.softmax(trials.values["evidence_temperature"].view(-1, 1) * torch.cat(scores, dim=1), dim=1)
    mean = torch.zeros_like(starts)
    for candidate, weight in zip(candidates, weights.unbind(1), strict=True):
        mean.addcmul_(candidate, weight.view(-1, 1, 1, 1))
    return mean, weights.unflatten(1, (-1, count)).sum(1)


def _probe_logits(pool: Pool, heads: Tensor, folds: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of labelled images: logits (T, n, K) by the head (T, J, K, D) that is without each image's fold."""
    for first in range(0, folds.shape[1], TOGETHER):
        part = slice(first, first + TOGETHER)
        logits = products(pool.features.rows(pool.labeled_rows[:, part]), heads)  # (T, n, J, K)
        yield part, _of_fold(logits, (folds[:, part] - 1).clamp(min=0))


def _right_without_text(
    pool: Pool, views: Tensor, trials: Trials, scale: Tensor, kept: Tensor, folds: Tensor, classes: int
) -> Tensor:
    """Whether probes of a scale (T, 1) that start from class means hit each held-out label: 1 or 0, (T, L)."""
    starts = class_starts(pool.labeled, pool.labels, kept, classes)
    heads, _ = _probes(pool, views, trials, scale, kept, folds, starts)
    hits = [logits.argmax(-1) == pool.labels[:, part] for part, logits in _probe_logits(pool, heads, folds)]
    return torch.cat(hits, dim=1).to(starts.dtype)


def _described(
    trials: Trials,
    pool: Pool,
    joining: Tensors,
    kept: Tensor,
    index: Tensor,
    present: Tensor,
    texts_mean: Tensor,
    sharpness: float,
) -> Tensor:
    """Prototypes (T, J, K, D) of all prompts and sentences of a class, weighted by their cosine with its cluster.

    A cluster has the labelled images that a fold keeps, and unlabelled images by a first assignment to the class's
    prompts and labelled images, so that it knows no label that the fold holds out.

    Args:
        trials: with prototypes of the space that is classified.
        pool: likewise.
        joining: see :func:`_join`.
        kept: labelled images of each fold (T, L, J).
        index: rows of unlabelled images (T, n).
        present: which of them are there (T, n).
        texts_mean: mean of the class prototypes as the cache has them (T, 1, D).
        sharpness: factor on the cosines, at least 0.
    """
    owner, classes = trials.inputs.shared["text_labels"], trials.prototypes.shape[1]
    texts = trials.inputs.shared["texts"].expand(len(kept), -1, -1)  # (T, M, D)
    width = texts.shape[-1]
    if "center" in joining:
        texts = normalize(texts - texts_mean[..., :width])
    of_class = F.one_hot(owner, classes).to(texts.dtype).expand(len(kept), -1, -1)  # (T, M, K)
    prompts = trials.prototypes[..., :width]
    # of joined prototypes the first encoder's projected part alone is one of texts
    lengths = prompts.square().sum(-1, keepdim=True).sqrt()
    rows = normalize(pool.features.rows(index)[..., :width]) * present.unsqueeze(-1)  # (T, n, D)
    labeled = normalize(pool.labeled[..., :width])

    folds = []
    for fold in kept.unbind(2):
        # what is not kept is a class of its own, which is dropped
        own = F.one_hot(torch.where(fold, pool.labels, classes), classes + 1)[..., :classes]  # (T, L, K)
        own = own.to(rows.dtype)
        of_labeled = own.transpose(1, 2) @ labeled  # (T, K, D)
        guide = normalize(normalize(prompts) + normalize(of_labeled))
        assigned = torch.softmax(TEXT_SCALE * rows @ guide.transpose(1, 2), dim=-1)  # (T, n, K)
        clusters = normalize(of_labeled + assigned.transpose(1, 2) @ rows)
        clusters = normalize(clusters - clusters.mean(1, keepdim=True))
        centered = normalize(texts - texts.mean(1, keepdim=True))
        agreement = (centered * clusters[:, owner]).sum(-1)  # (T, M)
        weights = torch.exp(sharpness * (agreement - agreement.amax(1, keepdim=True))).unsqueeze(-1) * of_class
        direction = normalize((weights / weights.sum(1, keepdim=True)).transpose(1, 2) @ texts)  # (T, K, D)
        folds.append(torch.cat([lengths * direction, trials.prototypes[..., width:]], dim=-1))
    return torch.stack(folds, dim=1)


def _least_similarity(largest: Tensor, known: Tensor) -> Tensor:
    """What the largest cosine with a class (T, L, S) of 99 of 100 held-out labelled images exceeds (T, S)."""
    return torch.nanquantile(largest.masked_fill(~known.unsqueeze(-1), torch.nan), NO_CLASS, dim=1)


def _far_from_all(images: RowChunks, clusters: Clusters, weights: Tensor, least: Tensor) -> Tensor:
    """How many images (T,) are less similar to all classes than labelled images are, by the candidates' majority."""
    count = torch.zeros_like(weights[:, 0])
    total = weights.sum(1, keepdim=True)  # (T, 1)
    for _, rows, present in images.split(clusters.prior.shape[1] * clusters.prior.shape[2]):
        far = clusters.cosines(rows).amax(-1) < least.unsqueeze(1)  # (T, n, S')
        votes = (far * weights.unsqueeze(1)).sum(-1)  # (T, n)
        count += (present & (votes > total / 2)).sum(1)
    return count


def _space(pool: Pool, values: Tensors) -> Whitening:
    """Whitening by the scatter of all training images and of their views."""
    index = torch.cat([pool.labeled_rows, pool.unlabeled_rows], dim=1)
    present = torch.cat([pool.labels >= 0, pool.present], dim=1)

    def parts(read: Callable[[Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        # some of the rows at a time: all views in float32 are many times what the cache holds
        for rows, rows_present in zip(index.split(TOGETHER, 1), present.split(TOGETHER, 1), strict=True):
            yield read(rows), rows_present

    scatter = Scatter.of(parts(pool.features.rows))
    nuisance = view_scatter(parts(pool.features.all_views)) if pool.features.views.shape[1] > 1 else None
    return whitening(scatter, nuisance, values["shrinkage"], values["view_weight"])


def _fused(values: Tensors, similarity: Tensor, linear: Tensor) -> Tensor:
    """Logits of equal class priors from cosines (T, ..., S, K) and the probe's logits (T, ..., 1, K)."""
    shape = (-1,) + (1,) * (similarity.dim() - 1)
    return values["sharpness_end"].view(shape) * similarity + values["probe_weight"].view(shape) * linear


def _log_mixture(logits: Tensor, weights: Tensor, temperatures: Tensor) -> Tensor:
    """Log of the weighted mean of the candidates' probabilities: (T, n, 1 + S, K) to (T, n, K)."""
    log_probabilities = log_softmax(logits / temperatures[:, None, :, None])
    return torch.logsumexp(log_probabilities + torch.log(weights + 1e-12)[:, None, :, None], dim=2)


def _mixed_logits(logits: Tensor, weights: Tensor, temperatures: Tensor) -> Tensor:
    """The same of exponentials that are not normalised: large only where a candidate's own logits are."""
    scaled = logits / temperatures[:, None, :, None]
    return torch.logsumexp(scaled + torch.log(weights + 1e-12)[:, None, :, None], dim=2)
