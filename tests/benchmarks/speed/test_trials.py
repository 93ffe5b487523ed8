"""The command on a tiny shape: rows, table, who is left out, and bad input."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.speed import trials
from benchmarks.speed.floor import SHAPES, Shape
from benchmarks.speed.trials import measure
from tests.benchmarks.program import run_command

TINY = Shape("tiny", 24, 7, 4, 9, 6)
CPU = torch.device("cpu")
QUICK = ("eager", "vmap", "specification", "fused")


@pytest.fixture(autouse=True)
def quick_floor(monkeypatch):
    monkeypatch.setattr(trials, "floor_rate", lambda shape, device: 1e4)
    monkeypatch.setitem(SHAPES, "tiny", TINY)


def test_there_is_a_row_for_every_number_of_trials_and_contender():
    rows = measure(TINY, [1, 3], QUICK, CPU, rounds=3, seconds=0.0)
    assert [(row["trials"], row["contender"]) for row in rows] == [(t, name) for t in (1, 3) for name in QUICK]
    for row in rows:
        assert row["shape"] == "tiny"
        assert row["trial_steps_per_second"] == sorted(row["rates"])[1] > 0
        assert row["floor_trial_steps_per_second"] == 1e4
        assert row["left_out"] is None
    # the plain loop is measured again beside each number of trials
    assert rows[0]["rates"] != rows[4]["rates"]


def test_the_command_prints_and_writes(tmp_path):
    file = tmp_path / "rows.json"
    options = ["--shape", "tiny", "--trials", "2", "--contenders", "eager,specification"]
    done = run_command(trials.trials, *options, "--rounds", "1", "--seconds", "0", "--json", str(file))
    assert done.exit_code == 0, done.output
    rows = json.loads(file.read_text())
    assert {"shape", "trials", "contender", "trial_steps_per_second", "floor_trial_steps_per_second"} <= set(rows[0])
    eager, ours = (line.split("|") for line in done.output.splitlines() if "tiny" in line)
    assert eager[6].strip() == "1.00"
    wanted = rows[1]["trial_steps_per_second"] / rows[0]["trial_steps_per_second"]
    assert float(ours[6]) == pytest.approx(wanted, abs=0.006)


def test_without_a_compiler_compiled_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(trials.shutil, "which", lambda name: None)
    rows = measure(TINY, [1], ["eager", "compiled"], CPU, rounds=1, seconds=0.0)
    assert rows[1]["trial_steps_per_second"] is None
    assert "compiler" in rows[1]["left_out"]
    assert trials.table(rows)[1][-1] == rows[1]["left_out"]


@pytest.mark.parametrize("name", ["native", "native_bf16"])
def test_compiled_passes_are_left_out_with_the_reason(name, monkeypatch):
    monkeypatch.setattr(trials.native, "why_not", lambda: "engine native needs a C compiler")
    rows = measure(TINY, [1], [name], CPU, rounds=1, seconds=0.0)
    assert rows[0]["left_out"] == "engine native needs a C compiler"
    assert trials._why_no_native(torch.device("cuda")) == "engine native is one of processors"


def test_a_gpu_compiles_with_triton(monkeypatch):
    for module, reason in ((None, "Triton"), (object(), "")):
        monkeypatch.setattr(trials.importlib.util, "find_spec", lambda name, module=module: module)
        assert reason in (text := trials._no_compiler(torch.device("cuda")))
        assert bool(text) == bool(reason)


def test_trials_that_do_not_fit_are_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(trials, "_free_bytes", lambda device: 10)
    rows = measure(TINY, [2], ["eager", "fused"], CPU, rounds=1, seconds=0.0)
    assert rows[0]["trial_steps_per_second"] > 0
    assert rows[1]["trial_steps_per_second"] is None
    assert "GiB" in rows[1]["left_out"]


def test_free_memory_is_known():
    assert trials._free_bytes(CPU) > 2**20


def test_numbers_and_names_are_separated_by_commas(tmp_path):
    file = tmp_path / "rows.json"
    options = ["--shape", "tiny", "--trials", "2, 1,2", "--contenders", "fused, eager"]
    assert run_command(trials.trials, *options, "--rounds", "1", "--seconds", "0", "--json", str(file)).exit_code == 0
    rows = json.loads(file.read_text())
    assert [(row["trials"], row["contender"]) for row in rows] == [(t, n) for t in (2, 1) for n in ("fused", "eager")]


@pytest.mark.parametrize("text", ["", "0", "-1", "1,x", "1.5"])
def test_other_numbers_are_refused(text):
    done = run_command(trials.trials, f"--trials={text}")
    assert done.exit_code == 2
    assert "numbers of trials are whole numbers of at least 1" in done.output


@pytest.mark.parametrize("text", ["", "eager,nobody"])
def test_other_names_are_refused(text):
    done = run_command(trials.trials, f"--contenders={text}")
    assert done.exit_code == 2
    assert "contenders are eager, compiled" in done.output


@pytest.mark.parametrize("options", [["--shape", "S9"], ["--trials", "0"], ["--contenders", "x"], ["--device", "x"]])
def test_bad_options_end_with_one_sentence(options):
    done = run_command(trials.trials, *options)
    assert done.exit_code == 2
    assert "Traceback" not in done.output
