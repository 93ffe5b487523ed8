from __future__ import annotations

import json

import numpy as np
import torch

from benchmarks.speed import load as benchmark
from tests.benchmarks.program import run_command
from ulfine_fast.cache.store import FeatureCache


def test_the_cache_is_a_real_one(tmp_path):
    benchmark.write_cache(tmp_path / "cache", rows=50, dim=8, shard_size=20)
    cache = FeatureCache.open(tmp_path / "cache")
    assert (len(cache), cache.verify()) == (50, [])
    assert [record.rows for record in cache.records] == [20, 20, 10]
    np.testing.assert_allclose(np.linalg.norm(cache.plain.astype(np.float32), axis=1), 1.0, atol=2e-3)


def test_files_are_read_whole_and_may_be_forgotten(tmp_path):
    benchmark.write_cache(tmp_path / "cache", rows=50, dim=8, shard_size=20)
    size = sum(path.stat().st_size for path in (tmp_path / "cache/shards").glob("*.h5"))
    assert benchmark.read_files(tmp_path / "cache") == size
    benchmark.forget(tmp_path / "cache")
    assert benchmark.read_files(tmp_path / "cache") == size


def test_both_are_measured_cold_and_warm(tmp_path):
    benchmark.write_cache(tmp_path / "cache", rows=50, dim=8, shard_size=20)
    rows = benchmark.measure(tmp_path / "cache", torch.device("cpu"), rounds=1)
    assert [(row["state"], row["contender"]) for row in rows] == [
        ("cold", "files"),
        ("cold", "cache"),
        ("warm", "files"),
        ("warm", "cache"),
    ]
    assert all(row["share"] > 0 for row in rows)
    assert rows[0]["share"] == 1.0


def test_the_command_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--rows", "60", "--dim", "8", "--shard-size", "20", "--rounds", "1", "--device", "cpu"]
    done = run_command(benchmark.main, *options, "--json", tmp_path / "rows.json")
    assert done.exit_code == 0, done.output
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
