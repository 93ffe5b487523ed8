"""The end-to-end study on a small world: metrics, resuming, choosing, the table and the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks.studies import end_to_end
from benchmarks.studies.end_to_end import (
    METHODS,
    Settings,
    choose,
    evaluate,
    measure,
    planned_runs,
    pseudo_labels,
    table,
    world_of,
)
from tests.benchmarks.program import run_command
from tests.benchmarks.worlds import make_world
from tests.cache.samples import write_images, write_tiny_model
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.models.encoder import load_encoder
from ulfine_fast.cache.sources import open_source
from ulfine_fast.data.splits import draw_split

TINY = Settings(size=12, steps=2, batch=4, n1=12, m1=20, gamma=4, val=0.3, test=10)


@pytest.fixture(scope="module")
def world():
    return make_world()


@pytest.fixture(scope="module")
def measured(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return folder, measure(lambda: world, TINY, METHODS, [0.01, 0.02], [0], folder)


# -- runs


def test_every_method_gives_a_whole_row(measured):
    _, rows = measured
    assert [row["method"] for row in rows[::2]][:4] == ["fft", "lft", "lp", "scratch"]
    assert {row["method"] for row in rows} == set(METHODS)
    for row in rows:
        for name in ("accuracy", "balanced_accuracy", "tail_accuracy", "ece", "val_balanced_accuracy"):
            assert 0 <= row[name] <= 1, (row["method"], name)
        assert row["seconds"] > 0
        assert 0 <= row["false_kept"] <= row["kept"] <= row["unlabeled"]
        assert row["false_kept"] <= row["false_guesses"]
        assert (row["extraction_seconds"] > 0) == row["method"].startswith("cached")
        assert row["settings"]["steps"] == (4 if row["method"] == "scratch" else 2)


def test_all_methods_see_one_split(measured):
    _, rows = measured
    assert len({(row["unlabeled"], row["n1"], row["m1"], row["gamma_u"]) for row in rows}) == 1


def test_trained_weights_count(measured):
    _, rows = measured
    trained = {row["method"]: row["trained_weights"] for row in rows}
    head, norms, tower = 15, 12, 6 * 27 + 6 + 12 + 35
    assert trained["lp"] == trained["cached-lp"] == head
    assert trained["lft"] == head + norms
    assert trained["fft"] == trained["scratch"] == head + tower


def test_finished_runs_are_not_repeated(measured):
    folder, rows = measured

    def never():
        raise AssertionError("nothing was left to run")

    assert measure(never, TINY, METHODS, [0.01, 0.02], [0], folder) == rows
    with pytest.raises(AssertionError, match="nothing was left"):
        measure(never, TINY, ["lp"], [0.01], [1], folder)
    with pytest.raises(AssertionError, match="nothing was left"):
        measure(never, Settings(**{**vars_of(TINY), "steps": 3}), ["lp"], [0.01], [0], folder)


def vars_of(settings):
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}


def test_a_missing_run_is_made_again(world, measured):
    folder, rows = measured
    path = next(folder.glob("lft-lr0.02-*.json"))
    path.unlink()
    again = measure(lambda: world, TINY, ["lft"], [0.02], [0], folder)[0]
    before = next(row for row in rows if row["method"] == "lft" and row["lr"] == 0.02)
    assert {**again, "seconds": 0} == {**before, "seconds": 0}


def test_control_agrees_with_the_cached_probe_before_training(world, tmp_path):
    """With no step to speak of, the frozen tower and its cached features are one classifier."""
    still = {"lp", "cached-lp", "cached-zero-shot"}
    rows = measure(lambda: world, TINY, sorted(still), [0.0], [3], tmp_path)
    assert len({row["balanced_accuracy"] for row in rows}) == 1
    assert len({row["false_guesses"] for row in rows}) == 1


# -- metrics


def test_pseudo_labels_by_hand():
    logits = np.log(np.array([[0.9, 0.1], [0.95, 0.05], [0.4, 0.6], [0.3, 0.7]])).astype(np.float32)
    metrics = pseudo_labels(logits, np.array([0, 1, 1, 0]), threshold=0.8)
    assert (metrics["unlabeled"], metrics["kept"], metrics["false_kept"], metrics["false_guesses"]) == (4, 2, 1, 2)
    assert metrics["pseudo_label_precision"] == 0.5
    assert metrics["confidence_on_false"] == pytest.approx(0.95, abs=1e-6)
    assert metrics["confidence_on_false_guesses"] == pytest.approx((0.95 + 0.7) / 2, abs=1e-6)


def test_pseudo_labels_where_nothing_is_sure():
    metrics = pseudo_labels(np.zeros((3, 4), np.float32), np.array([0, 0, 0]), threshold=0.9)
    assert metrics["kept"] == metrics["false_guesses"] == 0
    assert metrics["pseudo_label_precision"] is None
    assert metrics["confidence_on_false"] is metrics["confidence_on_false_guesses"] is None


def test_metrics_of_an_oracle_and_of_a_liar(world):
    config = TINY.config("lp", 0.01, 0)
    split = draw_split(world.labels, world.splits, world.class_names, config)

    def oracle(rows, shift=0):
        return 20 * np.eye(3, dtype=np.float32)[(world.labels[rows] + shift) % 3]

    right = evaluate(oracle, world.labels, split, config, 3)
    wrong = evaluate(lambda rows: oracle(rows, 1), world.labels, split, config, 3)
    assert right["accuracy"] == right["tail_accuracy"] == right["pseudo_label_precision"] == 1
    assert right["false_kept"] == 0
    assert wrong["balanced_accuracy"] == wrong["val_balanced_accuracy"] == 0
    assert wrong["false_kept"] == wrong["kept"] == len(split.unlabeled)


def test_evaluation_reads_test_once(world):
    config = TINY.config("lp", 0.01, 0)
    split = draw_split(world.labels, world.splits, world.class_names, config)
    asked = []

    def read(rows):
        asked.append(rows)
        return np.zeros((len(rows), 3), np.float32)

    evaluate(read, world.labels, split, config, 3)
    assert sum(np.array_equal(rows, split.test) for rows in asked) == 1


# -- settings


def test_settings_have_a_digest_of_their_own():
    assert TINY.digest == Settings(**vars_of(TINY)).digest
    assert TINY.digest != Settings().digest
    assert len(TINY.digest) == 8


def test_configs_differ_only_where_the_method_does():
    through, cached = TINY.config("fft", 0.01, 5), TINY.config("cached-lp", 0.01, 5)
    assert through == cached
    assert TINY.config("cached-lft", 0.01, 5).adapter == "residual"
    assert TINY.config("scratch", 0.01, 5).steps == 4
    assert Settings(scratch_steps=7).config("scratch", 0.01, 5).steps == 7


def test_settings_refuse_what_a_config_refuses():
    with pytest.raises(InputError, match="steps must be at least 1"):
        Settings(steps=0).config("lp", 0.01, 0)


def test_the_text_has_one_run_a_seed():
    runs = planned_runs(["lp", "cached-zero-shot"], [0.1, 0.2], [0, 1])
    assert runs[:3] == [(0, "lp", 0.1), (0, "lp", 0.2), (0, "cached-zero-shot", 0.0)]
    assert len(runs) == 6


# -- choosing and showing


def row(method, lr, seed, val, **values):
    shown = {name: 0.5 for name in end_to_end._COLUMNS}
    return {**shown, "method": method, "lr": lr, "seed": seed, "val_balanced_accuracy": val, **values}


def test_validation_chooses_over_all_seeds():
    rows = [row("a", 0.1, 0, 0.9), row("a", 0.1, 1, 0.1), row("a", 0.2, 0, 0.6), row("a", 0.2, 1, 0.6)]
    assert [each["lr"] for each in choose(rows) if each["chosen"]] == [0.2, 0.2]


def test_test_metrics_do_not_choose():
    rows = [row("a", 0.1, 0, 0.7, balanced_accuracy=0.1), row("a", 0.2, 0, 0.6, balanced_accuracy=0.9)]
    assert [each["lr"] for each in choose(rows) if each["chosen"]] == [0.1]


def test_ties_go_to_the_smaller_rate_and_methods_choose_alone():
    rows = [row("a", 0.2, 0, 0.5), row("a", 0.1, 0, 0.5), row("b", 0.2, 0, 0.5), row("b", 0.1, 0, None)]
    assert [(each["method"], each["lr"]) for each in choose(rows) if each["chosen"]] == [("a", 0.1), ("b", 0.2)]


def test_table_shows_means_and_marks_the_edge():
    rows = [row("a", lr, seed, 0.5 + lr, accuracy=0.2 + 0.2 * seed) for lr in (0.1, 0.2) for seed in (0, 1)]
    [line] = table(choose(rows))
    assert line[:4] == ["a", "0.2*", "30.0%", "50.0%"]
    assert len(table(choose(rows), chosen=False)) == 2


def test_table_leaves_unknown_metrics_out_of_means():
    rows = choose([row("a", 0.1, 0, 0.5, confidence_on_false=None), row("a", 0.1, 1, 0.5, confidence_on_false=0.75)])
    assert "0.75" in table(rows)[0]
    assert "-" in table([{**each, "confidence_on_false": None} for each in rows])[0]


# -- the command


def run(*options):
    return run_command(end_to_end.end_to_end, *options)


def test_command_writes_rows_and_prints_the_table(world, tmp_path, monkeypatch):
    monkeypatch.setattr(end_to_end, "fashion_world", lambda settings: world)
    threads = torch.get_num_threads()
    options = ["--methods", "lp,cached-probe", "--lrs", "0.01,0.02", "--seeds", "0", "--steps", "2", "--n1", "12"]
    options += ["--m1", "20", "--gamma", "4", "--out", str(tmp_path / "runs"), "--json", str(tmp_path / "rows.json")]
    done = run(*options, "--threads", str(threads))
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 4
    assert sum(each["chosen"] for each in rows) == 2
    assert "|cached-probe | 0.0" in done.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--methods", "all"), "got 'all'"),
        (("--lrs", "x"), "learning rates are numbers"),
        (("--seeds", "1-"), "seeds are numbers"),
        (("--steps", "0"), "steps must be at least 1"),
    ],
)
def test_command_names_what_is_wrong(world, tmp_path, monkeypatch, options, words):
    monkeypatch.setattr(end_to_end, "fashion_world", lambda settings: world)
    done = run(*options, "--out", str(tmp_path))
    assert done.exit_code == 2
    assert words in done.output


def test_world_of_a_folder(tmp_path):
    """An encoder's tower at a size that is not its own; a ViT takes only its own, so that is what this one gets."""
    encoder = load_encoder(write_tiny_model(tmp_path / "model"), device="cpu")
    source = open_source(write_images(tmp_path / "images", {"train/cat": 2, "train/dog": 3, "test/dog": 1}))
    world = world_of(source, encoder, 16)
    assert world.class_names == ["cat", "dog"]
    assert world.labels.tolist() == [0, 0, 1, 1, 1, 1]
    assert world.splits.tolist() == ["train"] * 5 + ["test"]
    pixels = world.plain_pixels(np.array([0, 5]))
    assert torch.equal(pixels[0], encoder.transform(source.read(source.rows[0])))
    features = torch.nn.functional.normalize(world.tower(pixels), dim=-1)
    assert torch.allclose(features, encoder.encode_images(pixels), atol=1e-5)
    assert world_of(source, encoder, 20).plain_pixels(np.array([0])).shape == (1, 3, 20, 20)


def test_fashion_world_takes_the_first_images_of_each_class(tmp_path, monkeypatch):
    """Only as many as the settings can need: all of them would take longer to list than a run takes."""
    model = write_tiny_model(tmp_path / "model")
    folder = write_images(tmp_path / "images", {"train/cat": 9, "train/dog": 4, "test/cat": 3, "test/dog": 1})
    monkeypatch.setattr(end_to_end, "open_source", lambda name: open_source(folder))
    monkeypatch.setattr(end_to_end, "load_encoder", lambda name, device: load_encoder(model, device=device))
    world = end_to_end.fashion_world(Settings(size=16, n1=2, m1=3, test=2))
    counts = {split: np.bincount(world.labels[world.splits == split]).tolist() for split in ("train", "test")}
    assert counts == {"train": [5, 4], "test": [2, 1]}
    assert world.image(0) is world.image(0)


def test_command_has_an_option_for_every_setting(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(end_to_end, "measure", lambda world, settings, *_: asked.append(settings) or [])
    threads = torch.get_num_threads()
    values = {name: value + 1 for name, value in vars_of(Settings()).items()} | {"threads": threads}
    options = [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    done = run(*options, "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert asked == [Settings(**values)]


def test_rows_say_what_was_run(measured):
    _, rows = measured
    first = rows[0]
    assert {"data", "n1", "gamma_l", "m1", "gamma_u", "shape", "method", "seed", "lr", "tuned"} <= set(first)
    assert (first["gamma_l"], first["gamma_u"], first["shape"]) == (4, 4, "consistent")
    assert first["settings"]["size"] == 12
