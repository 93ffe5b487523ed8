"""Trial-steps per second of one shape by five ways to train, beside the floor, for growing numbers of trials."""

from __future__ import annotations

import torch

from benchmarks.gpu.checks import TINY
from benchmarks.gpu.parts import Report, Settings
from benchmarks.results import Row
from benchmarks.speed.floor import SHAPES, Shape
from benchmarks.speed.trials import measured

_COUNTS = (1, 16, 64, 256, 1024)
_ROUNDS = 3
_SECONDS = 0.2  # of one measurement
# a number of trials takes as much longer than the one before, at most
_GROWTH = 4.0


def run_trials(settings: Settings, report: Report, name: str) -> None:
    """Measure one shape, the smallest number of trials first; torch.compile, which takes longest, comes last."""
    device = torch.device(settings.device)
    shape = TINY if settings.tiny else SHAPES[name]
    names = ["eager", "vmap", "specification", "fused"]
    counts = (1, 2) if settings.tiny else _COUNTS
    rounds = 1 if settings.tiny else _ROUNDS
    seconds = 0.0 if settings.tiny else _SECONDS

    with report.attempt(f"trials of {shape.name}", shape=shape.name):
        left, took = report.seconds_left, 0.0
        for count, rows in zip(
            counts, measured(shape, counts, names, device, rounds=rounds, seconds=seconds), strict=True
        ):
            for row in rows:
                _report_row(report, shape, row)
            took, left = left - report.seconds_left, report.seconds_left
            if count != counts[-1] and left < _GROWTH * took:
                report(f"T > {count}: left out, {left:.0f} s are left", shape=shape.name, left_out=f"T > {count}")
                break
    if settings.tiny:  # a minute of compiling
        return
    with report.attempt(f"torch.compile of {shape.name}", shape=shape.name):
        for rows in measured(shape, [1], ["eager", "compiled"], device, rounds=rounds, seconds=seconds):
            _report_row(report, shape, rows[1])


def _report_row(report: Report, shape: Shape, row: Row) -> None:
    """One line: rate, time of a trial-step, and how far it is from the floor."""
    rate, peak = row["trial_steps_per_second"], row["peak_bytes"]
    text = f"{shape.name} T {row['trials']:5} {row['contender']:13} "
    if rate is None:
        text += row["left_out"]
    else:
        text += f"{rate:12,.0f} trial-steps/s {1e6 / rate:10.2f} us, "
        text += f"{row['floor_trial_steps_per_second'] / rate:6.2f} times the floor"
        text += "" if peak is None else f", {peak / 2**20:,.0f} MiB"
    report(text, **row)
