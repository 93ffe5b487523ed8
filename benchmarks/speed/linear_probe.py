"""A linear probe over a path of penalties: the engine's in one trial batch, and scikit-learn's logistic regression.

    python -m benchmarks.speed.linear_probe --penalties 45 --json linear_probe.json

Both have the same unit features, split, and validation images, which choose the penalty; the chosen one's test
accuracy is read. scikit-learn's follows CLIP's protocol (arXiv 2103.00020, appendix A.3): l2 penalty, L-BFGS, at most
1,000 iterations, here from the strongest penalty to the weakest, each from the solution before. The engine's probe is
another estimator: a cosine classifier by SGD from the text's prototypes, of which no penalty but the weight decay is
varied; rows of any length make the same cosine, so that it acts through the step size alone.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from benchmarks.data import open_features, unit_rows
from benchmarks.options import DataOption, DeviceOption, JsonOption, ThreadsOption
from benchmarks.results import Row, print_table, write_rows
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.config import FitConfig
from ulfine_fast.data.splits import Split, draw_split
from ulfine_fast.engine.fit import fit_many

# both ends of each are beyond what is ever chosen
_WEIGHT_DECAYS = (1e-6, 1e-1)
_INVERSE_PENALTIES = (1e-6, 1e6)


def path(low: float, high: float, count: int) -> list[float]:
    """So many values from low to high, evenly spread over their logarithm."""
    return [float(value) for value in np.geomspace(low, high, count)]


def engine(cache: FeatureCache, split: Split, count: int, config: FitConfig, device: str) -> Row:
    """The engine's probe with all penalties in one trial batch."""
    configs = [replace(config, weight_decay=decay) for decay in path(*_WEIGHT_DECAYS, count)]
    started = time.perf_counter()
    runs = fit_many(cache, configs, split=split, device=device, progress=False)
    seconds = time.perf_counter() - started
    scores = [run.metrics["val"]["accuracy"] for run in runs]
    best = int(np.argmax(scores))
    return {
        **_row("engine", seconds, scores, configs[best].weight_decay),
        "accuracy": runs[best].metrics["accuracy"],
        "balanced_accuracy": runs[best].metrics["balanced_accuracy"],
    }


def sklearn(cache: FeatureCache, split: Split, count: int, iterations: int) -> Row:
    """scikit-learn's logistic regression along the path, each from the solution before."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, balanced_accuracy_score

    features = unit_rows(cache.plain)  # (n, D)
    labels = cache.labels
    penalties = path(*_INVERSE_PENALTIES, count)
    model = LogisticRegression(solver="lbfgs", max_iter=iterations, warm_start=True)
    scores: list[float] = []
    predictions: list[NDArray[Any]] = []
    started = time.perf_counter()
    for inverse in penalties:
        with warnings.catch_warnings():
            # the weakest penalties may need more iterations than the protocol gives
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.set_params(C=inverse).fit(features[split.labeled], labels[split.labeled])
        scores.append(float(model.score(features[split.val], labels[split.val])))
        predictions.append(model.predict(features[split.test]))
    seconds = time.perf_counter() - started
    best = int(np.argmax(scores))
    return {
        **_row("scikit-learn", seconds, scores, penalties[best]),
        "accuracy": float(accuracy_score(labels[split.test], predictions[best])),
        "balanced_accuracy": float(balanced_accuracy_score(labels[split.test], predictions[best])),
    }


def _row(contender: str, seconds: float, scores: Sequence[float], chosen: float) -> Row:
    """What both contenders have in common; `scores` are accuracies on validation, one for each penalty."""
    return {
        "contender": contender,
        "penalties": len(scores),
        "seconds": seconds,
        "chosen": chosen,
        "val_accuracy": max(scores),
        "val_accuracy_lowest": min(scores),
        "threads": torch.get_num_threads(),
    }


def measure(cache: FeatureCache, count: int, config: FitConfig, *, iterations: int, device: str) -> list[Row]:
    """Both contenders on one split.

    Args:
        cache: features.
        count: penalties of each, at least 1.
        config: of the engine's probe and the split.
        iterations: most steps of L-BFGS for one penalty.
        device: where the engine runs.

    Raises:
        InputError: a split without validation images.
    """
    split = draw_split(cache.labels, cache.splits, cache.class_names, config)
    if not len(split.val):
        raise InputError("a path needs validation images to choose from, and this split has none")
    # the first fit of a process pays for threads and buffers that others find ready
    fit_many(cache, [replace(config, steps=2)], split=split, device=device, progress=False)
    return [engine(cache, split, count, config, device), sklearn(cache, split, count, iterations)]


def linear_probe(
    penalties: Annotated[int, typer.Option(help="Penalties on the path of each contender.", min=1)] = 45,
    data: DataOption = "demo",
    steps: Annotated[int, typer.Option(help="Steps of the engine's probe.", min=1)] = 1000,
    batch: Annotated[int, typer.Option(help="Images in its mini-batches.", min=1)] = 64,
    lr: Annotated[float, typer.Option(help="Its peak learning rate.", min=0.0)] = 0.3,
    iterations: Annotated[int, typer.Option(help="Most iterations of scikit-learn's, for each penalty.", min=1)] = 1000,
    threads: ThreadsOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = None,
) -> None:
    """Time a linear probe over a path of penalties, by the engine and by scikit-learn; print test accuracy."""
    if threads:
        torch.set_num_threads(threads)
    config = FitConfig(method="linear_probe", steps=steps, eval_every=steps, batch_labeled=batch, lr=lr)
    rows = measure(open_features(data), penalties, config, iterations=iterations, device=device)
    rows = [{"data": data, **row} for row in rows]
    write_rows(as_json, rows)
    titles = ["probe", "penalties", "seconds", "accuracy", "balanced accuracy", "validation, best to worst", "chosen"]
    print_table(titles, [_line(row) for row in rows])


def _line(row: Row) -> list[str]:
    """A line of the table; accuracies in percent."""
    return [
        row["contender"],
        str(row["penalties"]),
        f"{row['seconds']:.1f}",
        f"{100 * row['accuracy']:.1f}",
        f"{100 * row['balanced_accuracy']:.1f}",
        f"{100 * row['val_accuracy']:.1f} to {100 * row['val_accuracy_lowest']:.1f}",
        f"{row['chosen']:.2g}",
    ]


if __name__ == "__main__":
    typer.run(guarded(linear_probe))
