"""What a cache stores beside features, by the commands: extract, inspect, fit, eval and predict."""

from __future__ import annotations

import csv

import pytest

from tests.cache.samples import write_images
from tests.cli.program import run
from ulfine_fast.cache.store import FeatureCache

OPTIONS = ["--method", "lightweight", "--steps", 10, "--eval-every", 10]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    counts = {"train/cat": 8, "train/dog": 6, "test/cat": 2, "test/dog": 2}
    return write_images(tmp_path_factory.mktemp("images"), counts)


@pytest.fixture(scope="module")
def cache(images, model, tmp_path_factory):
    """Features as bytes, and the last block's tokens."""
    out = tmp_path_factory.mktemp("cache") / "features"
    done = run("extract", images, "-o", out, "--model", model, "--features", "last-block", "--dtype", "int8")
    assert done.exit_code == 0, done.output
    return out


def test_inspect_tells_type_and_tokens(cache):
    assert "8 x int8, tokens pre and post" in run("inspect", cache).output
    assert FeatureCache.open(cache).summary()["tokens"] == ["pre", "post"]


def test_an_adapter_in_the_encoder_from_images_to_predictions(cache, images, tmp_path):
    fitted = run("fit", cache, "--out", tmp_path / "run", "--adapter", "adaptformer", *OPTIONS)
    assert fitted.exit_code == 0, fitted.output
    judged = run("eval", tmp_path / "run", "--json")
    assert judged.exit_code == 0, judged.output
    done = run("predict", tmp_path / "run", images / "test", "--out", tmp_path / "predictions.csv")
    assert done.exit_code == 0, done.output
    with (tmp_path / "predictions.csv").open(newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == [
            f"{name}/{n:03d}.png" for name in ("cat", "dog") for n in (0, 1)
        ]


def test_lifts_head_from_images_to_predictions(images, model, tmp_path):
    out = tmp_path / "crops"
    options = ("--features", "pre-projection", "--weak", 4, "--smallest-crop", 0.08)
    done = run("extract", images, "-o", out, "--model", model, *options)
    assert done.exit_code == 0, done.output
    cache = FeatureCache.open(out)
    assert (cache.manifest.views["weak_scale"], cache.token_kinds) == ([0.08, 1.0], ["ln_post"])
    assert cache.view_areas("weak").min() < 0.5
    lift = (
        "--method",
        "lift_head",
        "--feature",
        "pre-projection",
        "--crop-epochs",
        5,
        "--adapter",
        "none",
        "--steps",
        6,
    )
    fitted = run("fit", out, "--out", tmp_path / "run", *lift)
    assert fitted.exit_code == 0, fitted.output
    for name, crops in (("whole.csv", ()), ("five.csv", ("--five-crops",))):
        done = run("predict", tmp_path / "run", images / "test", "--out", tmp_path / name, *crops)
        assert done.exit_code == 0, done.output
    assert (tmp_path / "whole.csv").read_text() != (tmp_path / "five.csv").read_text()


def test_refusals(cache, images, model, tmp_path):
    refused = run("fit", cache, "--out", tmp_path / "run", "--adapter", "adaptformer", "--method", "linear_probe")
    assert refused.exit_code == 2
    assert "method linear_probe takes no adapter adaptformer" in refused.output
    refused = run("extract", images, "-o", tmp_path / "c", "--model", model, "--features", "cls")
    assert refused.exit_code == 2
    assert "'cls' is not one of" in refused.output
    assert not (tmp_path / "c").exists()
    refused = run("extract", images, "-o", cache, "--model", model, "--dtype", "int8")
    assert refused.exit_code == 2
    assert "tokens" in refused.output
