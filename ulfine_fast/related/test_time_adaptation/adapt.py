"""Test-time adaptation: a run follows a stream of images without labels, after CLIPTTA (arXiv 2507.14312).

Two vectors are learned, the weight and bias of the encoder's last norm: for that norm as exactly as in the encoder,
where the stream's cache holds its input; else a weight and a bias on the output feature. The run's head stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.names import one_of
from ulfine_fast.cache.io.progress import progress_bar
from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.related.test_time_adaptation.losses import (
    entropy,
    exposure_loss,
    known_score,
    marginal_entropy,
    otsu,
    soft_contrast,
)
from ulfine_fast.runs.evaluate import refuse_other_encoder

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache
    from ulfine_fast.runs.run import Run

BY = ("cliptta", "tent", "none")
_LARGEST = 1000


@dataclass(frozen=True)
class Adaptation:
    """How to follow a stream; the defaults are CLIPTTA's published ones but for `marginal`.

    Attributes:
        by: "cliptta", "tent", or "none", which learns nothing.
        lr: Adam's learning rate, in (0, 1000].
        steps: gradient steps on each batch before its images are predicted, at least 1.
        batch: images that arrive together, at least 1.
        marginal: weight of the entropy of the batch's mean probabilities, at least 0. The paper takes 1, which
            assumes that all classes are equally frequent.
        shots: most confident images of each class that the memory keeps; 0 for no memory.
        sample: images drawn from the memory in a step, the same number of each class and at least one.
        open_set: whether images of unknown classes are among them; `cliptta` then learns from the others alone.
        exposure: weight of the outlier contrastive exposure, at least 0.
        scale: factor on the run's cosines inside the losses; None for the encoder's own with `zero_shot`, else the
            run's.
        seed: of the draws from the memory.
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
        """Refuse values out of range."""
        if self.by not in BY:
            raise one_of("by", self.by, BY)
        if not 0 < self.lr <= _LARGEST or not 0 < (1.0 if self.scale is None else self.scale) <= _LARGEST:
            raise InputError(f"lr and scale must be above 0 and at most {_LARGEST}, got {self.lr} and {self.scale}")
        for name, least in (("steps", 1), ("batch", 1), ("sample", 1), ("marginal", 0), ("shots", 0), ("exposure", 0)):
            if not least <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be at least {least} and finite, got {getattr(self, name)}")


@dataclass(frozen=True)
class AdaptableRun:
    """A run's logits on the images of a cache, as a function of a norm's weight and bias.

    Attributes:
        inputs: what the norm's weight multiplies (n, W), or tokens that are normed within `logits` (n, S W).
        weight: the encoder's own weight (W,), or ones.
        bias: the encoder's own bias (W,), or zeros.
        logits: weight (W,), bias (W,) and inputs (B, ...) to the run's logits (B, K).
        exact: whether the two are those of the encoder's last norm.
    """

    inputs: Tensor
    weight: Tensor
    bias: Tensor
    logits: Callable[[Tensor, Tensor, Tensor], Tensor]
    exact: bool


@dataclass(frozen=True)
class AdaptedStream:
    """Predictions of a stream, in the order in which its rows arrived.

    Attributes:
        rows: of the cache (n,).
        before: the run's own logits (n, K).
        logits: those of the adapted run, after its steps on the row's batch (n, K).
        scores: how much an image looks like one of a known class, the largest log softmax of cosines (n,); cosines
            are logits divided by the run's scale.
        scores_before: the same of the run's own logits (n,).
        weight: the norm's weight at the end (W,).
        bias: its bias at the end (W,).
        exact: as in :class:`AdaptableRun`.
    """

    rows: NDArray[np.int64]
    before: NDArray[np.float32]
    logits: NDArray[np.float32]
    scores: NDArray[np.float32]
    scores_before: NDArray[np.float32]
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    exact: bool


class ConfidentMemory:
    """The most confident images of each predicted class; it keeps their positions in the stream.

    Attributes:
        positions: in the stream, int64 (K, S); -1 for an empty slot.
        confidence: of the prediction as the image arrived (K, S); -inf for an empty slot.
    """

    def __init__(self, classes: int, shots: int, sample: int, seed: int) -> None:
        """Empty, for K classes; see :class:`Adaptation`."""
        self.positions = torch.full((classes, shots), -1)
        self.confidence = torch.full((classes, shots), -torch.inf)
        self._drawn_per_class = min(shots, max(1, sample // classes))
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, positions: Tensor, logits: Tensor) -> None:
        """Add images at positions (B,) of the stream, with their logits (B, K)."""
        classes, shots = self.positions.shape
        confidence, predicted = logits.softmax(-1).max(-1)
        is_of_class = predicted == torch.arange(classes).unsqueeze(1)  # (K, B)
        new = torch.where(is_of_class, confidence, -torch.inf)
        candidates = torch.cat([self.confidence, new], dim=1)  # (K, S + B)
        # stable: of equals the earlier stays
        best = candidates.argsort(dim=1, descending=True, stable=True)[:, :shots]
        self.confidence = candidates.gather(1, best)
        kept = torch.cat([self.positions, positions.expand(classes, -1)], dim=1).gather(1, best)
        self.positions = kept.where(self.confidence > -torch.inf, -1)

    def draw(self) -> Tensor:
        """Positions (M,) of the sample; a class without images adds none."""
        keys = torch.rand(self.positions.shape, generator=self._generator).masked_fill(self.positions < 0, -1.0)
        order = keys.argsort(dim=1, descending=True)[:, : self._drawn_per_class]
        drawn = self.positions.gather(1, order)
        return drawn[drawn >= 0]


class Follower:
    """Adapts to the batches of a stream one after the other, without returning to the start."""

    def __init__(
        self, run: AdaptableRun, classes: int, settings: Adaptation, *, run_scale: float, loss_scale: float
    ) -> None:
        """For K classes; the scales are the factors on cosines in the run's logits and in the losses."""
        self._run = run
        self._settings = settings
        self._run_scale = run_scale
        self._loss_scale = loss_scale
        self.weight = run.weight.clone().requires_grad_()
        self.bias = run.bias.clone().requires_grad_()
        self._threshold = torch.zeros((), requires_grad=True)
        self._memory: ConfidentMemory | None = None
        if settings.by == "cliptta" and settings.shots > 0:
            self._memory = ConfidentMemory(classes, settings.shots, settings.sample, settings.seed)
        self._adam = torch.optim.Adam([self.weight, self.bias, self._threshold], lr=settings.lr)

    def follow(self, positions: Tensor) -> Tensor:
        """Learn from a batch (B,) of the stream, then predict it: the run's logits (B, K)."""
        if self._settings.by != "none":
            if self._settings.open_set:
                with torch.no_grad():
                    self._threshold.copy_(otsu(known_score(self._logits(positions) / self._run_scale)))
            for step in range(self._settings.steps):
                self._adam.zero_grad()
                self._loss(positions, is_first=step == 0).backward()
                self._adam.step()
        with torch.no_grad():
            return self._logits(positions)

    def _logits(self, positions: Tensor) -> Tensor:
        return self._run.logits(self.weight, self.bias, self._run.inputs[positions])

    def _loss(self, positions: Tensor, is_first: bool) -> Tensor:
        """The loss of a batch; in its first step its images enter the memory."""
        settings = self._settings
        cosines = self._logits(positions) / self._run_scale
        if settings.by == "tent":
            return self._with_marginal(entropy, self._loss_scale * cosines)

        # images below the threshold count as unknown: they train the exposure alone
        loss = torch.zeros(())
        if settings.open_set:
            scores = known_score(cosines)
            loss = settings.exposure * exposure_loss(scores, self._threshold)
            # the threshold is learned too and may exceed every score; the highest stays inside
            inside = (scores >= torch.minimum(self._threshold, scores.max())).detach()
            cosines, positions = cosines[inside], positions[inside]
        loss = loss + self._with_marginal(soft_contrast, self._loss_scale * cosines)

        # the same loss on a sample of the memory
        if self._memory is None:
            return loss
        if is_first:
            self._memory.add(positions, self._loss_scale * cosines.detach())
        remembered = self._logits(self._memory.draw()) * (self._loss_scale / self._run_scale)
        return loss + self._with_marginal(soft_contrast, remembered)

    def _with_marginal(self, loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
        value = loss(logits)
        return value - self._settings.marginal * marginal_entropy(logits) if self._settings.marginal else value


def adaptable(run: Run, cache: FeatureCache) -> AdaptableRun:
    """A run on a cache of its encoder's features.

    Raises:
        InputError: the run failed, or reads tokens that the cache lacks.
    """
    head = run.head()

    # the encoder's last norm is in the run, behind an adapter in its last block
    if "backbone.scale" in head.tensors:
        if cache.token_kinds != ["pre", "post"]:
            raise InputError("this run reads the last block's tokens; extract the stream with --features last-block")

        def through_norm(weight: Tensor, bias: Tensor, tokens: Tensor) -> Tensor:
            norm = {"backbone.scale": weight.unsqueeze(0), "backbone.shift": bias.unsqueeze(0)}
            return replace(head, tensors={**head.tensors, **norm}).logits(tokens)

        tokens = torch.from_numpy(np.asarray(cache.tokens("plain"), dtype=np.float32)).flatten(1)  # (n, 2 W)
        return AdaptableRun(tokens, run.tensors["backbone.scale"], run.tensors["backbone.shift"], through_norm, True)

    # the run classifies the output of the last norm, before the projection
    norm = last_norm_of(cache)
    if run.config.reads_tokens:
        inputs, weight, bias = norm or _without_norm(cache.tokens("plain")[:, 0])
        return AdaptableRun(inputs, weight, bias, lambda w, b, x: head.logits(w * x + b), norm is not None)

    # the run classifies features, and the cache has nothing from before them
    if norm is None:
        inputs, weight, bias = _without_norm(cache.plain)
        return AdaptableRun(inputs, weight, bias, lambda w, b, x: head.logits(normalize(w * x + b)), False)

    # the run classifies features, which are the last norm's output through the projection
    inputs, weight, bias = norm
    projection = torch.from_numpy(np.asarray(cache.head["projection"]))
    return AdaptableRun(inputs, weight, bias, lambda w, b, x: head.logits(normalize((w * x + b) @ projection)), True)


def last_norm_of(cache: FeatureCache) -> tuple[Tensor, Tensor, Tensor] | None:
    """What the last norm's weight multiplies (n, W), that weight and the bias; None where the cache lacks them."""
    kinds = cache.token_kinds
    if "ln_post_weight" not in cache.head or not {"post", "ln_post"} & set(kinds):
        return None
    weight, bias = (torch.from_numpy(np.asarray(cache.head[f"ln_post_{part}"])) for part in ("weight", "bias"))
    kind = "post" if "post" in kinds else "ln_post"
    rows = torch.from_numpy(np.asarray(cache.tokens("plain")[:, kinds.index(kind)], dtype=np.float32))
    if kind == "post":
        eps = float(cache.head["ln_post_eps"][0])
        return torch.nn.functional.layer_norm(rows, rows.shape[-1:], eps=eps), weight, bias
    # the cache has the norm's output; a channel of weight zero has lost its input
    divisor = weight.where(weight != 0, 1.0)
    return ((rows - bias) / divisor).masked_fill(weight == 0, 0.0), weight, bias


def _without_norm(features: NDArray[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Features (n, D) of mean square one, as a norm outputs them, with ones and zeros."""
    rows = normalize(torch.from_numpy(np.asarray(features, dtype=np.float32))) * features.shape[1] ** 0.5
    return rows, torch.ones(rows.shape[1]), torch.zeros(rows.shape[1])


def adapt(
    run: Run,
    cache: FeatureCache,
    settings: Adaptation | None = None,
    *,
    rows: NDArray[np.int64] | None = None,
    progress: bool | None = None,
) -> AdaptedStream:
    """Follow a stream of images.

    Args:
        run: the run that predicts them.
        cache: features of the run's encoder.
        settings: how; CLIPTTA by default.
        rows: of the cache, in the order in which they arrive; by default all of them in the cache's order.
        progress: whether to draw a bar; None draws it where stderr is a terminal.

    Raises:
        InputError: no rows, a run that failed, or losses that diverge.
        CacheMismatch: the cache comes from another encoder.
    """
    settings = settings or Adaptation()
    rows = np.arange(len(cache)) if rows is None else np.asarray(rows)
    run.refuse_failed()
    refuse_other_encoder(run, cache)
    if not len(rows):
        raise InputError("the stream has no images; name a cache that holds some")

    # the run as it is
    adapted = adaptable(run, cache)
    positions = torch.from_numpy(rows.astype(np.int64))
    with torch.no_grad():
        parts = positions.split(1024)
        before = torch.cat([adapted.logits(adapted.weight, adapted.bias, adapted.inputs[part]) for part in parts])

    # the run batch by batch
    run_scale = float(run.config.scale)
    loss_scale = settings.scale or (cache.logit_scale if run.config.method == "zero_shot" else run_scale)
    follower = Follower(adapted, len(run.class_names), settings, run_scale=run_scale, loss_scale=loss_scale)
    blocks = []
    with progress_bar(progress) as bar:
        task = bar.add_task("adapt", total=len(positions), unit="images", note="")
        for batch in positions.split(settings.batch):
            blocks.append(follower.follow(batch))
            bar.advance(task, len(batch))
    logits = torch.cat(blocks)
    if not bool(torch.isfinite(logits).all()):
        raise InputError("adaptation diverged: its logits are not finite; lower lr or the weights of the losses")
    return AdaptedStream(
        rows=rows,
        before=before.numpy(),
        logits=logits.numpy(),
        scores=known_score(logits / run_scale).numpy(),
        scores_before=known_score(before / run_scale).numpy(),
        weight=follower.weight.detach().numpy(),
        bias=follower.bias.detach().numpy(),
        exact=adapted.exact,
    )
