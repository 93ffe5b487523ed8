"""The script for a GPU, tried on a processor: every part, parts that fail, and what the results come to."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import checks, fits, summary
from benchmarks.gpu.__main__ import PARTS, TINY, main, run
from benchmarks.gpu.cuda_tests import ROOT
from benchmarks.gpu.parts import Part, Report, Settings, run_parts
from benchmarks.speed.ulfine_plus import Size
from tests.benchmarks.program import run_command

CPU = torch.device("cpu")
BAD = "tests.benchmarks.gpu.bad_parts"


def test_every_part_reports_numbers(tmp_path):
    file = tmp_path / "gpu.json"
    done = run_command(main, "--tiny", "--device", "cpu", "--minutes", "5", "--json", file)
    assert done.exit_code == 0, done.output
    results = json.loads(file.read_text())
    assert set(results) == {"machine", "settings", "missing", "parts", "memory", "failures", "aims"}
    assert results["machine"]["versions"]["torch"]
    assert results["machine"]["date"]
    assert tuple(results["parts"]) == TINY
    assert results["failures"] == []
    for name, part in results["parts"].items():
        assert part["status"] == "done", (name, part["error"])
        assert 0 < part["seconds"] < part["limit_seconds"]
        assert part["memory"]["peak_bytes"] > 1e8
        numbers = [value for row in part["rows"] for value in row.values() if type(value) in (int, float)]
        assert numbers, name

    # what each part is for
    rows = {name: part["rows"] for name, part in results["parts"].items()}
    assert rows["tests"][-1]["tests"] == rows["tests"][-1]["skipped"] + rows["tests"][-1]["passed"] >= 2
    judged = [row for row in rows["checks"] if "passed" in row]
    assert len(judged) >= 9
    assert all(row["passed"] for row in judged)
    assert {row["contender"] for row in rows["trials S1"]} == {"eager", "vmap", "specification", "fused"}
    assert all(row["trial_steps_per_second"] > 0 for row in rows["trials S1"])
    sweep = rows["sweep"][0]
    parts = sweep["steps_seconds"] + sweep["validation_seconds"] + sweep["start_and_metrics_seconds"]
    assert sweep["seconds"] == pytest.approx(parts)
    assert rows["ulfine_plus"][0]["images"] == 200
    stages = next(row["stages"] for row in rows["extraction ViT-B-32"] if "stages" in row)
    assert set(stages) == {"read", "resample", "model", "write"}
    assert all(rate > 0 for rate in stages.values())
    assert {row["stage"] for row in rows["extraction ViT-B-32"]} == {
        "model alone",
        "each alone",
        "end to end",
        "features",
    }
    exact = next(r for r in rows["extraction ViT-B-32"] if r["stage"] == "features" and r["precision"] == "fp32")
    assert exact["centred_least"] == pytest.approx(1.0, abs=1e-5)


# -- parts that fail


def runs(pid):
    """Whether a process still runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_parts_that_fail_hang_or_die_leave_the_others(tmp_path, capfd):
    seen = []
    parts = (
        Part("raises", f"{BAD}:raises", 1),
        Part("hangs", f"{BAD}:hangs", 0.4),
        Part("dies", f"{BAD}:dies", 1),
        Part("no such module", f"{BAD}.missing:f", 1),
        Part("works", f"{BAD}:works", 6, "argument"),
    )
    results = run_parts(parts, Settings("cpu", True), 120, lambda results: seen.append(list(results)))
    assert seen == [list(results)[: i + 1] for i in range(5)]
    assert {name: result["status"] for name, result in results.items()} == {
        "raises": "failed",
        "hangs": "out of time",
        "dies": "failed",
        "no such module": "failed",
        "works": "done",
    }
    assert results["raises"]["rows"][0] == {"number": 1.0, "missing": None}
    assert results["raises"]["rows"][1]["failed"] == "a step"
    assert results["raises"]["rows"][1]["step"] == 2
    assert results["raises"]["error"][-1] == "RuntimeError: no such kernel"
    assert results["hangs"]["rows"][0] == {"number": 2}
    assert len(results["hangs"]["rows"]) == 2, results["hangs"]
    assert any("in hangs" in line for line in results["hangs"]["error"])
    assert results["hangs"]["seconds"] < results["hangs"]["limit_seconds"] + 5
    assert not runs(results["hangs"]["rows"][1]["pid"])  # what it had started has ended too
    assert "code -6" in results["dies"]["error"][-1]
    assert "missing" in results["no such module"]["error"][-1]
    assert results["works"]["rows"][0]["name"] == "argument"
    # what the others left is there for the last
    assert results["works"]["limit_seconds"] > 80
    assert [line.split(":")[0] for line in summary.failures(results)] == [
        "raises",
        "raises",
        "hangs",
        "dies",
        "no such module",
    ]
    assert "RuntimeError: no such kernel" in capfd.readouterr().out


def test_the_file_is_written_after_each_part(tmp_path, monkeypatch):
    file, written = tmp_path / "gpu.json", []
    monkeypatch.setattr("benchmarks.gpu.__main__.write_json", lambda path, value: written.append(list(value["parts"])))
    run((Part("a", f"{BAD}:works", 1, "x"), Part("b", f"{BAD}:works", 1, "y")), Settings("cpu", True), 1.0, file)
    assert written[:2] == [["a"], ["a", "b"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cpu"], "add --tiny"),
        (["--parts", "checks,nothing"], "parts are tests, checks"),
        (["--minutes", "0"], "minutes"),
    ],
)
def test_bad_options_are_refused(options, message):
    done = run_command(main, *options)
    assert done.exit_code == 2
    assert message in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_so():
    done = run_command(main)
    assert done.exit_code == 2
    assert "no GPU is available here" in done.output


def test_a_checkout_in_which_nothing_is_installed_is_enough():
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if not f.__module__.startswith('__editable__')];"
        "import benchmarks.gpu.parts, ulfine_fast.cli.main; print(ulfine_fast.cli.main.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "cli/main.py"


# -- checks that can fail


def test_a_wrong_step_fails_its_check(tmp_path, monkeypatch):
    def judged():
        report = Report(tmp_path / f"rows{time.monotonic_ns()}", time.monotonic() + 60)
        checks.run_checks(Settings("cpu", True), report)
        lines = report._path.read_text().splitlines()
        return {row["check"]: row["passed"] for kind, row in map(json.loads, lines) if "passed" in row}

    def wrong(velocity, parameters, momentum, decay):
        velocity.mul_(momentum.unsqueeze(1))
        if velocity.dtype == torch.float32:
            velocity.add_(1e-2)

    right = judged()
    assert all(right.values())
    monkeypatch.setattr(checks, "decay_velocity_", wrong)
    monkeypatch.setattr("ulfine_fast.core.fused.step.decay_velocity_", wrong)
    failed = {name for name, passed in judged().items() if not passed}
    assert {"momentum and decay", f"parameters of {checks._STEPS} steps against float64"} <= failed
    assert "gather" not in failed


def test_other_batches_are_noticed(monkeypatch):
    assert checks.same_batches(CPU, checks.TINY, steps=3)
    configs = checks.TrainingSet.configs
    calls = iter((0, 1))
    monkeypatch.setattr(
        checks.TrainingSet, "configs", lambda self, trials: configs(self, trials + 1)[next(calls) :][:3]
    )
    assert not checks.same_batches(CPU, checks.TINY, steps=3)


def test_replays_are_counted(monkeypatch):
    played = []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", played.append)
    with checks.counted_replays() as count:
        torch.cuda.CUDAGraph.replay("one")
        torch.cuda.CUDAGraph.replay("two")
    assert count == [2]
    assert played == ["one", "two"]


# -- sizes and aims


def test_a_size_that_is_too_large_says_why(monkeypatch):
    size = Size(1000, 10, 8)
    assert fits._too_large(size, CPU, seconds_left=10, seconds=5) == ""
    assert "are left" in fits._too_large(size, CPU, seconds_left=10, seconds=11)
    monkeypatch.setattr(fits, "free_memory", lambda: 10)
    assert "are free" in fits._too_large(size, CPU, seconds_left=10, seconds=5)


def test_a_size_shrinks_to_what_fits(tmp_path, monkeypatch):
    def measured(size, device):
        return {"images": size.images, "classes": 2, "dim": 2, "seconds": 1.0, "ratio": 2.0, "megabytes": None}

    monkeypatch.setattr(fits, "_SMALL", Size(100, 2, 2))
    monkeypatch.setattr(fits, "IMAGENET", Size(1600, 2, 2))
    monkeypatch.setattr(fits.ulfine_plus, "measure", measured)
    monkeypatch.setattr(fits, "_too_large", lambda size, *rest: "no room" if size.images > 500 else "")
    report = Report(tmp_path / "rows", time.monotonic() + 60)
    fits.run_ulfine_plus(Settings("cpu"), report)
    rows = [json.loads(line)[1] for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row.get("images") for row in rows] == [100, None, None, 400]
    assert rows[-1]["wanted_images"] == 1600


def result(*rows, status="done"):
    return {"status": status, "rows": list(rows), "memory": None, "error": None}


def test_aims_are_compared_with_what_was_measured():
    s1 = {"shape": "S1", "trials": 256, "peak_bytes": None}
    model = {"model": "ViT-B-16", "precision": "bf16"}
    results = {
        "tests": result({"tests": 9, "passed": 8, "failed": 0, "skipped": 1}),
        "trials S1": result(
            {**s1, "contender": "eager", "trial_steps_per_second": 500.0},
            {**s1, "contender": "fused", "trial_steps_per_second": 250_000.0},
        ),
        "sweep": result({"trials": 256, "microseconds_per_trial_step": 7.0}),
        "ulfine_plus": result({"images": 1_280_000, "seconds": 59.0, "megabytes": 50_000.0}),
        "extraction": result(
            {**model, "stage": "model alone", "images_per_second": 9_000.0},
            {**model, "stage": "model alone", "images_per_second": 11_000.0},
            {"model": "ViT-B-16", "stage": "end to end", "images_per_second": 3_000.0, "of_slowest": 0.95},
        ),
    }
    rows = summary.aims(results)
    assert [row["measured"] for row in rows] == [500.0, 4.0, 7.0, 11_000.0, 3_000.0, 0.95, 59.0, 52.4288, 1]
    assert [row["reached"] for row in rows] == [True, True, False, True, False, True, True, False, False]
    assert {row["reached"] for row in summary.aims({})} == {None}


def test_memory_is_sorted_and_failures_are_named():
    memory = {"peak_gpu_bytes": 5, "peak_bytes": 7}
    results = {
        "a": {**result(), "memory": memory},
        "b": result(
            {"shape": "S1", "trials": 4, "contender": "fused", "peak_bytes": 9},
            {"check": "gather", "shape": "K1", "passed": False, "error": 0.5},
            {"left_out": "T > 64"},
        ),
    }
    assert [row["what"] for row in summary.memory_rows(results)] == ["S1 T 4 fused", "a"]
    assert summary.failures(results) == ["b: check failed: gather K1 0.5", "b: left out: T > 64"]


def test_every_part_names_a_function_that_exists():
    assert {part.name for part in PARTS} >= set(TINY)
    assert all(callable(pkgutil.resolve_name(part.work)) for part in PARTS)
