from __future__ import annotations

import dataclasses

import pytest
import torch

import ulfine_fast.core.features
from tests.conftest import make_clusters
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.engine.memory import peak_bytes
from ulfine_fast.ops.prototypes import normalize

CPU = torch.device("cpu")
ROWS, VIEWS = torch.tensor([[0, 5, 7], [9, 0, 0]]), torch.tensor([[0, 1, 2], [3, 3, 0]])


@pytest.fixture(params=["widened", "stored"])
def features(request, monkeypatch):
    """The same cache, small enough to be widened and not."""
    if request.param == "stored":
        monkeypatch.setattr(ulfine_fast.core.features, "_WIDENED_BYTES", 0)
    loaded = DeviceFeatures.load(make_clusters(train=10, test=4), CPU)
    assert (loaded.unit, loaded.views.dtype) == (
        (True, torch.float32) if request.param == "widened" else (False, torch.float16)
    )
    return loaded


def test_views_loaded_in_blocks_of_rows_are_the_same(features, monkeypatch):
    monkeypatch.setattr(ulfine_fast.core.features, "_ROWS", 7)
    assert torch.equal(DeviceFeatures.load(make_clusters(train=10, test=4), CPU).views, features.views)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_loading_holds_one_copy_of_the_views_on_a_gpu(monkeypatch):
    monkeypatch.setattr(ulfine_fast.core.features, "_ROWS", 256)
    cache, loaded = make_clusters(dim=512, train=2000), []
    peak = peak_bytes(lambda: loaded.append(DeviceFeatures.load(cache, torch.device("cuda"))), torch.device("cuda"))
    assert peak < 1.2 * (loaded[0].plain.nbytes + loaded[0].views.nbytes)


def test_slots_count_through_the_views_of_all_rows(features):
    cache = make_clusters(train=10, test=4)
    result = features.at(features.slots(ROWS, VIEWS))
    position = {row: i for i, row in enumerate(cache.view_rows.tolist())}
    for t in range(2):
        for i in range(3):
            row = int(ROWS[t, i])
            kinds = [cache.plain[row], *cache.views("weak")[position[row]], *cache.views("strong")[position[row]]]
            wanted = normalize(torch.from_numpy(kinds[VIEWS[t, i]]).float())
            torch.testing.assert_close(result[t, i], wanted)


def test_reading_into_memory_is_reading(features):
    slots = features.slots(ROWS, VIEWS)
    room = torch.full((2, 5, 16), 9.0)
    features.at_into(slots, room[:, 1:4])
    assert torch.equal(room[:, 1:4], features.at(slots))
    assert (room[:, [0, 4]] == 9.0).all()


def test_rows_have_length_one(features):
    for result in (features.rows(ROWS), features.all_views(ROWS)):
        torch.testing.assert_close(result.norm(dim=-1), torch.ones(result.shape[:-1]))


def test_widening_changes_nothing_but_rounding(features):
    other = DeviceFeatures.load(make_clusters(train=10, test=4), CPU)
    torch.testing.assert_close(features.rows(ROWS), other.rows(ROWS))
    torch.testing.assert_close(features.all_views(ROWS), other.all_views(ROWS))
    assert features.strong == other.strong == 2
    assert dataclasses.replace(features, easy=4).strong == 0
