"""The table of all comparisons, on tiny sizes."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.speed import __main__ as program
from benchmarks.speed import trials
from benchmarks.speed.floor import Shape
from benchmarks.speed.ulfine_plus import Size
from tests.benchmarks.program import run_command
from ulfine_fast.cache.io.errors import InputError

CPU = torch.device("cpu")
TINY = Shape("tiny", 24, 7, 4, 9, 6)


def test_steps_are_compared_with_the_loop_and_the_floor(monkeypatch):
    monkeypatch.setattr(trials, "floor_rate", lambda shape, device: 1e6)
    monkeypatch.setattr(trials.shutil, "which", lambda name: None)  # without a compiler
    rows = program.steps_rows(CPU, {TINY: [1, 2]}, rounds=1)
    assert [(row["what"], row["over"]) for row in rows] == [
        ("steps, tiny, 1 trials", "plain loop"),
        ("steps, tiny, 2 trials", "plain loop"),
    ]
    rate = float(rows[0]["ours"].split()[0].replace(",", ""))
    assert rows[0]["times_the_bound"] == pytest.approx(1e6 / rate, rel=0.01)
    assert rows[0]["ratio"] > 0


def test_fits_and_loading_are_compared_with_their_bounds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (plus,) = program.ulfine_plus_rows(CPU, (Size(60, 4, 8),))
    assert plus["times_the_bound"] > 1
    cold, warm = program.loading_rows(CPU, rows=300, dim=8)
    assert "cold" in cold["what"]
    assert warm["times_the_bound"] > 0
    assert not list(tmp_path.iterdir())


def test_the_command_prints_one_table_and_what_it_leaves_out(tmp_path, monkeypatch):
    def missing(device):
        raise InputError("no such model; install it")

    lines = [program.row_of("a", "1 s", "b", 2.0, "c", None), program.row_of("d", "1 s", None, None, "e", 3.0)]
    monkeypatch.setattr(program, "COMPARISONS", {"one": lambda device: lines, "two": missing})
    file = tmp_path / "speed.json"
    done = run_command(program.speed, "--only", "one,two", "--device", "cpu", "--json", file)
    assert done.exit_code == 0, done.output
    assert json.loads(file.read_text()) == lines
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.output.splitlines()]
    assert ["a", "b", "c", "1 s", "2.00", ""] in cells
    assert ["d", "", "e", "1 s", "", "3.00"] in cells
    assert "two is left out: no such model; install it" in done.output
    assert run_command(program.speed, "--only", "three").exit_code == 2
