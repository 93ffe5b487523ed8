from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from benchmarks import images
from benchmarks.speed import extract as benchmark
from benchmarks.speed.extracting import peak_bytes, script, ulfine_fast
from benchmarks.speed.stages import stage_rates
from tests.benchmarks.program import run_command
from ulfine_fast.cache.models.encoder import load_encoder
from ulfine_fast.cache.sources import FolderSource


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ULFINE_FAST_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def few_images(home, monkeypatch):
    """48 JPEG images instead of the demo's, whose encoder takes a while to build."""
    monkeypatch.setitem(images.SHAPES, "png28", lambda count: images.large_jpeg(min(count, 48)))


def test_images_are_made_once_and_differ(home):
    folder = images.large_jpeg(12)
    files = sorted(folder.rglob("*.jpg"))
    assert len(files) == 12
    assert {Image.open(path).size for path in files} == {(500, 500)}
    assert len({path.read_bytes() for path in files}) == 12
    times = [path.stat().st_mtime_ns for path in files]
    assert images.large_jpeg(12) == folder
    assert times == [path.stat().st_mtime_ns for path in files]


def test_the_bound_is_the_sum_of_the_stages_times(home):
    source = FolderSource(images.large_jpeg(20))
    rates = stage_rates(source, load_encoder(images.model_name(images.TINY), device="cpu"))
    assert 1 / rates["bound"] == pytest.approx(sum(1 / rates[stage] for stage in ("read", "encode", "write")))
    slowest = stage_rates(source, load_encoder(images.model_name(images.TINY), device="cpu"), device_shares_cores=False)
    assert slowest["bound"] == pytest.approx(min(slowest[stage] for stage in ("read", "encode", "write")))


def test_the_command_writes_a_row_for_each_contender(few_images, tmp_path):
    options = ["--shapes", "png28", "--models", "tiny", "--images", "64", "--rounds", "1"]
    done = run_command(benchmark.extract, *options, "--json", str(tmp_path / "rows.json"))
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["contender"] for row in rows] == ["script", "ulfine_fast"]
    assert all(row["images"] == 48 and row["images_per_second"] > 0 for row in rows)
    assert all(row["peak_rss_bytes"] > 1e8 for row in rows)
    assert "over script" in done.output


@pytest.mark.parametrize("option", ["--shapes", "--models", "--contenders"])
def test_unknown_names_are_refused(option):
    done = run_command(benchmark.extract, option, "nothing")
    assert done.exit_code == 2
    assert "got 'nothing'" in done.output


def test_readers_count_towards_the_peak():
    assert peak_bytes(readers=0) > 1e7
    assert peak_bytes(readers=2) >= peak_bytes(readers=0)


@pytest.mark.parametrize("contender", [script, ulfine_fast])
def test_contenders_run_in_the_precision_asked_for(contender, home, monkeypatch):
    folder = images.large_jpeg(8)
    seen = []
    linear = torch.nn.functional.linear

    def noting(rows, *weights):
        seen.append(linear(rows, *weights).dtype)
        return linear(rows, *weights)

    monkeypatch.setattr(torch.nn.functional, "linear", noting)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        seen.clear()
        assert contender(images.model_name(images.TINY), precision, folder)["images"] == 8
        assert dtype in seen
        assert (torch.bfloat16 in seen) == (precision == "bf16")
