from __future__ import annotations

import numpy as np
import pytest

from tests.related.multilabel.worlds import hidden, make_images
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.related.multilabel.labels import labels_by_row, read_label_table, split_labels
from ulfine_fast.related.multilabel.settings import MultiLabelConfig


def written(folder, text):
    path = folder / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_table_is_read(tmp_path):
    table = read_label_table(written(tmp_path, "id,cat,dog\nb.png,1,\na.png,0, 1\n\n"))
    assert table.class_names == ["cat", "dog"]
    assert table.ids == ["b.png", "a.png"]
    assert table.values.tolist() == [[1, -1], [0, 1]]
    floats = read_label_table(written(tmp_path, " id,cat,dog \nb.png,1.0,-1\na.png,0.0,1.\n,,\n"))
    assert floats.digest == table.digest
    again = read_label_table(written(tmp_path, "id,cat,dog\nb.png,1,\na.png,0,0\n"))
    assert again.digest != table.digest


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "column id"),
        ("id\na\n", "one for each class"),
        ("name,cat\na,1\n", "got name, cat"),
        ("id,cat,cat\na,1,1\n", "class 'cat'"),
        ("id,split\na,1\n", "class 'split'"),
        ("id,cat\na,1,0\n", "line 2 of .* has 3 cells instead of 2"),
        ("id,cat\na,1\nb,yes\n", "line 3 of .* has 'yes' for class 'cat'"),
        ("id,cat\na,1\na,0\n", "line 3 of .* names 'a' again"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path, text, sentence):
    with pytest.raises(InputError, match=sentence):
        read_label_table(written(tmp_path, text))


def test_labels_go_to_the_rows_of_their_images():
    cache, truth = make_images()
    table = hidden(cache, truth)
    few = type(table)(table.class_names, table.ids[5:2:-1], table.values[5:2:-1])
    whole, rows = labels_by_row(few, cache)
    assert rows.tolist() == [3, 4, 5]
    np.testing.assert_array_equal(whole[3:6], table.values[3:6])
    assert (np.delete(whole, rows, 0) == -1).all()
    with pytest.raises(InputError, match=r"'missing', which this cache lacks \(its ids look like 'train/0'\)"):
        labels_by_row(type(table)(table.class_names, ["missing"], table.values[:1]), cache)
    with pytest.raises(InputError, match="no image"):
        labels_by_row(type(table)(table.class_names, [], table.values[:0]), cache)


def test_splits_follow_the_cache_or_hold_some_out():
    cache, truth = make_images()
    labels, rows = labels_by_row(hidden(cache, truth), cache)
    names = cache.class_names
    split = split_labels(cache, labels, rows, names, MultiLabelConfig())
    assert split.train.tolist() == list(range(120))
    assert split.test.tolist() == list(range(120, 240))
    held = [split_labels(cache, labels, rows[:120], names, MultiLabelConfig(seed=s)) for s in (1, 1, 2)]
    assert len(held[0].test) == 24
    assert set(held[0].test) | set(held[0].train) == set(range(120))
    np.testing.assert_array_equal(held[0].test, held[1].test)
    assert not np.array_equal(held[0].test, held[2].test)
    with pytest.raises(InputError, match="no training image; all"):
        split_labels(cache, labels, rows[120:], names, MultiLabelConfig())


def test_a_class_that_no_image_shows_is_refused():
    cache, truth = make_images()
    labels, rows = labels_by_row(hidden(cache, truth), cache)
    with pytest.raises(InputError, match="'class 0' is 0 in no training image"):
        split_labels(cache, labels, rows, cache.class_names, MultiLabelConfig(unknown="ignore"))
    labels[:120, 3] = -1
    with pytest.raises(InputError, match="'class 3' is 1 in none of 120 training images"):
        split_labels(cache, labels, rows, cache.class_names, MultiLabelConfig())
