from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from benchmarks.images import image_source
from benchmarks.studies import neighbors as benchmark
from tests.benchmarks.program import run_command
from tests.cache.samples import write_images, write_tiny_model
from ulfine_fast.cache.models.encoder import load_encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return load_encoder(write_tiny_model(tmp_path_factory.mktemp("model")), device="cpu")


def test_variants_are_what_their_names_say():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    made = {name: make(image) for name, make in benchmark.VARIANTS.items()}
    assert [one.size for one in made.values()] == [(120, 90), (120, 90), (80, 60), (114, 86), (120, 90)]
    assert np.array_equal(np.asarray(made["mirrored"])[:, ::-1], np.asarray(image))
    error = [np.abs(np.asarray(made[f"JPEG of quality {q}"]).astype(int) - np.asarray(image)).mean() for q in (90, 50)]
    assert 0 < error[0] < error[1]


def test_copies(tmp_path, encoder):
    write_images(tmp_path / "images", {"train/cat": 4, "test/cat": 3})
    rows = benchmark.copies(image_source(str(tmp_path / "images"), 7), encoder)
    assert [row["variant"] for row in rows] == [*benchmark.VARIANTS, "nearest other image"]
    for row in rows:
        assert row["images"] == 7
        assert -1 <= row["first_percentile"] <= row["median"] <= row["last_percentile"] <= 1 + 1e-6


def test_search_compares_cells_with_the_flat_index():
    real = np.random.default_rng(0).standard_normal((200, 16), dtype=np.float32)
    rows = benchmark.between(real, 3000)
    assert rows.shape == (3000, 16)
    flat, cells = benchmark.search(rows, queries=50)
    assert (flat["index"], flat["recall"]) == ("flat", 1.0)
    assert cells["index"] == "cells"
    assert 0.98 <= cells["recall"] <= 1.0


def test_command(tmp_path, monkeypatch):
    real = np.random.default_rng(0).standard_normal((200, 16), dtype=np.float32)
    monkeypatch.setattr(benchmark, "demo", lambda: SimpleNamespace(plain=real))
    done = run_command(benchmark.neighbors, "--rows", "2000", "--json", str(tmp_path / "rows.json"))
    assert done.exit_code == 0, done.output
    assert [row["rows"] for row in json.loads((tmp_path / "rows.json").read_text())] == [2000, 2000]
