from __future__ import annotations

import json

import pytest
import torch

from benchmarks.speed.ulfine_plus import Size, growth, measure, multiply_adds, parse_sizes, table, world
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.methods import ulfine_plus as method
from ulfine_fast.ops import clustering


def test_the_world_has_the_sizes_it_was_asked_for():
    cache = world(Size(60, 4, 8), torch.device("cpu"))
    assert list(cache.splits).count("unlabeled") == 60
    assert (cache.labels[[split == "unlabeled" for split in cache.splits]] == -1).all()
    assert len(cache.class_names) == 4
    assert cache.dim == 8


def test_a_row_has_seconds_above_the_floor():
    row = measure(Size(60, 4, 32), torch.device("cpu"), trials=2)
    assert row["seconds"] > row["floor_seconds"] > 0
    assert 1 <= row["survivors"] <= 5
    assert row["trials"] == 2
    assert row["balanced_accuracy"] > 0.5


def test_multiply_adds_by_hand(monkeypatch):
    monkeypatch.setattr(method, "PROBE_SCALES", (10.0,))
    monkeypatch.setattr(method, "SAMPLE", 10)
    monkeypatch.setattr(method, "SAMPLE_PER_CLASS", 1)
    size, labeled, survivors, folds = Size(30, 2, 5), 7, 3, 2
    vector = 2 * 5
    # one with all labels, two without a fold, two of these from class means
    probes = method.PROBE_STOPS[-1] * 2 * 7 * (1 + 2 + 2) * vector
    scatter = 37 * 3 * 5 * 5 + 37 * 5 * 5

    def clusters(rows, fits, candidates, rounds, first):
        """The products of one call, one by one."""
        total = 0
        for _ in range(clustering.ANCHOR_PASSES if first else 0):
            total += rows * fits * vector
        total += 2 * rows * candidates * vector if first else 0
        for _ in range(rounds):
            total += rows * candidates * 2 * 5 + labeled * candidates * (2 * 5 + vector)
            total += rows * candidates * vector
            for _ in range(method.STEPS):
                total += rows * (fits * vector + 2 * candidates * vector)
        return total

    # two classes have two factors, each 5 wide: lengths cost min(K, D) D
    factor = 2 * 5
    assert factor == min(size.classes, size.dim) * size.dim
    wanted = probes + scatter + clusters(10, 2, 10, method.JUDGED_ROUNDS, True)
    wanted += clusters(10, 1, 3, method.ROUNDS, True)
    wanted += clusters(30, 1, 3, 2, False) + 30 * 25 * 2 * 3
    assert multiply_adds(size, labeled, survivors, folds) == wanted


def test_growth_is_the_exponent_between_sizes_that_differ_in_one_number():
    rows = [
        {"images": 100, "classes": 2, "dim": 8, "trials": 1, "seconds": 1.0},
        {"images": 400, "classes": 2, "dim": 8, "trials": 1, "seconds": 4.0},
        {"images": 400, "classes": 8, "dim": 8, "trials": 1, "seconds": 64.0},
    ]
    assert growth(rows, "images") == [{"grows": "images", "from": 100, "to": 400, "exponent": pytest.approx(1.0)}]
    assert growth(rows, "classes") == [{"grows": "classes", "from": 2, "to": 8, "exponent": pytest.approx(2.0)}]


@pytest.mark.parametrize("text", ["", "10", "10x2", "10x2xa", "2x4x8", "10x1x8", "-5x2x8"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(InputError, match="a size"):
        parse_sizes(text)


def test_the_command_writes_its_rows(tmp_path, capsys):
    table(sizes="40x2x4", threads=0, device="cpu", as_json=tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text())[0]["images"] == 40
    assert "ratio" in capsys.readouterr().out
