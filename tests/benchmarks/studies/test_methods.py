import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks.studies.methods
from benchmarks.comparison.cells import parse_cells
from benchmarks.studies.methods import FASHION, Plan, methods, parse_settings, run_plan
from tests.benchmarks.program import run_command
from ulfine_fast import fit
from ulfine_fast.cache.io.errors import InputError

ROOT = Path(__file__).parents[3]
FIELDS = {
    "data",
    "n1",
    "gamma_l",
    "m1",
    "gamma_u",
    "shape",
    "method",
    "seed",
    "accuracy",
    "balanced_accuracy",
    "tail_accuracy",
    "ece",
    "pseudo_label_precision",
    "confidence_on_false",
    "seconds",
    "tuned",
    "settings",
}
CELLS = "folder=/made:20:consistent,folder=/made:20:reversed"
QUICK = ("--set", "steps=20", "--set", "eval_every=20", "--gamma-u", "5", "--seeds", "0-1", "--device", "cpu")


@pytest.fixture(autouse=True)
def _made(clusters, monkeypatch):
    monkeypatch.setattr(benchmarks.studies.methods, "open_data", lambda name, model, device: clusters)


def run(*arguments):
    return run_command(methods, *QUICK, *arguments)


def rows_of(path):
    return json.loads(path.read_text())


def timeless(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_a_row_for_each_cell_method_and_seed(tmp_path, clusters):
    file = tmp_path / "rows.json"
    done = run("--cells", CELLS, "--methods", "linear_probe,ulfine,oracle", "--trials", 0, "--json", file)
    assert done.exit_code == 0, done.output
    rows = rows_of(file)
    assert len(rows) == 2 * 3 * 2
    assert all(set(row) >= FIELDS for row in rows)
    assert all(0 <= row["balanced_accuracy"] <= 1 and not row["tuned"] for row in rows)
    [row] = [row for row in rows if (row["shape"], row["method"], row["seed"]) == ("reversed", "ulfine", 1)]
    assert (row["n1"], row["gamma_l"], row["gamma_u"], row["m1"]) == (20, 100, 5, None)
    [cell] = parse_cells("folder=/made:20:reversed", 5)
    alone = fit(clusters, cell.config(method="ulfine", seed=1, steps=20, eval_every=20), device="cpu").metrics
    assert row["balanced_accuracy"] == alone["balanced_accuracy"]
    assert row["tail_accuracy"] == pytest.approx(alone["few"])
    assert row["ece"] == alone["ece_temperature_scaled"]
    assert row["confidence_on_false"] == alone["confidence_on_false"]


def test_the_tables_are_printed(tmp_path):
    done = run("--cells", CELLS, "--methods", "linear_probe,ulfine,oracle", "--trials", 0, "--against", "linear_probe")
    assert "linear_probe against the best other method" in done.output
    assert "20 reversed" in done.output
    assert not list(tmp_path.iterdir())


def test_a_search_is_noted_and_not_worse_on_validation_than_the_defaults(tmp_path):
    file = tmp_path / "rows.json"
    done = run("--cells", CELLS, "--methods", "linear_probe,zero_shot", "--trials", 3, "--json", file)
    assert done.exit_code == 0, done.output
    for row in rows_of(file):
        assert row["tuned"]
        assert row["trials"] == 3
        assert row["settings"]["steps"] == 20


def test_a_finished_part_is_not_repeated(tmp_path, monkeypatch):
    arguments = ("--cells", CELLS, "--methods", "linear_probe,sklearn_label_spreading", "--trials", 0)
    first, again = tmp_path / "a.json", tmp_path / "b.json"
    assert run(*arguments, "--json", first, "--out", tmp_path / "parts").exit_code == 0
    assert len(list((tmp_path / "parts").glob("*.json"))) == 4
    monkeypatch.setattr(benchmarks.studies.methods, "fit_cell", lambda *_: pytest.fail("measured again"))
    assert run(*arguments, "--json", again, "--out", tmp_path / "parts").exit_code == 0
    assert rows_of(first) == rows_of(again)


@pytest.mark.parametrize(
    "change", [("--seeds", "0-2"), ("--set", "lr=0.2"), ("--gamma-u", "9"), ("--m1", "9"), ("--trials", "2")]
)
def test_a_part_of_other_options_is_not(tmp_path, monkeypatch, change):
    arguments = ("--cells", CELLS, "--methods", "linear_probe", "--trials", 0, "--out", tmp_path)
    assert run(*arguments).exit_code == 0
    asked, real = [], benchmarks.studies.methods.fit_cell
    monkeypatch.setattr(
        benchmarks.studies.methods, "fit_cell", lambda *arguments: asked.append(arguments) or real(*arguments)
    )
    assert run(*arguments, *change).exit_code == 0
    assert len(asked) == 2


KILLED = """
import os, signal, sys
import benchmarks.studies.methods as program
from tests.conftest import make_clusters

real, fitted = program.fit_cell, []


def fit_cell(*arguments):
    fitted.append(arguments)
    if len(fitted) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)


program.fit_cell, program.open_data = fit_cell, lambda *_: make_clusters()
program.typer.run(program.methods)
"""


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    """Kill -9 while the third of four parts is measured; then the same command again, and one that runs through."""
    arguments = ["--cells", CELLS, "--methods", "linear_probe,ulfine", "--trials", "0"]
    file, whole = tmp_path / "rows.json", tmp_path / "whole.json"
    command = [sys.executable, "-c", KILLED, *QUICK, *arguments, "--json", str(file)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    before = {path.name: path.read_bytes() for path in (tmp_path / "rows.parts").glob("*.json")}
    assert len(before) == 2
    assert len(rows_of(file)) == 4

    fitted, real = [], benchmarks.studies.methods.fit_cell
    monkeypatch.setattr(
        benchmarks.studies.methods, "fit_cell", lambda *arguments: fitted.append(arguments[0]) or real(*arguments)
    )
    assert run(*arguments, "--json", file).exit_code == 0
    assert fitted == ["linear_probe", "ulfine"]
    assert {name: (tmp_path / "rows.parts" / name).read_bytes() for name in before} == before
    assert run(*arguments, "--json", whole).exit_code == 0
    assert timeless(rows_of(file)) == timeless(rows_of(whole))


def test_a_data_set_is_opened_once(clusters, monkeypatch):
    opened = []
    monkeypatch.setattr(
        benchmarks.studies.methods, "open_data", lambda *arguments: opened.append(arguments) or clusters
    )
    cells = parse_cells("folder=/a:20:uniform,folder=/b:20:uniform,folder=/a:20:reversed")
    plan = Plan(("zero_shot",), (0,), 0, {}, "lite0-minilm", "cpu", None)
    measured = [row["cell"] for rows in run_plan(plan, cells) for row in rows]
    assert measured == ["folder=/a:20:uniform", "folder=/a:20:reversed", "folder=/b:20:uniform"]
    assert opened == [("folder=/a", "lite0-minilm", "cpu"), ("folder=/b", "lite0-minilm", "cpu")]


def test_an_option_is_for_the_methods_that_read_it(tmp_path):
    file = tmp_path / "rows.json"
    done = run("--cells", CELLS, "--methods", "linear_probe,ulfine", "--trials", 0, "--set", "mu=0.2", "--json", file)
    assert done.exit_code == 0, done.output
    assert {row["method"]: row["settings"].get("mu") for row in rows_of(file)} == {"linear_probe": None, "ulfine": 0.2}


def test_by_default_the_ten_cells_are_measured():
    assert len(parse_cells(FASHION)) == 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--cells", "nope"), "DATA:N1:SHAPE"),
        (("--cells", "nope:5:uniform"), "unknown data set"),
        (("--methods", "nope"), "unknown method"),
        (("--seeds", "x"), "seeds"),
        (("--set", "lr=-1"), "lr must be at least 0"),
        (("--set", "bogus=1"), "unknown option"),
        (("--set", "mu=0.1", "--methods", "linear_probe"), "does not read mu"),
        (("--gamma-u", "0.5"), "gamma_u"),
        (("--methods", "oracle", "--against", "ulfine"), "--against"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_two(arguments, words):
    done = run(*arguments)
    assert done.exit_code == 2
    assert words in done.output
    assert "Traceback" not in done.output


def test_settings_have_the_type_of_their_value():
    pairs = ["steps=300", "lr=0.1", "dlf=false", "adapter=none"]
    assert parse_settings(pairs) == {"steps": 300, "lr": 0.1, "dlf": False, "adapter": "none"}


@pytest.mark.parametrize(("pair", "words"), [("lr", "NAME=VALUE"), ("seed=3", "decided"), ("n1=3", "decided")])
def test_other_settings_are_refused(pair, words):
    with pytest.raises(InputError, match=words):
        parse_settings([pair])
