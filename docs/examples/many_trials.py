"""Trials in one batch, a search on validation, and their results: a run folder and a report."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from ulfine_fast import FeatureCache, FitConfig, build_report, fit_many, sweep

features, labels = load_digits(return_X_y=True)
cache = FeatureCache.from_arrays(features.astype(np.float32), labels, class_names=[str(digit) for digit in range(10)])
tail: dict[str, Any] = dict(n1=50, gamma_l=10.0, m1=80, gamma_u=10.0, steps=60, eval_every=20)
tail["feature_noise"] = 0.1  # instead of views, which the cache does not hold


def worse_half(step: int, rows: dict[int, dict[str, float]]) -> list[int]:
    """Indices of trials to stop at a validation: half of them, after 20 steps."""
    order = sorted(rows, key=lambda trial: rows[trial]["val_balanced_accuracy"])
    return order[: len(order) // 2] if step == 20 else []


with tempfile.TemporaryDirectory() as scratch:
    # twelve trials train as one batch; six of them stop early
    configs = [FitConfig(method="ulfine", seed=seed, lr=lr, **tail) for seed in range(4) for lr in (0.01, 0.03, 0.1)]
    runs = fit_many(cache, configs, watch=worse_half, progress=False)
    best = max(runs, key=lambda run: run.metrics["val"]["balanced_accuracy"])
    best.save(Path(scratch) / "runs" / "by-hand")
    print(f"by hand: few {best.metrics['few']:.3f}")

    # a search over the same options, three seeds per trial, with refits
    space = {"method": "ulfine", "lr": {"low": 0.003, "high": 0.3, "log": True}, "paf": [True, False], **tail}
    result = sweep(cache, space, out=Path(scratch) / "sweep", trials=8, seeds=3, refit=1, refit_seeds=3, progress=False)
    print("best options:", result.leaderboard[0].params)
    print(f"by search: few {result.best[0]['test']['few']['mean']:.3f}")

    report = build_report([Path(scratch)], Path(scratch) / "report.html")
    print(f"report: {report.stat().st_size / 1e3:.0f} kB")
