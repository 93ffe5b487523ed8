"""What int8 features cost: the heads of a run on features rounded as an int8 cache rounds them."""

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
from ulfine_fast.report.one_byte import RoundingCost, one_byte_section, rounder
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
    row_of = {name: row for row, name in enumerate(cache.ids)}
    rows = cache.plain[[row_of[name] for name in loaded.test_ids]]
    for metrics, features in ((cost.stored, rows), (cost.rounded, by_hand(rows))):
        logits = loaded.logits(features)
        assert metrics["accuracy"] == (logits.argmax(1) == loaded.test_labels).mean()
        confidence, correct = softmax(logits).max(1), logits.argmax(1) == loaded.test_labels
        bins = np.ceil(confidence * 15)
        gaps = [abs(correct[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in set(bins)]
        assert metrics["ece"] == pytest.approx(sum(gaps), abs=1e-6)
    assert cost.stored["accuracy"] == pytest.approx(run.number("accuracy"))
    assert cost.stored["ece"] != cost.rounded["ece"]


def test_the_page_has_a_row_where_the_cache_is_available(fitted, tmp_path):
    _, run = fitted
    text = render_page([run], rounding_cost=rounder())
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
    costs = {0: RoundingCost(stored, dict.fromkeys(names, 0.49)), 1: RoundingCost(stored, dict.fromkeys(names, 0.50))}
    (row,) = one_byte_section(group_runs(runs)[0], lambda run: costs[run.seed])
    # two seeds: t(1) = 12.706, standard error 0.5 points
    assert row["metrics"][0] == ("-0.50", "6.35")
    assert row["metrics"][2] == ("–", "")
    assert one_byte_section(group_runs(runs)[0], lambda run: None) == []
