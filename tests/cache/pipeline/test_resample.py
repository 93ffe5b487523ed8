"""Batched resizing on a device against PIL and torchvision, image by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from ulfine_fast.cache.pipeline import resample
from ulfine_fast.cache.pipeline.resample import Resampling, Sampling, Window, by_products, resampled
from ulfine_fast.engine.memory import peak_bytes

SIDE = 24


def images(count: int, *, wide: bool) -> list[Image.Image]:
    """Noise; wide ones alone are resized by PIL in the order of the products."""
    rng = np.random.default_rng(count)
    sizes = [sorted(int(v) for v in rng.integers(5, 120, 2)) for _ in range(count)]
    shapes = [(low, high) if wide else (high, low) for low, high in sizes]
    return [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]


def flat(originals: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.asarray(one).reshape(-1) for one in originals]))


def sampled(originals: list[Image.Image], windows: list, mirrored=None) -> Sampling:
    sizes = np.array([(one.height, one.width) for one in originals])
    shape = np.array(windows).shape[:2]
    return Sampling(sizes, np.array(windows), np.zeros(shape, bool) if mirrored is None else mirrored)


def bytes_of(views: torch.Tensor) -> np.ndarray:
    """(B, V, 3, S, S) to (B, V, S, S, 3), wide enough to subtract."""
    return views.permute(0, 1, 3, 4, 2).numpy().astype(int)


def open_clips(squash: bool, filter_: str) -> Compose:
    mode = InterpolationMode(filter_)
    return Compose([Resize((SIDE, SIDE), mode)] if squash else [Resize(SIDE, mode), CenterCrop(SIDE)])


@pytest.mark.parametrize("way", [by_products, resampled])
@pytest.mark.parametrize("filter_", ["bicubic", "bilinear"])
@pytest.mark.parametrize("squash", [False, True])
def test_the_plain_view_is_torchvisions(way, filter_, squash):
    originals, how = images(40, wide=True), Resampling(SIDE, squash, filter_)
    views = way(flat(originals), sampled(originals, [[how.whole(one.height, one.width)] for one in originals]), how)
    wanted = np.stack([np.asarray(open_clips(squash, filter_)(one)) for one in originals])
    difference = np.abs(bytes_of(views)[:, 0] - wanted)
    assert views.shape == (40, 1, 3, SIDE, SIDE)
    # PIL may go along the columns first, which rounds otherwise beside the sharpest edges
    assert np.quantile(difference, 0.99) <= 1
    assert difference.mean() < 0.05


def test_tall_images_differ_by_a_rounding_at_most_nearly_everywhere():
    originals, how = images(40, wide=False), Resampling(SIDE)
    views = by_products(
        flat(originals), sampled(originals, [[how.whole(one.height, one.width)] for one in originals]), how
    )
    wanted = np.stack([np.asarray(open_clips(False, "bicubic")(one)) for one in originals])
    difference = np.abs(bytes_of(views)[:, 0] - wanted)
    assert np.quantile(difference, 0.97) <= 1
    assert difference.max() < 64


def test_a_slow_loop_by_the_definition_gives_the_same_bytes():
    image, how = images(1, wide=True)[0], Resampling(7)
    windows = (Window(3.25, 0.6), Window(1.5, 2.1))
    views = bytes_of(by_products(flat([image]), sampled([image], [[windows]]), how))[0, 0]
    pixels = np.asarray(image).astype(float)
    across = np.stack([slow(pixels[row], windows[1], 7) for row in range(image.height)])  # (H, 7, 3)
    down = np.stack([slow(across[:, column], windows[0], 7) for column in range(7)], axis=1)  # (7, 7, 3)
    assert np.abs(views - down).max() <= 1  # a half may go either way
    assert (views != down).mean() < 0.02


def slow(line: np.ndarray, window: Window, side: int) -> np.ndarray:
    """One row of pixels (n, 3), resized: Keys' cubic, widened where it shrinks, rounded to bytes."""
    out = []
    for position in range(side):
        center, spread = window.start + (position + 0.5) * window.step, max(1.0, window.step)
        weights = []
        for source in range(len(line)):
            x = abs((source + 0.5 - center) / spread)
            inner, outer = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
            weights.append(inner if x < 1 else outer if x < 2 else 0.0)
        total = sum(weight * pixel for weight, pixel in zip(weights, line, strict=True)) / sum(weights)
        out.append(np.clip(np.floor(total + 0.5), 0, 255))
    return np.array(out)


@pytest.mark.parametrize("way", [by_products, resampled])
def test_crops_and_mirrors(way):
    image, how = images(1, wide=True)[0], Resampling(SIDE)
    boxes = [(0, 0, 9, 4), (3, 1, image.width, image.height), (2, 2, 3, 3)]
    mirrored = np.array([[False, True, True]])
    views = bytes_of(way(flat([image]), sampled([image], [[how.cropped(box) for box in boxes]], mirrored), how))[0]
    for view, box in enumerate(boxes):
        wanted = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)).astype(int)
        wanted = wanted[:, ::-1] if mirrored[0, view] else wanted
        assert np.quantile(np.abs(views[view] - wanted), 0.98) <= 1, box


def test_images_worked_on_apart_are_the_same(monkeypatch):
    originals, how = images(30, wide=True), Resampling(SIDE)
    sampling = sampled(originals, [[how.whole(one.height, one.width)] for one in originals])
    together = by_products(flat(originals), sampling, how)
    monkeypatch.setattr(resample, "_CHUNK_VALUES", 20_000)
    assert torch.equal(by_products(flat(originals), sampling, how), together)


def test_a_reduced_image_shows_the_same_part():
    """A ramp halved along both sides, of an odd length, so that the last pixel covers less than two."""
    ramp = np.arange(201, dtype=np.uint8)[None, :, None]
    image = Image.fromarray(np.broadcast_to(ramp, (201, 201, 3)).copy())
    half, how = image.reduce(2), Resampling(SIDE)
    windows = np.array([[how.cropped((20, 20, 150, 150))]])
    whole = bytes_of(by_products(flat([image]), sampled([image], windows), how))
    reduced = bytes_of(by_products(flat([half]), sampled([half], windows / 2), how))
    assert np.abs(whole - reduced).max() <= 1


def test_views_of_an_image_do_not_copy_it():
    """Eight small views of two large images: they are 3.8 MB of float32, and eight copies would be 31 MB."""
    originals, how = [Image.new("RGB", (400, 400), (10, 200, 30))] * 2, Resampling(8)
    windows = [[how.cropped((view, view, 380, 390)) for view in range(8)]] * 2
    peak = peak_bytes(lambda: by_products(flat(originals), sampled(originals, windows), how), torch.device("cpu"))
    assert peak < 12e6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_nothing_waits_for_a_gpu():
    originals, how = images(40, wide=True), Resampling(SIDE)
    sampling = sampled(originals, [[how.whole(one.height, one.width)] for one in originals])
    values = flat(originals).cuda()
    resampled(values, sampling, how)  # the first products wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        resampled(values, sampling, how)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_gives_the_same_bytes():
    originals, how = images(40, wide=True), Resampling(SIDE)
    sampling = sampled(originals, [[how.whole(one.height, one.width)] for one in originals])
    there, here = resampled(flat(originals).cuda(), sampling, how).cpu(), by_products(flat(originals), sampling, how)
    assert (there.int() - here.int()).abs().max() <= 1
