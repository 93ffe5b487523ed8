"""Features without a model: raw pixels, and an encoder that was never trained. Small grey images (n, H, W), 0..1."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ulfine_fast.cache.store import FeatureCache

Pixels = NDArray[np.float32]
Encode = Callable[[Pixels], Pixels]

WEAK, STRONG = 2, 4
"""Views of each training image."""


def moved(pixels: Pixels, random: np.random.Generator, reach: int) -> Pixels:
    """Each image shifted by up to `reach` pixels along both axes, zeros moving in; (n, H, W) to (n, H, W)."""
    n, height, width = pixels.shape
    wide = np.pad(pixels, ((0, 0), (reach, reach), (reach, reach)))
    down, right = random.integers(0, 2 * reach + 1, (2, n, 1, 1))
    rows = np.arange(height).reshape(1, -1, 1) + down
    columns = np.arange(width).reshape(1, 1, -1) + right
    return wide[np.arange(n).reshape(-1, 1, 1), rows, columns]


def mirrored(pixels: Pixels, random: np.random.Generator) -> Pixels:
    """Half of the images flipped left to right."""
    flip = random.random((len(pixels), 1, 1)) < 0.5
    return np.where(flip, pixels[:, :, ::-1], pixels)


def erased(pixels: Pixels, random: np.random.Generator, side: int) -> Pixels:
    """A square of zeros, `side` pixels wide, at a random position of each image."""
    n, height, width = pixels.shape
    top = random.integers(0, height - side + 1, (n, 1, 1))
    left = random.integers(0, width - side + 1, (n, 1, 1))
    rows = np.arange(height).reshape(1, -1, 1) - top
    columns = np.arange(width).reshape(1, 1, -1) - left
    inside = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)
    return np.where(inside, np.float32(0), pixels)


def weak_view(pixels: Pixels, random: np.random.Generator, *, flips: bool) -> Pixels:
    """An image moved by up to a fourteenth of its side, at least one pixel."""
    reach = max(1, pixels.shape[1] // 14)
    shifted = moved(pixels, random, reach)
    return mirrored(shifted, random) if flips else shifted


def strong_view(pixels: Pixels, random: np.random.Generator, *, flips: bool) -> Pixels:
    """A weak view with another brightness, a square a third as wide as the image erased, and noise."""
    view = weak_view(pixels, random, flips=flips) * random.uniform(0.6, 1.0, (len(pixels), 1, 1)).astype(np.float32)
    noise = random.normal(0, 0.05, pixels.shape).astype(np.float32)
    return np.clip(erased(view, random, max(1, pixels.shape[1] // 3)) + noise, 0, 1)


def pixel_cache(
    pixels: Pixels,
    labels: NDArray[np.int64],
    splits: list[str],
    class_names: list[str],
    encode: Encode,
    *,
    flips: bool,
    ids: list[str] | None = None,
    views: tuple[int, int] = (WEAK, STRONG),
) -> FeatureCache:
    """A cache in memory, without text, of images (n, H, W) and their views.

    Features are centred at the mean of the training rows: without it all cosines of non-negative features are close
    to one, and a head would first have to learn that direction away.
    """
    random = np.random.default_rng(0x9E1)
    training = pixels[np.isin(splits, ("train", "unlabeled"))]  # (m, H, W)
    center = encode(training).mean(axis=0)  # (D,)

    def features(view: Pixels) -> NDArray[np.float16]:
        return (encode(view) - center).astype(np.float16)

    weak = [features(weak_view(training, random, flips=flips)) for _ in range(views[0])]
    strong = [features(strong_view(training, random, flips=flips)) for _ in range(views[1])]
    return FeatureCache.from_arrays(
        features(pixels),
        labels,
        class_names=class_names,
        weak=np.stack(weak, axis=1),
        strong=np.stack(strong, axis=1),
        splits=splits,
        ids=ids,
    )


def raw(pixels: Pixels) -> Pixels:
    """The pixels themselves as a row, (n, H, W) to (n, H * W)."""
    return pixels.reshape(len(pixels), -1)


def untrained(filters: int = 24, seed: int = 0) -> Encode:
    """An encoder of random weights: 5 x 5 filters in steps of two, relu, the mean of each cell of a 4 x 4 grid.

    Returns:
        A function from images (n, H, W) to features (n, 16 * filters).
    """
    kernel = torch.randn(filters, 1, 5, 5, generator=torch.Generator().manual_seed(seed)) / 5
    bias = 0.1 * torch.randn(filters, generator=torch.Generator().manual_seed(seed + 1))

    def one_block(pixels: Tensor) -> Tensor:
        responses = functional.conv2d(pixels.unsqueeze(1), kernel, bias, stride=2).relu()  # (n, F, h, w)
        return functional.adaptive_avg_pool2d(responses, 4).flatten(1)  # (n, 16 F)

    def encode(pixels: Pixels) -> Pixels:
        blocks = torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32)).split(2048)
        return torch.cat([one_block(block) for block in blocks]).numpy()

    return encode
