"""DINOv2's linear protocol over a cache: learning rates and penalties, by features to train on, chosen on validation.

    python -m benchmarks.studies.linear_protocol --data demo --seeds 0-4

As in arXiv 2304.07193, appendix B.3, many linear heads are trained side by side, 13 learning rates for each choice of
features, and the best on validation is tested; and logistic regressions are fitted with 45 values of C from 1e-6 to
1e5. The choices here are what a cache holds: the plain view; weak views too; the encoder's output before its
projection, and both side by side, where the cache has tokens. Learning rates are of cosine heads at scale 25, whose
gradients are larger than those of DINOv2's heads: 0.001 to 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from benchmarks.data import changed_cache, open_features, unit_rows
from benchmarks.options import DataOption, DeviceOption, JsonOption, SeedsOption, StepsOption, parse_seeds
from benchmarks.results import Row, print_table, write_rows
from benchmarks.speed.linear_probe import path
from benchmarks.speed.logistic_regression import INVERSE_PENALTIES
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.config import FitConfig
from ulfine_fast.core.heads import frozen_end, last_norm
from ulfine_fast.data.splits import Split
from ulfine_fast.engine.fit import draw_splits, fit_many

LEARNING_RATES = path(1e-3, 1.0, 13)
INVERSE = path(*INVERSE_PENALTIES, 45)

Metric = Literal["accuracy", "balanced_accuracy"]


def before_projection(cache: FeatureCache) -> NDArray[np.float32]:
    """The encoder's output in front of its projection, of the plain views (n, W)."""
    tokens = torch.from_numpy(np.asarray(cache.tokens("plain"))).float()  # (n, S, W)
    if cache.token_kinds == ["pre", "post"]:
        head = {name: torch.from_numpy(values).float() for name, values in cache.head.items()}
        tokens = last_norm(frozen_end(head, 1), tokens.flatten(1).unsqueeze(0), torch.zeros(1))[0]
    return tokens.flatten(1).numpy()


def feature_choices(cache: FeatureCache) -> dict[str, FeatureCache]:
    """Caches in memory of the same rows, without texts, by what their heads train on."""
    bare: dict[str, Any] = {"text_features": None, "weak": None, "strong": None}
    choices = {"plain": changed_cache(cache, **bare)}
    if cache.views("weak").shape[1]:
        choices["views"] = changed_cache(cache, text_features=None, strong=None)
    if cache.trainable_tokens:
        wide = unit_rows(before_projection(cache))
        both = np.concatenate([unit_rows(cache.plain), wide], axis=1)
        choices["pre-projection"] = changed_cache(cache, plain=wide, **bare)
        choices["plain + pre-projection"] = changed_cache(cache, plain=both, **bare)
    return choices


def trial_options(choice: str, steps: int, tau: float) -> dict[str, list[Row]]:
    """Options of the trials on a choice of features, by solver."""
    shared: Row = {"method": "linear_probe", "tau": tau}
    by_sgd = {**shared, "steps": steps, "eval_every": steps, "batch_labeled": 128}
    views = "weak" if choice == "views" else "plain"
    affine = {**shared, "solver": "converged", "head": "affine", "train_views": views}
    return {
        "sgd": [{**by_sgd, "lr": rate} for rate in LEARNING_RATES],
        "converged": [{**affine, "ridge": 1 / value} for value in INVERSE],
    }


def measure(
    cache: FeatureCache, seeds: Sequence[int], *, steps: int, tau: float, metric: Metric, device: str
) -> list[Row]:
    """A row for each solver and choice of features; those chosen on validation have test metrics.

    Args:
        cache: features.
        seeds: of splits and mini-batches.
        steps: of SGD.
        tau: logit adjustment; 0 as in the protocol.
        metric: by whose mean over seeds, on validation, the best is chosen.
        device: where trials run.

    Raises:
        InputError: a split without validation images.
    """
    splits = draw_splits(cache, [FitConfig(method="linear_probe", seed=seed) for seed in seeds])
    if not all(len(split.val) for split in splits):
        raise InputError("the protocol chooses on validation images, and these splits have none")
    choices = feature_choices(cache)
    rows: list[Row] = []
    for choice, features in choices.items():
        for solver, options in trial_options(choice, steps, tau).items():
            # the best learning rate or penalty of this choice
            runs = _fit(features, options, seeds, splits, device, read_test=False)
            scores = np.array([run.metrics["val"][metric] for run in runs]).reshape(len(options), len(seeds)).mean(1)
            best = options[int(scores.argmax())]
            rows.append(
                {
                    "solver": solver,
                    "features": choice,
                    "trials": len(options),
                    "chosen": best["lr"] if solver == "sgd" else 1 / best["ridge"],
                    "val": float(scores.max()),
                    "options": best,
                }
            )

    # the best choice of features, tested once
    for solver in ("sgd", "converged"):
        row = max((row for row in rows if row["solver"] == solver), key=lambda row: float(row["val"]))
        runs = _fit(choices[row["features"]], [row["options"]], seeds, splits, device, read_test=True)
        for name in ("accuracy", "balanced_accuracy"):
            row[name] = float(np.mean([run.metrics[name] for run in runs]))
    return rows


def _fit(
    cache: FeatureCache,
    options: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    splits: Sequence[Split],
    device: str,
    *,
    read_test: bool,
) -> list[Any]:
    """Runs of each of the options with each seed, those of one options side by side."""
    configs = [FitConfig.from_dict({**one, "seed": seed}) for one in options for seed in seeds]
    return fit_many(cache, configs, split=[*splits] * len(options), device=device, read_test=read_test)


def linear_protocol(
    data: DataOption = "demo",
    seeds: SeedsOption = "0-4",
    steps: StepsOption = 1000,
    tau: Annotated[float, typer.Option(help="Logit adjustment of both solvers; 0 as in the protocol.", min=0.0)] = 0.0,
    metric: Annotated[Metric, typer.Option(help="Metric on validation that chooses.")] = "accuracy",
    device: DeviceOption = "auto",
    as_json: JsonOption = None,
) -> None:
    """Choose learning rate, penalty and features on validation, as DINOv2 is evaluated; print the test metrics."""
    rows = measure(open_features(data), parse_seeds(seeds), steps=steps, tau=tau, metric=metric, device=device)
    rows = [{"data": data, **row} for row in rows]
    write_rows(as_json, rows)
    titles = ["solver", "features", "trials", "learning rate or C", "validation", "accuracy", "balanced accuracy"]
    print_table(titles, [_line(row) for row in rows], texts=2)


def _line(row: Row) -> list[str]:
    """A line of the table, in percent; only what was chosen has been tested."""
    tested = [f"{100 * row[name]:.1f}" if name in row else "" for name in ("accuracy", "balanced_accuracy")]
    return [
        row["solver"],
        row["features"],
        str(row["trials"]),
        f"{row['chosen']:.2g}",
        f"{100 * row['val']:.1f}",
        *tested,
    ]


if __name__ == "__main__":
    typer.run(guarded(linear_protocol))
