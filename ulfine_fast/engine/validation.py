"""Metrics of T trials: validation accuracy and pseudo-label health, computed a block of trials and rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ulfine_fast.core.batches import PaddedRows
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.core.heads import Tensors
from ulfine_fast.core.types import State, Trials
from ulfine_fast.methods.base import Method

Metrics = dict[str, NDArray[np.float64]]
"""Metrics by name, (T,) or (T, K); NaN where there are no rows to compute one from."""

ROWS = 4096
"""Rows whose logits are computed together."""
# float32 values of a block's features: so many fit in a processor's cache, or keep a GPU busy
_VALUES = 1 << 19
_VALUES_GPU = 1 << 26


@dataclass(frozen=True)
class Validation:
    """Computes metrics of T trials.

    Attributes:
        method: of all trials.
        trials: their options.
        state: what they have learned so far.
        features: on the device.
        labels: class of each row of the cache (n,), -1 unknown.
    """

    method: Method
    trials: Trials
    state: State
    features: DeviceFeatures
    labels: Tensor

    def accuracy(self, rows: PaddedRows) -> Metrics:
        """`accuracy` and `balanced_accuracy` (mean recall over classes present) on each trial's rows, each (T,)."""
        classes = self.trials.log_prior.shape[1]
        correct = torch.zeros_like(self.trials.log_prior, dtype=torch.int64)  # (T, K)
        total = torch.zeros_like(correct)
        for start, stop, first, logits in self._blocks(rows, self.method.logits):
            index, present = _block(rows, start, stop, first, logits.shape[1])
            labels = self.labels[index]
            total[start:stop] += _class_counts(labels, present, classes)
            correct[start:stop] += _class_counts(labels, present & (logits.argmax(-1) == labels), classes)
        recall = _fractions(correct, total)
        seen = ~np.isnan(recall)
        balanced = _quotients(np.where(seen, recall, 0.0).sum(1), seen.sum(1))
        return {"accuracy": _fractions(correct.sum(1), total.sum(1)), "balanced_accuracy": balanced}

    def health(self, rows: PaddedRows, most: int | None = None) -> Metrics:
        """Pseudo-label metrics over each trial's unlabelled rows, those of :func:`metrics.pseudo_label_health`.

        Args:
            rows: of each trial.
            most: how many rows are read at most, evenly spaced; None for all.
        """
        if most is not None:
            rows = _evenly_spaced(rows, most)
        threshold = self.method.threshold(self.trials)
        counts = torch.zeros(4, *self.trials.log_prior.shape, dtype=torch.int64, device=self.labels.device)
        false = torch.zeros(2, len(threshold), dtype=torch.float64, device=self.labels.device)
        for start, stop, first, probabilities in self._probabilities(rows):
            index, present = _block(rows, start, stop, first, probabilities.shape[1])
            block_counts, block_false = _health(probabilities, self.labels[index], present, threshold[start:stop])
            counts[:, start:stop] += block_counts
            false[:, start:stop] += block_false
        return _health_metrics(counts, false, rows.count)

    def _probabilities(self, rows: PaddedRows) -> Iterator[tuple[int, int, int, Tensor]]:
        """Pseudo-label probabilities, in the blocks of :meth:`_blocks`."""
        probabilities = self.method.pool_probabilities(self.trials, self.state)
        if probabilities is not None:
            yield 0, len(probabilities), 0, probabilities.float()
            return
        temperature = self.method.temperature(self.trials)
        for start, stop, first, logits in self._blocks(rows, self.method.pseudo_logits):
            if temperature is not None:
                logits = logits / temperature[start:stop].view(-1, 1, 1)
            yield start, stop, first, torch.softmax(logits, dim=-1)

    def logits(self, rows: PaddedRows) -> Tensor:
        """Logits of each trial's rows, padding included (T, N, K), on the device."""
        result = torch.zeros(*rows.index.shape, self.trials.log_prior.shape[1], device=rows.index.device)
        for start, stop, first, logits in self._blocks(rows, self.method.logits):
            result[start:stop, first : first + logits.shape[1]] = logits
        return result

    def scores(self, rows: PaddedRows, logits: Tensor) -> Tensor:
        """How much each trial's rows look like one of a known class, padding included (T, N), in main memory.

        Args:
            rows: of each trial.
            logits: theirs (T, N, K), which are not computed again where the method scores by its prediction.
        """
        if type(self.method).known_logits is Method.known_logits:
            return torch.logsumexp(logits, dim=-1).cpu()
        result = torch.zeros(*rows.index.shape)
        for start, stop, first, known in self._blocks(rows, self.method.known_logits):
            result[start:stop, first : first + known.shape[1]] = torch.logsumexp(known, dim=-1).cpu()
        return result

    @torch.no_grad()
    def _blocks(
        self, rows: PaddedRows, forward: Callable[[Trials, Tensors, Tensor], Tensor]
    ) -> Iterator[tuple[int, int, int, Tensor]]:
        """Logits (t, n, K), by `forward`, of trials [start, stop) and n rows from `first` on, block after block."""
        trials, total = rows.index.shape
        width = min(total, ROWS)
        together = trials_together(self.features, width)
        for start in range(0, trials, together):
            stop = min(start + together, trials)
            trials_part = self.trials.part(start, stop)
            tensors = self.state.part(start, stop).tensors
            shared = bool((rows.index[start:stop] == rows.index[start]).all())
            for first in range(0, total, width):
                # trials of one split read the same images, which are gathered once for the whole block
                index = rows.index[start : start + 1 if shared else stop, first : first + width]
                features = self.features.rows(index).expand(stop - start, -1, -1)  # (t, n, D)
                yield start, stop, first, forward(trials_part, tensors, features).float()


def trials_together(features: DeviceFeatures, width: int) -> int:
    """How many trials' logits of so many rows are computed together."""
    values = _VALUES_GPU if features.plain.is_cuda else _VALUES
    return max(1, values // (width * features.plain.shape[1]))


def finite(*tensors: Tensor) -> Tensor:
    """Whether all values of each trial are finite: tensors (T, ...) give bool (T,)."""
    return torch.stack([torch.isfinite(tensor.detach()).reshape(len(tensor), -1).all(1) for tensor in tensors]).all(0)


def _evenly_spaced(rows: PaddedRows, most: int) -> PaddedRows:
    """At most so many rows, every n-th of each trial; all of them where there are no more."""
    stride = -(-rows.index.shape[1] // most)
    return PaddedRows(rows.index[:, ::stride], (rows.count + stride - 1) // stride)


def _block(rows: PaddedRows, start: int, stop: int, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Row numbers and presence of a block, each (t, n)."""
    positions = torch.arange(first, first + count, device=rows.index.device)
    return rows.index[start:stop, first : first + count], positions < rows.count[start:stop, None]


def _health(probabilities: Tensor, labels: Tensor, present: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Counts by class, and confidences, for :func:`_health_metrics`.

    Returns:
        Counts (4, t, K) of pseudo-labels, those of images with a known label, correct ones, and known labels; sum and
        number (2, t) of the confidences of false pseudo-labels.
    """
    classes = probabilities.shape[-1]
    confidence, predicted = probabilities.max(-1)  # (t, n)
    kept = present & (confidence >= threshold.unsqueeze(1))
    known = present & (labels >= 0)
    correct = kept & (predicted == labels)
    false = kept & known & (predicted != labels)
    counts = torch.stack(
        [
            _class_counts(predicted, kept, classes),
            _class_counts(predicted, kept & known, classes),
            _class_counts(predicted, correct, classes),
            _class_counts(labels, known, classes),
        ]
    )
    return counts, torch.stack([(confidence * false).double().sum(1), false.double().sum(1)])


def _health_metrics(counts: Tensor, false: Tensor, rows: Tensor) -> Metrics:
    kept, kept_known, correct, known = counts
    confidence_sum, false_count = false
    return {
        "pseudo_label_rate": _fractions(kept.sum(1), rows),
        "pseudo_label_precision": _fractions(correct.sum(1), kept_known.sum(1)),
        "confidence_on_false": _fractions(confidence_sum, false_count),
        "per_class_pseudo_label_rate": _fractions(kept, rows.unsqueeze(1).expand_as(kept)),
        "per_class_pseudo_label_precision": _fractions(correct, kept_known),
        "per_class_pseudo_label_recall": _fractions(correct, known),
    }


def _class_counts(classes_of: Tensor, mask: Tensor, classes: int) -> Tensor:
    """How many masked rows (t, n) have each class: int64 (t, K)."""
    counts = torch.zeros(len(mask), classes, dtype=torch.int64, device=mask.device)
    # unknown labels are masked: they add 0 to class 0
    return counts.scatter_add_(1, classes_of.clamp(min=0), mask.long())


def _fractions(part: Tensor, whole: Tensor) -> NDArray[np.float64]:
    return _quotients(part.cpu().numpy(), whole.cpu().numpy())


def _quotients(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float64]:
    """Part / whole, NaN where the whole is 0."""
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
