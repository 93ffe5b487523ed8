"""A classifier that is fitted again in about a second, while labels come in: a probe with held-out predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ulfine_fast.data.splits import Rows
from ulfine_fast.ops.evidence import fold_numbers, held_out_scores, label_likelihoods
from ulfine_fast.ops.probe import class_starts, fit_probe
from ulfine_fast.ops.prototypes import normalize

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache

FOLDS = 4
"""A label is checked by heads that were trained on three quarters of the labels."""

_SCALES = (10.0, 25.0)  # of cosines; which is better depends on encoder and labels, and held-out labels decide
_STEPS = 100
_RATE = 0.2
_ROWS = 16384  # predicted together


@dataclass(frozen=True)
class QuickFit:
    """A probe on all labels, and predictions for labelled images by probes without their label.

    Attributes:
        probabilities: (n, K) for every row of the cache; for a labelled row by the probe without it, NaN for the only
            label of a class.
        similarity: largest cosine of each row with a class vector (n,), of the same probes.
        labels: class index that each row trains with, -1 for none (n,).
        val: rows that are labelled but train no probe (V,).
        val_labels: their class indices (V,).
        classes: K.
        scale: of cosines, the best of those tried.
    """

    probabilities: NDArray[np.float32]
    similarity: NDArray[np.float32]
    labels: Rows
    val: Rows
    val_labels: Rows
    classes: int
    scale: float

    @property
    def counts(self) -> Rows:
        """Labels of each class that train (K,)."""
        return np.bincount(self.labels[self.labels >= 0], minlength=self.classes)

    def held_out(self) -> tuple[Rows, Rows]:
        """Rows (m,) whose label their prediction did not see, and these labels (m,)."""
        trained = np.flatnonzero((self.labels >= 0) & ~np.isnan(self.probabilities[:, 0]))
        return np.concatenate([trained, self.val]), np.concatenate([self.labels[trained], self.val_labels])


def quick_fit(cache: FeatureCache, labeled: Rows, val: Rows, scale: float | None = None) -> QuickFit:
    """Fit a logit-adjusted cosine probe on all labels and, in the same pass, without each quarter of them.

    Args:
        cache: with the labels to train with.
        labeled: rows that train (L,); every class may have any number of them, zero too.
        val: rows that are labelled and do not train (V,).
        scale: of cosines, as an earlier fit has it; None to try several.
    """
    classes = len(cache.class_names)
    rows = _unit(cache.plain[labeled])  # (L, D)
    labels = torch.from_numpy(cache.labels[labeled])
    fold = fold_numbers(torch.zeros(1, dtype=torch.int64), labels.unsqueeze(0), classes, FOLDS)  # (1, L)
    numbers = torch.arange(FOLDS + 1)
    kept = (numbers == 0) | (fold.unsqueeze(-1) != numbers)  # (1, L, J)

    # heads of each scale, side by side
    scales = torch.tensor(_SCALES if scale is None else (scale,))  # (S,)
    count, fits = len(scales), kept.shape[2]
    of_fits = scales.repeat_interleave(fits)  # (S J,)
    fitted = fit_probe(
        rows.view(1, len(rows), 1, -1),
        labels.unsqueeze(0),
        kept.repeat(1, 1, count),
        _starts(cache, rows, labels, kept).repeat(1, count, 1, 1),
        scale=of_fits.unsqueeze(0),
        rate=_RATE,
        stops=(_STEPS,),
    )
    heads = (of_fits.view(-1, 1, 1) * fitted[0, 0]).unflatten(0, (count, fits))  # (S, J, K, D)

    # the scale and temperature that held-out labels prefer
    logits = torch.einsum("ld,sjkd->lsjk", rows, heads)
    own = logits[torch.arange(len(rows)), :, fold[0]]  # (L, S, K)
    likelihoods = label_likelihoods(own.unsqueeze(0), labels.unsqueeze(0))
    scores, temperatures = held_out_scores(likelihoods, labels.unsqueeze(0), fold > 0, classes)
    best = int(scores[0].argmax())

    # every row by the probe on all labels, a labelled one by that without its fold
    logits_per_cosine = scales[best] / temperatures[0, best]
    cosines = np.empty((len(cache), classes), dtype=np.float32)
    for first in range(0, len(cache), _ROWS):
        part = slice(first, first + _ROWS)
        cosines[part] = (_unit(cache.plain[part]) @ heads[best, 0].T / scales[best]).numpy()
    cosines[labeled] = (own[:, best] / scales[best]).numpy()
    probabilities = torch.softmax(logits_per_cosine * torch.from_numpy(cosines), -1).numpy()
    probabilities[labeled[fold[0].numpy() == 0]] = np.nan
    trained = np.full(len(cache), -1, dtype=np.int64)
    trained[labeled] = cache.labels[labeled]
    return QuickFit(probabilities, cosines.max(1), trained, val, cache.labels[val], classes, float(scales[best]))


def _unit(features: NDArray[np.generic]) -> Tensor:
    return normalize(torch.from_numpy(np.asarray(features, dtype=np.float32)))


def _starts(cache: FeatureCache, rows: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
    """Class vectors that each classifier begins with (1, J, K, D): of the texts, or the means of its images kept."""
    if cache.prototypes is None:
        return class_starts(rows.unsqueeze(0), labels.unsqueeze(0), kept, len(cache.class_names))
    texts = normalize(torch.from_numpy(np.asarray(cache.prototypes, dtype=np.float32)))
    return texts.expand(1, kept.shape[2], -1, -1)
