"""Trial-steps per second of ULFine on cached features, by several ways to train trials, beside what the machine allows.

    python -m benchmarks.speed.trials --shape S1 --trials 1,4,16,64 --threads 2 --json trials.json

`eager` is a well-written loop, one trial after another; `compiled` the same under torch.compile; `vmap` the same
functions under torch.func.vmap; `specification` the engine through autograd; `fused` its path without an autograd
graph; `native` that path with passes compiled for the processor. Names that end in `_bf16` have products of bfloat16.
Only steps are timed, not validations. Contenders are measured one after the other, several times, and a rate is the
median of a contender's own measurements; the floor is that of `benchmarks.speed.floor`, of float32 products.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import statistics
from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
import typer

from benchmarks.options import DeviceOption, JsonOption, ThreadsOption, parse_names, parse_numbers
from benchmarks.results import Row, print_table, write_rows
from benchmarks.speed.floor import SHAPES, Shape, floor_rate, seconds_of
from benchmarks.speed.trial_steps import CONTENDERS, ONE_TRIAL, TrainingSet, contender
from ulfine_fast.cache.io.device import pick_device
from ulfine_fast.cli.main import guarded
from ulfine_fast.engine.memory import budget
from ulfine_fast.ops import native

# compiling, first touch of buffers, threads that start; on a GPU the fourth step is recorded and later ones replayed
_WARM_UP = 8
# steps whose mini-batches are drawn together, as many as in training
_STRETCH = 50
# fewer steps would let a contender that keeps a block of trials in the processor's cache pay for loading it each time
_LEAST_STEPS = 4
_MOST_STEPS = 500


class Entry:
    """A contender that is ready to be measured.

    Attributes:
        name: of the contender.
        trials: how many it trains together.
        steps: in one measurement.
        warm_up: seconds of the first steps, compilation included.
        peak_bytes: most memory of a GPU that it took so far, None on a processor.
        rates: trial-steps per second, one for each measurement.
    """

    def __init__(self, name: str, training_set: TrainingSet, trials: int, seconds: float) -> None:
        """Build it, warm it up, and choose the steps of a measurement so that it takes about `seconds`."""
        self.name = name
        self.rates: list[float] = []
        self._device = training_set.device
        on_gpu = self._device.type == "cuda"
        before = _reset_peak(self._device) if on_gpu else 0
        self._work, self.trials = contender(name, training_set, trials)
        self.warm_up = seconds_of(lambda: self._work(_WARM_UP), self._device)
        seconds_per_step = seconds_of(lambda: self._work(_WARM_UP), self._device) / _WARM_UP
        # a GPU draws a whole stretch in hundreds of launches, which a few steps would have to pay for
        least = _STRETCH if on_gpu and name == "fused" else _LEAST_STEPS
        self.steps = min(_MOST_STEPS, max(least, round(seconds / seconds_per_step)))
        self.peak_bytes = torch.cuda.max_memory_allocated(self._device) - before if on_gpu else None

    def measure(self) -> None:
        """Make the steps once more, and note their rate."""
        seconds = seconds_of(self._make_steps, self._device)
        self.rates.append(self.trials * self.steps / seconds)

    def _make_steps(self) -> None:
        for first in range(0, self.steps, _STRETCH):
            self._work(min(_STRETCH, self.steps - first))


def measure(
    shape: Shape, counts: Sequence[int], names: Sequence[str], device: torch.device, *, rounds: int, seconds: float
) -> list[Row]:
    """A row for each number of trials and contender; see :func:`measured`."""
    return [row for rows in measured(shape, counts, names, device, rounds=rounds, seconds=seconds) for row in rows]


def measured(
    shape: Shape, counts: Sequence[int], names: Sequence[str], device: torch.device, *, rounds: int, seconds: float
) -> Iterator[list[Row]]:
    """For each number of trials the rows of all contenders, as soon as they are measured.

    Args:
        shape: of the step.
        counts: numbers of trials.
        names: contenders.
        device: where they train.
        rounds: measurements of each, one contender after the other.
        seconds: about how long one takes.
    """
    training_set = TrainingSet.of_shape(shape, device)
    # those that train one trial after another are built once, and measured again beside each number of trials
    one_trial = {name: _entry(name, training_set, 1, seconds) for name in names if name in ONE_TRIAL}
    for count in counts:
        entries = {name: one_trial.get(name) or _entry(name, training_set, count, seconds) for name in names}
        taking_part = [entry for entry in entries.values() if isinstance(entry, Entry)]
        for entry in taking_part:
            entry.rates.clear()
        floors = []
        for _ in range(rounds):
            floors.append(floor_rate(shape, device))
            for entry in taking_part:
                entry.measure()
        floor = statistics.median(floors)
        yield [_row(training_set, count, name, entry, floor) for name, entry in entries.items()]
        # the next number of trials finds the memory of these free
        entries.clear()
        taking_part.clear()


def _entry(name: str, training_set: TrainingSet, trials: int, seconds: float) -> Entry | str:
    """The contender, or why it does not take part."""
    device = training_set.device
    if name == "compiled":
        reason = _no_compiler(device)
    elif name.startswith("native") and _why_no_native(device):
        reason = _why_no_native(device)
    else:
        need = training_set.shape.memory(trials, graph=name in ("vmap", "specification"))
        free = _free_bytes(device)
        too_large = name not in ONE_TRIAL and need > free
        reason = f"about {need / 2**30:.0f} GiB are needed and {free / 2**30:.0f} GiB are free" if too_large else ""
    try:
        return reason or Entry(name, training_set, trials, seconds)
    except torch.OutOfMemoryError as error:
        return f"out of memory: {str(error).partition(chr(10))[0]}"


def _no_compiler(device: torch.device) -> str:
    """What torch.compile lacks; an empty text where it has all."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "torch.compile needs Triton and it is not installed"
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    return "" if compiler else "torch.compile needs a C++ compiler and none was found"


def _why_no_native(device: torch.device) -> str:
    """What compiled passes lack; an empty text where they have all."""
    return (native.why_not() or "") if device.type == "cpu" else "engine native is one of processors"


def _reset_peak(device: torch.device) -> int:
    """Bytes of a GPU in use now, from which on the peak counts."""
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _free_bytes(device: torch.device) -> int:
    """Memory that a contender may take: half of what is free, as others take part beside it."""
    if device.type == "cuda":
        return budget(device)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _row(training_set: TrainingSet, trials: int, name: str, entry: Entry | str, floor: float) -> Row:
    """What is known of one contender; no rate but a reason where it does not take part."""
    row: Row = {
        "shape": training_set.shape.name,
        "trials": trials,
        "contender": name,
        "trial_steps_per_second": None,
        "floor_trial_steps_per_second": floor,
        "rates": [],
        "compile_seconds": None,
        "peak_bytes": None,
        "left_out": None,
        "device": training_set.device.type,
        "threads": torch.get_num_threads(),
    }
    if isinstance(entry, str):
        return {**row, "left_out": entry}
    return {
        **row,
        "trial_steps_per_second": statistics.median(entry.rates),
        "rates": entry.rates.copy(),
        "compile_seconds": entry.warm_up if name == "compiled" else None,
        "peak_bytes": entry.peak_bytes,
    }


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each row: rates, and their ratios to the eager loop and the floor of the same rounds."""
    eager = {row["trials"]: row["trial_steps_per_second"] for row in rows if row["contender"] == "eager"}
    lines = []
    for row in rows:
        rate = row["trial_steps_per_second"]
        eager_rate = eager.get(row["trials"])
        compile_seconds = row["compile_seconds"]
        if rate is None:
            numbers = ["-", "-", "-", "-", row["left_out"]]
        else:
            numbers = [
                f"{rate:.0f}",
                f"{1000 / rate:.3f}",
                f"{rate / eager_rate:.2f}" if eager_rate else "-",
                f"{row['floor_trial_steps_per_second'] / rate:.2f}",
                f"compiled in {compile_seconds:.0f} s" if compile_seconds else "",
            ]
        lines.append([row["shape"], str(row["trials"]), row["contender"], *numbers])
    return lines


def trials(
    shape: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(SHAPES)}.")] = "S1",
    counts: Annotated[str, typer.Option("--trials", help="Numbers of trials, comma-separated.")] = "1,4,16,64",
    contenders: Annotated[str, typer.Option(help="Who takes part, comma-separated.")] = ",".join(CONTENDERS),
    threads: ThreadsOption = 0,
    rounds: Annotated[int, typer.Option(help="Measurements of each contender.", min=1)] = 5,
    seconds: Annotated[float, typer.Option(help="About how long one measurement takes.", min=0.0)] = 0.7,
    device: DeviceOption = "auto",
    as_json: JsonOption = None,
) -> None:
    """Measure T trials of ULFine by a plain loop, torch.compile, vmap and the engine; print steps per second."""
    shapes = parse_names(shape, SHAPES, "shapes")
    trial_counts = parse_numbers(counts, "numbers of trials", 1, kind=int)
    names = parse_names(contenders, CONTENDERS, "contenders")
    torch_device = pick_device(device)
    if threads:
        torch.set_num_threads(threads)
    rows: list[Row] = []
    for name in shapes:
        rows += measure(SHAPES[name], trial_counts, names, torch_device, rounds=rounds, seconds=seconds)
        write_rows(as_json, rows)
    titles = ["shape", "trials", "contender", "trial-steps/s", "ms per trial-step", "over eager", "times the floor"]
    print_table([*titles, "note"], table(rows), texts=3)


if __name__ == "__main__":
    typer.run(guarded(trials))
