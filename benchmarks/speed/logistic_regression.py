"""Logistic regressions over penalties and seeds: the engine's in one trial batch, and scikit-learn's one by one.

    python -m benchmarks.speed.logistic_regression --data fashion_mnist --penalties 45 --seeds 0-4 --json rows.json

Both minimise the same objective on the same unit features and splits: the sum of the labelled images' losses and
|W|^2 / (2 C), for C from 1e-6 to 1e5, the range of DINOv2's protocol (arXiv 2304.07193, appendix B.3). scikit-learn's
`LogisticRegression` goes from the smallest C to the largest, each from the solution before. Where its loss is more than
1e-4 above the lower of both, it continues with a tighter tolerance, and then in float64; it is given what it needs for
each C, which its users do not know. The engine's time includes its metrics on validation, scikit-learn's is of its fits
alone. Beside seconds are those that the process had a core for: on a busy machine they alone compare the work.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from numpy.typing import NDArray

from benchmarks.data import open_features, unit_rows
from benchmarks.options import DataOption, DeviceOption, JsonOption, SeedsOption, ThreadsOption, parse_seeds
from benchmarks.results import Row, print_table, write_rows
from benchmarks.speed.linear_probe import path
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.config import FitConfig
from ulfine_fast.data.splits import Split
from ulfine_fast.engine.fit import draw_splits, fit_many

INVERSE_PENALTIES = (1e-6, 1e5)
CLOSE = 1e-4
# the last ones in float64: the rounding of float32 stops scikit-learn early at weak penalties
_TOLERANCES = ((1e-4, np.float32), (1e-6, np.float32), (1e-6, np.float64), (1e-8, np.float64))
_MOST_ITERATIONS = 10_000


class Seconds(NamedTuple):
    """Seconds on the clock, and those of all cores that the process has used."""

    clock: float
    cores: float

    @classmethod
    def now(cls) -> Seconds:
        """Both since any point."""
        return cls(time.perf_counter(), time.process_time())

    def times(self, factor: float) -> Seconds:
        """Both by a factor."""
        return Seconds(self.clock * factor, self.cores * factor)

    def __sub__(self, other: Seconds) -> Seconds:
        return self.plus(other.times(-1))

    def plus(self, other: Seconds) -> Seconds:
        """The sum of both."""
        return Seconds(self.clock + other.clock, self.cores + other.cores)


def objective(
    rows: NDArray[np.float32],
    labels: NDArray[np.int64],
    weight: NDArray[Any],
    bias: NDArray[Any],
    inverse_penalty: float,
) -> float:
    """Sum of losses and penalty of an affine head (K, D) and (K,) over rows (N, D), in float64."""
    vectors = torch.from_numpy(np.asarray(weight, dtype=np.float64))
    logits = torch.from_numpy(rows.astype(np.float64)) @ vectors.T + torch.from_numpy(np.asarray(bias, np.float64))
    losses = F.cross_entropy(logits, torch.from_numpy(labels), reduction="sum")
    return float(losses + vectors.square().sum() / (2 * inverse_penalty))


def engine(
    cache: FeatureCache, splits: Sequence[Split], seeds: Sequence[int], values: Sequence[float], device: str
) -> tuple[Seconds, NDArray[np.float64], int]:
    """All fits in one call: seconds, objectives (seeds, penalties), and how many did not converge."""
    shared = {"method": "linear_probe", "solver": "converged", "head": "affine", "tau": 0.0}
    configs = [FitConfig.from_dict({**shared, "ridge": 1 / value, "seed": seed}) for seed in seeds for value in values]
    started = Seconds.now()
    split_of = [split for split in splits for _ in values]
    runs = fit_many(cache, configs, split=split_of, device=device, progress=False, read_test=False)
    seconds = Seconds.now() - started
    rows, labels = unit_rows(cache.plain), cache.labels
    losses = [
        objective(
            rows[split.labeled],
            labels[split.labeled],
            run.tensors["linear"].numpy(),
            run.tensors["bias"].numpy(),
            value,
        )
        for run, split, value in zip(runs, split_of, [*values] * len(splits), strict=True)
    ]
    unfinished = sum(run.metrics["converged"] != 1 for run in runs)
    return seconds, np.reshape(losses, (len(splits), len(values))), unfinished


def sklearn(
    cache: FeatureCache, split: Split, values: Sequence[float], goals: NDArray[np.float64], threads: int
) -> tuple[Seconds, NDArray[np.float64]]:
    """The path of one seed: seconds, and objectives (penalties,).

    Args:
        cache: features.
        split: whose labelled images train.
        values: C, rising.
        goals: objectives of the other contender; a fit ends when it is at most 1e-4 above (penalties,).
        threads: of its linear algebra.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    rows, labels = unit_rows(cache.plain)[split.labeled], cache.labels[split.labeled]
    model = LogisticRegression(solver="lbfgs", max_iter=_MOST_ITERATIONS, warm_start=True)
    seconds, losses = Seconds(0.0, 0.0), []
    with threadpool_limits(threads), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for value, goal in zip(values, goals, strict=True):
            for tolerance, dtype in _TOLERANCES:
                typed = rows.astype(dtype)
                started = Seconds.now()
                model.set_params(C=value, tol=tolerance).fit(typed, labels)
                seconds = seconds.plus(Seconds.now() - started)
                loss = objective(rows, labels, model.coef_, model.intercept_, value)
                if loss <= goal * (1 + CLOSE):
                    break
            losses.append(loss)
    return seconds, np.array(losses)


def measure(
    cache: FeatureCache, count: int, seeds: Sequence[int], *, reference_seeds: int, threads: int, device: str
) -> list[Row]:
    """Both contenders on the splits of some seeds.

    Args:
        cache: features.
        count: penalties, at least 1.
        seeds: of the splits.
        reference_seeds: how many of them scikit-learn fits; its seconds count in proportion.
        threads: of scikit-learn.
        device: where the engine runs.
    """
    values = path(*INVERSE_PENALTIES, count)
    splits = draw_splits(cache, [FitConfig(method="linear_probe", seed=seed) for seed in seeds])
    # the first fit of a process pays for what others find ready
    engine(cache, splits[:1], seeds[:1], values[:1], device)
    seconds, losses, unfinished = engine(cache, splits, seeds, values, device)
    paths = [
        sklearn(cache, split, values, goals, threads)
        for split, goals in zip(splits[:reference_seeds], losses, strict=False)
    ]
    reference = np.stack([one for _, one in paths])
    lowest = np.minimum(losses[: len(reference)], reference)
    common = {"penalties": count, "seeds": len(seeds), "images": len(splits[0].labeled), "dim": cache.dim}
    reference_seconds = Seconds(0.0, 0.0)
    for one, _ in paths:
        reference_seconds = reference_seconds.plus(one.times(len(seeds) / len(paths)))
    return [
        {
            "contender": "engine",
            "seconds": seconds.clock,
            "core_seconds": seconds.cores,
            "excess": float((losses[: len(reference)] / lowest - 1).max()),
            "unfinished": unfinished,
            "threads": torch.get_num_threads(),
            "ratio": reference_seconds.clock / seconds.clock,
            "core_ratio": reference_seconds.cores / seconds.cores,
            **common,
        },
        {
            "contender": "scikit-learn",
            "seconds": reference_seconds.clock,
            "core_seconds": reference_seconds.cores,
            "excess": float((reference / lowest - 1).max()),
            "unfinished": int((reference > lowest * (1 + CLOSE)).sum()),
            "threads": threads,
            "ratio": 1.0,
            "core_ratio": 1.0,
            **common,
        },
    ]


def logistic_regression(
    penalties: Annotated[int, typer.Option(help="Penalties of each seed.", min=1)] = 45,
    seeds: SeedsOption = "0-4",
    reference_seeds: Annotated[
        int, typer.Option(help="Seeds that scikit-learn fits; its time counts in proportion.", min=1)
    ] = 5,
    reference_threads: Annotated[int, typer.Option(help="Threads of scikit-learn.", min=1)] = 1,
    data: DataOption = "fashion_mnist",
    threads: ThreadsOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = None,
) -> None:
    """Time logistic regressions over a path of penalties to the same loss, by the engine and by scikit-learn."""
    if threads:
        torch.set_num_threads(threads)
    rows = measure(
        open_features(data),
        penalties,
        parse_seeds(seeds),
        reference_seeds=reference_seeds,
        threads=reference_threads,
        device=device,
    )
    rows = [{"data": data, **row} for row in rows]
    write_rows(as_json, rows)
    titles = ["contender", "fits", "images", "seconds", "of all cores", "times faster", "by cores' seconds"]
    titles += ["largest loss above the lower", "above 1e-4"]
    print_table(titles, [_line(row) for row in rows])


def _line(row: Row) -> list[str]:
    """A line of the table."""
    return [
        row["contender"],
        str(row["penalties"] * row["seeds"]),
        str(row["images"]),
        f"{row['seconds']:.1f}",
        f"{row['core_seconds']:.1f}",
        f"{row['ratio']:.1f}",
        f"{row['core_ratio']:.1f}",
        f"{row['excess']:.1e}",
        str(row["unfinished"]),
    ]


if __name__ == "__main__":
    typer.run(guarded(logistic_regression))
