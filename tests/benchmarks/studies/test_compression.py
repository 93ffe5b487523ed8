from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks.studies import bias_transfer, compression
from tests.benchmarks.program import run_command
from tests.benchmarks.studies.test_storage import FAST, fine
from tests.cache.samples import write_tiny_model
from ulfine_fast.cache.models.encoder import load_encoder


def test_rounding_by_hand():
    rows = np.array([[1.0, -0.5, 0.26, 0.0]], dtype=np.float32)
    # three bits: -3..3, a step is a third of the largest
    np.testing.assert_allclose(compression.by_row(3)(rows, rows), [[1, -2 / 3, 1 / 3, 0]], atol=1e-6)
    train = np.array([[2.0, 0.5, 0.26, 0.0]], dtype=np.float32)
    np.testing.assert_allclose(compression.by_dimension(3)(rows, train), [[4 / 3, -0.5, 0.26, 0]], atol=1e-6)
    np.testing.assert_allclose(compression.signs(rows, rows), [[0.44, -0.44, 0.44, 0]], atol=1e-6)


def test_pruning_keeps_the_dimensions_that_vary():
    train = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32) * np.arange(8)
    cut = compression.pruned(0.75)(train[:3], train)
    assert np.array_equal(cut[:, 6:], train[:3, 6:])
    assert not cut[:, :6].any()


def test_fewer_bits_are_further_away():
    rows = np.random.default_rng(0).standard_normal((20, 64)).astype(np.float32)
    change = [np.abs(compression.by_row(bits)(rows, rows) - rows).mean() for bits in (8, 6, 4, 2)]
    assert change == sorted(change)
    assert change[0] < 0.01


def test_an_encoder_of_few_bits(tmp_path):
    encoder = load_encoder(write_tiny_model(tmp_path / "model"), device="cpu")
    images = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8)
    whole = encoder.encode_pixels(images)
    compression.round_weights(encoder, 8)
    eight = (whole * encoder.encode_pixels(images)).sum(1).min()
    compression.round_weights(encoder, 2)
    two = (whole * encoder.encode_pixels(images)).sum(1).min()
    assert two < eight < 1
    assert eight > 0.99


def run(command, *words):
    return run_command(command, *words, "--seeds", "0", "--n1", "20", "--m1", "20", "--gamma", "4")


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(compression, "open_features", lambda data: fine())
    out = tmp_path / "rows.json"
    done = run(compression.compression, "--methods", "zero_shot", "--json", str(out))
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())
    assert [row["encoding"] for row in rows] == list(compression.ENCODINGS)
    assert rows[0]["bytes"] == 64
    assert run(compression.compression, "--data", "digits", "--encoder-bits", "8").exit_code == 2
    wrong = run(compression.compression, "--encoder-bits", "8,bf8")
    assert (wrong.exit_code, "got 'bf8'" in wrong.output) == (2, True)


def test_bias_transfer(tmp_path, monkeypatch):
    monkeypatch.setattr(bias_transfer, "open_features", lambda data: fine())
    out = tmp_path / "rows.json"
    done = run(bias_transfer.bias_transfer, "--methods", "tip_adapter,linear_probe", "--json", str(out))
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())
    assert [row["method"] for row in rows] == ["tip_adapter", "linear_probe"]
    assert all(-1 <= row["bias_correlation"] <= 1 and 0 <= row["drift"] <= 1 for row in rows)


def test_the_same_seeds_are_compared():
    rows = bias_transfer.measure(fine(), ["zero_shot"], [3, 1], FAST)
    assert [row["seed"] for row in rows] == [3, 1]
    for row in rows:
        assert row["drift"] == pytest.approx(0, abs=1e-6)
        assert row["bias_correlation"] == pytest.approx(1)
