"""Run folders under attack: damaged files, kills while a run is replaced, and two writers.

A few hundred damages by default, as many as `--mutations N` says otherwise.
"""

from __future__ import annotations

import errno
import faulthandler
import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.attacks import damages
from tests.cache.samples import write_cache
from tests.cli.program import run as command
from ulfine_fast import InputError, Run
from ulfine_fast.cache.io.digests import BLANK, sealed
from ulfine_fast.runs.files import load_run, load_runs
from ulfine_fast.runs.seeds import save_runs

DEFAULT = 400
HANG_SECONDS = 60
# files that each give another run, with a digest of its own, where a program that means it writes them all anew
VARIANTS = ("sealed", "resealed", "version 1")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A cache, and runs of two methods and seeds over it."""
    root = tmp_path_factory.mktemp("runs")
    write_cache(root / "cache", [("train", 6), ("train", 6), ("unlabeled", 4), ("val", 2), ("val", 2), ("test", 8)])
    for name, options in (("run", ["--method", "lightweight"]), ("other", ["--method", "ulfine", "--seed", 3])):
        fit = ["fit", root / "cache", "--out", root / name, "--steps", 4, "--eval-every", 2]
        done = command(*fit, *options)
        assert done.exit_code == 0, done.output
    return root


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def as_version_1(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same run as version 0.1 wrote it."""
    config = json.loads(files["config.json"])
    del config["digest"], config["digests"]
    text = json.dumps({**config, "version": 1}, indent=2, sort_keys=True)
    return {**files, "config.json": text.encode()}


def reseal(folder: Path) -> None:
    """Give the files of a run new digests, as a program would that means the change."""
    if not all(path.is_file() and not path.is_symlink() for path in folder.iterdir()):
        return  # a device would be read for ever, and a link written through
    try:
        config = json.loads((folder / "config.json").read_bytes())
        config["digests"] = {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in config["digests"]
        }
        data = json.dumps({**config, "digest": BLANK}, indent=2, sort_keys=True).encode()
        (folder / "config.json").write_bytes(sealed(data))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # damaged beyond that


def content(folder: Path) -> dict[str, Any]:
    """All that commands read of a run."""
    files, run = load_run(folder), Run.load(folder)
    return {
        "files": {name: repr(getattr(files, name)) for name in files.__slots__ if name != "path"},
        "run": {name: repr(value) for name, value in vars(run).items() if name != "tensors"},
        "tensors": {name: (str(t.dtype), t.shape, t.numpy().tobytes()) for name, t in run.tensors.items()},
    }


def commands(world: Path, run: Path, out: Path) -> list[list[Any]]:
    """Every command that reads a run."""
    return [
        ["eval", run, "--json"],
        ["export", run, out / "export"],
        ["report", run, "--out", out / "page.html", "--map", "none"],
        ["realign", run, "--by", "adjust", "--out", out / "realigned"],
        ["adapt", run, world / "cache", "--steps", 1, "--out", out / "adapted.csv"],
        ["predict", run, out, "--out", out / "predicted.csv"],
        ["log", run, "--out", out / "logs"],
        ["fit", world / "cache", "--split", run, "--out", out / "fitted", "--steps", 1, "--method", "zero_shot"],
    ]


def refuses(arguments: list[Any]) -> bool:
    """Whether a command ends with 2 and one sentence; it never ends with a traceback."""
    done = command(*arguments)
    assert done.exit_code in (0, 2), (arguments, done.output, done.exception)
    if done.exit_code == 2:
        assert damages.is_sentence(done.stderr), (arguments, done.stderr)
    return bool(done.exit_code)


def test_a_damaged_run_is_refused_or_unchanged(world, tmp_path, request):
    count = request.config.getoption("--mutations") or DEFAULT
    whole = files_of(world / "run")
    pristine = {"sealed": whole, "resealed": whole, "version 1": as_version_1(whole)}
    wanted = {}
    for variant, files in pristine.items():
        damages.write_files(tmp_path / "run", files)
        wanted[variant] = content(tmp_path / "run")
    rng = random.Random(count)
    outcomes: Counter[tuple[str, str]] = Counter()
    for number in range(count):
        variant, name = rng.choice(VARIANTS), rng.choice(sorted(whole))
        damage = rng.choice(damages.of_kind(Path(name)))
        what = f"mutation {number}: {damage.__name__} of {name}, {variant}"
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        run = tmp_path / "run"
        damages.write_files(run, pristine[variant])
        damage(run / name, rng, world / "other" / name)
        if variant == "resealed":
            reseal(run)
        try:
            loaded = content(run)
        except InputError as error:
            if not damages.is_sentence(str(error)):
                raise AssertionError(what) from error
            outcomes[variant, "refused"] += 1
            # what has no digests is refused where it is read
            reading = commands(world, run, tmp_path / "out")[: 4 if variant == "sealed" else 1]
            if number % 25 == 0 and not all(refuses(arguments) for arguments in reading):
                raise AssertionError(what) from error
            continue
        except BaseException as error:
            raise AssertionError(what) from error
        if loaded == wanted[variant]:
            outcomes[variant, "unchanged"] += 1
            continue
        assert variant != "sealed", f"{what}: changed content was accepted"
        outcomes[variant, "another run"] += 1
        # a run of other numbers, which is used like one or refused
        for arguments in rng.sample(commands(world, run, tmp_path / "out" / str(number)), 1):
            try:
                refuses(arguments)
            except AssertionError as error:
                raise AssertionError(what) from error
    print(dict(outcomes))  # shown with -rP
    assert sum(outcomes.values()) == count


def test_every_command_refuses_one_changed_byte_of_any_file(world, tmp_path):
    whole = files_of(world / "run")
    rng = random.Random(0)
    assert set(whole) == {
        *("config.json", "heads.safetensors", "history.csv", "metrics.json", "predictions.parquet", "split.json"),
        "calibration.parquet",
        "summary.json",
    }
    for name in whole:
        damages.write_files(tmp_path / "run", whole)
        data = bytearray(whole[name])
        data[rng.randrange(len(data))] ^= 1
        (tmp_path / "run" / name).write_bytes(data)
        for arguments in commands(world, tmp_path / "run", tmp_path / "out"):
            assert refuses(arguments), (name, arguments[0])
        assert not (tmp_path / "out").exists(), name


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("metrics.json", {"temperature": "x"}),
        ("metrics.json", {"temperature": 0}),
        ("metrics.json", {"temperature": None}),
        ("metrics.json", {"class_counts": ["x", "y"]}),
        ("metrics.json", {"class_counts": [10**400, 1]}),
        ("metrics.json", {"accuracy": 10**400}),
        ("metrics.json", {"val": 3}),
        ("split.json", {"class_order": ["x"]}),
        ("split.json", {"class_order": [10**400]}),
        ("split.json", {"test": [1, 2]}),
        ("split.json", {"labeled": "x"}),
        ("config.json", {"config": {"method": "ulfine", "m1": 10**400}}),
        ("config.json", {"config": {"method": ["x"]}}),
        ("config.json", {"config": {"method": "no such method"}}),
        ("config.json", {"config": {"method": "ulfine", "steps": "x"}}),
        ("config.json", {"class_names": ["cat"]}),
        ("config.json", {"class_names": ["cat", 3]}),
        ("config.json", {"class_names": []}),
        ("config.json", {"encoder": {"name": "x"}}),
        ("config.json", {"encoder": []}),
        ("config.json", {"cache": "a\0b"}),
        ("config.json", {"digests": {"../run/config.json": BLANK}}),
        ("config.json", {"digests": None}),
        ("config.json", {"version": True}),
        ("config.json", {"version": 1}),
    ],
)
def test_values_of_other_types_are_refused_though_the_digests_fit(world, tmp_path, name, change):
    damages.write_files(tmp_path / "run", files_of(world / "run"))
    path = tmp_path / "run" / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    reseal(tmp_path / "run")
    assert refuses(["eval", tmp_path / "run"])


@pytest.mark.parametrize(
    "text", [b"step,\xff\n1,2\n", b"step\n9999999999999999999\n", b"step\ninf\n", b"\n1\n", b"step,step\n1,1\n"]
)
def test_a_history_of_other_texts_is_refused_though_the_digests_fit(world, tmp_path, text):
    damages.write_files(tmp_path / "run", files_of(world / "run"))
    (tmp_path / "run" / "history.csv").write_bytes(text)
    reseal(tmp_path / "run")
    assert refuses(["eval", tmp_path / "run"])


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_refit_killed_at_any_write_leaves_no_mixed_run(world, tmp_path, request, seeds):
    """Old runs, new runs, or folders that are refused and that the same command finishes.

    With `--mutations` the whole command is killed, without it the save at its end, where all writes to runs are.
    """
    what = "fit" if request.config.getoption("--mutations") else "save"
    (tmp_path / "cache").symlink_to(world / "cache")
    options = ["--seeds", str(seeds), "--steps", "2", "--eval-every", "2", "--method"]
    (tmp_path / "after.json").write_text(json.dumps([*options, "lightweight"]))
    done = command("fit", tmp_path / "cache", "--out", tmp_path / "before", *options, "linear_probe")
    assert done.exit_code == 0, done.output
    done = subprocess.run(
        [sys.executable, "-m", "tests.attacks.kills", str(tmp_path), str(seeds), what],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    print(result)  # shown with -rP
    assert result["points"] > 60
    assert (result["mixed"], result["unfinished"], result["left"]) == ([], [], [])
    assert min(result["old"], result["refused"], result["new"]) > 0


def fit_into(world: Path, out: Path, *options: Any) -> Any:
    return command("fit", world / "cache", "--out", out, "--steps", 2, "--eval-every", 2, *options)


def test_the_second_fit_into_one_folder_is_refused(world, tmp_path):
    """As long as the first one lives, which may end by a kill."""
    out = tmp_path / "run"
    assert fit_into(world, out, "--method", "linear_probe").exit_code == 0
    before = files_of(out)
    code = """
import sys
from pathlib import Path
from ulfine_fast.runs.folder import locked
with locked(Path(sys.argv[1])):
    print("here", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(out)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "here\n"
        done = fit_into(world, out, "--method", "lightweight")
        assert done.exit_code == 2
        assert done.stderr == (
            f"error: another process writes to {out}; wait for it or end it, or name another folder with --out\n"
        )
        with pytest.raises(InputError, match="another process writes to"):
            Run.load(out).save(out)
        first.kill()
    assert {name: data for name, data in files_of(out).items() if name != ".lock"} == before
    assert fit_into(world, out, "--method", "lightweight").exit_code == 0
    assert Run.load(out).config.method == "lightweight"
    assert not (out / ".lock").exists()


def test_the_lock_is_not_written_through_a_link(world, tmp_path):
    out, precious = tmp_path / "run", tmp_path / "precious"
    precious.write_text("mine")
    out.mkdir()
    (out / ".lock").symlink_to(precious)
    done = fit_into(world, out)
    assert done.exit_code == 2
    assert damages.is_sentence(done.stderr)
    assert precious.read_text() == "mine"


def test_a_full_disk_leaves_the_earlier_run(world, tmp_path, monkeypatch):
    out = tmp_path / "run"
    assert fit_into(world, out, "--method", "linear_probe").exit_code == 0
    before = files_of(out)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    done = fit_into(world, out, "--method", "lightweight")
    assert (done.exit_code, done.stderr) == (2, f"error: cannot write the run to {out}: No space left on device\n")
    assert files_of(out) == before


def test_a_folder_of_another_program_is_not_replaced(world, tmp_path):
    """Though it has a config.json as well."""
    out = tmp_path / "model"
    out.mkdir()
    (out / "config.json").write_text('{"hidden_size": 384}')
    (out / "model.safetensors").write_bytes(b"weights")
    before = files_of(out)
    done = fit_into(world, out)
    assert done.exit_code == 2
    assert "exists and is no run; name a new folder" in done.stderr
    assert files_of(out) == before


def test_the_run_of_a_seed_that_diverged_does_not_stay_beside_new_ones(world, tmp_path):
    out = tmp_path / "runs"
    assert fit_into(world, out, "--method", "linear_probe", "--seeds", 2).exit_code == 0
    runs = [Run.load(out / f"seed-{seed}") for seed in range(2)]
    runs[0].config = replace(runs[0].config, lr=0.7)
    runs[1].status, runs[1].metrics = "failed", {"failed_at": 2}
    save_runs(runs, out)
    assert [run.config["lr"] for run in load_runs([out])] == [0.7]
    assert json.loads((out / "summary.json").read_text())["seeds"] == [0]


def test_a_class_name_that_is_no_unicode_is_saved_as_an_escape(world, tmp_path):
    run = Run.load(world / "run")
    run.class_names = ["cat", "d\udcffog"]
    run.cache_path = Path("/data/\udcff")
    again = Run.load(run.save(tmp_path / "run"))
    assert (again.class_names, again.cache_path) == (["cat", r"d\udcffog"], Path(r"/data/\udcff"))
