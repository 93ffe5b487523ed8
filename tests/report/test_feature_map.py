"""The map of test images: positions by PCA of the cache's features, mistakes as crosses."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.report.writer import write_run
from ulfine_fast import FitConfig, build_report, fit
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.report.charts import map_chart
from ulfine_fast.report.feature_map import mapper
from ulfine_fast.report.page import render_page
from ulfine_fast.runs.files import load_run
from ulfine_fast.runs.seeds import save_runs


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A run over a cache on disk, and that cache."""
    from tests.cache.samples import write_cache

    folder = tmp_path_factory.mktemp("mapped")
    write_cache(folder / "cache", [("train", 6), ("train", 6), ("unlabeled", 4), ("val", 4), ("test", 9), ("test", 8)])
    cache = FeatureCache.open(folder / "cache")
    config = FitConfig(method="linear_probe", steps=3, eval_every=3)
    save_runs([fit(cache, config, progress=False)], folder / "run")
    return cache, load_run(folder / "run")


def test_positions_are_the_first_two_principal_components(fitted):
    cache, run = fitted
    feature_map = mapper("pca")(run)
    row_of = {name: row for row, name in enumerate(cache.ids)}
    rows = np.asarray(cache.plain, np.float64)[[row_of[name] for name in run.predictions().ids]]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows -= rows.mean(0)
    values, vectors = np.linalg.eigh(rows.T @ rows)
    wanted = rows @ vectors[:, [-1, -2]]
    np.testing.assert_allclose(np.abs(feature_map.positions), np.abs(wanted), atol=1e-3)
    assert feature_map.name == f"PCA, {100 * values[-2:].sum() / values.sum():.0f}% of the variance"


def test_the_page_shows_the_map_where_the_cache_is_available(fitted, tmp_path):
    _, run = fitted
    text = render_page([run], map_run=mapper("pca"))
    wrong = int((run.predictions().predicted != run.predictions().labels).sum())
    assert text.count('class="miss"><') + text.count('class="miss" d') == wrong
    assert 'id="map"' not in render_page([run], map_run=mapper("none"))
    gone = write_run(tmp_path / "run")
    assert 'id="map"' not in build_report([gone], tmp_path / "page.html", projection="pca").read_text()


def test_a_dot_a_cross_and_an_image_without_a_label():
    positions = np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 0.5]])
    text = map_chart("title", positions, np.array([0, 1, -1]), np.array([0, 0, 1]), ["<cat>", "dog"])
    assert len(re.findall(r'<circle [^>]*class="dot"', text)) == 1
    assert len(re.findall(r'<circle [^>]*class="count"', text)) == 1
    assert text.count('class="miss"') == 1
    assert "dog, predicted as &lt;cat&gt;" in text
    assert "<cat>" not in text


def test_names_of_many_classes_are_left_out():
    positions, labels = np.random.default_rng(0).normal(size=(40, 2)), np.arange(40)
    assert map_chart("t", positions, labels, labels, [f"c{k}" for k in range(40)]).count("halo") == 0
    assert map_chart("t", positions, labels % 5, labels % 5, [f"c{k}" for k in range(5)]).count("halo") == 5


def test_another_projection_is_refused():
    with pytest.raises(InputError, match="must be one of pca, umap, none, got 'tsne'"):
        mapper("tsne")
