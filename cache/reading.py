"""Reader processes: rows of a source to batches of drawn views, in order."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ulfine_fast.cache.errors import InputError
from ulfine_fast.cache.shard import VIEWED_SPLITS
from ulfine_fast.cache.sources.picture import UnreadablePicture
from ulfine_fast.cache.views import ViewRecipe, draw

if TYPE_CHECKING:
    from PIL import Image

    from ulfine_fast.cache.encoder import Encoder
    from ulfine_fast.cache.sources import Row, Source

_AHEAD = 2  # batches that each reader prepares ahead


class Batch(NamedTuple):
    """What a reader hands over: B pictures that could be read, and those that could not.

    Attributes:
        rows: row numbers of the source, those skipped included.
        kept: row numbers of the B pictures.
        skipped: (row number, reason).
        pixels: (B, V, 3, H, W) float32, the plain view first, then weak, then strong ones.
        scale: float32 (B, V - 1). flip: uint8 (B, V - 1). Of the views that are drawn.
    """

    rows: list[int]
    kept: list[int]
    skipped: list[tuple[int, str]]
    pixels: Any
    scale: Any
    flip: Any


class _Views(NamedTuple):
    """One picture: pixels (V, 3, H, W), scale (V - 1,), flip (V - 1,)."""

    pixels: torch.Tensor
    scale: np.ndarray
    flip: np.ndarray


@dataclass(frozen=True)
class PictureReader(Dataset[tuple[int, "_Views | str"]]):
    """Row number -> all views of the picture, or the reason why it cannot be read. It travels to the readers.

    Attributes:
        source: where pictures come from.
        transform: PIL picture -> (3, H, W), the evaluation preprocessing.
        recipe: of the drawn views.
        image_size: H and W, in pixels. mean, std: normalisation by channel, for values 0..1.
    """

    source: Source
    transform: Callable[[Image.Image], torch.Tensor]
    recipe: ViewRecipe
    image_size: int
    mean: Sequence[float]
    std: Sequence[float]

    @classmethod
    def of(cls, source: Source, encoder: Encoder, recipe: ViewRecipe) -> PictureReader:
        """The reader for an encoder; it takes nothing of the model itself, which stays in the main process."""
        return cls(source, encoder.transform, recipe, encoder.spec.image_size, encoder.mean, encoder.std)

    def __getitem__(self, index: int) -> tuple[int, _Views | str]:
        row = self.source.rows[index]
        try:
            return index, self._views(self.source.read(row), row)
        except UnreadablePicture as error:
            return index, str(error)

    def _views(self, picture: Image.Image, row: Row) -> _Views:
        plain = self.transform(picture)[None]  # (1, 3, H, W)
        recipe = self.recipe
        if row.split not in VIEWED_SPLITS or recipe.weak + recipe.strong == 0:
            return _Views(plain, np.empty(0, np.float32), np.empty(0, np.uint8))
        drawn = draw(picture, row.id, recipe, image_size=self.image_size, mean=self.mean, std=self.std)
        return _Views(torch.cat([plain, drawn.pixels]), drawn.scale, drawn.flip)


@contextmanager
def batches(
    reader: PictureReader, numbers: Sequence[list[int]], *, workers: int, pin: bool = False
) -> Iterator[Iterator[Batch]]:
    """Reads batches of rows in the order given.

    Args:
        reader: makes the views.
        numbers: row numbers of each batch.
        workers: reader processes; 0 reads in this process, while it encodes nothing.
        pin: whether to copy batches to pinned memory, for a GPU.

    Yields:
        An iterator over the batches; on leaving, the readers are gone.
    """
    largest = max((len(batch) for batch in numbers), default=0)
    shared = _fits_shared_memory(reader, largest, workers)
    loader: DataLoader[Any] = DataLoader(
        reader,
        batch_sampler=numbers,
        num_workers=workers,
        collate_fn=_Collate(shared or workers == 0),
        pin_memory=pin,
        prefetch_factor=_AHEAD if workers else None,
        worker_init_fn=_leave_interrupts_to_parent,
    )
    # The processes start here, before anything draws on the terminal from a thread.
    iterator = iter(loader)
    try:
        yield iterator
    finally:
        getattr(iterator, "_shutdown_workers", lambda: None)()


def default_workers(device: torch.device) -> int:
    """Reader processes when the user names none."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # On a GPU the cores have nothing else to do; on the CPU the encoder wants them, so readers only fill gaps.
    return min(cores, 16) if device.type == "cuda" else min(cores // 2, 4)


@dataclass(frozen=True)
class _Collate:
    """Joins the pictures of a batch.

    Attributes:
        shared: whether pixels travel in shared memory (fast) or through a pipe (where that memory is small, as in
            containers, a reader would die of a bus error).
    """

    shared: bool

    def __call__(self, items: list[tuple[int, _Views | str]]) -> Batch:
        read = [(index, views) for index, views in items if not isinstance(views, str)]
        skipped = [(index, views) for index, views in items if isinstance(views, str)]
        empty = _Views(torch.empty(0), np.empty(0, np.float32), np.empty(0, np.uint8))
        pixels = torch.stack([views.pixels for _, views in read]) if read else empty.pixels  # (B, V, 3, H, W)
        scale = np.stack([views.scale for _, views in read]) if read else empty.scale  # (B, V - 1)
        flip = np.stack([views.flip for _, views in read]) if read else empty.flip
        return Batch(
            [index for index, _ in items],
            [index for index, _ in read],
            skipped,
            pixels if self.shared else pixels.numpy(),
            scale,
            flip,
        )


def _fits_shared_memory(reader: PictureReader, batch_size: int, workers: int) -> bool:
    """Whether all batches under way fit into /dev/shm with room to spare; true where there is no such folder."""
    if not workers or not os.path.isdir("/dev/shm"):
        return True
    views = 1 + reader.recipe.weak + reader.recipe.strong
    wanted = workers * (_AHEAD + 1) * batch_size * views * 3 * reader.image_size**2 * 4  # bytes
    return shutil.disk_usage("/dev/shm").free > 1.25 * wanted


def _leave_interrupts_to_parent(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the parent ends its readers in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def is_dead_reader(error: RuntimeError) -> bool:
    """Whether torch says that a reader process is gone; what a reader itself raised comes with its traceback."""
    return "DataLoader worker" in str(error) and "Traceback" not in str(error)


def reader_died(error: RuntimeError) -> InputError:
    """The sentence for a reader process that the system ended."""
    return InputError(
        f"a reader process ended ({str(error).partition(chr(10))[0][:120]}), most likely for want of memory; use fewer "
        "--workers or a smaller --batch-size and run again: finished shards stay"
    )
