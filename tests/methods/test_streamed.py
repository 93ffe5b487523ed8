"""What holds for all methods that read the pool chunk by chunk."""

from __future__ import annotations

import pytest
import torch

from tests.methods.pools import clustered, plan_of
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.methods import registry
from ulfine_fast.methods.base import StreamedMethod
from ulfine_fast.ops import clustering, transport

METHODS = [name for name in registry.names() if issubclass(registry.find(name).method, StreamedMethod)]


def test_there_are_some():
    assert {"ss_text_u", "otter", "stata", "otfusion"} <= set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_chunks_and_held_scores_change_nothing_and_bound_what_is_read(monkeypatch, method):
    whole = clustered(method)
    read = []
    rows = DeviceFeatures.rows
    monkeypatch.setattr(DeviceFeatures, "rows", lambda self, index: read.append(index.shape[1]) or rows(self, index))
    monkeypatch.setattr(clustering, "_CHUNK_VALUES", 1)
    monkeypatch.setattr(clustering, "_LEAST_ROWS", 3)
    monkeypatch.setattr(transport, "HELD_VALUES", 0)
    parts = clustered(method)
    assert max(read) == 3
    torch.testing.assert_close(plan_of(*parts), plan_of(*whole), rtol=1e-3, atol=1e-5)
    assert parts[2].scratch == {}
    # what is kept has no axis of images
    assert max(tensor.numel() for tensor in parts[2].memory.values()) <= 2 * 3 * 6


@pytest.mark.parametrize("method", METHODS)
def test_a_trial_does_not_see_its_neighbour_nor_its_padding(method):
    both, alone = clustered(method), clustered(method, count=1)
    torch.testing.assert_close(plan_of(*both)[:1], plan_of(*alone), rtol=1e-4, atol=1e-6)
    for name, tensor in alone[2].memory.items():
        torch.testing.assert_close(both[2].memory[name][:1], tensor, rtol=1e-4, atol=1e-5)
