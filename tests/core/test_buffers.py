from __future__ import annotations

import torch

from ulfine_fast.core.fused.buffers import Buffers, flatten, unflatten


def test_a_buffer_is_lent_again_under_its_name_and_shape():
    buffers = Buffers(torch.zeros(1, dtype=torch.float64))
    first = buffers.lend("a", 2, 3)
    assert (first.shape, first.dtype, first.is_contiguous()) == ((2, 3), torch.float64, True)
    assert buffers.lend("a", 2, 3) is first
    assert buffers.lend("b", 2, 3).data_ptr() != first.data_ptr()


def test_smaller_shapes_lie_in_the_same_memory():
    buffers = Buffers(torch.zeros(1))
    large = buffers.lend("a", 4, 5)
    large.fill_(7.0)
    small = buffers.lend("a", 2, 3)
    assert small.data_ptr() == large.data_ptr()
    assert small.tolist() == [[7.0] * 3] * 2


def test_growing_leaves_what_was_lent():
    buffers = Buffers(torch.zeros(1))
    small = buffers.lend("a", 2).fill_(1.0)
    large = buffers.lend("a", 3)
    assert large.tolist() == [0.0, 0.0, 0.0]
    assert small.tolist() == [1.0, 1.0]


def test_a_type_may_be_asked_for():
    assert Buffers(torch.zeros(1)).lend("labels", 2, dtype=torch.int64).dtype == torch.int64


def test_flattened_tensors_are_views_in_order():
    tensors = {"a": torch.arange(12.0).view(2, 2, 3), "b": torch.tensor([[1.0], [2.0]])}
    flat, views = flatten(tensors)
    assert flat.tolist() == [[0, 1, 2, 3, 4, 5, 1], [6, 7, 8, 9, 10, 11, 2]]
    assert list(views) == ["a", "b"]
    views["a"][1, 1, 2] = -1.0
    assert flat[1, 5] == -1.0
    assert tensors["a"][1, 1, 2] == 11.0  # a copy: the given tensors stay as they are


def test_a_part_of_the_trials_unflattens_like_all():
    tensors = {"a": torch.rand(5, 2, 3), "b": torch.rand(5, 4)}
    flat, _ = flatten(tensors)
    part = unflatten(flat[1:3], tensors)
    assert torch.equal(part["a"], tensors["a"][1:3])
    assert torch.equal(part["b"], tensors["b"][1:3])
