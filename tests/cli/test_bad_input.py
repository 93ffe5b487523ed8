"""Bad input at the command line: exit code 2, one sentence on stderr with the value, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.cache.samples import write_images, write_tiny_model
from tests.cli.program import refused, run
from ulfine_fast.cli.tables import print_metrics


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images", {"train/cat": 8, "train/dog": 5, "test/cat": 2, "test/dog": 2})


@pytest.fixture(scope="module")
def cache(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    source = write_images(folder / "images", {"train/cat": 8, "train/dog": 6, "test/cat": 2, "test/dog": 2})
    done = run("extract", source, "--out", folder / "cache", "--model", model, "--workers", 0)
    assert done.exit_code == 0, done.output
    return folder / "cache"


@pytest.fixture(scope="module")
def fitted(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted") / "run"
    done = run("fit", cache, "--method", "linear_probe", "--steps", 5, "--out", folder)
    assert done.exit_code == 0, done.output
    return folder


def test_a_missing_folder(tmp_path):
    assert "no such folder or table" in refused("extract", tmp_path / "none", "--out", tmp_path / "cache")


def test_an_empty_source(tmp_path):
    """As a script with an unset variable names it; it is not the current folder."""
    assert "the source is an empty text" in refused("extract", "", "--out", tmp_path / "cache")


def test_an_empty_folder(tmp_path, model):
    (tmp_path / "empty").mkdir()
    sentence = refused("extract", tmp_path / "empty", "--out", tmp_path / "cache", "--model", model)
    assert "CLASS/image" in sentence


def test_a_data_set_misspelt(tmp_path):
    assert "did you mean cifar10?" in refused("extract", "cifar1O", "--out", tmp_path / "cache")


def test_a_model_misspelt(images, tmp_path):
    sentence = refused("extract", images, "--out", tmp_path / "cache", "--model", "ViT-B-61")
    assert "'ViT-B-61'" in sentence
    assert "ViT-B-16" in sentence


def test_a_table_without_its_column(tmp_path):
    (tmp_path / "t.csv").write_text("file,label\na.png,cat\n")
    assert "path" in refused("extract", tmp_path / "t.csv", "--out", tmp_path / "cache")


def test_a_table_with_a_path_that_is_not_there(tmp_path):
    (tmp_path / "t.csv").write_text("path,label\na.png,cat\n")
    assert "a.png" in refused("extract", tmp_path / "t.csv", "--out", tmp_path / "cache")


def test_a_table_with_an_id_twice(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("path,label\na.png,cat\na.png,dog\n")
    assert "a.png" in refused("extract", tmp_path / "t.csv", "--out", tmp_path / "cache")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--weak", "-1", "-1"),
        ("--batch-size", "0", "0"),
        ("--shard-size", "0", "0"),
        ("--workers", "-2", "-2"),
        ("--max-skipped", "1.5", "1.5"),
        ("--device", "tpu", "tpu"),
    ],
)
def test_extract_options_out_of_range(images, tmp_path, model, option, value, words):
    sentence = refused("extract", images, "--out", tmp_path / "cache", "--model", model, option, value)
    assert words in sentence


def test_an_option_that_is_no_number_is_clicks_own_exit_two(images, tmp_path):
    assert run("extract", images, "--out", tmp_path / "cache", "--weak", "many").exit_code == 2
    for option, value in (("--dtype", "float8"), ("--mode", "append"), ("--precision", "fp64")):
        done = run("extract", images, "--out", tmp_path / "cache", option, value)
        assert (done.exit_code, value in done.stderr) == (2, True)
    assert run("extract", images).exit_code == 2
    assert run("nonsense").exit_code == 2


def test_a_class_without_a_labelled_image(tmp_path, model):
    source = write_images(tmp_path / "images", {"train/cat": 3, "test/cat": 1, "test/dog": 1})
    done = run("extract", source, "--out", tmp_path / "cache", "--model", model, "--workers", 0)
    sentence = done.stderr
    if done.exit_code == 0:
        sentence = refused("fit", tmp_path / "cache", "--method", "zero_shot", "--out", tmp_path / "run")
    assert "dog" in sentence


def test_broken_images_are_skipped_up_to_a_share(tmp_path, model):
    source = write_images(tmp_path / "images", {"cat": 8, "dog": 8})
    good = (source / "cat" / "000.png").read_bytes()
    for name, content in {"zero.png": b"", "cut.png": good[: len(good) // 2], "text.jpg": b"hello"}.items():
        (source / "cat" / name).write_bytes(content)
    Image.fromarray(np.full((9, 9), 40_000, dtype=np.uint16)).save(source / "dog" / "deep.png")
    Image.new("CMYK", (9, 9)).save(source / "dog" / "print.jpg")
    frames = [Image.new("P", (9, 9), k) for k in range(3)]
    frames[0].save(source / "dog" / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (9, 9)).save(source / "dog" / f"{'ö' * 60}.png")
    extract = ["extract", source, "--out", tmp_path / "cache", "--model", model, "--workers", 0]
    sentence = refused(*extract)
    assert "1%" in sentence or "0.01" in sentence
    done = run(*extract, "--max-skipped", 0.2, "--json")
    # another share is no other cache: what was finished is kept
    assert done.exit_code == 0, done.stderr
    for name in ("zero.png", "cut.png", "text.jpg"):
        assert name in done.stdout
    for name in ("deep.png", "print.jpg", "moving.gif"):
        assert name not in done.stdout


def test_an_output_that_is_something_else(images, tmp_path, model):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_bytes(b"meow")
    for mode in ("resume", "overwrite"):
        refused("extract", images, "--out", photos, "--model", model, "--mode", mode)
    assert (photos / "cat.jpg").read_bytes() == b"meow"


def test_an_output_below_a_file(images, tmp_path, model):
    (tmp_path / "file").write_text("")
    refused("extract", images, "--out", tmp_path / "file" / "cache", "--model", model)


def test_no_cache_there(tmp_path):
    for command in (["inspect"], ["fit"]):
        assert "manifest.json" in refused(*command, tmp_path)


def test_a_flipped_byte_in_a_shard(cache, tmp_path):
    import shutil

    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    shard = sorted((copy / "shards").glob("*.h5"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert "00000" in refused("fit", copy, "--method", "zero_shot", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    shard.unlink()
    assert "00000" in refused("fit", copy, "--method", "zero_shot", "--out", tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rank", "0"], "rank must be at least 1, got 0"),
        (["--method", "magic"], "method must be one of"),
        (["--method", "ulfine", "--threshold", "1.5"], "threshold must be at most 1, got 1.5"),
        (["--lr", "nan"], "lr must be a finite number"),
        (["--method", "linear_probe", "--mu", "0.5"], "method linear_probe does not read mu, which channel_ulfine and"),
        (
            ["--mu", "0.5"],
            "method ulfine_plus does not read mu, which channel_ulfine and ulfine read; name a method that",
        ),
        (["--mu", "0.5"], "such as --method ulfine"),
        (["--n1", "500"], "n1 = 500 needs 500 labelled images"),
        (["--n1", "2", "--gamma-l", "1", "--m1", "500"], "m1 = 500 needs 500 unlabelled images"),
        (["--device", "tpu"], "device"),
        (["--split", "nowhere.json"], "is not a saved split"),
    ],
)
def test_fit_settings_out_of_range(cache, tmp_path, arguments, words):
    assert words in refused("fit", cache, "--out", tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


def test_choices_and_counts_are_refused_by_the_parser(cache, tmp_path):
    for arguments in (["--shape", "round"], ["--seeds", "0"], ["--align", "sideways"], ["--no-such-option"]):
        done = run("fit", cache, "--method", "ulfine", "--out", tmp_path / "run", *arguments)
        assert done.exit_code == 2
        assert arguments[0] in done.stderr
        assert not (tmp_path / "run").exists()


def test_a_run_folder_that_is_something_else_is_refused_before_training(cache, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert "exists and is no run" in refused("fit", cache, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_fit_over_runs_it_does_not_replace_is_refused_before_training(cache, tmp_path):
    fit = ["fit", cache, "--method", "zero_shot", "--out", tmp_path / "runs"]
    assert run(*fit, "--seeds", 2).exit_code == 0
    assert "seed-0 holds a run that this fit does not replace" in refused(*fit)
    assert run(*fit, "--seeds", 2).exit_code == 0


@pytest.mark.parametrize("command", ["eval", "predict", "report"])
def test_no_run_there(command, tmp_path, images):
    extra = [images] if command == "predict" else []
    assert "run" in refused(command, tmp_path / "nowhere", *extra)


def test_predict_refuses_what_it_cannot_do(fitted, tmp_path, images):
    assert "no such folder or image" in refused("predict", fitted, tmp_path / "none")
    assert "got 0" in refused("predict", fitted, images, "--batch-size", 0)
    assert "must end in .csv or .parquet" in refused("predict", fitted, images, "--out", tmp_path / "out.xlsx")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no")
    assert "none of the 1 images" in refused("predict", fitted, tmp_path / "bad", "--out", tmp_path / "o.csv")


def test_predict_says_what_it_passes_over(fitted, tmp_path):
    """In the words of extract."""
    folder = write_images(tmp_path / "new", {"a": 2})
    for name in ("backup.tar", "a/raw.dng"):
        (folder / name).write_bytes(b"x")
    done = run("predict", fitted, folder, "--out", tmp_path / "o.csv")
    assert done.exit_code == 0, done.output
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: 1 .dng file passed over beside the images: a/raw.dng",
        "note: 1 .tar file passed over beside the images: backup.tar",
    ]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes with names")
@pytest.mark.parametrize("form", ["csv", "parquet", "png"])
def test_pipes_are_not_waited_for(fitted, tmp_path, images, form):
    """Neither as input nor as output."""
    pipe = tmp_path / f"pipe.{form}"
    os.mkfifo(pipe)
    refused("predict", fitted, pipe)
    refused("predict", fitted, images, "--out", pipe)
    refused("extract", pipe, "--out", tmp_path / "cache")
    refused("extract", images, "--out", tmp_path / "cache", "--class-names", pipe)
    refused("extract", images, "--out", tmp_path / "cache", "--prompts", pipe)
    refused("eval", pipe)


def test_eval_refuses_another_encoders_cache(fitted, tmp_path, images):
    other = write_tiny_model(tmp_path / "other", seed=1)
    done = run("extract", images, "--out", tmp_path / "cache", "--model", other, "--workers", 0)
    assert done.exit_code == 0, done.stderr
    assert "model.sha256" in refused("eval", fitted, "--cache", tmp_path / "cache")


def test_eval_refuses_classes_the_run_does_not_know(fitted, tmp_path, model):
    source = write_images(tmp_path / "images", {"cat": 2, "horse": 2})
    run("extract", source, "--out", tmp_path / "cache", "--model", model, "--workers", 0)
    assert "class 'horse'" in refused("eval", fitted, "--cache", tmp_path / "cache")


def test_ctrl_c_is_exit_code_130_and_a_sentence(monkeypatch, cache, tmp_path):
    def interrupt(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("ulfine_fast.engine.fit.fit_many", interrupt)
    done = run("fit", cache, "--out", tmp_path / "run")
    assert done.exit_code == 130
    assert "interrupted" in done.stderr


def test_version_and_help():
    assert run("--version").stdout.startswith("ulfine-fast ")
    helped = run("fit", "--help").stdout
    assert "--gamma-l" in helped
    assert "--no-paf" not in helped
    assert "--method NAME" in helped
    helped = run("fit", "--method", "ulfine", "--help").stdout
    for word in ("--gamma-l", "--no-paf", "--threshold"):
        assert word in helped


def test_the_help_of_fit_is_short():
    environment = {**os.environ, "COLUMNS": "100"}
    command = [sys.executable, "-m", "ulfine_fast.cli.main", "fit", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) <= 104  # examples among them


def test_the_table_shows_percent_and_dashes(capsys):
    accuracy = {"mean": 0.1234, "half_width": 0.01, "n": 3}
    print_metrics({"probe": {"accuracy": accuracy, "seconds": {"mean": 2.0, "half_width": 0.0, "n": 3}}}, as_json=False)
    printed = capsys.readouterr().out
    assert "12.3 ±1.0" in printed
    assert "2.0" in printed
    assert " - " in printed
