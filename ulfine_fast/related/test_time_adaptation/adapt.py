"""Test-time adaptation: a run follows a stream of images without labels, after CLIPTTA (arXiv 2507.14312).

Two vectors are learned, the weight and bias of the encoder's last norm: for that norm as exactly as in the encoder,
where the stream's cache holds what goes through it; else a weight and a bias on the output feature. The run's head
stays as it is. Losses are those of the paper and its released code; TENT (arXiv 2006.10726) stands beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.progress import progress_bar
from ulfine_fast.methods.registry import method_of
from ulfine_fast.metrics import classification as metrics
from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.runs.evaluate import refuse_other_encoder

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache
    from ulfine_fast.runs.run import Run

BY = ("cliptta", "tent", "none")
_SOFTNESS = 0.005
"""gamma of the weights w_i in the outlier contrastive exposure, in units of the score (released code)."""
_EPS, _MOST = 1e-12, 1000


@dataclass(frozen=True)
class Adaptation:
    """How a stream is followed; the defaults are CLIPTTA's published ones but for `marginal`.

    Attributes:
        by: "cliptta", "tent", or "none", which learns nothing.
        lr: Adam's learning rate, in (0, 1000].
        steps: gradient steps on each batch before its images are predicted, at least 1.
        batch: images that arrive together, at least 1.
        marginal: weight of the entropy of the batch's mean probabilities, at least 0. The paper takes 1, which
            supposes that all classes are equally frequent.
        shots: most confident images of each class that the memory keeps; 0 for no memory.
        sample: images drawn from the memory in a step, the same number of each class and at least one.
        open_set: whether images of unknown classes are among them; `cliptta` then learns from the others alone.
        exposure: weight of the outlier contrastive exposure, at least 0.
        scale: factor on the run's cosines inside the losses; None for the encoder's own with `zero_shot`, else the
            run's.
        seed: of what is drawn from the memory.
    """

    by: str = "cliptta"
    lr: float = 1e-4
    steps: int = 10
    batch: int = 128
    marginal: float = 0.0
    shots: int = 4
    sample: int = 40
    open_set: bool = False
    exposure: float = 1.0
    scale: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.by not in BY:
            raise InputError(f"by must be one of {', '.join(BY)}, got {self.by!r}")
        if not 0 < self.lr <= _MOST or not 0 < (1.0 if self.scale is None else self.scale) <= _MOST:
            raise InputError(f"lr and scale must be above 0 and at most {_MOST}, got {self.lr} and {self.scale}")
        for name, least in (("steps", 1), ("batch", 1), ("sample", 1), ("marginal", 0), ("shots", 0), ("exposure", 0)):
            if not least <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be at least {least} and finite, got {getattr(self, name)}")


@dataclass(frozen=True)
class Adaptable:
    """A run on a stream, as a function of the two vectors.

    Attributes:
        rows: what the norm's weight multiplies (n, W), or tokens that are normed within `logits` (n, S W).
        start: the encoder's own weight and bias (W,) each, or ones and zeros.
        logits: weight (W,), bias (W,) and rows (B, ...) to the run's logits (B, K).
        exact: whether the vectors are those of the encoder's last norm.
    """

    rows: Tensor
    start: tuple[Tensor, Tensor]
    logits: Callable[[Tensor, Tensor, Tensor], Tensor]
    exact: bool


@dataclass(frozen=True)
class Adapted:
    """What came of a stream, in the order in which its rows arrived.

    Attributes:
        rows: of the cache (n,).
        before: the run's own logits (n, K).
        logits: those of the adapted run, after its steps on the row's batch (n, K).
        scores: how much an image looks like one of a known class, the largest log softmax of cosines (n,).
        scores_before: the same of the run's own logits (n,).
        weight, bias: where the vectors ended (W,).
        exact: as in :class:`Adaptable`.
    """

    rows: NDArray[np.int64]
    before: NDArray[np.float32]
    logits: NDArray[np.float32]
    scores: NDArray[np.float32]
    scores_before: NDArray[np.float32]
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    exact: bool


def soft_contrast(logits: Tensor) -> Tensor:
    """Soft contrastive loss of CLIPTTA: the entropy of who belongs to whom between images and predicted texts.

    With z_ij the logit of image i for the class that image j is predicted as, it is the mean entropy of softmax
    over j (image to texts) and over i (text to images), halved and added. The released code computes the first of
    them twice where the text tower is frozen.

    Args:
        logits: of B images (B, K), at the loss's temperature.

    Returns:
        A number in [0, log B].
    """
    contrast = logits[:, logits.argmax(1)]  # (B, B)
    return (entropy(contrast) + entropy(contrast.T)) / 2


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy of softmax over the last axis of (B, n): TENT's loss where n are classes."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def marginal_entropy(logits: Tensor) -> Tensor:
    """Entropy of the mean of softmax over a batch (B, K), in [0, log K]."""
    mean = logits.softmax(-1).mean(0)
    return -(mean * (mean + _EPS).log()).sum()


def known_score(cosines: Tensor) -> Tensor:
    """Largest log softmax of cosines at temperature one, (B, K) to (B,); high for images of known classes."""
    return cosines.log_softmax(-1).amax(-1)


def exposure_loss(scores: Tensor, threshold: Tensor) -> Tensor:
    """Outlier contrastive exposure, -(mu_in - mu_out)^2: the two sides of a threshold move apart.

    Args:
        scores: (B,).
        threshold: alpha, ().

    Returns:
        A number <= 0; mu_in and mu_out are means of the scores weighted by w_i = sigmoid((s_i - alpha) / 0.005) and
        1 - w_i.
    """
    away = (scores - threshold) / _SOFTNESS
    inside, outside = away.sigmoid(), (-away).sigmoid()
    gap = inside @ scores / (inside.sum() + _EPS) - outside @ scores / (outside.sum() + _EPS)
    return -gap.square()


def otsu(scores: Tensor) -> Tensor:
    """The threshold () between scores (B,) that leaves the largest variance between its two sides (Otsu, 1979)."""
    ordered = scores.sort().values
    if len(ordered) == 1:
        return ordered[0]
    below = torch.arange(1, len(ordered), dtype=ordered.dtype)  # (B - 1,)
    above, sums = len(ordered) - below, ordered.cumsum(0)
    gap = sums[:-1] / below - (sums[-1] - sums[:-1]) / above
    cut = (below * above * gap.square()).argmax()
    return (ordered[cut] + ordered[cut + 1]) / 2


class ConfidentMemory:
    """The most confident images of each predicted class; it keeps where they stand in the stream, not what they are.

    Attributes:
        places: in the stream, int64 (K, S); -1 for none.
        confidence: of the prediction as the image arrived (K, S); -inf for none.
    """

    def __init__(self, classes: int, shots: int, sample: int, seed: int) -> None:
        """Empty, for K classes; see :class:`Adaptation`."""
        self.places = torch.full((classes, shots), -1)
        self.confidence = torch.full((classes, shots), -torch.inf)
        self._each = min(shots, max(1, sample // classes))
        self._draws = torch.Generator().manual_seed(seed)

    def add(self, places: Tensor, logits: Tensor) -> None:
        """Images at places (B,) of the stream, with their logits (B, K)."""
        confidence, predicted = logits.softmax(-1).max(-1)
        theirs = predicted == torch.arange(len(self.places)).unsqueeze(1)  # (K, B)
        offered = torch.where(theirs, confidence, -torch.inf)
        everyone = torch.cat([self.confidence, offered], dim=1)  # (K, S + B)
        # stable: of equals the earlier stays
        best = everyone.argsort(dim=1, descending=True, stable=True)[:, : self.places.shape[1]]
        self.confidence = everyone.gather(1, best)
        known = torch.cat([self.places, places.expand(len(self.places), -1)], dim=1).gather(1, best)
        self.places = known.where(self.confidence > -torch.inf, -1)

    def draw(self) -> Tensor:
        """Places (M,) of the sample; a class without images gives none."""
        chance = torch.rand(self.places.shape, generator=self._draws)
        order = chance.masked_fill(self.places < 0, -1.0).argsort(dim=1, descending=True)[:, : self._each]
        drawn = self.places.gather(1, order)
        return drawn[drawn >= 0]


class Follower:
    """Adapts to one batch of a stream after the other, without ever going back to the start."""

    def __init__(self, on: Adaptable, classes: int, scales: tuple[float, float], settings: Adaptation) -> None:
        """For K classes; `scales` is the run's factor on cosines and that of the losses."""
        self._on, self._settings, self._scales = on, settings, scales
        self.weight, self.bias = (start.clone().requires_grad_() for start in on.start)
        self._threshold = torch.zeros((), requires_grad=True)
        remembers = settings.by == "cliptta" and settings.shots > 0
        self._memory = ConfidentMemory(classes, settings.shots, settings.sample, settings.seed) if remembers else None
        self._adam = torch.optim.Adam([self.weight, self.bias, self._threshold], lr=settings.lr)

    def follow(self, places: Tensor) -> Tensor:
        """Learn from a batch (B,) of the stream, then predict it: the run's logits (B, K)."""
        if self._settings.by != "none":
            self._start_threshold(places)
            for step in range(self._settings.steps):
                self._adam.zero_grad()
                self._loss(places, arriving=step == 0).backward()
                self._adam.step()
        with torch.no_grad():
            return self._logits(places)

    def _logits(self, places: Tensor) -> Tensor:
        return self._on.logits(self.weight, self.bias, self._on.rows[places])

    def _start_threshold(self, places: Tensor) -> None:
        if self._settings.open_set:
            with torch.no_grad():
                self._threshold.copy_(otsu(known_score(self._logits(places) / self._scales[0])))

    def _loss(self, places: Tensor, arriving: bool) -> Tensor:
        own, wanted = self._scales
        cosines = self._logits(places) / own
        if self._settings.by == "tent":
            return self._with_marginal(entropy, wanted * cosines)
        loss = torch.zeros(())
        if self._settings.open_set:
            scores = known_score(cosines)
            loss = self._settings.exposure * exposure_loss(scores, self._threshold)
            # the threshold is learned too and may pass them all; nobody would be left
            inside = (scores >= torch.minimum(self._threshold, scores.max())).detach()
            cosines, places = cosines[inside], places[inside]
        loss = loss + self._with_marginal(soft_contrast, wanted * cosines)
        if self._memory is None:
            return loss
        if arriving:
            self._memory.add(places, wanted * cosines.detach())
        remembered = self._logits(self._memory.draw()) * (wanted / own)
        return loss + self._with_marginal(soft_contrast, remembered)

    def _with_marginal(self, loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
        found = loss(logits)
        return found - self._settings.marginal * marginal_entropy(logits) if self._settings.marginal else found


def adaptable(run: Run, cache: FeatureCache) -> Adaptable:
    """A run on a cache of its encoder's features, as a function of the last norm's weight and bias.

    Raises:
        InputError: the run reads tokens that the cache lacks.
    """
    tensors = {name: tensor.unsqueeze(0) for name, tensor in run.tensors.items()}
    trial, method = run.trial(tensors), method_of(run.config)

    def head(rows: Tensor, **norm: Tensor) -> Tensor:
        others = {f"backbone.{name}": vector.unsqueeze(0) for name, vector in norm.items()}
        return method.logits(trial, tensors | others, rows.unsqueeze(0))[0]

    if "backbone.scale" in tensors:
        start = run.tensors["backbone.scale"], run.tensors["backbone.shift"]
        return Adaptable(_both_tokens(cache), start, lambda w, b, x: head(x, scale=w, shift=b), True)
    normed = last_norm_of(cache)
    if run.config.reads_tokens:
        rows, start = normed or _unnormed(cache.tokens("plain")[:, 0])
        return Adaptable(rows, start, lambda w, b, x: head(w * x + b), normed is not None)
    if normed is None:
        rows, start = _unnormed(cache.plain)
        return Adaptable(rows, start, lambda w, b, x: head(normalize(w * x + b)), False)
    projection = torch.from_numpy(np.asarray(cache.head["projection"]))
    return Adaptable(*normed, lambda w, b, x: head(normalize((w * x + b) @ projection)), True)


def _both_tokens(cache: FeatureCache) -> Tensor:
    """The last block's tokens side by side (n, 2 W)."""
    if cache.token_kinds != ["pre", "post"]:
        raise InputError("this run reads the last block's tokens; extract the stream with --features last-block")
    return torch.from_numpy(np.asarray(cache.tokens("plain"), dtype=np.float32)).flatten(1)


def last_norm_of(cache: FeatureCache) -> tuple[Tensor, tuple[Tensor, Tensor]] | None:
    """What the last norm's weight multiplies (n, W), with that weight and bias; None where the cache does not know."""
    kinds = cache.token_kinds
    if "ln_post_weight" not in cache.head or not {"post", "ln_post"} & set(kinds):
        return None
    weight, bias = (torch.from_numpy(np.asarray(cache.head[f"ln_post_{part}"])) for part in ("weight", "bias"))
    kind = "post" if "post" in kinds else "ln_post"
    rows = torch.from_numpy(np.asarray(cache.tokens("plain")[:, kinds.index(kind)], dtype=np.float32))
    if kind == "post":
        eps = float(cache.head["ln_post_eps"][0])
        return torch.nn.functional.layer_norm(rows, rows.shape[-1:], eps=eps), (weight, bias)
    # it has been through the norm; where the weight is zero, nothing of what it multiplied is left
    safe = weight.where(weight != 0, 1.0)
    return ((rows - bias) / safe).masked_fill(weight == 0, 0.0), (weight, bias)


def _unnormed(features: NDArray[Any]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Features (n, D) of mean square one, as a norm gives them, with ones and zeros."""
    rows = normalize(torch.from_numpy(np.asarray(features, dtype=np.float32))) * features.shape[1] ** 0.5
    return rows, (torch.ones(rows.shape[1]), torch.zeros(rows.shape[1]))


def adapt(
    run: Run,
    cache: FeatureCache,
    settings: Adaptation | None = None,
    *,
    rows: NDArray[np.int64] | None = None,
    progress: bool | None = None,
) -> Adapted:
    """Follow a stream of images.

    Args:
        run: what predicts them.
        cache: features of the run's encoder.
        settings: how; CLIPTTA by default.
        rows: of the cache, in the order in which they arrive; all of them as they stand by default.
        progress: whether to draw a bar; None draws it where stderr is a terminal.

    Raises:
        InputError: no rows, a run that failed, or losses that diverge.
        CacheMismatch: the cache comes from another encoder.
    """
    settings, chosen = settings or Adaptation(), np.arange(len(cache)) if rows is None else np.asarray(rows)
    run.refuse_failed()
    refuse_other_encoder(run, cache)
    if not len(chosen):
        raise InputError("the stream has no images; name a cache that holds some")
    on, own = adaptable(run, cache), float(run.config.scale)
    places = torch.from_numpy(chosen.astype(np.int64))
    with torch.no_grad():
        before = torch.cat([on.logits(*on.start, on.rows[part]) for part in places.split(1024)])
    wanted = settings.scale or (cache.logit_scale if run.config.method == "zero_shot" else own)
    follower = Follower(on, len(run.class_names), (own, wanted), settings)
    logits = _follow(follower, places.split(settings.batch), len(places), progress)
    return Adapted(
        rows=chosen,
        before=before.numpy(),
        logits=logits.numpy(),
        scores=known_score(logits / own).numpy(),
        scores_before=known_score(before / own).numpy(),
        weight=follower.weight.detach().numpy(),
        bias=follower.bias.detach().numpy(),
        exact=on.exact,
    )


def _follow(follower: Follower, batches: tuple[Tensor, ...], total: int, progress: bool | None) -> Tensor:
    found = []
    with progress_bar(progress) as bar:
        task = bar.add_task("adapt", total=total, unit="images", note="")
        for places in batches:
            found.append(follower.follow(places))
            bar.advance(task, len(places))
    logits = torch.cat(found)
    if not bool(torch.isfinite(logits).all()):
        raise InputError("adaptation diverged: its logits are not finite; lower lr or the weights of the losses")
    return logits


def stream_labels(run: Run, cache: FeatureCache) -> NDArray[np.int64]:
    """Labels of a cache's rows by the run's classes (n,): -1 unknown, K for a class that the run does not have."""
    index = {name: k for k, name in enumerate(run.class_names)}
    known = np.array([index.get(name, len(index)) for name in cache.class_names] + [-1], dtype=np.int64)
    found: NDArray[np.int64] = known[cache.labels]  # label -1 takes the last
    return found


def figures(found: Adapted, labels: NDArray[np.int64], *, open_set: bool = False) -> dict[str, Any]:
    """What labels, where there are any, say of a stream; and whether predictions have collapsed.

    Args:
        found: of :func:`adapt`.
        labels: of the arrived rows (n,), see :func:`stream_labels`.
        open_set: whether to tell images of known classes from others.

    Returns:
        images, exact, classes_predicted and effective_classes (the exponential of the entropy of how often each class
        is predicted) over the last half of the stream, the same before adaptation as classes_predicted_before; where
        there are labels of known classes accuracy, accuracy_before, balanced_accuracy, accuracy_by_quarter; with
        `open_set` and labels of both kinds auroc, fpr95, and both before.
    """
    classes, half = found.logits.shape[1], len(found.rows) // 2
    predicted, before = found.logits.argmax(1), found.before.argmax(1)
    told = {
        "images": len(predicted),
        "exact": found.exact,
        **_spread("", predicted[half:], classes),
        **_spread("_before", before[half:], classes),
    }
    known, strange = (labels >= 0) & (labels < classes), labels == classes
    if known.any():
        told |= _right(predicted, before, labels, known, classes)
    if open_set and known.any() and strange.any():
        told |= open_set_figures(found.scores[known], found.scores[strange])
        own = open_set_figures(found.scores_before[known], found.scores_before[strange])
        told |= {f"{name}_before": value for name, value in own.items()}
    return told


def _spread(ending: str, predicted: NDArray[np.int64], classes: int) -> dict[str, Any]:
    shares = np.bincount(predicted, minlength=classes) / len(predicted)
    there = shares[shares > 0]
    effective = float(np.exp(-(there * np.log(there)).sum()))
    return {f"classes_predicted{ending}": len(there), f"effective_classes{ending}": effective}


def _right(
    predicted: NDArray[np.int64],
    before: NDArray[np.int64],
    labels: NDArray[np.int64],
    known: NDArray[np.bool_],
    classes: int,
) -> dict[str, Any]:
    """Accuracies over the images of known classes."""
    right = (predicted == labels)[known]
    recall = metrics.per_class_accuracy(labels[known], predicted[known], classes)
    return {
        "accuracy": float(right.mean()),
        "accuracy_before": float((before == labels)[known].mean()),
        "balanced_accuracy": float(np.nanmean(recall)),
        "accuracy_by_quarter": [float(part.mean()) for part in np.array_split(right, 4) if len(part)],
    }


def open_set_figures(known: NDArray[np.floating[Any]], strange: NDArray[np.floating[Any]]) -> dict[str, float]:
    """How well a score, high for known classes, tells images (n,) of known classes from strange ones (m,).

    Returns:
        auroc, the chance that a known one scores above a strange one; fpr95, the share of strange ones that score at
        least as high as all but 5% of the known.
    """
    ranks = rankdata(np.concatenate([known, strange]))[: len(known)]
    above = ranks.sum() - len(known) * (len(known) + 1) / 2
    least = np.sort(known)[len(known) * 5 // 100]
    return {"auroc": float(above / (len(known) * len(strange))), "fpr95": float((strange >= least).mean())}
