from __future__ import annotations

import json

import pytest

from benchmarks.images import image_source
from benchmarks.studies import agreement as benchmark
from tests.benchmarks.program import run_command
from tests.cache.samples import write_images, write_tiny_model
from ulfine_fast.cache.models.encoder import load_encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return load_encoder(write_tiny_model(tmp_path_factory.mktemp("model")), device="cpu")


def test_rows(tmp_path, encoder):
    write_images(tmp_path / "images", {"train/cat": 4, "test/cat": 2})
    source = image_source(str(tmp_path / "images"), 5)
    rows = benchmark.measure(source, encoder, benchmark.WAYS)
    assert [(row["way"], row["view"]) for row in rows] == [(w, v) for w in benchmark.WAYS for v in benchmark.VIEW_KINDS]
    assert {row["images"] for row in rows} == {5}
    for row in rows:
        assert -1 <= row["worst_cosine"] <= row["mean_cosine"] <= 1 + 1e-6
        assert row["times_as_fast"] > 0
    # these images are small, so nothing is reduced
    for row in rows[:4]:
        assert row["worst_cosine"] == pytest.approx(1, abs=1e-6)


def test_a_model_of_less_precision_is_close_to_the_exact_one_and_not_equal(tmp_path):
    model = write_tiny_model(tmp_path / "model")
    write_images(tmp_path / "images", {"train/cat": 4})
    source = image_source(str(tmp_path / "images"), 4)
    rounded = load_encoder(model, device="cpu", precision="bf16")
    rows = benchmark.measure(source, load_encoder(model, device="cpu"), ["exact"], rounded)
    for row in rows:
        assert 0.99 < row["worst_cosine"] < 1 - 1e-7


def test_command(tmp_path, monkeypatch, encoder):
    write_images(tmp_path / "images", {"train/cat": 3})
    monkeypatch.setattr(benchmark, "load_encoder", lambda name, device, precision="fp32": encoder)
    arguments = ["--data", str(tmp_path / "images"), "--ways", "reduced", "--json", str(tmp_path / "rows.json")]
    done = run_command(benchmark.agreement, *arguments)
    assert done.exit_code == 0, done.output
    assert "worst cosine" in done.output
    assert [row["data"] for row in json.loads((tmp_path / "rows.json").read_text())] == ["images"] * 3
    assert run_command(benchmark.agreement, "--ways", "guess").exit_code == 2
