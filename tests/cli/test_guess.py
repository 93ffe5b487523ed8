"""What a person meant who guessed a command: answered in one sentence with the command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cache.samples import write_cache, write_images
from tests.cli.program import refused, usage_error
from tests.cli.test_start_up import UNUSED
from tests.report.writer import RunSpec, edit_json, write_json, write_run
from ulfine_fast.cli.content import content_of, find_folders


@pytest.fixture
def things(tmp_path, monkeypatch):
    """A folder with one of each thing, which is the current one."""
    monkeypatch.chdir(tmp_path)
    write_cache(tmp_path / "my-cache")
    write_run(tmp_path / "runs" / "plus", RunSpec(rows=20, cache=str(tmp_path / "my-cache")))
    write_run(tmp_path / "seeds" / "seed-0", RunSpec(rows=20))
    (tmp_path / "model").mkdir()
    write_json(tmp_path / "model" / "config.json", {"format": "ulfine-fast-model"})
    write_images(tmp_path / "photos", {"train/cat": 1})
    Path("photo.JPG").write_bytes(b"")
    Path("labels.csv").write_text("id,label\n")
    Path("notes").mkdir()
    Path("my-sweep").mkdir()
    write_json(tmp_path / "my-sweep" / "sweep.json", {"format": "ulfine-fast-sweep"})
    write_run(tmp_path / "my-sweep" / "best-1" / "seed-1", RunSpec(rows=20))
    return tmp_path


def test_content(things):
    expected = {
        "my-cache": "cache",
        "runs/plus": "run",
        "seeds": "runs",
        "model": "export",
        "photos": "images",
        "photos/train": "images",
        "photo.JPG": "image",
        "labels.csv": "table",
        "notes": "unknown",
        "nothing": "nothing",
        "my-sweep": "sweep",
    }
    assert {name: content_of(Path(name)) for name in expected} == expected
    Path("runs/plus/config.json").write_bytes(b"\xff{")
    assert content_of(Path("runs/plus")) == "unknown"


def test_caches_runs_and_sweeps_below_a_folder(things):
    (things / ".hidden").mkdir()
    write_run(things / ".hidden" / "run")
    kinds = {path.relative_to(things).as_posix(): kind for path, kind in find_folders(things)}
    assert kinds == {
        "my-cache": "cache",
        "my-sweep": "sweep",
        "my-sweep/best-1/seed-1": "run",
        "runs/plus": "run",
        "seeds/seed-0": "run",
    }
    assert list(find_folders(things, depth=0)) == []


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("my-cache", "my-cache is a cache, not a command; to train on it: ulfine-fast fit my-cache"),
        ("runs/plus", "to see it: ulfine-fast report runs/plus"),
        ("seeds", "seeds is a folder of runs, not a command"),
        ("my-sweep", "to see it: ulfine-fast report my-sweep"),
        ("photos/", "to make a cache of them: ulfine-fast extract photos --out cache"),
        ("photo.JPG", "to classify it: ulfine-fast predict RUN photo.JPG"),
        ("labels.csv", "labels.csv is a table, not a command"),
        ("model", "ulfine-fast push model OWNER/NAME"),
        ("notes", "notes is not a command, and it is no cache, run or image"),
        ("no/where", "no/where is not a command, and there is no such file or folder"),
        ("my-cache fit", "the command comes first; did you mean `ulfine-fast fit my-cache`?"),
        ("photos extract --out c", "did you mean `ulfine-fast extract photos --out c`?"),
        ("fitt my-cache", "no such command: fitt; did you mean fit?"),
        ("train my-cache", "no such command: train; did you mean fit?"),
        ("merge a b", "did you mean `ulfine-fast cache merge`?"),
        ("cache marge a b", "no such command: marge; did you mean merge?"),
        ("cache my-cache", "my-cache is a cache, not a command"),
        ("cache train", "no such command: train; did you mean `ulfine-fast fit`?"),
        ("qqqq", "no such command: qqqq; `ulfine-fast --help` lists them"),
        ("fit runs/plus", "runs/plus is a run, and fit takes a cache; did you mean `ulfine-fast fit my-cache`?"),
        ("fit seeds", "seeds is a folder of runs, and fit takes a cache; to compare them: ulfine-fast report seeds"),
        ("fit photos", "photos is a folder of images, and fit takes a cache; to make a cache of them"),
        (
            "predict my-cache",
            "my-cache is a cache, and predict takes a run or an exported classifier; to train on it: ulfine-fast fit",
        ),
        ("predict my-cache photos", "my-cache is a cache, and predict takes a run"),
        ("predict photos runs/plus", "in another order; did you mean `ulfine-fast predict runs/plus photos`?"),
        ("predict runs/plus seeds", "seeds is a folder of runs, and predict takes images or a cache"),
        ("report my-cache", "my-cache is a cache, and report takes a run"),
        ("extract my-cache --out c", "my-cache is a cache, and extract takes images; to train on it"),
        ("eval seeds", "did you mean `ulfine-fast eval seeds/seed-0`?"),
        ("eval my-sweep", "did you mean `ulfine-fast eval my-sweep/best-1/seed-1`?"),
        ("export my-cache", "to write its features as arrays: ulfine-fast cache export my-cache --out arrays"),
        ("push runs/plus me/it", "runs/plus is a run, and push takes an exported classifier"),
        ("inspect photo.JPG", "photo.JPG is an image, and inspect takes a cache"),
    ],
)
def test_a_guess_is_answered_with_the_command(things, line, sentence):
    assert sentence in refused(*line.split())


def test_a_right_argument_keeps_its_own_refusal(things):
    assert "lr must be" in refused("fit", "my-cache", "--lr", "-1")
    edit_json(things / "runs" / "plus" / "config.json", status=3)
    assert "is a run, and" not in refused("eval", "runs/plus")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("sweep my-cache --sampler tpee", "'tpee' is not one of 'tpe', 'random', 'grid', 'cmaes', 'qmc'; did you mean"),
        ("sweep my-cache --metric balanced", "did you mean balanced_accuracy?"),
        ("extract photos --out c --dtype Float16", "did you mean float16?"),
        ("fit my-cache --shape uniforn", "did you mean uniform?"),
        ("log runs --to wand", "did you mean wandb?"),
        ("fit my-cache --setps 3", "--steps"),
        ("extract photos --out c --dtype qqq", "'qqq' is not one of 'float16', 'float32', 'int8'."),
    ],
)
def test_a_near_choice_is_named(things, line, words):
    assert words in usage_error(*line.split())


def test_a_refusal_imports_no_library_that_takes_long(things):
    code = (
        "import sys, json, atexit; from ulfine_fast.cli.main import main;"
        "atexit.register(lambda: print(json.dumps(sorted(sys.modules)))); main()"
    )
    for line in (["my-cache"], ["fitt"], ["predict", "my-cache"]):
        done = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        imported = done.stdout.splitlines()[-1]
        assert [name for name in (*UNUSED, "torch", "numpy", "pyarrow") if f'"{name}"' in imported] == []
