"""What the options of a sweep may be."""

from __future__ import annotations

from enum import Enum
from typing import Literal

Sampler = Literal["tpe", "random", "grid", "cmaes", "qmc"]
Pruning = Literal["none", "halving", "hyperband"]


class Metric(str, Enum):
    """Metrics of :func:`ulfine_fast.metrics.classification.classification` that a sweep may optimise."""

    ACCURACY = "accuracy"
    BALANCED_ACCURACY = "balanced_accuracy"
    MANY = "many"
    MEDIUM = "medium"
    FEW = "few"
    MANY_SHOT = "many_shot"
    MEDIUM_SHOT = "medium_shot"
    FEW_SHOT = "few_shot"
    WORST_CLASS = "worst_class"
    MACRO_F1 = "macro_f1"
    ECE = "ece"
    ECE_TEMPERATURE_SCALED = "ece_temperature_scaled"
