"""Long-tailed semi-supervised classification on cached CLIP features.

Public names are imported on first use (PEP 562), so that `import ulfine_fast` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ulfine_fast._version import __version__

if TYPE_CHECKING:
    from ulfine_fast.cache.io.errors import CacheMismatch, InputError
    from ulfine_fast.cache.store import FeatureCache
    from ulfine_fast.config import FitConfig
    from ulfine_fast.distillation import distill
    from ulfine_fast.engine.fit import fit, fit_many
    from ulfine_fast.estimator import (
        FeatureClassifier,
        FixMatchClassifier,
        LinearProbeClassifier,
        ULFineClassifier,
        ULFinePlusClassifier,
    )
    from ulfine_fast.exports import export, load, push
    from ulfine_fast.report import build_report
    from ulfine_fast.runs.run import Run
    from ulfine_fast.search.result import SweepResult
    from ulfine_fast.search.sweep import sweep

_HOMES = {
    "CacheMismatch": "ulfine_fast.cache.io.errors",
    "FeatureCache": "ulfine_fast.cache.store",
    "FeatureClassifier": "ulfine_fast.estimator",
    "FitConfig": "ulfine_fast.config",
    "FixMatchClassifier": "ulfine_fast.estimator",
    "InputError": "ulfine_fast.cache.io.errors",
    "LinearProbeClassifier": "ulfine_fast.estimator",
    "Run": "ulfine_fast.runs.run",
    "SweepResult": "ulfine_fast.search.result",
    "ULFineClassifier": "ulfine_fast.estimator",
    "ULFinePlusClassifier": "ulfine_fast.estimator",
    "build_report": "ulfine_fast.report",
    "distill": "ulfine_fast.distillation",
    "fit": "ulfine_fast.engine.fit",
    "fit_many": "ulfine_fast.engine.fit",
    "export": "ulfine_fast.exports",
    "load": "ulfine_fast.exports",
    "push": "ulfine_fast.exports",
    "sweep": "ulfine_fast.search.sweep",
}

__all__ = [
    "CacheMismatch",
    "FeatureCache",
    "FeatureClassifier",
    "FitConfig",
    "FixMatchClassifier",
    "InputError",
    "LinearProbeClassifier",
    "Run",
    "SweepResult",
    "ULFineClassifier",
    "ULFinePlusClassifier",
    "__version__",
    "build_report",
    "distill",
    "export",
    "fit",
    "fit_many",
    "load",
    "push",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
