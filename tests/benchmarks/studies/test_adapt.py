from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.studies import adapt
from tests.benchmarks.program import run_command
from tests.cache.samples import write_images
from tests.conftest import make_clusters
from ulfine_fast.cache.sources import open_source
from ulfine_fast.config import FitConfig
from ulfine_fast.engine.fit import fit


def run(*words):
    return run_command(adapt.adapting, *words, "--seeds", "0", "--n1", "20", "--gamma", "4", "--methods", "zero_shot")


@pytest.fixture
def world(monkeypatch):
    cache = make_clusters()
    monkeypatch.setattr(adapt, "demo", lambda: cache)
    monkeypatch.setattr(adapt, "corrupted", lambda name: cache)
    return cache


def test_corruptions_do_what_they_say():
    image = Image.fromarray(np.full((40, 40, 3), 128, dtype=np.uint8))
    image.paste((200, 200, 200), (10, 10, 30, 30))
    pixels = np.asarray(image, dtype=float)
    changed = {name: np.asarray(make(image, 7), dtype=float) for name, make in adapt.CORRUPTIONS.items()}
    assert np.array_equal(changed["clean"], pixels)
    assert (changed["noise"] - pixels)[15:25, 15:25].std() == pytest.approx(50, rel=0.25)  # some is clipped at 255
    assert np.array_equal(changed["noise"], np.asarray(adapt.noisy(image, 7)))
    assert not np.array_equal(changed["noise"], np.asarray(adapt.noisy(image, 8)))
    assert np.ptp(changed["contrast"]) == pytest.approx(0.3 * 72, abs=2)
    edge = np.abs(np.diff(changed["blur"][20, :, 0]))
    assert edge.max() < 36
    assert changed["blur"].mean() == pytest.approx(pixels.mean(), abs=1)


def test_a_corrupted_source_is_another_one(tmp_path):
    source = open_source(write_images(tmp_path / "images", {"train/cat": 2, "test/cat": 1}))
    noisy = adapt.corrupted_source(source, "noise")
    assert [row.id for row in noisy.rows] == [row.id for row in source.rows]
    assert noisy.describe() != source.describe() != adapt.corrupted_source(source, "blur").describe()
    first, second = (np.asarray(noisy.read(row), dtype=int) - np.asarray(source.read(row)) for row in source.rows[:2])
    assert np.abs(first - second).mean() > 20  # each image has noise of its own


def test_the_stream_holds_what_the_run_did_not_learn_from():
    cache = make_clusters()
    fitted = fit(
        cache, FitConfig(method="linear_probe", n1=20, gamma_l=4.0, m1=5, steps=5, eval_every=5), progress=False
    )
    rows = adapt.stream_of(fitted, cache, "random")
    names = {cache.ids[row] for row in rows}
    assert len(names) == len(rows) == len(cache) - len(fitted.split["labeled"]) - len(fitted.split["val"])
    assert not names & {*fitted.split["labeled"], *fitted.split["val"]}
    by_class = adapt.stream_of(fitted, cache, "classes")
    assert set(by_class) == set(rows)
    assert (np.diff(cache.labels[by_class]) >= 0).all()
    assert (np.diff(cache.labels[rows]) < 0).any()
    tail = adapt.stream_of(fitted, cache, "tail")
    assert set(tail) < set(rows)
    counts, order = np.bincount(cache.labels[tail], minlength=4), fitted.split["class_order"]
    whole = np.bincount(cache.labels[rows], minlength=4)
    np.testing.assert_allclose((counts / whole)[order], 4.0 ** -(np.arange(4) / 3), atol=0.01)


def test_the_command(world, tmp_path):
    out = tmp_path / "rows.json"
    done = run("--streams", "noise", "--rates", "1e-3,1e-2", "--json", str(out))
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())
    assert [(row["by"], row["marginal"], row["lr"]) for row in rows][:3] == [
        ("none", 0, None),
        ("tent", 0, 0.001),
        ("cliptta", 0, 0.001),
    ]
    assert len(rows) == 9
    assert rows[0]["accuracy"] == rows[1]["accuracy_before"]
    assert len(adapt.table(rows)) == 9


def test_the_command_with_an_open_set(world, tmp_path):
    out = tmp_path / "rows.json"
    done = run("--streams", "clean", "--rates", "1e-3", "--open-set", "--order", "classes", "--json", str(out))
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())
    assert [row["exposure"] for row in rows] == [1, 1, 1, 1, 1, 0]
    assert all(0 <= row["auroc"] <= 1 for row in rows)
    assert "AUROC" in done.output
    assert run("--order", "sorted").exit_code == 2
    assert run("--streams", "fog").exit_code == 2
