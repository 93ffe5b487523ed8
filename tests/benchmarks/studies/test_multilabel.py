from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from benchmarks.studies import mosaics, multilabel
from tests.benchmarks.program import run_command
from tests.cache.samples import write_images
from tests.related.multilabel.worlds import make_images
from ulfine_fast.cache.sources import open_source
from ulfine_fast.cache.store import FeatureCache


@pytest.fixture
def small_tiles(monkeypatch):
    """Ten noise images of each of 20 classes instead of thousands."""
    pixels = np.random.default_rng(0).integers(1, 256, (20, 10, 28, 28), dtype=np.uint8)
    own = mosaics.Tiles([f"class {k}" for k in range(20)], list(pixels))
    monkeypatch.setattr(mosaics, "tiles", lambda: own)
    return own


def run(*words):
    return run_command(multilabel.multilabel, *words)


def test_a_mosaic_shows_what_its_labels_say(small_tiles):
    source, shown = mosaics.Mosaics(1), mosaics.truth(1)
    assert len(source.rows) == len(shown) == sum(mosaics.SIZES.values())
    assert len(source.class_names) == shown.shape[1] == 20
    for row in (0, 7, len(shown) - 1):
        whole = np.asarray(source.read(source.rows[row]).convert("L"))
        shown_tiles = whole.reshape(2, 28, 2, 28).transpose(0, 2, 1, 3).reshape(4, 28, 28)
        seen = set()
        for tile in shown_tiles:
            owners = [k for k, own in enumerate(small_tiles.images) if (own == tile).all((1, 2)).any()]
            assert bool(owners) == bool(tile.any())
            seen |= set(owners)
        assert seen == set(np.flatnonzero(shown[row]))
        assert shown[row, source.rows[row].label] == 1


def test_training_mosaics_have_a_long_tail_and_images_of_their_own():
    counts = [100] * 20
    train, test = (mosaics.drawn(3, split, counts) for split in ("train", "test"))
    often = np.sort(np.bincount(train.classes[train.classes >= 0], minlength=20))[::-1]
    assert often[0] / max(often[-1], 1) > mosaics.IMBALANCE / 3
    even = np.bincount(test.classes[test.classes >= 0], minlength=20)
    assert even.max() / even.min() < 2
    assert train.numbers[train.classes >= 0].max() < 60 <= test.numbers[test.classes >= 0].min()
    assert (train.classes >= 0).any(1).all()
    other = mosaics.drawn(4, "train", counts)
    assert np.bincount(other.classes[other.classes >= 0]).argmax() != often[0]
    assert not np.array_equal(train.classes, other.classes)


def test_hidden_labels():
    shown = (np.random.default_rng(0).random((200, 4)) < [0.5, 0.3, 0.1, 0.02]).astype(np.int8)
    shown[0] = 1
    train = np.arange(200) < 150
    labels = multilabel.hidden(shown, train, 0.4, 0)
    np.testing.assert_array_equal(labels[150:], shown[150:])
    assert set(np.unique(labels[:150])) == {-1, 1}
    assert (shown[:150][labels[:150] == 1] == 1).all()
    whole, kept = (shown[:150] == 1).sum(0), (labels[:150] == 1).sum(0)
    np.testing.assert_allclose(kept / whole, 0.6, atol=0.5 / whole.min())
    assert (multilabel.hidden(shown, train, 0.99, 0)[:150] == 1).sum(0).min() == 1
    assert not np.array_equal(multilabel.hidden(shown, train, 0.4, 1), labels)


def test_learning_rates_are_chosen_on_validation():
    rows = [
        {"share": 0.4, "way": "bce", "lr": lr, "seed": seed, "val": val, "map": 1 - val}
        for lr, vals in ((0.1, (0.3, 0.5)), (1.0, (0.6, 0.1)))
        for seed, val in enumerate(vals)
    ]
    assert [row["lr"] for row in multilabel.chosen(rows)] == [0.1, 0.1]
    assert multilabel.by_group([1.0, 0.5, 0.0], np.array([3, 9, 1])) == {
        "map": 0.5,
        "many": 0.5,
        "medium": 1.0,
        "few": 0.0,
    }


@pytest.fixture
def world(monkeypatch):
    def small(seed):
        cache, shown = make_images(n=120, seed=seed)
        splits = ["train"] * 60 + ["val"] * 20 + ["test"] * 40
        return FeatureCache.from_arrays(
            cache.plain, cache.labels, class_names=cache.class_names, splits=splits, ids=cache.ids
        ), shown

    monkeypatch.setattr(multilabel, "mosaics", lambda seed: small(seed)[0])
    monkeypatch.setattr(multilabel, "truth", lambda seed: small(seed)[1])
    monkeypatch.setattr(multilabel, "WAYS", {n: {**way, "steps": 20} for n, way in multilabel.WAYS.items()})


def test_the_command(world, tmp_path):
    out, sheet = tmp_path / "rows.json", tmp_path / "rows.csv"
    done = run("--shares", "0.4", "--seeds", "0,1", "--rates", "0.1,0.3", "--json", out, "--csv", sheet)
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())
    assert len(rows) == 2 * 2 * len(multilabel.WAYS)
    assert {row["way"] for row in rows} == set(multilabel.WAYS)
    assert all(0 <= row["map"] <= 1 for row in rows)
    true, taken = ([row for row in rows if row["way"] == way] for way in (multilabel.TRUE, "bce"))
    assert np.mean([row["map"] for row in true]) > np.mean([row["map"] for row in taken])
    with sheet.open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert "comic - balance" in done.output


def test_tiles_are_real_images(monkeypatch, tmp_path):
    images = write_images(tmp_path / "images", {"bag": 2, "coat": 1})
    monkeypatch.setattr(mosaics, "demo_source", lambda: open_source(images))
    mosaics.tiles.cache_clear()
    tiles = mosaics.tiles()
    mosaics.tiles.cache_clear()
    assert tiles.names == ["bag", "coat", *mosaics._DIGITS]
    assert [own.shape for own in tiles.images[:2]] == [(2, 28, 28), (1, 28, 28)]
    assert sum(len(own) for own in tiles.images[2:]) == 1797
    assert tiles.images[2].max() > 200 > 10 > tiles.images[2][:, :, :4].mean()  # bright on black


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--shares", "some"), "fractions of --shares are numbers from 0 to 0.99"),
        (("--rates", "0"), "learning rates of --rates are numbers"),
    ],
)
def test_bad_options_are_refused(world, options, words):
    done = run(*options)
    assert done.exit_code == 2
    assert words in done.stderr
