"""Every file of a sweep is damaged in many ways: it is refused in one sentence, or what it says is unchanged.

And a sweep is killed at its writes, and goes on as if nothing had happened. A few of each by default; `--mutations N`
damages N times, half of them a sweep of version 0.1, and kills at every write.
"""

from __future__ import annotations

import csv
import faulthandler
import json
import random
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.attacks import damages
from ulfine_fast import FeatureCache, InputError, sweep
from ulfine_fast.cache.io.toml import read_toml
from ulfine_fast.cli.main import app
from ulfine_fast.related.forecast.from_sweep import forecast_sweep
from ulfine_fast.report.sweeps import find_sweeps, sweeps_section

ROOT = Path(__file__).parents[2]
V0_1 = ROOT / "tests/fixtures/v0_1"
DEFAULT = 120  # damages, half of them of each sweep
KILLS = 5
HANG_SECONDS = 120
CELLS = ["", "0", "-1", "1e400", "nan", "x", "0.5", "1" * 5000, "\0", '"', "\ud800", "9" * 200_000]
NEW_SPACE = {
    "method": "linear_probe",
    "steps": 9,
    "eval_every": 3,
    "val_fraction": 0.3,
    "lr": {"low": 0.003, "high": 0.3, "log": True},
    "scale": {"low": 5.0, "high": 50.0},
    "feature_noise": [0.0, 0.5],
}
NEW_OPTIONS: dict[str, Any] = {
    "trials": 6,
    "batch": 3,
    "seeds": 2,
    "sampler": "cmaes",
    "pruning": "halving",
    "refit": 1,
    "refit_seeds": 3,
}
OLD_OPTIONS: dict[str, Any] = {"trials": 6, "seeds": 2, "refit": 1, "refit_seeds": 2}


class Case:
    """A finished sweep with a forecast, and the command that made it."""

    def __init__(self, folder: Path, cache: FeatureCache, space: dict[str, Any], options: dict[str, Any]) -> None:
        self.folder, self.cache, self.space, self.options = folder, cache, space, options
        forecast_sweep(folder, cache, "steps", 2.0, seeds=3)
        self.files = sorted(
            path.relative_to(folder)
            for path in folder.rglob("*")
            # runs have their own test
            if path.is_file() and path.name not in (".lock", "space.toml") and "seed-" not in str(path)
        )
        self.wanted = {name: read(self, folder) for name, read in READERS.items()}


def _resumed(case: Case, folder: Path) -> Any:
    """What the same command says again."""
    result = sweep(case.cache, case.space, out=folder, progress=False, **case.options)
    trials = [(trial.number, trial.state.name, trial.values, _current(trial.params)) for trial in result.study.trials]
    refits = [{**refit, "test": {**refit["test"], "seconds": None}} for refit in result.best]
    said = {**result.to_dict(), "out": None, "storage": None, "best": refits}
    # version 0.1 wrote nothing that this number could be compared with
    reads = json.loads((folder / "sweep.json").read_text())["test_reads"] if case.options is NEW_OPTIONS else None
    best = read_toml(folder / "best.toml")
    return json.loads(json.dumps([trials, said, reads, best]))


def _current(params: dict[str, Any]) -> dict[str, Any]:
    """Without the settings of version 0.1 that nothing reads."""
    return {name: value for name, value in params.items() if name not in ("lean", "trust")}


def _reported(case: Case, folder: Path) -> Any:
    """The section of the report."""
    sections = sweeps_section(find_sweeps([folder]))
    # the width of a bar has fewer digits than a number in a file
    return json.loads(json.dumps([{**section, "path": None} for section in sections], default=str))


def _forecast(case: Case, folder: Path) -> Any:
    """The forecast, of the curve in the folder or of new runs."""
    return forecast_sweep(folder, case.cache, "steps", 2.0, seeds=3)


# a resumed sweep writes its files anew, so it comes last
READERS: dict[str, Callable[[Case, Path], Any]] = {"report": _reported, "forecast": _forecast, "sweep": _resumed}


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("sweeps")
    cache = FeatureCache.open(V0_1 / "cache")
    sweep(cache, NEW_SPACE, out=root / "new", progress=False, **NEW_OPTIONS)
    sweep(cache, NEW_SPACE, out=root / "other", progress=False, seed=50, **NEW_OPTIONS)
    shutil.copytree(V0_1 / "sweep", root / "old")
    # as it is read today, but for what neither method reads
    unread = ("shrink", "lean", "trust")
    space = {name: entry for name, entry in read_toml(V0_1 / "sweep/space.toml").items() if name not in unread}
    old = Case(root / "old", cache, space, OLD_OPTIONS)
    # resuming has written the files of the present version
    shutil.rmtree(root / "old")
    shutil.copytree(V0_1 / "sweep", root / "old")
    forecast_sweep(root / "old", cache, "steps", 2.0, seeds=3)
    new = Case(root / "new", cache, NEW_SPACE, NEW_OPTIONS)
    return {"old": old, "new": new, "other": Case(root / "other", cache, NEW_SPACE, {**NEW_OPTIONS, "seed": 50})}


# -- damages: each takes the file, a random generator and the same file of another sweep


def _exchange(path: Path, rng: random.Random, other: Path) -> None:
    """Two pieces of the file are swapped."""
    data = path.read_bytes()
    length = rng.choice((1, 8, 64, 4096))
    first, second = sorted(rng.sample(range(0, len(data) + length, length), 2))
    a, b = data[first : first + length], data[second : second + length]
    path.write_bytes(data[:first] + b + data[first + len(a) : second] + a + data[second + len(b) :])


def _digit(path: Path, rng: random.Random, other: Path) -> None:
    """One digit of a number becomes another."""
    data = bytearray(path.read_bytes())
    digits = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
    if digits:
        data[rng.choice(digits)] = rng.randrange(48, 58)
    path.write_bytes(data)


def _change_json(path: Path, rng: random.Random, other: Path) -> None:
    """One value anywhere gets another value, or goes, or is turned round."""
    data = _changed_json(json.loads(path.read_text(encoding="utf-8")), rng)
    path.write_bytes(data)


def _changed_json(content: Any, rng: random.Random) -> bytes:
    positions: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            positions.append((node, key))
            if isinstance(node[key], dict | list):
                collect(node[key])

    collect(content)
    marker = "the value that is replaced"
    if not positions:
        return rng.choice(damages.RAW_VALUES)
    node, key = rng.choice(positions)
    change = rng.randrange(5)
    if change == 0:
        del node[key]
    elif change == 1 and isinstance(node[key], list):
        node[key] = node[key][::-1]
    elif change == 2 and isinstance(node[key], int | float):
        node[key] += rng.choice((1, -1, 0.25, 1e-3))
    elif change == 3:
        node[key] = marker
    else:
        node[key] = rng.choice(damages.VALUES)
    data = json.dumps(content).encode()
    return data.replace(json.dumps(marker).encode(), rng.choice(damages.RAW_VALUES))


def _change_table(path: Path, rng: random.Random, other: Path) -> None:
    """A cell gets another value, or a row goes, comes twice or elsewhere."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    change = rng.randrange(4)
    if change == 0:
        del rows[rng.randrange(len(rows))]
    elif change == 1:
        rows.insert(rng.randrange(len(rows)), rng.choice(rows))
    elif change == 2:
        rng.shuffle(rows)
    else:
        row = rng.choice(rows)
        row[rng.randrange(len(row))] = rng.choice(CELLS)
    text = "\r\n".join(",".join(row) for row in rows) + "\r\n"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def _change_database(path: Path, rng: random.Random, other: Path) -> None:
    """A value of a row gets another value, or rows go, or are swapped."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA foreign_keys = OFF")
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    table = rng.choice([name for name in tables if connection.execute(f"SELECT 1 FROM {name}").fetchone()])
    columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
    rowid, column = rng.choice(connection.execute(f"SELECT rowid FROM {table}").fetchall())[0], rng.choice(columns)
    change = rng.randrange(6)
    try:
        if change == 0:
            connection.execute(f"DELETE FROM {table} WHERE rowid = ?", [rowid])
        elif change == 1:
            connection.execute(f"DROP TABLE {table}")
        elif change == 2:
            connection.execute(
                f"UPDATE {table} SET {column} = (SELECT {column} FROM {table} ORDER BY random() LIMIT 1)"
            )
        elif column == "value_json":
            old = connection.execute(f"SELECT value_json FROM {table} WHERE rowid = ?", [rowid]).fetchone()[0]
            text = _changed_json(json.loads(old), rng).decode(errors="replace") if old[0] in "[{" else "3"
            connection.execute(f"UPDATE {table} SET value_json = ? WHERE rowid = ?", [text, rowid])
        else:
            value = rng.choice(
                [None, 0, 1, 2, 7, -1, 10**15, 0.5, 1e308, "x", "", "RUNNING", "FAIL", b"\xff", "[" * 10**5]
            )
            connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", [value, rowid])
        connection.commit()
    except sqlite3.IntegrityError:
        pass  # the database does not take the value
    finally:
        connection.close()


DAMAGES = [*damages.DAMAGES, damages.grow, _exchange, _digit]
OF_KIND = {".json": _change_json, ".csv": _change_table, ".db": _change_database, ".toml": _digit}


# -- what must hold


def _same(value: Any, wanted: Any) -> bool:
    """Equal, but for what version 0.1 cannot be checked for: the last digits of numbers."""
    if isinstance(wanted, float) and isinstance(value, float):
        return value == wanted or abs(value - wanted) <= 1e-6 * abs(wanted)
    if isinstance(wanted, dict) and isinstance(value, dict):
        return value.keys() == wanted.keys() and all(_same(value[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list) and isinstance(value, list):
        return len(value) == len(wanted) and all(map(_same, value, wanted))
    return bool(value == wanted)


@pytest.mark.parametrize("name", ["old", "new"])
def test_a_damaged_sweep_is_refused_or_unchanged(cases, name, tmp_path, request):
    count = (request.config.getoption("--mutations", default=0) or DEFAULT) // 2
    case, other = cases[name], cases["other"]
    rng = random.Random(f"{name} {count}")
    outcomes: Counter[str] = Counter()
    for number in range(count):
        # the database holds most of what a sweep is
        file = rng.choice([*case.files, *[Path("sweep.db"), Path("sweep.json")] * 3])
        own = OF_KIND.get(file.suffix)
        damage = rng.choice([*DAMAGES, *([own] * 10 if own else [])])
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        copy = tmp_path / f"sweep-{number}"
        shutil.copytree(case.folder, copy)
        damage(copy / file, rng, other.folder / file)
        for reader, read in READERS.items():
            what = f"damage {number}: {damage.__name__} of {file}: {reader}"
            try:
                said = read(case, copy)
            except InputError as error:
                refusal = str(error)
                outcomes["refused"] += 1
            except BaseException as error:
                raise AssertionError(what) from error
            else:
                wanted = case.wanted[reader]
                # a sweep without sweep.json has not been finished, and is in no report
                if reader == "report" and not (copy / "sweep.json").exists():
                    wanted = []
                # forecasts are made when they are asked for
                elif reader == "report" and not (copy / "forecast.json").exists():
                    wanted = [{**section, "notes": []} for section in wanted]
                same = said == wanted if name == "new" else _same(said, wanted)
                assert same, f"{what}: another content was accepted"
                outcomes["unchanged"] += 1
                continue
            assert damages.is_sentence(refusal), f"{what}: {refusal}"
        shutil.rmtree(copy, ignore_errors=True)
    assert sum(outcomes.values()) == len(READERS) * count
    assert outcomes["refused"] > count / 2
    print(f"{name}: {dict(outcomes)}")


def test_commands_refuse_a_damaged_sweep_in_one_sentence(cases, tmp_path):
    case, rng = cases["new"], random.Random(0)
    (tmp_path / "space.toml").write_text(
        'method = "linear_probe"\nsteps = 9\neval_every = 3\nval_fraction = 0.3\nfeature_noise = [0.0, 0.5]\n'
        "lr = { low = 0.003, high = 0.3, log = true }\nscale = { low = 5.0, high = 50.0 }\n"
    )
    search = ["--space", tmp_path / "space.toml", "--trials", 6, "--batch", 3, "--seeds", 2, "--sampler", "cmaes"]
    search += ["--pruning", "halving", "--refit-seeds", 3]
    commands = {
        "sweep": ["sweep", V0_1 / "cache", *search, "--out", "SWEEP"],
        "report": ["report", "SWEEP", "--out", tmp_path / "page.html"],
        "forecast": ["forecast", "SWEEP", "--over", "steps", "--times", 2, "--cache", V0_1 / "cache"],
    }
    read_by = {
        "sweep.db": ["sweep"],
        ".owner": ["sweep"],
        "sweep.json": list(commands),
        "leaderboard.csv": ["report", "forecast"],
        "importance.json": ["report", "forecast"],
        "best.toml": ["report", "forecast"],
        "forecast.json": ["report"],
    }
    for file, names in read_by.items():
        for damage in (damages.truncate, damages.pipe, damages.folder, OF_KIND.get(Path(file).suffix, damages.flip)):
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
            copy = tmp_path / f"{damage.__name__}-{file}"
            shutil.copytree(case.folder, copy)
            damage(copy / file, rng, case.folder)
            for name in names:
                words = [str(copy) if word == "SWEEP" else str(word) for word in commands[name]]
                done = CliRunner().invoke(app, words)
                what = f"{damage.__name__} of {file}: {name}: {done.output}"
                assert done.exit_code == 2 or damage is OF_KIND.get(Path(file).suffix, damages.flip), what
                if done.exit_code:
                    assert done.stderr.splitlines()[-1].startswith("error: "), what
                    assert "Traceback" not in done.output, what
            shutil.rmtree(copy, ignore_errors=True)


def test_a_sweep_killed_at_any_write_goes_on_as_if_it_had_not_been(tmp_path, request):
    every = bool(request.config.getoption("--mutations", default=0))

    def kill(step: int, offset: int) -> dict[str, Any]:
        command = [sys.executable, "-W", "ignore", "-m", "tests.attacks.sweep_kills", tmp_path, str(step), str(offset)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    # without the option, other writes each day would make a failure hard to repeat: they are always the same
    result = kill(1, 0) if every else kill(61, 7)
    assert result["wrong"] == []
    assert result["kills"] >= (200 if every else KILLS - 1)
    print(result)
