"""Trial-steps per second of ULFine on cached features, by five ways to train T trials, beside what the machine allows.

    python -m benchmarks.speed.trials --shape S1 --trials 1,4,16,64 --threads 2 --json trials.json

`eager` is a well-written loop, one trial after another; `compiled` the same under torch.compile; `vmap` the same
functions under torch.func.vmap; `specification` the engine through autograd; `fused` its path without an autograd
graph. Only steps are timed, not evaluations. Contenders are measured in turn, several times over, and a figure is the
median of its own measurements; the floor is that of `benchmarks.speed.floor`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.comparison.parts import write_json
from benchmarks.speed.floor import SHAPES, Shape, floor_rate, seconds_of, shape_of
from benchmarks.speed.trial_steps import ALONE, CONTENDERS, Field, contender
from benchmarks.tables import print_table
from ulfine_fast.cache.io.device import pick_device
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cli.main import guarded

Row = dict[str, Any]

# fewer steps would let a contender that keeps a block of trials in the processor's cache pay for loading it each time
_LEAST_STEPS = 4
_MOST_STEPS = 500


def parse_counts(text: str) -> list[int]:
    """Read numbers of trials such as 1,16,64.

    Raises:
        InputError: none, or one that is no positive whole number.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"trials are positive whole numbers such as 1,16,64, got {text!r}")
    return list(dict.fromkeys(int(part) for part in parts))


def parse_contenders(text: str) -> list[str]:
    """Read names separated by commas.

    Raises:
        InputError: none, or an unknown one.
    """
    wanted = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in wanted if name not in CONTENDERS]
    if unknown or not wanted:
        raise InputError(f"contenders are {', '.join(CONTENDERS)}, got {(unknown or [text])[0]!r}")
    return list(dict.fromkeys(wanted))


class Entry:
    """A contender that is ready to be measured.

    Attributes:
        name: of the contender. trials: how many it trains at once. steps: in one measurement. rates: trial-steps per
        second, one for each measurement.
    """

    def __init__(self, name: str, field: Field, trials: int, seconds: float) -> None:
        """Build it, warm it up, and choose the steps of a measurement so that it takes about `seconds`."""
        self.name, self.rates, self._device = name, list[float](), field.device
        self._work, self.trials = contender(name, field, trials)
        # compiling, first touch of buffers, and threads that start
        self.warm_up = seconds_of(lambda: self._work(3), field.device)
        each = seconds_of(lambda: self._work(2), field.device) / 2
        self.steps = min(_MOST_STEPS, max(_LEAST_STEPS, round(seconds / each)))

    def measure(self) -> None:
        """Make the steps once more, and note their rate."""
        taken = seconds_of(lambda: self._work(self.steps), self._device)
        self.rates.append(self.trials * self.steps / taken)


def measure(
    shape: Shape, counts: Sequence[int], names: Sequence[str], device: torch.device, *, rounds: int, seconds: float
) -> list[Row]:
    """A row for each number of trials and contender.

    Args:
        shape: of the step.
        counts: numbers of trials.
        names: contenders.
        device: where they train.
        rounds: measurements of each, taken in turn.
        seconds: about how long one takes.
    """
    field, rows = Field.of(shape, device), list[Row]()
    alone = {name: _entry(name, field, 1, seconds) for name in names if name in ALONE}
    for count in counts:
        # those that train one trial after another are measured anew beside each number of trials
        entries = {name: alone.get(name) or _entry(name, field, count, seconds) for name in names}
        floors = _play([one for one in entries.values() if isinstance(one, Entry)], field, rounds)
        rows += [_row(field, count, name, entry, statistics.median(floors)) for name, entry in entries.items()]
    return rows


def _play(entries: Sequence[Entry], field: Field, rounds: int) -> list[float]:
    """Measure everyone in turn, with the floor of the same moment."""
    floors = []
    for entry in entries:
        entry.rates.clear()
    for _ in range(rounds):
        floors.append(floor_rate(field.shape, field.device))
        for entry in entries:
            entry.measure()
    return floors


def _entry(name: str, field: Field, trials: int, seconds: float) -> Entry | str:
    """The contender, or why it does not take part."""
    missing = _unavailable(name, field, trials)
    return missing or Entry(name, field, trials, seconds)


def _unavailable(name: str, field: Field, trials: int) -> str:
    """Why a contender cannot take part; an empty text where it can."""
    if name == "compiled":
        return _no_compiler(field.device)
    need, free = field.shape.memory(trials, graph=name != "fused"), _free_bytes(field.device)
    if name not in ALONE and need > free:
        return f"about {need / 2**30:.0f} GiB are needed and {free / 2**30:.0f} GiB are free"
    return ""


def _no_compiler(device: torch.device) -> str:
    """What torch.compile lacks; an empty text where it has it."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "torch.compile needs Triton and it is not installed"
    there = shutil.which(os.environ.get("CXX", "g++"))
    return "" if there else "torch.compile needs a C++ compiler and none was found"


def _free_bytes(device: torch.device) -> int:
    """Memory that a contender may take: half of what is free, as others take part beside it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _row(field: Field, trials: int, name: str, entry: Entry | str, floor: float) -> Row:
    """What is known of one contender; no rate but a reason where it does not take part."""
    left_out = entry if isinstance(entry, str) else None
    compiled = name == "compiled" and isinstance(entry, Entry)
    return {
        "shape": field.shape.name,
        "trials": trials,
        "contender": name,
        "trial_steps_per_second": statistics.median(entry.rates) if isinstance(entry, Entry) else None,
        "floor_trial_steps_per_second": floor,
        "rates": entry.rates.copy() if isinstance(entry, Entry) else [],
        "compile_seconds": entry.warm_up if compiled and isinstance(entry, Entry) else None,
        "left_out": left_out,
        "device": field.device.type,
        "threads": torch.get_num_threads(),
    }


def _lines(rows: Sequence[Row]) -> list[list[str]]:
    """The table's lines: rates, and how they stand to the eager loop and the floor of the same rounds."""
    eager = {row["trials"]: row["trial_steps_per_second"] for row in rows if row["contender"] == "eager"}
    found = []
    for row in rows:
        rate, floor = row["trial_steps_per_second"], row["floor_trial_steps_per_second"]
        line = [row["shape"], str(row["trials"]), row["contender"]]
        if rate is None:
            found.append([*line, "-", "-", "-", "-", row["left_out"]])
            continue
        first = eager.get(row["trials"])
        note = f"compiled in {row['compile_seconds']:.0f} s" if row["compile_seconds"] else ""
        ratio = f"{rate / first:.2f}" if first else "-"
        found.append([*line, f"{rate:.0f}", f"{1000 / rate:.3f}", ratio, f"{floor / rate:.2f}", note])
    return found


_TITLES = [
    "shape",
    "trials",
    "contender",
    "trial-steps/s",
    "ms per trial-step",
    "over eager",
    "times the floor",
    "note",
]


def trials(
    shape: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(SHAPES)}.")] = "S1",
    counts: Annotated[str, typer.Option("--trials", help="Numbers of trials, comma-separated.")] = "1,4,16,64",
    contenders: Annotated[str, typer.Option(help="Who takes part, comma-separated.")] = ",".join(CONTENDERS),
    threads: Annotated[int, typer.Option(help="Threads of torch; 0 takes its own choice.", min=0)] = 0,
    rounds: Annotated[int, typer.Option(help="Measurements of each contender.", min=1)] = 5,
    seconds: Annotated[float, typer.Option(help="About how long one measurement takes.", min=0.0)] = 0.7,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[Path | None, typer.Option("--json", help="Write all rows to this file.")] = None,
) -> None:
    """Measure T trials of ULFine by a plain loop, torch.compile, vmap and the engine; print steps per second."""
    shapes = [shape_of(name.strip()) for name in shape.split(",")]
    numbers, names, place = parse_counts(counts), parse_contenders(contenders), pick_device(device)
    if threads:
        torch.set_num_threads(threads)
    rows: list[Row] = []
    for one in shapes:
        rows += measure(one, numbers, names, place, rounds=rounds, seconds=seconds)
        if as_json is not None:
            write_json(as_json, rows)
    print_table(_TITLES, _lines(rows), texts=3)


if __name__ == "__main__":
    typer.run(guarded(trials))
