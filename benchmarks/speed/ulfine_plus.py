"""How `ulfine_plus` grows with images and classes: seconds and memory on made-up features, beside the least they take.

    python -m benchmarks.speed.ulfine_plus --sizes 2000x50x384,5000x100x384 --json ulfine_plus.json

A size is unlabelled images x classes x dimensions; ten labelled images a class on average, both long-tailed by a ratio
of 10, one weak and one strong view. The floor counts the multiply-adds of the final algorithm at the rate of the
machine's own float32 products, measured in the same run. Memory is what the process takes above the cache. The last
lines are the growth: the exponent of the seconds in images and in classes, over sizes that differ in nothing else.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from benchmarks.options import DeviceOption, JsonOption, ThreadsOption
from benchmarks.results import Row, print_table, write_rows
from benchmarks.speed.floor import Shape, product_rate
from ulfine_fast.cache.io.device import pick_device
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.config import FitConfig
from ulfine_fast.engine.fit import fit_many
from ulfine_fast.methods import ulfine_plus
from ulfine_fast.ops.clustering import ANCHOR_PASSES
from ulfine_fast.ops.probe import MOST_ROWS
from ulfine_fast.runs.run import Run

_LABELED_PER_CLASS = 10
_VIEWS = 3
_RATIO = 10.0
_STATUS = Path("/proc/self/status")


class Size(NamedTuple):
    """Unlabelled images N, classes K, and dimensions D."""

    images: int
    classes: int
    dim: int


def multiply_adds(size: Size, labeled: int, survivors: int, folds: int = 4) -> int:
    """Of a fit whose folds leave so many candidates to be fitted with all labels.

    Probes, scatter, and passes over rows: a pass takes the products of rows and centers, and the sums over rows; a
    round also the rows' lengths and one more sum. Work element by element and matrices of classes are not counted.
    """
    images, classes, dim = size
    vector = classes * dim
    # each scale with all labels and without each fold, and one scale from class means without each fold
    heads = len(ulfine_plus.PROBE_SCALES) * (1 + folds) + folds
    probes = heads * max(ulfine_plus.PROBE_STOPS) * 2 * min(labeled, MOST_ROWS) * vector
    scatter = (images + labeled) * (1 + _VIEWS) * dim * dim
    sample = min(images, max(ulfine_plus.SAMPLE, ulfine_plus.SAMPLE_PER_CLASS * classes))

    def clusters(rows: int, fits: int, candidates: int, rounds: int, anchor_passes: int) -> int:
        """Of a call of the clustering."""
        anchor = fits * vector * (anchor_passes + rounds * ulfine_plus.STEPS)
        first = 2 * candidates * vector if anchor_passes else 0
        round_of = candidates * (2 * ulfine_plus.STEPS * vector + min(classes, dim) * dim + vector)
        # labelled rows are summed once a round, and measured
        known = labeled * rounds * candidates * (vector + min(classes, dim) * dim)
        return rows * (anchor + first + rounds * round_of) + known

    total = probes + scatter
    total += clusters(sample, folds, folds * ulfine_plus.STARTS, ulfine_plus.JUDGED_ROUNDS, ANCHOR_PASSES)
    total += clusters(sample, 1, survivors, ulfine_plus.ROUNDS, ANCHOR_PASSES)
    if sample < images:
        total += clusters(images, 1, survivors, ulfine_plus.LAST_ROUNDS, 0)
        # rows of the whole set are whitened anew in every pass, and measured once a round
        total += images * dim * dim * ulfine_plus.LAST_ROUNDS * (1 + ulfine_plus.STEPS)
    return total


def world(size: Size, device: torch.device, seed: int = 0) -> FeatureCache:
    """Gaussian classes, both roles long-tailed, with two views that move each image a little.

    A GPU draws its own numbers, as a processor would take longer for a million images than the fit.
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> NDArray[np.float32]:
        if device.type == "cpu":
            return rng.standard_normal(shape, dtype=np.float32)
        return torch.randn(shape, device=device, generator=generator).cpu().numpy()

    tail = _RATIO ** -(np.arange(size.classes) / max(size.classes - 1, 1))
    labeled = np.maximum(2, (_LABELED_PER_CLASS * size.classes * tail / tail.sum())).astype(int)
    unlabeled = rng.choice(size.classes, size.images, p=tail / tail.sum())
    test = np.arange(size.classes).repeat(2)
    truth = np.concatenate([np.arange(size.classes).repeat(labeled), unlabeled, test])
    roles = ["train"] * int(labeled.sum()) + ["unlabeled"] * size.images + ["test"] * len(test)
    centers = normal(size.classes, size.dim)
    plain = np.empty((len(truth), size.dim), dtype=np.float16)
    views = np.empty((len(truth) - len(test), 2, size.dim), dtype=np.float16)
    # a part at a time: everything in float32 would be most of the memory
    for first in range(0, len(truth), 8192):
        part = slice(first, first + 8192)
        rows = 1.0 + centers[truth[part]] + 1.5 * normal(len(truth[part]), size.dim)
        plain[part] = rows
        seen = views[part]
        seen[:] = rows[: len(seen), None] + 0.5 * normal(len(seen), 2, size.dim)
    labels = np.where(np.asarray(roles) == "unlabeled", -1, truth)
    return FeatureCache.from_arrays(
        plain, labels, text_features=centers + 1.0, weak=views[:, :1], strong=views[:, 1:], splits=roles
    )


def measure(size: Size, device: torch.device, trials: int = 1) -> Row:
    """Seconds, floor and memory of one fit, or of several trials that are fitted together."""
    cache = world(size, device)
    configs = [FitConfig(method="ulfine_plus", seed=seed) for seed in range(trials)]
    # the fastest products of these sizes make the hardest floor
    shape = Shape("ulfine_plus", dim=size.dim, classes=size.classes, rank=16, labeled=512, unlabeled=512)
    rate = product_rate(shape, device)
    before = _reset_peak(device)
    started = time.perf_counter()
    runs = fit_many(cache, configs, device=str(device), progress=False)
    seconds = time.perf_counter() - started
    labeled = len(runs[0].split["labeled"])
    floor = sum(multiply_adds(size, labeled, _survivors(run)) for run in runs) / rate
    return {
        "images": size.images,
        "classes": size.classes,
        "dim": size.dim,
        "trials": trials,
        "labeled": labeled,
        "seconds": seconds,
        "floor_seconds": floor,
        "ratio": seconds / floor,
        "survivors": max(map(_survivors, runs)),
        "megabytes": None if before is None else (_peak(device) - before) / 2**20,
        "balanced_accuracy": runs[0].metrics["balanced_accuracy"],
        "gigaflops": 2 * rate / 1e9,
        "threads": torch.get_num_threads(),
        "device": str(device),
    }


def _survivors(run: Run) -> int:
    """Candidates fitted with all labels."""
    return len(run.tensors["shares"])


def _reset_peak(device: torch.device) -> int | None:
    """Bytes in use now, from which the peak is counted; None where the system does not say."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def _peak(device: torch.device) -> int:
    """Most bytes in use since the reset."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def growth(rows: Sequence[Row], name: str) -> list[Row]:
    """Exponent of the seconds between neighbouring sizes that differ in one number alone, `images` or `classes`."""
    rest = [key for key in ("images", "classes", "dim", "trials") if key != name]
    result: list[Row] = []
    for _, group in itertools.groupby(sorted(rows, key=lambda r: [r[k] for k in rest]), lambda r: [r[k] for k in rest]):
        ordered = sorted(group, key=lambda row: float(row[name]))
        for small, large in itertools.pairwise(ordered):
            exponent = math.log(large["seconds"] / small["seconds"]) / math.log(large[name] / small[name])
            result.append({"grows": name, "from": small[name], "to": large[name], "exponent": exponent})
    return result


def parse_sizes(text: str) -> list[Size]:
    """Read sizes such as `2000x50x384`, separated by commas.

    Raises:
        InputError: anything else, fewer than two classes or an image a class.
    """
    sizes = []
    for part in text.split(","):
        numbers = part.strip().split("x")
        if len(numbers) != 3 or not all(number.isdecimal() for number in numbers):
            raise InputError(f"a size is images x classes x dimensions such as 2000x50x384, got {part!r}")
        size = Size(*map(int, numbers))
        if size.classes < 2 or size.images < size.classes or size.dim < 2:
            raise InputError(f"a size has two classes, two dimensions and an image a class at least, got {part!r}")
        sizes.append(size)
    return sizes


def table(
    sizes: Annotated[str, typer.Option(help="Images x classes x dimensions, separated by commas.")] = (
        "2000x50x384,5000x100x384,10000x100x384,20000x100x384,10000x500x384"
    ),
    trials: Annotated[int, typer.Option(help="Trials that are fitted together.", min=1)] = 1,
    threads: ThreadsOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = None,
) -> None:
    """Time ulfine_plus over growing numbers of images and classes."""
    if threads:
        torch.set_num_threads(threads)
    chosen = parse_sizes(sizes)
    where = pick_device(device)
    measure(Size(200, 4, 16), where)  # the first fit of a process pays for threads and buffers
    rows = []
    titles = ["images", "classes", "D", "trials", "seconds", "floor", "ratio", "candidates", "MB", "balanced acc."]
    for size in chosen:
        rows.append(measure(size, where, trials))
        write_rows(as_json, rows)
    print_table(titles, [_line(row) for row in rows])
    for row in growth(rows, "images") + growth(rows, "classes"):
        typer.echo(f"{row['grows']} {row['from']} to {row['to']}: seconds grow with exponent {row['exponent']:.2f}")


def _line(row: Row) -> list[str]:
    return [
        str(row["images"]),
        str(row["classes"]),
        str(row["dim"]),
        str(row["trials"]),
        f"{row['seconds']:.1f}",
        f"{row['floor_seconds']:.1f}",
        f"{row['ratio']:.2f}",
        str(row["survivors"]),
        "" if row["megabytes"] is None else f"{row['megabytes']:.0f}",
        f"{100 * row['balanced_accuracy']:.1f}",
    ]


if __name__ == "__main__":
    typer.run(guarded(table))
