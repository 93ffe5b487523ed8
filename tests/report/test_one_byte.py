"""What one byte a number costs: the very heads of a run, on features that went through an int8 cache's rounding."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.cache.samples import write_cache, write_images, write_tiny_model
from tests.report.writer import RunSpec, write_run
from ulfine_fast import FitConfig, Run, build_report, fit
from ulfine_fast.cache.models.encoder import load_encoder
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.sources import open_source
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.metrics.classification import softmax
from ulfine_fast.report.groups import group_runs
from ulfine_fast.report.one_byte import Cost, cost_section, rounder
from ulfine_fast.report.page import render_page
from ulfine_fast.runs.files import load_run
from ulfine_fast.runs.seeds import save_runs

SPLITS = [("train", 6), ("train", 6), ("unlabeled", 4), ("val", 4), ("test", 9), ("test", 8)]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A run over a cache on disk, and the cache."""
    folder = tmp_path_factory.mktemp("rounded")
    write_cache(folder / "cache", SPLITS)
    cache = FeatureCache.open(folder / "cache")
    save_runs([fit(cache, FitConfig(method="linear_probe", steps=3, eval_every=3), progress=False)], folder / "run")
    return cache, load_run(folder / "run")


def by_hand(rows: np.ndarray) -> np.ndarray:
    """Each number to the nearest of 255 steps between the row's largest magnitude and its negative."""
    made = np.empty_like(rows)
    for i, row in enumerate(rows):
        step = np.float32(max(abs(float(value)) for value in row)) / np.float32(127)
        made[i] = [np.float16(np.float32(round(float(value) / float(step))) * step) for value in row]
    return made


def test_the_same_heads_see_rounded_features(fitted):
    cache, run = fitted
    cost = rounder()(run)
    loaded = Run.load(run.path)
    number = {name: row for row, name in enumerate(cache.ids)}
    rows = cache.plain[[number[name] for name in loaded.test_ids]]
    for found, features in ((cost.stored, rows), (cost.rounded, by_hand(rows))):
        logits = loaded.logits(features)
        assert found["accuracy"] == (logits.argmax(1) == loaded.test_labels).mean()
        confidence, right = softmax(logits).max(1), logits.argmax(1) == loaded.test_labels
        place = np.ceil(confidence * 15)
        gaps = [abs(right[place == b].mean() - confidence[place == b].mean()) * (place == b).mean() for b in set(place)]
        assert found["ece"] == pytest.approx(sum(gaps), abs=1e-6)
    assert cost.stored["accuracy"] == pytest.approx(run.number("accuracy"))
    assert cost.stored["ece"] != cost.rounded["ece"]


def test_the_page_has_a_row_where_the_cache_is_at_hand(fitted, tmp_path):
    _, run = fitted
    text = render_page([run], rounded=rounder())
    assert 'id="storage"' in text
    assert 'href="#storage"' in text
    assert 'id="storage"' not in render_page([run])
    assert 'id="storage"' in build_report([run.path], tmp_path / "with.html", one_byte=True).read_text()
    gone = write_run(tmp_path / "run")
    assert 'id="storage"' not in build_report([gone], tmp_path / "page.html", one_byte=True).read_text()


@pytest.mark.parametrize(("dtype", "row"), [("float16", True), ("int8", False)])
def test_a_cache_in_one_byte_has_nothing_more_to_lose(tmp_path, dtype, row):
    counts = {"train/cat": 3, "train/dog": 3, "val/dog": 1, "test/cat": 2, "test/dog": 2}
    encoder = load_encoder(write_tiny_model(tmp_path / "model"), device="cpu")
    extract(open_source(write_images(tmp_path / "images", counts)), encoder, tmp_path / "cache", dtype=dtype)
    config = FitConfig(method="linear_probe", steps=1, eval_every=1)
    save_runs([fit(FeatureCache.open(tmp_path / "cache"), config, progress=False)], tmp_path / "run")
    assert (rounder()(load_run(tmp_path / "run")) is not None) == row


def test_differences_are_points_with_an_interval_over_seeds(tmp_path):
    runs = [load_run(write_run(tmp_path / str(seed), RunSpec(seed=seed))) for seed in (0, 1)]
    names = ("accuracy", "balanced_accuracy", "few", "ece", "ece_temperature_scaled")
    stored = dict.fromkeys(names, 0.5) | {"few": math.nan}
    costs = {0: Cost(stored, dict.fromkeys(names, 0.49)), 1: Cost(stored, dict.fromkeys(names, 0.50))}
    (row,) = cost_section(group_runs(runs)[0], lambda run: costs[run.seed])
    # two seeds: t(1) = 12.706, standard error 0.5 points
    assert row["figures"][0] == ("-0.50", "6.35")
    assert row["figures"][2] == ("–", "")
    assert cost_section(group_runs(runs)[0], lambda run: None) == []
