"""The least time a ULFine step can take: the multiply-adds it must do, at the machine's own matrix-product rate.

Multiply-adds of one trial's step, with B labelled and U unlabelled images, features D wide, K classes, rank r:

    forward     (B + 2U) (2 D r + 2 K D)    adapter down and up, both heads; labelled, weak and strong rows
    backward    (B + U) (4 K D + 3 D r)     heads: weights and rows; adapter: up's weights, hidden rows, down's weights
    orthogonal  2 K D min(K, D)             the Gram matrix of the prototypes, and its product with them

Inputs need no gradient, and scale and shift of the norm get theirs from down's without a further product. Work element
by element (norms, softmax, PAF, optimiser, drawing and gathering of rows) is not counted, nor the symmetry of the Gram
matrix, nor that strong rows without a pseudo-label need no gradient; so no real step of float32 products is as fast.
Products of bfloat16 may be faster than this floor, which stays that of float32.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_REPEATS = 7


@dataclass(frozen=True)
class Shape:
    """Sizes of a step.

    Attributes:
        name: of the shape.
        dim: width of the features D.
        classes: K.
        rank: width of the adapter's bottleneck r.
        labeled: labelled images of a mini-batch B.
        unlabeled: unlabelled images of a mini-batch U.
    """

    name: str
    dim: int
    classes: int
    rank: int
    labeled: int
    unlabeled: int

    @property
    def multiply_adds(self) -> int:
        """Of one trial's step, as this module's docstring has it."""
        adapter = self.dim * self.rank
        heads = 2 * self.classes * self.dim
        forward = (self.labeled + 2 * self.unlabeled) * (2 * adapter + heads)
        backward = (self.labeled + self.unlabeled) * (2 * heads + 3 * adapter)
        return forward + backward + heads * min(self.classes, self.dim)

    @property
    def bytes(self) -> int:
        """Moved to and from memory by one trial's step where nothing stays in a cache.

        Parameters and velocities are read and written, visual prototypes too, all float32; features are read as
        float16.
        """
        parameters = 2 * self.dim * (self.classes + self.rank + 1)
        rows = self.labeled + 2 * self.unlabeled
        return 4 * (4 * parameters + 2 * self.classes * self.dim) + 2 * rows * self.dim

    def memory(self, trials: int, *, graph: bool) -> int:
        """About how many bytes T trials take together; with a `graph`, gradients and what autograd keeps too."""
        weights = 2 * self.dim * (self.classes + self.rank)
        if not graph:
            return 4 * trials * 4 * weights
        rows = (self.labeled + 2 * self.unlabeled) * 12 * (self.dim + 2 * self.classes)
        return 4 * trials * (8 * weights + rows + 4 * self.classes**2)


SHAPES = {
    "S1": Shape("S1", dim=512, classes=100, rank=64, labeled=64, unlabeled=64),
    "S2": Shape("S2", dim=384, classes=10, rank=16, labeled=32, unlabeled=32),
    "S3": Shape("S3", dim=768, classes=1000, rank=64, labeled=128, unlabeled=128),
}


def floor_rate(shape: Shape, device: torch.device) -> float:
    """Trial-steps per second that the machine's products, and on a GPU its memory, allow at most."""
    seconds = shape.multiply_adds / product_rate(shape, device)
    if device.type == "cuda":
        seconds = max(seconds, shape.bytes / bandwidth(device))
    return 1 / seconds


def product_rate(shape: Shape, device: torch.device) -> float:
    """Multiply-adds per second in float32: the best of large square products and batched ones of the shape's sizes."""
    # large enough to be at the full rate, small enough to be repeated in every round
    side, trials = (8192, 64) if device.type == "cuda" else (1536, 16)
    rows = shape.labeled + 2 * shape.unlabeled
    # which of them is fastest depends on caches and threads; the fastest makes the hardest floor
    sizes = [
        (1, side, side, side),
        (trials, rows, shape.dim, 2 * shape.classes),
        (trials, 2 * shape.classes, rows, shape.dim),
        (trials, rows, shape.dim, shape.rank),
    ]
    return max(_rate(size, device) for size in sizes)


def bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.ones(1 << 28, device=device)  # 1 GiB
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), device)


def _rate(size: tuple[int, int, int, int], device: torch.device) -> float:
    """Multiply-adds per second of a batched product."""
    trials, rows, inner, columns = size
    left = torch.randn(trials, rows, inner, device=device)
    right = torch.randn(trials, inner, columns, device=device)
    out = torch.empty(trials, rows, columns, device=device)
    return trials * rows * inner * columns / _median_seconds(lambda: torch.bmm(left, right, out=out), device)


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    work()  # the first call picks a kernel and touches its memory
    return statistics.median(seconds_of(work, device) for _ in range(_REPEATS))


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds until the device is done."""
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    # a GPU's work is queued, and a clock would see the queueing alone
    if device.type == "cuda":
        torch.cuda.synchronize(device)
