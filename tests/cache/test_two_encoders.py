"""Two caches of the same images as one: rows are joined by id, and what does not fit is refused in one sentence."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.cache.samples import make_manifest
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cache.two_encoders import beside

IDS = ["a", "b", "c", "d"]
SPLITS = ["train", "train", "unlabeled", "test"]


def cache_of(order, dim, *, ids=IDS, splits=SPLITS, names=("cat", "dog"), weak=1, texts=True, seed=0):
    """A cache in memory of four images in some order, each with the same features in every order."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((len(ids), 1 + weak, dim)).astype(np.float32)
    viewed = [i for i in order if splits[i] in ("train", "unlabeled")]
    return FeatureCache.from_arrays(
        features[order, 0],
        [[0, 1, -1, 1][i] for i in order],
        class_names=names,
        text_features=rng.standard_normal((2, dim)) if texts else None,
        weak=features[viewed, 1:] if weak else None,
        splits=[splits[i] for i in order],
        ids=[ids[i] for i in order],
    )


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_rows_are_joined_by_id():
    first, second = cache_of([0, 1, 2, 3], 3), cache_of([2, 0, 3, 1], 5, seed=1)
    in_order = cache_of([0, 1, 2, 3], 5, seed=1)
    joined = beside(first, second)
    assert (joined.dim, joined.ids, joined.second) == (8, IDS, second)
    np.testing.assert_allclose(joined.plain, np.hstack([unit(first.plain), unit(in_order.plain)]), atol=1e-6)
    views = np.concatenate([unit(first.views("weak")), unit(in_order.views("weak"))], axis=2)
    np.testing.assert_allclose(joined.views("weak"), views, atol=1e-6)
    assert joined.labels.tolist() == [0, 1, -1, 1]
    assert first.second is None
    assert first.dim == 3


def test_prototypes_are_zero_where_an_encoder_reads_no_texts():
    joined = beside(cache_of([0, 1, 2, 3], 3), cache_of([0, 1, 2, 3], 5, texts=False))
    assert joined.prototypes is not None
    assert joined.prototypes.shape == (2, 8)
    assert not joined.prototypes[:, 3:].any()
    neither = beside(cache_of([0, 1, 2, 3], 3, texts=False), cache_of([0, 1, 2, 3], 5, texts=False))
    assert neither.prototypes is None


def test_other_images_are_counted_and_one_is_named():
    first = cache_of([0, 1, 2, 3], 3)
    with pytest.raises(
        InputError, match=r"2 of the 4 images of the cache in memory are not in .*, such as 'c'; extract"
    ):
        beside(first, cache_of([0, 1], 3))
    with pytest.raises(InputError, match=r"1 of the 4 images of .* are not in .*, such as 'd'"):
        beside(cache_of([0, 1, 2], 3), first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ("cat", "emu")}, r"has other classes \(cat, emu\) than the cache in memory \(cat, dog\)"),
        ({"weak": 2}, "has 2 weak and 0 strong views of an image, the cache in memory has 1 and 0"),
        ({"splits": ["train", "train", "test", "test"]}, "1 training images .* are held out in .*, such as 'c'"),
    ],
)
def test_caches_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        beside(cache_of([0, 1, 2, 3], 3), cache_of([0, 1, 2, 3], 3, **changes))


def test_views_that_are_drawn_in_another_way_are_refused():
    first, second = cache_of([0, 1, 2, 3], 3), cache_of([0, 1, 2, 3], 3)
    first.manifest = make_manifest()
    views = {**first.manifest.views, "seed": 1}
    second.manifest = dataclasses.replace(first.manifest, views=views)
    with pytest.raises(InputError, match="extract both with the same --view-seed and --smallest-crop"):
        beside(first, second)
