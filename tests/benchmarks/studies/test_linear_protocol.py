"""DINOv2's linear protocol on a small world with tokens."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.data import unit_rows
from benchmarks.studies import linear_protocol
from benchmarks.studies.linear_protocol import before_projection, feature_choices, measure, trial_options
from tests.benchmarks.program import run_command
from tests.cache.samples import write_images, write_model_with_norm
from tests.conftest import make_clusters
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.models.encoder import load_encoder
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.pipeline.views import ViewRecipe
from ulfine_fast.cache.sources import open_source
from ulfine_fast.cache.store import FeatureCache

FEW = [0.1, 1.0]


@pytest.fixture
def brief(monkeypatch):
    """Two learning rates and two penalties."""
    monkeypatch.setattr(linear_protocol, "LEARNING_RATES", FEW)
    monkeypatch.setattr(linear_protocol, "INVERSE", FEW)


@pytest.fixture(scope="module")
def with_tokens(tmp_path_factory):
    """A cache of real images with the tokens of the encoder's last block."""
    images = write_images(tmp_path_factory.mktemp("images"), {"train/a": 3, "train/b": 3, "test/a": 1})
    encoder = load_encoder(write_model_with_norm(tmp_path_factory.mktemp("model")), device="cpu", features="last-block")
    folder = tmp_path_factory.mktemp("tokens") / "cache"
    extract(open_source(images), encoder, folder, views=ViewRecipe(weak=1, strong=1), workers=0, progress=False)
    return FeatureCache.open(folder)


def test_choices_are_what_the_cache_holds(with_tokens):
    assert set(feature_choices(make_clusters(views=False))) == {"plain"}
    assert set(feature_choices(make_clusters())) == {"plain", "views"}
    choices = feature_choices(with_tokens)
    wide = before_projection(with_tokens)
    dims = {name: cache.dim for name, cache in choices.items()}
    both = with_tokens.dim + wide.shape[1]
    assert dims == {
        "plain": with_tokens.dim,
        "views": with_tokens.dim,
        "pre-projection": wide.shape[1],
        "plain + pre-projection": both,
    }
    # the projection makes the features of it
    projected = unit_rows(wide @ with_tokens.head["projection"])
    np.testing.assert_allclose(projected, unit_rows(with_tokens.plain), atol=0.01)


def test_thirteen_rates_and_forty_five_penalties():
    options = trial_options("views", 100, 0.0)
    assert [len(one) for one in options.values()] == [13, 45]
    assert {one["train_views"] for one in options["converged"]} == {"weak"}
    assert 1 / options["converged"][0]["ridge"] == pytest.approx(1e-6)


def test_only_what_was_chosen_is_tested(brief):
    rows = measure(make_clusters(), [0, 1], steps=20, tau=0.0, metric="accuracy", device="cpu")
    assert [(row["solver"], row["features"]) for row in rows] == [
        ("sgd", "plain"),
        ("converged", "plain"),
        ("sgd", "views"),
        ("converged", "views"),
    ]
    for solver in ("sgd", "converged"):
        own = [row for row in rows if row["solver"] == solver]
        tested = [row for row in own if "accuracy" in row]
        assert len(tested) == 1
        assert tested[0]["val"] == max(row["val"] for row in own)
        assert any(tested[0]["chosen"] == pytest.approx(value) for value in FEW)
        assert tested[0]["accuracy"] > 0.5


def test_splits_without_validation_are_refused(brief):
    cache = make_clusters(train=2)
    with pytest.raises(InputError, match="validation"):
        measure(cache, [0], steps=5, tau=0.0, metric="accuracy", device="cpu")


def test_the_command_prints_and_writes(brief, monkeypatch, tmp_path):
    monkeypatch.setattr(linear_protocol, "open_features", lambda data: make_clusters())
    file = tmp_path / "rows.json"
    options = ["--seeds", "0", "--steps", "5", "--json", str(file)]
    done = run_command(linear_protocol.linear_protocol, *options)
    assert done.exit_code == 0, done.output
    assert "learning rate or C" in done.output
    assert len(json.loads(file.read_text())) == 4
