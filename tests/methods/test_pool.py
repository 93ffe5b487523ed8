from __future__ import annotations

import torch

from tests.conftest import make_clusters
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.core.types import Pool
from ulfine_fast.ops.prototypes import normalize

ROWS = torch.tensor([[0, 5, 7], [9, 0, 0]])


def loaded(**values):
    cache = make_clusters(train=10, test=4, **values)
    return cache, DeviceFeatures.load(cache, torch.device("cpu"))


def test_all_views_are_the_plain_the_weak_and_the_strong_ones_in_turn():
    cache, features = loaded()
    result = features.all_views(ROWS)
    assert result.shape == (2, 3, 4, 16)
    order = cache.view_rows.tolist()
    for t in range(2):
        for i, row in enumerate(ROWS[t].tolist()):
            position = order.index(row)
            stored = [cache.plain[row], *cache.views("weak")[position], *cache.views("strong")[position]]
            for view, wanted in enumerate(stored):
                torch.testing.assert_close(result[t, i, view], normalize(torch.from_numpy(wanted).float()))


def test_all_views_agree_with_the_views_by_kind():
    _, features = loaded()
    result = features.all_views(ROWS)
    torch.testing.assert_close(result[:, :, 0], features.rows(ROWS))
    torch.testing.assert_close(result[:, :, 1], features.at(features.slots(ROWS, torch.ones_like(ROWS))))
    torch.testing.assert_close(result[:, :, 3], features.at(features.slots(ROWS, torch.full_like(ROWS, 3))))


def test_without_views_the_plain_one_is_all():
    _, features = loaded(views=False)
    torch.testing.assert_close(features.all_views(ROWS), features.rows(ROWS).unsqueeze(2))


def test_a_pool_hands_out_features_of_its_rows():
    _, features = loaded()
    labels, present = torch.tensor([[0, 0, 0], [0, -1, -1]]), torch.tensor([[True, True], [True, False]])
    pool = Pool(features, ROWS, labels, ROWS[:, 1:], present)
    assert torch.equal(pool.labeled, features.rows(ROWS))
    assert torch.equal(pool.unlabeled, features.rows(ROWS[:, 1:]))
    assert torch.equal(pool.labeled_views, features.all_views(ROWS))
    assert torch.equal(pool.unlabeled_views, features.all_views(ROWS[:, 1:]))
    assert pool.unlabeled_views.shape == (2, 2, 4, 16)
