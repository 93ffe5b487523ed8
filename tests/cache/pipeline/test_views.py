from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.pipeline.views import ViewRecipe, Views, draw, view_seed


def noise(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def drawn(image: Image.Image | None = None, id: str = "a", size: int = 16, **recipe) -> Views:
    return draw(image or noise(), id, ViewRecipe(**recipe), image_size=size)


def same(one: Views, two: Views) -> bool:
    arrays = ((one.pixels, two.pixels), (one.scale, two.scale), (one.flip, two.flip))
    return all(np.array_equal(left, right) for left, right in arrays)


def test_shapes_and_types():
    views = drawn(weak=2, strong=3, size=16)
    assert views.pixels.shape == (5, 16, 16, 3)
    assert views.pixels.dtype == np.uint8
    assert (views.scale.dtype, views.scale.shape) == (np.float32, (5,))
    assert (views.flip.dtype, views.flip.shape) == (np.uint8, (5,))
    assert ViewRecipe(weak=2, strong=3).kinds == ["weak", "weak", "strong", "strong", "strong"]


def test_no_views():
    assert drawn(weak=0, strong=0).pixels.shape == (0, 16, 16, 3)


def test_seed_is_what_the_format_says():
    digest = hashlib.sha256(b"7/strong/2/train/cat/1.png").digest()
    assert view_seed(7, "train/cat/1.png", "strong", 2) == int.from_bytes(digest[:8], "big")
    assert len({view_seed(s, i, k, p) for s in (0, 1) for i in "ab" for k in ("weak", "strong") for p in (0, 1)}) == 16


def test_the_same_arguments_give_the_same_views():
    assert same(drawn(weak=2, strong=2), drawn(weak=2, strong=2))


@pytest.mark.parametrize("other", [{"seed": 1}, {"id": "b"}])
def test_seed_and_id_change_every_view(other: dict):
    one, two = drawn(weak=2, strong=2), drawn(weak=2, strong=2, **other)
    assert all(not np.array_equal(left, right) for left, right in zip(one.pixels, two.pixels, strict=True))


def test_asking_for_more_views_leaves_the_others_as_they_were():
    few, many = drawn(weak=1, strong=1), drawn(weak=3, strong=2)
    assert np.array_equal(few.pixels[0], many.pixels[0])
    assert np.array_equal(few.pixels[1], many.pixels[3])


def test_the_random_state_of_torch_neither_matters_nor_changes():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = drawn(weak=1, strong=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(one, drawn(weak=1, strong=2))


def test_order_and_threads_do_not_matter():
    names = [f"{number}.png" for number in range(40)]
    alone = [drawn(id=name, weak=1, strong=2) for name in names]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda name: drawn(id=name, weak=1, strong=2), reversed(names)))
    assert all(same(one, two) for one, two in zip(alone, reversed(together), strict=True))


def test_scale_is_the_share_of_the_area_and_within_the_recipe():
    views = drawn(noise(300, 200), weak=60, strong=0, weak_scale=(0.2, 0.6))
    # crops are whole pixels, so a little outside of the range is right
    assert views.scale.min() > 0.19
    assert views.scale.max() < 0.61
    assert views.scale.std() > 0.05
    assert 0.25 < views.flip.mean() < 0.75


def test_the_whole_square_image_is_resized_like_torchvision_does():
    image = noise(20, 20)
    views = drawn(image, weak=8, strong=0, weak_scale=(1.0, 1.0), size=33)
    wanted = np.asarray(functional.resize(image, [33, 33], interpolation=functional.InterpolationMode.BICUBIC))
    whole = [view for view in range(8) if views.scale[view] == 1.0]
    assert whole
    for view in whole:
        assert np.array_equal(views.pixels[view], wanted[:, ::-1] if views.flip[view] else wanted)


def test_scale_and_flip_tell_what_was_done():
    # Dark on the left, bright on the right: a mirrored view is bright on its left.
    ramp = np.linspace(0, 255, 100).astype(np.uint8)[None, :, None]
    image = Image.fromarray(np.broadcast_to(ramp, (100, 100, 3)).copy())
    views = drawn(image, weak=12, strong=0)
    values = views.pixels.astype(int)
    for view in range(12):
        left, right = values[view, :, 0].mean(), values[view, :, -1].mean()
        assert (left > right) == bool(views.flip[view])
        assert abs(left - right) < 256 * min(1.0, 1.2 * np.sqrt(views.scale[view] * 4 / 3))
    assert 0 < views.flip.sum() < 12


def test_strong_views_are_augmented_weak_crops():
    plain = drawn(weak=0, strong=20, strong_ops=0)
    strong = drawn(weak=0, strong=20, strong_ops=2)
    assert np.array_equal(plain.scale, strong.scale)
    assert np.array_equal(plain.flip, strong.flip)
    changed = [not np.array_equal(one, two) for one, two in zip(plain.pixels, strong.pixels, strict=True)]
    assert sum(changed) > 12  # RandAugment may draw the identity, twice at times


def test_magnitude_matters():
    assert not same(drawn(weak=0, strong=8, strong_magnitude=1), drawn(weak=0, strong=8, strong_magnitude=30))


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (2, 3), (3000, 20)])
def test_odd_sizes(size: tuple[int, int]):
    views = drawn(noise(*size), weak=3, strong=3, size=16)
    assert views.pixels.shape == (6, 16, 16, 3)
    assert ((views.scale > 0) & (views.scale <= 1)).all()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"weak": -1}, "weak must be at least 0, got -1"),
        ({"strong": -2}, "strong must be at least 0, got -2"),
        ({"strong_ops": -1}, "strong_ops must be at least 0, got -1"),
        ({"weak_scale": (0.0, 1.0)}, "weak_scale must hold 0 < low <= high <= 1, got 0 1"),
        ({"weak_scale": (0.9, 0.5)}, "got 0.9 0.5"),
        ({"weak_scale": (0.5, 1.5)}, "got 0.5 1.5"),
        ({"strong_magnitude": 31}, "strong_magnitude must be 0 to 30, got 31"),
    ],
)
def test_values_out_of_range(values: dict, sentence: str):
    with pytest.raises(InputError, match=sentence):
        ViewRecipe(**values)


def test_the_recipe_has_the_manifests_fields():
    assert asdict(ViewRecipe()) == {
        "weak": 1,
        "strong": 1,
        "seed": 0,
        "weak_scale": (0.5, 1.0),
        "strong_ops": 2,
        "strong_magnitude": 10,
    }
