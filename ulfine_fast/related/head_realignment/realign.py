"""Repair the head of a fitted run: trained anew on samples of its classes' Gaussians, or replaced in closed form.

After SLCA (arXiv 2303.05118) and SLCA++ (arXiv 2408.08295), where the order of tasks biases a head; here
labelled counts may as well. The mathematics, and what of it is a reconstruction:
:mod:`ulfine_fast.related.head_realignment.gaussians`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ulfine_fast.cache.io.device import pick_device
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.progress import progress_bar
from ulfine_fast.core.heads import Tensors, adapt, cosine_logits
from ulfine_fast.data.splits import Rows
from ulfine_fast.metrics import classification as metrics
from ulfine_fast.metrics.calibration import fit_temperature
from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.related.head_realignment.gaussians import (
    Gaussians,
    Sampling,
    align,
    anchored,
    class_gaussians,
    discriminant,
    text_anchors,
)
from ulfine_fast.runs.run import Run

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache

WAYS = ("gaussians", "lda", "adjust")
KAPPAS = (0.0, 5.0, 20.0, 100.0)

_TOLERANCE = 1e-3


def realign(
    runs: Sequence[Run],
    cache: FeatureCache,
    *,
    by: str = "gaussians",
    kappas: Sequence[float] = KAPPAS,
    tau: float = 1.0,
    sampling: Sampling | None = None,
    device: str = "auto",
    progress: bool | None = None,
) -> list[Run]:
    """Realigned copies of runs; their adapters stay, their heads are trained or replaced.

    Of several kappas each run takes the one with the best balanced accuracy on its validation images, the first of
    equals; the test images are read once, after that.

    Args:
        runs: fitted runs with one cosine head ("adjust" takes any).
        cache: the cache that all of them were fitted on.
        by: "gaussians" trains the head on samples; "lda" is linear discriminant analysis with the same means and
            covariance; "adjust" takes tau log pi_k off the logits, pi being the shares of labelled images.
        kappas: how many labelled images the text's guess at a class mean weighs as much as, each at least 0.
        tau: strength of "adjust", at least 0.
        sampling: of "gaussians".
        device: "auto", "cpu", "cuda" or "cuda:N".
        progress: draw a progress bar; None draws it where stderr is a terminal.

    Raises:
        InputError: another way, a value out of its range, a run that predicts from more than one cosine head, or a
            cache that lacks its images.
    """
    _refuse_values(by, kappas, tau)
    stands = [_Stand.of(run, cache, pick_device(device), by) for run in runs]
    if by == "adjust":
        note = {"by": by, "tau": tau}
        return [stand.finished([{"realigned.bias": -tau * stand.log_prior}], note) for stand in stands]
    means = [[stand.means(kappa) for kappa in kappas] for stand in stands]
    if by == "lda":
        found = [[_affine(one, stand) for one in own] for stand, own in zip(stands, means, strict=True)]
    else:
        found = _aligned(stands, means, sampling or Sampling(), progress)
    return [stand.finished(heads, {"by": by}, kappas) for stand, heads in zip(stands, found, strict=True)]


@dataclass(frozen=True)
class _Stand:
    """A run, what it was given, and its labelled images as its head sees them.

    Attributes:
        inputs: of all images, as :meth:`Run.logits` takes them (n, ...). labels: their classes (n,).
        counts: labelled images of each class (K,).
        features: labelled images as the head sees them (L, D), and `spread`, that of the head's logits of them;
            `gaussians` of them; `anchors`, where the class means would be by their texts, or the mean of all classes
            without texts (K, D). Nobody asks for these four to adjust logits.
    """

    run: Run
    cache: FeatureCache
    device: torch.device
    inputs: NDArray[Any]
    labels: NDArray[np.int64]
    counts: NDArray[np.int64]
    features: Tensor | None = None
    spread: float = 1.0
    gaussians: Gaussians | None = None
    anchors: Tensor | None = None

    @classmethod
    def of(cls, run: Run, cache: FeatureCache, device: torch.device, by: str) -> _Stand:
        run.refuse_failed()
        _refuse_cache(run, cache)
        inputs = cache.tokens("plain") if run.config.reads_tokens else cache.plain
        labeled = _rows(run, cache, "labeled")
        counts = np.bincount(cache.labels[labeled], minlength=len(run.class_names)).astype(np.int64)
        stand = cls(run, cache, device, inputs, cache.labels, counts)
        return stand if by == "adjust" else stand._measured(labeled, by)

    @property
    def log_prior(self) -> Tensor:
        """Log shares of the labelled images (K,)."""
        return torch.from_numpy(np.log(np.maximum(self.counts, 1) / self.counts.sum())).float()

    def means(self, kappa: float) -> Tensor:
        """Anchored class means (K, D), float64."""
        assert self.gaussians is not None
        assert self.anchors is not None
        return anchored(self.gaussians.means, self.gaussians.counts, self.anchors, kappa)

    def finished(self, heads: Sequence[Tensors], note: dict[str, Any], kappas: Sequence[float] = ()) -> Run:
        """The run with the best of these heads on validation, the first of equals, and its figures."""
        runs = [replace(self.run, tensors={**self._kept(), **own}) for own in heads]
        best = 0
        if kappas:
            scores = [self._score(run) for run in runs]
            best = int(np.argmax(scores))
            note = {
                **note,
                "kappa": kappas[best],
                "val_balanced_accuracy": {f"{k:g}": s for k, s in zip(kappas, scores, strict=True)},
            }
        return self._judged(runs[best], note)

    def _kept(self) -> Tensors:
        """The run's tensors without an earlier realignment."""
        return {name: tensor for name, tensor in self.run.tensors.items() if not name.startswith("realigned.")}

    def _measured(self, labeled: Rows, by: str) -> _Stand:
        """With the statistics of the labelled images."""
        seen = _seen(self.run, self.inputs[labeled], by)
        spread = _spread(torch.from_numpy(self.run.logits(self.inputs[labeled])))
        features = seen.to(self.device)
        labels = torch.from_numpy(self.labels[labeled]).to(self.device)
        try:
            gaussians = class_gaussians(features, labels, len(self.counts))
        except ValueError:
            raise InputError("no class has two labelled images, of which a covariance could be made") from None
        anchors = _anchors(gaussians, self.cache)
        return replace(self, features=features, spread=spread, gaussians=gaussians, anchors=anchors)

    def _score(self, run: Run) -> float:
        """Balanced accuracy on validation, 0 without validation images."""
        rows = _rows(run, self.cache, "val")
        if not len(rows):
            return 0.0
        predicted = run.predict(self.inputs[rows])
        return float(np.nanmean(metrics.per_class_accuracy(self.labels[rows], predicted, len(self.counts))))

    def _judged(self, run: Run, note: dict[str, Any]) -> Run:
        """The run with its figures on validation and test."""
        val, test = (_rows(run, self.cache, role) for role in ("val", "test"))
        seen = run.logits(self.inputs[val]) if len(val) else np.zeros((0, len(self.counts)), dtype=np.float32)
        logits = run.logits(self.inputs[test])
        temperature = fit_temperature(seen, self.labels[val])
        figures = metrics.classification(logits, self.labels[test], self.counts, temperature)
        figures |= {"temperature": temperature, "test_rows": len(test), "class_counts": self.counts.tolist()}
        figures["val"] = metrics.classification(seen, self.labels[val], self.counts, temperature)
        return replace(
            run,
            metrics={**self.run.metrics, **figures, "realigned": note},
            test_ids=[self.cache.ids[row] for row in test],
            test_labels=self.labels[test],
            test_probabilities=metrics.softmax(logits / temperature).astype(np.float32),
        )


def _aligned(
    stands: Sequence[_Stand], means: Sequence[Sequence[Tensor]], sampling: Sampling, progress: bool | None
) -> list[list[Tensors]]:
    """Heads trained on samples, one for each run and kappa; all runs in one batch."""
    device = stands[0].device
    wanted = torch.stack([torch.stack(list(own)) for own in means]).float()  # (T, C, K, D)
    heads = torch.stack([stand.run.tensors["linear"] for stand in stands]).to(device).float()  # (T, K, D)
    covariance = torch.stack([stand.gaussians.covariance for stand in stands if stand.gaussians is not None])
    seeds = torch.tensor([stand.run.config.seed for stand in stands], device=device)
    found = heads.unsqueeze(1).expand_as(wanted)
    with progress_bar(progress) as bar:
        note = f"{len(stands)} runs"
        task = bar.add_task("realign", total=sampling.steps(wanted.shape[2]), unit="steps", note=note)
        for step, trained in align(found, wanted, covariance, seeds, sampling):
            found = trained
            bar.update(task, completed=step)
    return [[{"linear": head.cpu().clone()} for head in own] for own in found]


def _affine(means: Tensor, stand: _Stand) -> Tensors:
    """An LDA head, its logits as widely spread as those of the head that it replaces."""
    assert stand.gaussians is not None
    assert stand.features is not None
    weight, bias = discriminant(means, stand.gaussians.covariance)
    # Gaussians of few rows are far surer than they should be, more than one temperature of a legal range mends
    factor = stand.spread / max(_spread(stand.features.double() @ weight.T + bias), 1e-12)
    return {"realigned.weight": (factor * weight).float().cpu(), "realigned.bias": (factor * bias).float().cpu()}


def _spread(logits: Tensor) -> float:
    """Root mean square of logits (n, K) around each row's mean."""
    return float((logits - logits.mean(1, keepdim=True)).square().mean().sqrt())


def _anchors(gaussians: Gaussians, cache: FeatureCache) -> Tensor:
    """Class means by the texts (K, D), or their common mean where the cache has no texts."""
    if cache.prototypes is None:
        return gaussians.means.mean(0, keepdim=True).expand_as(gaussians.means)
    text = normalize(torch.from_numpy(np.asarray(cache.prototypes)).double()).to(gaussians.means.device)
    return text_anchors(gaussians.means, gaussians.counts, text)


def _seen(run: Run, inputs: NDArray[Any], by: str) -> Tensor:
    """Features as the run's head sees them (n, D).

    Raises:
        InputError: the run's logits are not the scaled cosines of these features to one head.
    """
    rows = torch.from_numpy(np.asarray(inputs, dtype=np.float32))
    rows = rows.flatten(1) if run.config.reads_tokens else normalize(rows)
    tensors = {name: tensor.unsqueeze(0) for name, tensor in run.tensors.items()}
    head, refused = tensors.get("linear"), _other_head(run.config.method, by)
    if head is None or run.config.feature == "pre-projection":
        raise refused
    if "realigned.bias" in tensors:
        raise InputError("the run is realigned already; name the run that it was made from")
    trial = run.trial(tensors)
    with torch.no_grad():
        features = adapt(tensors, rows.unsqueeze(0), trial.values["adapter_scale"])
        expected = cosine_logits(features, head, trial.values["scale"])[0].numpy()
    # asked of the numbers themselves: what a method predicts from may depend on its settings
    if np.abs(run.logits(inputs) - expected).max() > _TOLERANCE * run.config.scale:
        raise refused
    return features[0]


def _other_head(method: str, by: str) -> InputError:
    return InputError(
        f"method {method} predicts from something else than one cosine head, which {by} needs; take adjust"
    )


def _rows(run: Run, cache: FeatureCache, role: str) -> Rows:
    """Rows of the cache that the run had in a role."""
    return cache.row_of(run.split[role], source="the run's split", fix="use the cache it was fitted on")


def _refuse_cache(run: Run, cache: FeatureCache) -> None:
    """Refuse features or labels that are not those the run was fitted on."""
    from ulfine_fast.runs.evaluate import refuse_other_encoder

    refuse_other_encoder(run, cache)
    if not run.split["labeled"]:
        raise InputError(f"the {run.config.method} run saw no labelled image, and realign needs some; fit with labels")
    if run.relabeled != cache.relabeled:
        raise InputError("the run was fitted on other labels than these; name its file of corrections with --labels")


def _refuse_values(by: str, kappas: Sequence[float], tau: float) -> None:
    if by not in WAYS:
        raise InputError(f"by must be one of {', '.join(WAYS)}, got {by!r}")
    if not kappas or not all(np.isfinite(kappa) and kappa >= 0 for kappa in kappas):
        raise InputError(f"kappa must be numbers of at least 0, got {', '.join(map(str, kappas)) or 'none'}")
    if not (np.isfinite(tau) and tau >= 0):
        raise InputError(f"tau must be a number of at least 0, got {tau}")
