"""What the JSON files of a run folder must look like; fields that are not named here may hold anything."""

from __future__ import annotations

from typing import Annotated

import msgspec

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Fractions = list[float | None]
_Ends = Annotated[list[float], msgspec.Meta(min_length=2, max_length=2)]
_Interval = Annotated[list[float | None], msgspec.Meta(min_length=3, max_length=3)]


class Encoder(msgspec.Struct):
    """What a run records of the model its features came from; as far as commands read it."""

    name: str = ""
    pretrained: str | None = None
    sha256: str = ""
    image_size: _Count | None = None
    dim: _Count | None = None
    logit_scale: float | None = None
    preprocessing: str | None = None
    exact: bool = True
    mean: list[float] | None = None
    std: list[float] | None = None


class Second(msgspec.Struct):
    """The second encoder of a run of two, and the cache of its features."""

    cache: Annotated[str, msgspec.Meta(pattern="^[^\0]*$")] | None = None
    encoder: Encoder | None = None


class Method(msgspec.Struct):
    """The part of a run's settings that is read without a `FitConfig`, which checks the others."""

    method: str


class Config(msgspec.Struct):
    """config.json."""

    config: Method
    class_names: Annotated[list[str], msgspec.Meta(min_length=1)]
    encoder: Encoder | None = None
    cache: Annotated[str, msgspec.Meta(pattern="^[^\0]*$")] | None = None
    created_by: str = "unknown"
    status: str = "done"
    relabeled: str | None = None
    second: Second | None = None
    digests: dict[str, str] | None = None


class SplitMetrics(msgspec.Struct):
    """The metrics that both parts of metrics.json have; a number that is not named is checked where it is asked for."""

    accuracy: float | None = None
    balanced_accuracy: float | None = None
    many: float | None = None
    medium: float | None = None
    few: float | None = None
    worst_class: float | None = None
    macro_f1: float | None = None
    ece: float | None = None
    ece_temperature_scaled: float | None = None
    temperature: Annotated[float, msgspec.Meta(gt=0)] = 1.0


class CrossValidation(SplitMetrics):
    """The metrics that cross-validation estimates."""

    folds: _Count = 0
    repeats: _Count = 0
    rows: _Count = 0
    balanced_accuracy_interval: _Ends | None = None
    per_class_accuracy: _Fractions | None = None
    per_class_interval: list[_Ends | None] | None = None


class Metrics(SplitMetrics):
    """metrics.json."""

    val: SplitMetrics | None = None
    cross_validation: CrossValidation | None = None
    pseudo_label_rate: float | None = None
    pseudo_label_precision: float | None = None
    confidence_on_false: float | None = None
    seconds: float | None = None
    steps: _Count | None = None
    stopped_at: _Count | None = None
    class_counts: list[_Count | None] | None = None
    held_out: float | None = None
    weight_of_probe: float | None = None
    no_class: float | None = None
    gain_unlabeled: _Interval | None = None
    gain_text: _Interval | None = None
    gain_second: _Interval | None = None
    weight_of_second: float | None = None
    gain_descriptions: _Interval | None = None
    weight_of_descriptions: float | None = None
    estimated_prior: list[float] | None = None
    per_class_accuracy: _Fractions | None = None
    per_class_pseudo_label_precision: _Fractions | None = None
    per_class_pseudo_label_recall: _Fractions | None = None
