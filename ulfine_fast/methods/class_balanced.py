"""Class-balanced cross-entropy (arXiv 1901.05555): classes weighted by their effective numbers of images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ulfine_fast.config import option
from ulfine_fast.core.types import Pool, State, Trials
from ulfine_fast.methods.cross_entropy import CrossEntropy
from ulfine_fast.methods.registry import register
from ulfine_fast.ops.margins import class_counts, effective_weights


@dataclass(frozen=True)
class ClassBalancedOptions:
    """Options of :class:`ClassBalanced`."""

    effective_beta: float = option(0.9999, "beta of the effective numbers of images", low=0.0, high=0.9999999)


@register("class_balanced", options=ClassBalancedOptions, source="arXiv 1901.05555")
class ClassBalanced(CrossEntropy):
    """Cross-entropy weighted by effective numbers (arXiv 1901.05555, section 4)."""

    uses_pool = True

    def refresh(self, trials: Trials, state: State, pool: Pool, step: int) -> None:
        """Count the labelled images of each class (T, K)."""
        state.scratch["counts"] = class_counts(pool.labels, trials.log_prior.shape[1])

    def weights(self, trials: Trials, state: State) -> Tensor:
        """Inverse effective numbers of the classes (T, K)."""
        return effective_weights(state.scratch["counts"], trials.values["effective_beta"])
