"""Realign the head of a fitted run: train it on samples of its classes' Gaussians, or replace it in closed form.

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
from ulfine_fast.cache.io.names import one_of
from ulfine_fast.cache.io.progress import progress_bar
from ulfine_fast.core.heads import Tensors, cosine_logits
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
from ulfine_fast.runs.calibration import Calibration
from ulfine_fast.runs.evaluate import inputs_of, refuse_other_encoder, rows_of
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
            covariance; "adjust" subtracts tau log pi_k from the logits, pi being the labelled class frequencies.
        kappas: pseudo-counts of the text's estimate of a class mean, in labelled images, each at least 0.
        tau: strength of "adjust", at least 0.
        sampling: schedule of "gaussians".
        device: "auto", "cpu", "cuda" or "cuda:N".
        progress: draw a progress bar; None draws it where stderr is a terminal.

    Raises:
        InputError: another way, a value out of its range, a run that predicts from more than one cosine head or is
            realigned already, or a cache that lacks its images.
    """
    # the arguments
    if by not in WAYS:
        raise one_of("by", by, WAYS)
    if not kappas or not all(np.isfinite(kappa) and kappa >= 0 for kappa in kappas):
        raise InputError(f"kappa must be numbers of at least 0, got {', '.join(map(str, kappas)) or 'none'}")
    if not (np.isfinite(tau) and tau >= 0):
        raise InputError(f"tau must be a number of at least 0, got {tau}")
    device_used = pick_device(device)
    tasks = [_Task.of(run, cache) for run in runs]

    # a shift of the logits has no candidates to choose from
    if by == "adjust":
        return [task.finished({"realigned.bias": -tau * task.log_prior}, {"by": by, "tau": tau}) for task in tasks]

    # one head for each run and kappa
    statistics = [_Statistics.of(task, device_used, by) for task in tasks]
    if by == "lda":
        candidates = [[_affine_head(each, kappa) for kappa in kappas] for each in statistics]
    else:
        candidates = _trained_heads(tasks, statistics, kappas, sampling or Sampling(), progress)

    # the best of each run on validation
    return [task.best(heads, kappas, by) for task, heads in zip(tasks, candidates, strict=True)]


@dataclass(frozen=True)
class _Task:
    """A run to realign, and its images.

    Attributes:
        run: the run.
        cache: the cache that it was fitted on.
        inputs: of all images, as :meth:`Run.logits` takes them (N, ...).
        labeled: rows of its labelled images (L,).
        val: rows of its validation images.
        test: rows of its test images.
        counts: labelled images of each class (K,).
    """

    run: Run
    cache: FeatureCache
    inputs: NDArray[Any]
    labeled: Rows
    val: Rows
    test: Rows
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, run: Run, cache: FeatureCache) -> _Task:
        """Refuses features or labels that are not those the run was fitted on, and a run realigned before."""
        run.refuse_failed()
        refuse_other_encoder(run, cache)
        if run.metrics.get("cross_validation"):
            raise InputError(
                f"the {run.config.method} run trained on every label, and realign chooses on validation images; fit "
                "with --test-fraction 0.2"
            )
        if not run.split["labeled"]:
            raise InputError(
                f"the {run.config.method} run was fitted without labelled images, and realign needs some; fit with "
                "labels"
            )
        if run.relabeled != cache.relabeled:
            raise InputError(
                "the run was fitted on other labels than these; name its file of corrections with --labels"
            )
        if "realigned.bias" in run.tensors:
            raise InputError("the run is realigned already; name the run that it was made from")
        labeled, val, test = (rows_of(run.split[role], cache) for role in ("labeled", "val", "test"))
        for role, rows in (("labeled", labeled), ("val", val), ("test", test)):
            if (cache.labels[rows] < 0).any():
                raise InputError(f"the run's split has an image in {role} whose label the cache does not know")
        counts = np.bincount(cache.labels[labeled], minlength=len(run.class_names)).astype(np.int64)
        return cls(run, cache, inputs_of(run, cache), labeled, val, test, counts)

    @property
    def log_prior(self) -> Tensor:
        """Log frequencies of the labelled classes (K,)."""
        return torch.from_numpy(np.log(np.maximum(self.counts, 1) / self.counts.sum())).float()

    def best(self, heads: Sequence[Tensors], kappas: Sequence[float], by: str) -> Run:
        """The run with the best of these heads, one for each kappa, on validation; the first of equals."""
        scores = []
        for head in heads:
            # without validation images all are equal
            score = 0.0
            if len(self.val):
                predicted = self._with(head).predict(self.inputs[self.val])
                recalls = metrics.per_class_accuracy(self.cache.labels[self.val], predicted, len(self.counts))
                score = float(np.nanmean(recalls))
            scores.append(score)
        best = int(np.argmax(scores))
        note = {
            "by": by,
            "kappa": kappas[best],
            "val_balanced_accuracy": {f"{kappa:g}": score for kappa, score in zip(kappas, scores, strict=True)},
        }
        return self.finished(heads[best], note)

    def finished(self, head: Tensors, note: dict[str, Any]) -> Run:
        """The run with this head, its metrics on validation and test, and a note of how it was realigned."""
        run, labels = self._with(head), self.cache.labels
        val_logits = np.zeros((0, len(self.counts)), dtype=np.float32)
        val_scores = np.zeros(0, dtype=np.float32)
        if len(self.val):
            val_logits, val_scores = run.logits(self.inputs[self.val]), run.scores(self.inputs[self.val])
        test_logits = run.logits(self.inputs[self.test])
        temperature = fit_temperature(val_logits, labels[self.val])
        run.metrics = {
            **self.run.metrics,
            **metrics.classification(test_logits, labels[self.test], self.counts, temperature),
            "temperature": temperature,
            "test_rows": len(self.test),
            "class_counts": self.counts.tolist(),
            "val": metrics.classification(val_logits, labels[self.val], self.counts, temperature),
            "realigned": note,
        }
        run.calibration = Calibration.held_out(
            [self.cache.ids[row] for row in self.val],
            labels[self.val],
            val_logits / temperature,
            val_scores,
            in_fold=False,
        )
        run.test_ids = [self.cache.ids[row] for row in self.test]
        run.test_labels = labels[self.test]
        run.test_probabilities = metrics.softmax(test_logits / temperature).astype(np.float32)
        return run

    def _with(self, head: Tensors) -> Run:
        return replace(self.run, tensors={**self.run.tensors, **head})


@dataclass(frozen=True)
class _Statistics:
    """A run's labelled images as its head reads them.

    Attributes:
        features: unit features after the adapter (L, D).
        spread: root mean square of the head's logits of them around each row's mean.
        gaussians: of the features, in float64.
        anchors: class means estimated from the texts, or the mean of all classes without texts (K, D).
    """

    features: Tensor
    spread: float
    gaussians: Gaussians
    anchors: Tensor

    @classmethod
    def of(cls, task: _Task, device: torch.device, by: str) -> _Statistics:
        """Refuses a run whose logits are not scaled cosines of its features with one head."""
        run, inputs = task.run, task.inputs[task.labeled]
        no_cosine_head = InputError(
            f"method {run.config.method} predicts from something else than one cosine head, which {by} needs; take "
            "adjust"
        )
        # a check of the numbers themselves, since what a method predicts from may depend on its options
        head = run.head()
        with torch.no_grad():
            rows = head.rows(torch.from_numpy(np.asarray(inputs, dtype=np.float32)))
            features, logits = head.features(rows), head.logits(rows)
            if "linear" not in head.tensors or head.tensors["linear"].shape[-1] != features.shape[-1]:
                raise no_cosine_head
            cosines = cosine_logits(features.unsqueeze(0), head.tensors["linear"], head.trials.values["scale"])[0]
        if (logits - cosines).abs().max() > _TOLERANCE * run.config.scale:
            raise no_cosine_head

        features = features.to(device)
        labels = torch.from_numpy(task.cache.labels[task.labeled]).to(device)
        try:
            gaussians = class_gaussians(features, labels, len(task.counts))
        except ValueError:
            raise InputError("no class has two labelled images, which a covariance needs; label more") from None
        if task.cache.prototypes is None:
            anchors = gaussians.means.mean(0, keepdim=True).expand_as(gaussians.means)
        else:
            text = normalize(torch.from_numpy(np.asarray(task.cache.prototypes)).double()).to(device)
            anchors = text_anchors(gaussians.means, gaussians.counts, text)
        return cls(features, _spread(logits), gaussians, anchors)

    def means(self, kappa: float) -> Tensor:
        """Anchored class means (K, D), float64."""
        return anchored(self.gaussians.means, self.gaussians.counts, self.anchors, kappa)


def _affine_head(statistics: _Statistics, kappa: float) -> Tensors:
    """An LDA head, its logits as widely spread as those of the head that it replaces."""
    weight, bias = discriminant(statistics.means(kappa), statistics.gaussians.covariance)
    # Gaussians of few rows are far too confident, more than a temperature in its range corrects
    factor = statistics.spread / max(_spread(statistics.features.double() @ weight.T + bias), 1e-12)
    return {"realigned.weight": (factor * weight).float().cpu(), "realigned.bias": (factor * bias).float().cpu()}


def _trained_heads(
    tasks: Sequence[_Task],
    statistics: Sequence[_Statistics],
    kappas: Sequence[float],
    sampling: Sampling,
    progress: bool | None,
) -> list[list[Tensors]]:
    """Heads trained on samples, one for each run and kappa; all runs in one trial batch."""
    means = torch.stack([torch.stack([each.means(kappa) for kappa in kappas]) for each in statistics]).float()
    covariance = torch.stack([each.gaussians.covariance for each in statistics])
    linear = torch.stack([task.run.tensors["linear"] for task in tasks]).to(means.device).float()  # (T, K, D)
    seeds = torch.tensor([task.run.config.seed for task in tasks], device=means.device)
    heads = start = linear.unsqueeze(1).expand_as(means)  # (T, C, K, D)
    with progress_bar(progress) as bar:
        note = f"{len(tasks)} runs"
        shown = bar.add_task("realign", total=sampling.steps(means.shape[2]), unit="steps", note=note)
        for step, trained in align(start, means, covariance, seeds, sampling):
            heads = trained
            bar.update(shown, completed=step)
    return [[{"linear": head.cpu().clone()} for head in candidates] for candidates in heads]


def _spread(logits: Tensor) -> float:
    """Root mean square of logits (n, K) around each row's mean."""
    return float((logits - logits.mean(1, keepdim=True)).square().mean().sqrt())
