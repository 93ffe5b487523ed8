from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.studies import storage
from tests.benchmarks.program import run_command
from tests.conftest import make_clusters
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.quantized import quantized, restored
from ulfine_fast.cache.store import FeatureCache

FAST = {"n1": 20, "gamma_l": 4.0, "gamma_u": 4.0, "steps": 5, "eval_every": 5}


def fine():
    """The clusters as float32 rows of length 1, which float16 cannot hold."""
    cache = make_clusters()

    def unit(rows):
        wide = rows.astype(np.float32)
        return wide / np.linalg.norm(wide, axis=-1, keepdims=True)

    return FeatureCache.from_arrays(
        unit(cache.plain),
        cache.labels,
        class_names=cache.class_names,
        text_features=cache.text_features,
        weak=unit(cache.views("weak")),
        strong=unit(cache.views("strong")),
        splits=cache.splits.tolist(),
    )


def test_bytes():
    assert [storage.bytes_of(dtype, 512) for dtype in storage.TYPES] == [2048, 1024, 516]


def test_rows_are_those_that_a_cache_returns():
    cache = fine()
    assert storage.types_of(cache) == ("float32", "float16", "int8")
    assert storage.types_of(make_clusters()) == ("float16", "int8")
    small = storage.stored(cache, "int8")
    assert np.array_equal(small.plain, restored(*quantized(cache.plain.astype(np.float16))))
    assert np.array_equal(small.views("strong"), restored(*quantized(cache.views("strong").astype(np.float16))))
    assert storage.stored(cache, "float32").plain.dtype == np.float32
    assert small.ids == cache.ids


def test_rows_and_table():
    rows = storage.measure(fine(), ["linear_probe", "zero_shot"], [0, 1], FAST, "cpu")
    assert len(rows) == 3 * 2 * 2
    assert {row["bytes_per_feature"] for row in rows} == {64, 32, 20}
    by = {(row["dtype"], row["method"], row["seed"]): row for row in rows}
    exact, small = by["float32", "linear_probe", 1], by["int8", "linear_probe", 1]
    assert abs(exact["balanced_accuracy"] - small["balanced_accuracy"]) < 0.05
    lines = storage.table([{"data": "d", **row} for row in rows])
    assert [line[:4] for line in lines[:3]] == [
        ["d", "linear_probe", dtype, size] for dtype, size in zip(storage.TYPES, ("64", "32", "20"), strict=True)
    ]
    assert lines[0][5] == ""
    assert "±" in lines[2][5]


def test_differences_are_paired():
    rows = [
        {"data": "d", "method": "m", "dtype": dtype, "seed": seed, "bytes_per_feature": 1, **dict.fromkeys(METRICS, v)}
        for dtype, shift in (("float16", 0.0), ("int8", -0.01))
        for seed, v in enumerate((0.2 + shift, 0.6 + shift))
    ]
    lines = storage.table(rows)
    assert lines[1][4:6] == ["39.00", "-1.00 ±0.00"]


METRICS = ("balanced_accuracy", "ece", "ece_temperature_scaled")


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "open_features", lambda name: fine())
    out = tmp_path / "rows.json"
    words = ["--seeds", "0", "--methods", "zero_shot", "--n1", "20", "--m1", "20", "--gamma", "4", "--json", str(out)]
    done = run_command(storage.storage, *words)
    assert done.exit_code == 0, done.output
    assert [row["dtype"] for row in json.loads(out.read_text())] == list(storage.TYPES)
    assert json.loads(out.read_text())[0]["data"] == "demo"


def test_a_cache_of_bytes_is_refused(monkeypatch):
    monkeypatch.setattr(storage, "types_of", lambda cache: ("int8",))
    monkeypatch.setattr(storage, "open_features", lambda name: fine())
    with pytest.raises(InputError, match="demo holds int8 features"):
        storage.storage(data=["demo"])
