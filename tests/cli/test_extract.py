from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
import typer
from typer.testing import CliRunner

from tests.cache.samples import write_images
from ulfine_fast.cache.io.errors import CacheMismatch, InputError
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.extract import extract
from ulfine_fast.cli.inspect import inspect

APP = typer.Typer(pretty_exceptions_enable=False)
APP.command()(extract)
APP.command()(inspect)


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images", {"train/cat": 2, "train/dog": 1, "test/cat": 1, "unlabeled": 1})


def run(*arguments):
    """Runs a command; errors that a user can cause come out as they are, `main` makes sentences of them."""
    result = CliRunner().invoke(APP, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def run_extract(images, out, model, *more):
    return run("extract", images, "--out", out, "--model", model, "--workers", 0, "--device", "cpu", *more)


# -- extract


def test_extract_prints_what_it_did(images, model, tmp_path):
    shown = run_extract(images, tmp_path / "cache", model)
    assert "5 images in 3 shards" in shown
    assert "5 images encoded in" in shown
    assert len(FeatureCache.open(tmp_path / "cache")) == 5
    again = run_extract(images, tmp_path / "cache", model)
    assert "3 shards finished before and kept" in again
    assert "encoded" not in again
    assert "3 shards with 5 images intact" in run_extract(images, tmp_path / "cache", model, "--mode", "verify")


def test_every_option_reaches_the_cache(images, model, tmp_path):
    (tmp_path / "prompts.txt").write_text("a drawing of a {}.\n{}\n")
    (tmp_path / "names.txt").write_text("house cat\nbig dog\n")
    options = ["--weak", 2, "--strong", 0, "--view-seed", 7, "--dtype", "float32", "--batch-size", 4, "--shard-size", 2]
    options += ["--prompts", tmp_path / "prompts.txt", "--class-names", tmp_path / "names.txt", "--precision", "bf16"]
    shown = run_extract(images, tmp_path / "cache", model, *options, "--max-skipped", 0.5, "--json")
    assert json.loads(shown)["images"] == 5
    manifest = FeatureCache.open(tmp_path / "cache").manifest
    assert manifest is not None
    assert (manifest.views["weak"], manifest.views["strong"], manifest.views["seed"]) == (2, 0, 7)
    assert (manifest.dtype, manifest.batch_size, manifest.shard_size) == ("float32", 4, 2)
    assert (manifest.prompts, manifest.class_names) == (["a drawing of a {}.", "{}"], ["house cat", "big dog"])
    assert (manifest.precision, manifest.max_skipped) == ("bf16", 0.5)


def test_extract_json_is_one_object(images, model, tmp_path):
    summary = json.loads(run_extract(images, tmp_path / "cache", model, "--json"))
    assert (summary["images"], summary["encoded"], summary["shards"], summary["skipped"]) == (5, 5, 3, [])
    assert summary["out"] == str(tmp_path / "cache")
    assert summary["images_per_second"] > 0


def test_skipped_images_are_listed(images, model, tmp_path):
    for number in range(12):
        (images / f"unlabeled/cut{number:02d}.png").write_bytes(b"")
    shown = run_extract(images, tmp_path / "cache", model, "--max-skipped", 0.9)
    assert "skipped unlabeled/cut00.png: " in shown
    assert "... and 2 more" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weak", "-1"], "weak must be at least 0, got -1"),
        (["--batch-size", "0"], "batch size must be at least 1, got 0"),
        (["--max-skipped", "2"], "fraction from 0 to 1, got 2"),
        (["--prompts", "/nowhere.txt"], r"/nowhere\.txt"),
        (["--class-names", "/nowhere.txt"], r"/nowhere\.txt"),
    ],
)
def test_a_wrong_value_is_said_with_the_value(images, model, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        run_extract(images, tmp_path / "cache", model, *options)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "append"], "'append' is not one of 'resume', 'overwrite', 'verify'"),
        (["--dtype", "int4"], "'int4' is not one of 'float16', 'float32', 'int8'"),
        (["--precision", "int8"], "'int8' is not one of 'fp32', 'tf32', 'bf16', 'fp16'"),
        (["--features", "cls"], "'cls' is not one of 'projected', 'pre-projection', 'last-block'"),
        (["--engine", "spark"], "'spark' is not one of 'local', 'ray'"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused_with_the_others(images, tmp_path, options, message):
    arguments = ["extract", images, "--out", tmp_path / "cache", *options]
    done = CliRunner().invoke(APP, [str(argument) for argument in arguments])
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert not (tmp_path / "cache").exists()


def test_a_wrong_source_is_said_before_a_model_is_loaded(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        run_extract(tmp_path / "nowhere", tmp_path / "cache", "no-such-model")


def test_other_settings_are_refused(images, model, tmp_path):
    run_extract(images, tmp_path / "cache", model)
    with pytest.raises(CacheMismatch, match=r"views\.weak = 1, the request says 3; .*--mode overwrite"):
        run_extract(images, tmp_path / "cache", model, "--weak", 3)
    run_extract(images, tmp_path / "cache", model, "--weak", 3, "--mode", "overwrite")
    assert FeatureCache.open(tmp_path / "cache").views("weak").shape[1] == 3


# Stops at the features of the second shard until the signal comes; everything else is the real command.
# A child of a shell's background job inherits that Ctrl-C is ignored; at a terminal it is not.
CHILD = """
import signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from ulfine_fast.cache.pipeline import encode
from ulfine_fast.cli.main import main
reached, add = Path(sys.argv.pop()), encode._OpenPart.add
seen = []
def halt(self, *rest):
    seen.append(rest)
    if len(seen) == 2:
        reached.touch()
        threading.Event().wait()
    add(self, *rest)
encode._OpenPart.add = halt
main()
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_says_how_to_continue(images, model, tmp_path, sent, code):
    out, reached = tmp_path / "cache", tmp_path / "reached"
    options = ["--out", out, "--model", model, "--workers", 2, "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [str(one) for one in [sys.executable, "-c", CHILD, "extract", images, *options, reached]],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not reached.exists():
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=0.02)
            pytest.fail(f"the command ended by itself: {child.communicate()[1]}")
    os.killpg(child.pid, sent)  # as a terminal or a queue does: to all of its processes
    stdout, stderr = child.communicate(timeout=120)
    assert child.returncode == code, stderr
    assert stdout == ""
    assert "stopped: 1 of 3 shards are finished" in stderr
    assert "run the same command again to continue" in stderr
    assert "Traceback" not in stderr
    assert "encoded" in run_extract(images, out, model)


def test_extract_says_what_it_took_the_source_for(images, model, tmp_path):
    (images / "train/cat/backup.tar").write_bytes(b"x")
    (tmp_path / "names.txt").write_text("house cat\nbig dog\n")
    arguments = ["extract", images, "--out", tmp_path / "cache", "--model", model, "--workers", 0, "--device", "cpu"]
    command = [sys.executable, "-m", "ulfine_fast.cli.main", *arguments, "--class-names", tmp_path / "names.txt"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    assert "note: " in done.stderr
    assert "renames the classes in their order: cat is house cat, dog is big dog" in done.stderr
    assert "note: 1 .tar file passed over beside the images: train/cat/backup.tar" in done.stderr
    assert done.stdout.splitlines()[-4:] == [
        "rows of each class by split:",
        "  house cat: train 2, test 1",
        "  big dog: train 1",
        "  (unknown): unlabeled 1",
    ]


def test_names_that_the_terminal_cannot_show_are_escaped(model, tmp_path):
    images = write_images(tmp_path / "images", {"train/猫": 1, "train/esc\x1b[1m": 1})
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    for arguments in (["extract", images, "--out", tmp_path / "c", "--model", model], ["inspect", tmp_path / "c"]):
        command = [sys.executable, "-m", "ulfine_fast.cli.main", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, check=True, env=environment)
        assert b"\\u732b" in done.stdout
        assert b"esc\\x1b[1m" in done.stdout
        assert b"\x1b" not in done.stdout


def test_classes_that_are_one_text_to_the_model_are_refused(images, model, tmp_path):
    for names in (["very " * 40 + "long", "very " * 40 + "wide"], ["Cow", "cow"], ["big_cow", "big cow"]):
        (tmp_path / "names.txt").write_text("\n".join(names))
        with pytest.raises(InputError, match="two classes are one text to the model, which reads 16 tokens"):
            run_extract(images, tmp_path / "cache", model, "--class-names", tmp_path / "names.txt")


# -- inspect


def test_inspect_prints_what_is_in_a_cache(images, model, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (images / "unlabeled/[red]cut.png").write_bytes(b"")
    run_extract(images, tmp_path / "cache", model, "--max-skipped", 0.5)
    shown = run("inspect", tmp_path / "cache")
    for part in ("local-dir:", "8 x float16", "1 plain, 1 weak, 1 strong, seed 0", "a photo of a {}.", "5 from folder"):
        assert part in shown
    rows = {cells[0]: cells[1:] for line in shown.splitlines() if len(cells := line.replace("│", " ").split()) > 3}
    assert (rows["cat"], rows["dog"], rows["all"]) == (["2", "0", "1"], ["1", "0", "0"], ["3", "1", "1"])
    assert "unlabeled/[red]cut.png" in shown
    assert "1 images skipped" in shown or "1 image skipped" in shown
    assert "every checksum, shape and value is right" in shown


def test_inspect_json_is_one_object(images, model, tmp_path):
    run_extract(images, tmp_path / "cache", model)
    summary = json.loads(run("inspect", tmp_path / "cache", "--json"))
    assert summary["counts"] == {"train": {"cat": 2, "dog": 1}, "unlabeled": {"(unknown)": 1}, "test": {"cat": 1}}
    assert (summary["problems"], summary["images"], summary["dim"]) == ([], 5, 8)


def test_inspect_of_a_damaged_cache_shows_the_rest_and_fails(images, model, tmp_path, capsys):
    run_extract(images, tmp_path / "cache", model)
    path = tmp_path / "cache/shards/00001.h5"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    for as_json in (False, True):
        with pytest.raises(InputError, match=r"problems?: shard 00001 is damaged"):
            inspect(tmp_path / "cache", as_json)
        shown = capsys.readouterr().out
        assert "cat" in shown
        assert "00001" in shown if as_json else "check: failed" in shown


def test_inspect_of_no_cache(tmp_path):
    with pytest.raises(InputError, match="is not a feature cache"):
        run("inspect", tmp_path)


def test_help_needs_no_torch():
    code = (
        "import sys, ulfine_fast.cli.extract, ulfine_fast.cli.inspect\n"
        "assert not {'torch', 'open_clip', 'h5py', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
