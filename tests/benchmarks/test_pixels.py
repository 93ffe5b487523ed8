import numpy as np

from benchmarks.pixels import (
    STRONG,
    WEAK,
    erased,
    mirrored,
    moved,
    pixel_cache,
    raw,
    strong_view,
    untrained,
    weak_view,
)


def images(n=6, side=8, seed=0):
    return np.random.default_rng(seed).random((n, side, side)).astype(np.float32)


def test_a_moved_image_is_the_image_at_another_position():
    before = images(20)
    after = moved(before, np.random.default_rng(0), 2)
    wide = np.pad(before, ((0, 0), (2, 2), (2, 2)))
    positions = set()
    for one, around in zip(after, wide, strict=True):
        matches = [(y, x) for y in range(5) for x in range(5) if np.array_equal(around[y : y + 8, x : x + 8], one)]
        assert len(matches) == 1
        positions.update(matches)
    assert len(positions) > 5


def test_about_half_are_mirrored_and_the_others_untouched():
    before = images(100)
    after = mirrored(before, np.random.default_rng(0))
    flipped = np.array([np.array_equal(a, b[:, ::-1]) for a, b in zip(after, before, strict=True)])
    kept = np.array([np.array_equal(a, b) for a, b in zip(after, before, strict=True)])
    assert (flipped ^ kept).all()
    assert 30 < flipped.sum() < 70


def test_an_erased_square_has_the_size_asked_for():
    before = images(10) + 1
    after = erased(before, np.random.default_rng(0), 3)
    for one, old in zip(after, before, strict=True):
        rows, columns = np.nonzero(one == 0)
        assert len(rows) == 9
        assert np.ptp(rows) == np.ptp(columns) == 2
        assert np.array_equal(one[one > 0], old[one > 0])


def test_views_stay_images_and_differ_from_them():
    before = images()
    for view in (weak_view, strong_view):
        after = view(before, np.random.default_rng(1), flips=True)
        assert after.shape == before.shape
        assert after.min() >= 0
        assert after.max() <= 1
        assert not np.array_equal(after, before)


def test_strong_views_are_further_away_than_weak_ones():
    # a smooth image, so that one pixel's shift is a small change
    before = np.tile(np.outer(np.hanning(28), np.hanning(28)).astype(np.float32), (50, 1, 1))
    weak, strong = (
        np.abs(view(before, np.random.default_rng(0), flips=False) - before).mean() for view in (weak_view, strong_view)
    )
    assert strong > weak


def test_a_cache_of_pixels_is_centred_and_has_views_of_its_training_rows():
    cache = pixels_cache()
    assert cache.plain.shape == (9, 64)
    assert cache.views("weak").shape == (6, WEAK, 64)
    assert cache.views("strong").shape == (6, STRONG, 64)
    assert np.abs(cache.plain[:6].astype(np.float32).mean(axis=0)).max() < 1e-3
    assert cache.prototypes is None


def pixels_cache():
    splits = ["train"] * 6 + ["test"] * 3
    return pixel_cache(images(9), np.arange(9) % 3, splits, ["a", "b", "c"], raw, flips=False)


def test_views_are_the_same_each_time():
    for kind in ("weak", "strong"):
        assert np.array_equal(pixels_cache().views(kind), pixels_cache().views(kind))


def test_the_untrained_encoder_is_fixed_by_its_seed_and_sees_each_image_alone():
    encode, before = untrained(filters=3), images(5, side=28)
    features = encode(before)
    assert features.shape == (5, 48)
    assert np.array_equal(features, untrained(filters=3)(before))
    assert not np.allclose(features, untrained(filters=3, seed=9)(before))
    assert np.allclose(features[2:3], encode(before[2:3]), atol=1e-6)
    assert (features >= 0).all()
