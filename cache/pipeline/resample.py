"""Resizing and cropping many images together on any device, to the pixels that PIL would give.

PIL resizes one side and then the other, each time by one small weighted sum for each pixel, rounded to a byte. The
weights of a side are a matrix, so a batch of images is two batched matrix products: of a kind that a GPU is made for,
crop, mirroring and all views of an image included. PIL resizes the columns first where that is less work; here the
rows always come first, so that now and then a pixel beside a sharp edge differs by a few of 255.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ulfine_fast.cache.io.device import float32_products, upload

PIL_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# Values of padded images resampled together: 256 MB of float32, and less than as much again between the two steps.
_CHUNK_VALUES = 2**26


class Window(NamedTuple):
    """A stretch of an image's side that becomes the side of a view.

    Attributes:
        start: where it begins, in pixels of the image, 0 at the outer edge of the first.
        step: pixels of the image that one pixel of the view covers.
    """

    start: float
    step: float


class Sampling(NamedTuple):
    """Where the V views of B images are in them.

    Attributes:
        sizes: int64 (B, 2), H and W of each image.
        windows: float64 (B, V, 2, 2): of the rows and of the columns, start and step of a `Window`.
        mirrored: bool (B, V), left and right exchanged.
    """

    sizes: NDArray[np.int64]
    windows: NDArray[np.float64]
    mirrored: NDArray[np.bool_]

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Index of each image's first value, and of the end of the last image: (B + 1,)."""
        return np.concatenate([[0], np.cumsum(self.sizes.prod(axis=1))]) * 3


@dataclass(frozen=True, slots=True)
class Resampling:
    """An evaluation preprocessing that can be done on a device.

    Attributes:
        side: of the square that comes out, in pixels.
        squash: whether both sides are brought to `side`; else the shorter one is, and the middle of the longer one is
            kept.
        filter: "bicubic" or "bilinear".
    """

    side: int
    squash: bool = False
    filter: str = "bicubic"

    def whole(self, height: int, width: int) -> tuple[Window, Window]:
        """Windows of the plain view: rows, columns; where torchvision's Resize and CenterCrop put them."""
        if self.squash:
            return Window(0.0, height / self.side), Window(0.0, width / self.side)
        short = min(height, width)
        return self._middle(height, short), self._middle(width, short)

    def cropped(self, box: tuple[int, int, int, int]) -> tuple[Window, Window]:
        """Windows of a crop (left, top, right, bottom)."""
        left, top, right, bottom = box
        return Window(top, (bottom - top) / self.side), Window(left, (right - left) / self.side)

    def _middle(self, length: int, short: int) -> Window:
        # whole pixels, rounded as torchvision does
        resized = int(self.side * length / short)
        step = length / resized
        return Window(round((resized - self.side) / 2.0) * step, step)


def resampled(values: torch.Tensor, sampling: Sampling, how: Resampling) -> torch.Tensor:
    """Views of images of any size.

    Args:
        values: uint8 (sum of H * W * 3,), the images' pixels one after another, on the device to compute on.
        sampling: where the views are in them.
        how: size and filter; crops are always bicubic, which is what `filter` is in nearly all models.

    Returns:
        uint8 (B, V, 3, S, S) on that device.
    """
    if values.device.type == "cpu":
        return _by_pil(values.numpy(), sampling, how)
    return by_products(values, sampling, how)


def by_products(values: torch.Tensor, sampling: Sampling, how: Resampling) -> torch.Tensor:
    """`resampled` on a device: two batched matrix products, exact ones as bytes times weights need more than TF32."""
    offsets, device = sampling.offsets, values.device
    chunks = list(_chunks(sampling.sizes))
    order = np.concatenate(chunks)

    # everything that the device must know travels together, in the order of the chunks
    start, step = sampling.windows[..., 0], sampling.windows[..., 1]  # (B, V, 2)
    centers = start[..., None] + (np.arange(how.side) + 0.5) * step[..., None]  # (B, V, 2, S)
    # Whole and fractional parts apart: float32 holds the distance to a pixel well, float64 is slow on a device.
    whole = np.floor(centers)
    arrays = (whole, centers - whole, np.maximum(step, 1.0), sampling.sizes, sampling.mirrored)
    *pixels_of_views, positions = _uploaded([*(array[order] for array in arrays), np.argsort(order)], device)

    views, done = [], 0
    for rows in chunks:
        height, width = sampling.sizes[rows].max(axis=0)
        padded = values.new_zeros(len(rows), int(height), int(width), 3)
        for index, row in enumerate(rows):
            h, w = sampling.sizes[row]
            padded[index, :h, :w] = values[offsets[row] : offsets[row + 1]].view(int(h), int(w), 3)
        where = _ViewPixels(*(tensor[done : done + len(rows)] for tensor in pixels_of_views))
        with float32_products(device, tf32=False):
            views.append(_resample_chunk(padded, where, how))
        done += len(rows)
    return torch.cat(views).index_select(0, positions.long())


class _ViewPixels(NamedTuple):
    """Where the V views of B images are in them, on the device: float32 all.

    Attributes:
        whole: pixel that the center of each pixel of a view is in, of the rows and of the columns (B, V, 2, S).
        fraction: where it is in that pixel, in [0, 1), likewise.
        spread: pixels of the image that the filter is stretched to, at least 1 (B, V, 2).
        sizes: H and W of each image (B, 2).
        mirrored: 1 or 0 (B, V).
    """

    whole: torch.Tensor
    fraction: torch.Tensor
    spread: torch.Tensor
    sizes: torch.Tensor
    mirrored: torch.Tensor


def _uploaded(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """Arrays on the device as float32, in one copy that nothing waits for."""
    flat = torch.from_numpy(np.concatenate([array.astype(np.float32).ravel() for array in arrays]))
    parts = upload(flat, device).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def _by_pil(values: NDArray[np.uint8], sampling: Sampling, how: Resampling) -> torch.Tensor:
    """`resampled` on a processor, where PIL, which leaves out weights of zero, is four times as fast."""
    offsets = sampling.offsets
    batch, views = sampling.windows.shape[:2]
    out = np.empty((batch, views, how.side, how.side, 3), dtype=np.uint8)
    for row, size in enumerate(sampling.sizes):
        image = Image.fromarray(values[offsets[row] : offsets[row + 1]].reshape(*size, 3))
        for view in range(views):
            (top, down), (left, across) = sampling.windows[row, view]
            # float64 may end a hair beyond the image's edge, which PIL refuses
            right, bottom = min(left + how.side * across, size[1]), min(top + how.side * down, size[0])
            filter_ = PIL_FILTERS[how.filter if view == 0 else "bicubic"]
            pixels = np.asarray(image.resize((how.side, how.side), filter_, box=(left, top, right, bottom)))
            out[row, view] = pixels[:, ::-1] if sampling.mirrored[row, view] else pixels
    return torch.from_numpy(out).permute(0, 1, 4, 2, 3)  # (B, V, 3, S, S)


def _chunks(sizes: NDArray[np.int64]) -> Iterator[list[int]]:
    """Images of similar sizes together, so that little is padded, and never more than a device has room for."""
    chunk: list[int] = []
    height = width = 0
    for row in np.lexsort(sizes.T):
        taller, wider = max(height, int(sizes[row, 0])), max(width, int(sizes[row, 1]))
        if chunk and (len(chunk) + 1) * taller * wider * 3 > _CHUNK_VALUES:
            yield chunk
            chunk, taller, wider = [], int(sizes[row, 0]), int(sizes[row, 1])
        chunk.append(int(row))
        height, width = taller, wider
    if chunk:
        yield chunk


def _resample_chunk(padded: torch.Tensor, where: _ViewPixels, how: Resampling) -> torch.Tensor:
    """Views uint8 (B, V, 3, S, S) of images (B, H, W, 3) that are padded at the right and at the bottom."""
    batch, height, width, _ = padded.shape
    down, across = (_weights(where, side, length, how) for side, length in ((0, height), (1, width)))
    mirrored = where.mirrored.bool()[:, :, None, None]  # (B, V, 1, 1)
    across = torch.where(mirrored, across.flip(2), across)  # (B, V, S, W)
    pixels = padded.permute(0, 3, 1, 2).reshape(batch, 3 * height, width).float()
    # The views of an image are columns of one product, as a product of each view would copy the image for it. PIL
    # rounds to bytes between the two steps, so the same is done here.
    wide = _rounded(across.flatten(1, 2) @ pixels.mT)  # (B, V S, 3 H)
    tall = _rounded(wide.view(-1, 3 * how.side, height) @ down.flatten(0, 1).mT)  # (B V, S 3, S), columns first
    return tall.view(batch, -1, how.side, 3, how.side).permute(0, 1, 3, 4, 2).to(torch.uint8)  # (B, V, 3, S, S)


def _rounded(values: torch.Tensor) -> torch.Tensor:
    """Whole numbers 0..255, halves upward; in place."""
    return values.add_(0.5).floor_().clamp_(0, 255)


def _weights(where: _ViewPixels, side: int, length: int, how: Resampling) -> torch.Tensor:
    """Weight of each pixel of a side in each pixel of a view: float32 (B, V, S, length), rows that sum to one."""
    whole, fraction = where.whole[:, :, side, :, None], where.fraction[:, :, side, :, None]  # (B, V, S, 1)
    positions = torch.arange(length, dtype=torch.float32, device=whole.device)
    distance = ((positions - whole) + (0.5 - fraction)).div_(where.spread[:, :, side, None, None])  # (B, V, S, L)
    # the plain view by the model's filter, drawn ones as `views.draw` makes them
    weights = _bicubic(distance)
    if how.filter == "bilinear":
        weights[:, 0] = (1 - distance[:, 0].abs()).clamp_min_(0)
    weights = weights * (positions < where.sizes[:, side, None, None, None])
    return weights.div_(weights.sum(dim=-1, keepdim=True))


def _bicubic(distance: torch.Tensor) -> torch.Tensor:
    """Keys' cubic with a = -0.5 (Keys 1981, equation 15), 0 beyond a distance of 2."""
    x = distance.abs()
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, inner, torch.where(x < 2, outer, torch.zeros_like(x)))
