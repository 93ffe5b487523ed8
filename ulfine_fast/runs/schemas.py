"""What the JSON files of a run folder must look like; fields that are not named here may hold anything."""

from __future__ import annotations

from typing import Annotated

import msgspec

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Fractions = list[float | None]


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


class Method(msgspec.Struct):
    """The part of a run's settings that is read without a `FitConfig`, which checks the others."""

    method: str


class Config(msgspec.Struct):
    """config.json."""

    config: Method
    class_names: Annotated[list[str], msgspec.Meta(min_length=1)]
    encoder: Encoder | None = None
    cache: str | None = None
    created_by: str = "unknown"
    status: str = "done"
    relabeled: str | None = None
    digests: dict[str, str] | None = None


class Split(msgspec.Struct):
    """split.json."""

    class_order: list[_Count]
    labeled: list[str]
    unlabeled: list[str]
    val: list[str]
    test: list[str]
    rule: str = "not recorded"


class SplitMetrics(msgspec.Struct):
    """The metrics that both parts of metrics.json have; any other number is read where it is asked for."""

    accuracy: float | None = None
    balanced_accuracy: float | None = None
    temperature: Annotated[float, msgspec.Meta(gt=0)] = 1.0


class Metrics(SplitMetrics):
    """metrics.json."""

    val: SplitMetrics | None = None
    steps: _Count | None = None
    stopped_at: _Count | None = None
    class_counts: list[_Count | None] | None = None
    per_class_accuracy: _Fractions | None = None
    per_class_pseudo_label_precision: _Fractions | None = None
    per_class_pseudo_label_recall: _Fractions | None = None
