"""Every comparison of speed in one table: what is measured, how many times as fast as what, how far from its bound.

    python -m benchmarks.speed --threads 2 --json speed.json

It runs the benchmarks of this package with small sizes, a few minutes in all; each has a command of its own for larger
ones. Numbers are ratios of rates that were measured in turn, in this run and on this machine.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.data import demo
from benchmarks.options import DeviceOption, JsonOption, ThreadsOption, parse_names
from benchmarks.results import Row, print_table, write_rows
from benchmarks.speed import extract, linear_probe, load, start, sweep, trials, ulfine_plus
from benchmarks.speed.floor import SHAPES, Shape
from benchmarks.speed.ulfine_plus import Size
from ulfine_fast.cache.io.device import pick_device
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.models.lite0_minilm import NAME as LITE0
from ulfine_fast.cli.main import guarded
from ulfine_fast.config import FitConfig


def row_of(what: str, ours: str, over: str | None, ratio: float | None, bound: str, of_bound: float | None) -> Row:
    """A line of the table.

    Args:
        what: is measured.
        ours: its own number with its unit.
        over: what it is compared with, None for nothing.
        ratio: how many times as fast it is as that.
        bound: what it cannot be faster than, "" for nothing known.
        of_bound: its time over that of the bound, at least about 1.
    """
    return {"what": what, "ours": ours, "over": over, "ratio": ratio, "bound": bound, "times_the_bound": of_bound}


# -- what each benchmark says


def steps_rows(device: torch.device, shapes: Mapping[Shape, list[int]], rounds: int = 3) -> list[Row]:
    """Fused training steps over the plain loop, and over torch.compile where it takes part."""
    rows = []
    for shape, counts in shapes.items():
        names = ("eager", "compiled", "fused")
        for measured in trials.measured(shape, counts, names, device, rounds=rounds, seconds=0.5):
            rates = {row["contender"]: row["trial_steps_per_second"] for row in measured}
            fused, floor = rates["fused"], measured[0]["floor_trial_steps_per_second"]
            what, ours = f"steps, {shape.name}, {measured[0]['trials']} trials", f"{fused:,.0f} trial-steps/s"
            rows.append(row_of(what, ours, "plain loop", fused / rates["eager"], "products", floor / fused))
            if rates["compiled"]:
                rows.append(row_of(what, ours, "torch.compile", fused / rates["compiled"], "products", floor / fused))
    return rows


def sweep_rows(device: torch.device) -> list[Row]:
    """A random search of 64 trials over Optuna around the plain loop."""
    plain, ours = sweep.measure(demo(), 64, 2, sweep.space_of(200, 100), str(device))
    seconds = ours["seconds"]
    return [
        row_of(
            "sweep, 64 trials x 200 steps", f"{seconds:.1f} s", plain["contender"], plain["seconds"] / seconds, "", None
        )
    ]


def linear_probe_rows(device: torch.device) -> list[Row]:
    """A path of penalties over scikit-learn's."""
    config = FitConfig(method="linear_probe", steps=500, eval_every=500, batch_labeled=64, lr=0.3)
    ours, other = linear_probe.measure(demo(), 15, config, iterations=1000, device=str(device))
    ratio = other["seconds"] / ours["seconds"]
    return [row_of("linear probe, 15 penalties", f"{ours['seconds']:.1f} s", other["contender"], ratio, "", None)]


def ulfine_plus_rows(device: torch.device, sizes: tuple[Size, ...] = (Size(5000, 100, 384),)) -> list[Row]:
    """A fit of `ulfine_plus` beside its multiply-adds."""
    ulfine_plus.measure(Size(200, 4, 16), device)  # the first fit of a process pays for threads and buffers
    rows = []
    for size in sizes:
        measured = ulfine_plus.measure(size, device)
        what = f"ulfine_plus, {size.images:,} images, {size.classes} classes"
        rows.append(row_of(what, f"{measured['seconds']:.1f} s", None, None, "products", measured["ratio"]))
    return rows


def extraction_rows(device: torch.device) -> list[Row]:
    """Extraction on a processor over a script, beside all stages alone."""
    measured = extract.measure("png28", LITE0, 256, ["script", "ulfine_fast"], 1, None)
    script, ours = (row["images_per_second"] for row in measured)
    of_bound = measured[1]["bound_images_per_second"] / ours
    return [
        row_of(f"extract, {LITE0}, 28 pixels", f"{ours:,.0f} images/s", "a script", ours / script, "stages", of_bound)
    ]


def loading_rows(device: torch.device, rows: int = 100_000, dim: int = 512) -> list[Row]:
    """Opening a cache beside reading its files."""
    root = Path(tempfile.mkdtemp(prefix="ulfine-fast-load-", dir=Path.cwd()))
    try:
        load.write_cache(root / "cache", rows, dim, 8192)
        measured = load.measure(root / "cache", device, 3)
    finally:
        shutil.rmtree(root)
    return [
        row_of(
            f"load, {rows:,} rows, files {row['state']}",
            f"{row['bytes_per_second'] / 1e9:.2f} GB/s",
            None,
            None,
            "reading the files",
            1 / row["share"],
        )
        for row in measured
        if row["contender"] == "cache"
    ]


def start_rows(device: torch.device, cache: Path | None = None, rounds: int = 3) -> list[Row]:
    """A fit from the shell beside `import torch`."""
    ours = start.measure(start.demo_cache() if cache is None else cache, rounds)[1]
    return [row_of("fit from the shell, demo", f"{ours['seconds']:.1f} s", None, None, "import torch", ours["ratio"])]


COMPARISONS: dict[str, Callable[[torch.device], list[Row]]] = {
    "steps": lambda device: steps_rows(device, {SHAPES["S1"]: [1, 16], SHAPES["S2"]: [16], SHAPES["S3"]: [4]}),
    "sweep": sweep_rows,
    "linear_probe": linear_probe_rows,
    "ulfine_plus": ulfine_plus_rows,
    "extract": extraction_rows,
    "load": loading_rows,
    "start": start_rows,
}


def table(rows: list[Row]) -> list[list[str]]:
    """Lines of the table."""
    return [
        [
            row["what"],
            row["over"] or "",
            row["bound"],
            row["ours"],
            "" if row["ratio"] is None else f"{row['ratio']:.2f}",
            "" if row["times_the_bound"] is None else f"{row['times_the_bound']:.2f}",
        ]
        for row in rows
    ]


def speed(
    only: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(COMPARISONS)}.")] = ",".join(COMPARISONS),
    threads: ThreadsOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = None,
) -> None:
    """Measure how many times as fast as its alternatives each part is, and how far from its bound."""
    names = parse_names(only, COMPARISONS, "comparisons")
    torch_device = pick_device(device)
    if threads:
        torch.set_num_threads(threads)
    rows: list[Row] = []
    left_out = []
    for name in names:
        try:
            rows += COMPARISONS[name](torch_device)
        except InputError as error:  # a model or a data set that is not on this machine
            left_out.append(f"{name} is left out: {error}")
        write_rows(as_json, rows)
    print_table(["measured", "over", "bound", "ours", "times as fast", "times the bound"], table(rows), texts=3)
    for line in left_out:
        typer.echo(line)


if __name__ == "__main__":
    typer.run(guarded(speed))
