from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ulfine_fast.cache.ids import RowIndex
from ulfine_fast.core.selection import select_trials
from ulfine_fast.data.splits import Split, read_split
from ulfine_fast.related.label_proportions.bags import Bags, PaddedBags, draw_bags

ROWS, LABELS = np.arange(10, 21), np.arange(11) % 3
IDS = [f"{row}.png" for row in range(30)]


def test_every_image_is_in_one_bag_whose_proportions_are_its_labels():
    bags = draw_bags(ROWS, LABELS, 4, 3, seed=1)
    assert [len(rows) for rows in bags.members] == [4, 4, 3]
    assert (bags.width, bags.rows.tolist()) == (4, ROWS.tolist())
    for rows, proportions in zip(bags.members, bags.proportions, strict=True):
        labels = LABELS[rows - 10]
        assert proportions.tolist() == [(labels == k).mean() for k in range(3)]


def test_bags_of_a_seed_are_the_same_and_nested():
    one, again, other = (draw_bags(ROWS, LABELS, 4, 3, seed=s) for s in (1, 1, 2))
    assert np.array_equal(np.concatenate(one.members), np.concatenate(again.members))
    assert not np.array_equal(np.concatenate(one.members), np.concatenate(other.members))
    small = draw_bags(ROWS, LABELS, 2, 3, seed=1)
    assert np.array_equal(np.concatenate(small.members[:2]), one.members[0])


def test_a_saved_split_keeps_its_bags(tmp_path):
    bags = draw_bags(ROWS, LABELS, 4, 3, seed=1)
    split = Split(ROWS, ROWS[:0], ROWS[:0], np.arange(3), np.arange(3), {"bags": bags.to_list(IDS)})
    (tmp_path / "split.json").write_text(json.dumps(split.to_dict(IDS)))
    # a cache of the same images in another order
    other = IDS[::-1]
    loaded = Bags.from_list(read_split(tmp_path, other).extra["bags"], RowIndex(other).rows)
    assert loaded.names == bags.names
    assert [[29 - row for row in rows] for rows in loaded.members] == [rows.tolist() for rows in bags.members]
    np.testing.assert_array_equal(loaded.proportions, bags.proportions)
    plain = Split(ROWS, ROWS[:0], ROWS[:0], np.arange(3), np.arange(3)).to_dict(IDS)
    assert "bags" not in plain


def test_padding_repeats_an_image_of_the_bag():
    one = Bags(("a", "b"), (np.array([4, 5, 6]), np.array([7])), np.array([[0.5, 0.5], [1.0, 0.0]]))
    other = Bags(("c",), (np.array([1, 2, 3]),), np.array([[0.25, 0.75]]))
    padded = PaddedBags.pad([one, other], torch.device("cpu"))
    assert padded.index[0].tolist() == [[4, 5, 6], [7, 7, 7]]
    assert padded.present.sum(-1).tolist() == [[3, 1], [3, 0]]
    assert padded.count.tolist() == [2, 1]
    torch.testing.assert_close(padded.proportions[:, 0], torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
    assert select_trials(padded, slice(1, 2)).index.tolist() == [[[1, 2, 3], [0, 0, 0]]]


@pytest.mark.parametrize("size", [1, 11, 50])
def test_the_smallest_and_the_largest_bag(size):
    bags = draw_bags(ROWS, LABELS, size, 3, seed=0)
    assert bags.width == min(size, 11)
    np.testing.assert_allclose(bags.proportions.sum(1), 1)
