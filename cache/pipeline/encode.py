"""Batches of rows to features: threads that read and encode on a processor, reader processes beside a GPU."""

from __future__ import annotations

import os
import shutil
import signal
import time
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.pipeline.read import Batch, ImageReader
from ulfine_fast.cache.pipeline.threads import cores, in_order

if TYPE_CHECKING:
    from ulfine_fast.cache.models.encoder import Encoder
    from ulfine_fast.cache.sources import Row

# Images in one call of the model on a processor: more do not fit into its caches (Lite0 at 224 pixels: 190 images/s
# with 16 on two cores, 150 with 32, 87 with 64), fewer give small products.
_ON_A_CORE = 16
_AHEAD = 2  # batches that each reader process prepares ahead


class Done(NamedTuple):
    """What became of some rows, without their features.

    Attributes:
        rows: how many. skipped: {"id", "reason"} of those whose image could not be read.
        seconds: of work on "read" and "encode".
    """

    rows: int
    skipped: list[dict[str, str]]
    seconds: dict[str, float]


class Encoded(NamedTuple):
    """Features of a batch of rows.

    Attributes:
        kept: the B rows whose images could be read. skipped: (row, reason) of the others.
        features: float32 (B, V, D + S W), rows of length 1 and behind each its tokens, if any; plain view first, then
            weak, then strong ones.
        scale: float32 (B, V - 1). flip: uint8 (B, V - 1). Of the drawn views.
        seconds: of work on "read" and "encode"; where several threads work at once they add up.
    """

    kept: list[Row]
    skipped: list[tuple[Row, str]]
    features: NDArray[np.float32]
    scale: NDArray[np.float32]
    flip: NDArray[np.uint8]
    seconds: dict[str, float]

    @property
    def done(self) -> Done:
        """The same without the features."""
        skipped = [{"id": row.id, "reason": reason} for row, reason in self.skipped]
        return Done(len(self.kept) + len(self.skipped), skipped, self.seconds)


def encoded(
    reader: ImageReader, encoder: Encoder, batches: Iterable[list[Row]], *, workers: int | None = None
) -> Generator[Encoded, None, None]:
    """Reads and encodes batches, in their order.

    Args:
        reader: makes the views.
        encoder: the frozen model.
        batches: rows of one split each; drawn a few ahead, never all at once.
        workers: on a processor threads, which read and encode a batch each; elsewhere processes, which read. 0 for
            none; by default one for each core, at most 16 processes.

    Raises:
        InputError: a reader process ended, or a single image is too large for the GPU's memory.
    """
    count = default_workers(encoder.device) if workers is None else workers
    if encoder.device.type == "cpu":
        yield from in_order(lambda rows: _on_a_core(reader, encoder, rows), batches, count)
    else:
        yield from _beside_readers(reader, encoder, batches, count)


def default_workers(device: torch.device) -> int:
    """Threads or processes when the user names no number."""
    return cores() if device.type == "cpu" else min(cores(), 16)


def _on_a_core(reader: ImageReader, encoder: Encoder, rows: list[Row]) -> Encoded:
    batch = reader.read(rows)
    started = time.perf_counter()
    flat = reader.pixels_on(encoder.device, batch).split(_ON_A_CORE)  # (b, H, W, 3) each
    features = torch.cat([encoder.encode_pixels(part) for part in flat]) if batch.kept else None
    return _encoded(batch, features, encoder.columns, time.perf_counter() - started)


def _encoded(batch: Batch, features: torch.Tensor | None, columns: int, seconds: float) -> Encoded:
    """Puts the features (B * V, D + S W) to their images; None where nothing could be read."""
    views = np.empty((0, 1, columns), np.float32) if features is None else features.cpu().numpy()
    shaped = views.reshape(len(batch.kept), -1, columns) if batch.kept else views  # (B, V, D + S W)
    times = {"read": batch.seconds, "encode": seconds}
    return Encoded(batch.kept, batch.skipped, shaped, batch.scale, batch.flip, times)


def _beside_readers(
    reader: ImageReader, encoder: Encoder, batches: Iterable[list[Row]], workers: int
) -> Iterator[Encoded]:
    """The model runs here, one batch behind what is asked of it, so that a GPU never waits for the copy back."""
    gpu = _Gpu(encoder)
    under_way: tuple[Batch, torch.Tensor | None] | None = None
    started = time.perf_counter()
    try:
        for batch in _read(reader, batches, workers):
            next_up = batch, gpu.encode(reader.pixels_on(encoder.device, batch)) if batch.kept else None
            if under_way is not None:
                yield _encoded(*under_way, encoder.columns, time.perf_counter() - started)
            under_way, started = next_up, time.perf_counter()
        if under_way is not None:
            yield _encoded(*under_way, encoder.columns, time.perf_counter() - started)
    except RuntimeError as error:
        if not _is_dead_reader(error):
            raise
        raise _reader_died(error) from error


class _Gpu:
    """All views of a batch at once, as long as they fit into the GPU's memory."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.most = encoder, 0

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Views (B * V, H, W, 3) to features (B * V, D + S W) on the device."""
        most = self.most or len(pixels)
        while True:
            try:
                return torch.cat([self.encoder.encode_pixels(part) for part in pixels.split(most)])
            except torch.OutOfMemoryError as error:
                if most == 1:
                    raise InputError("a single image is too large for the GPU's memory; use --device cpu") from error
                most = self._halved(most)

    def _halved(self, most: int) -> int:
        """Half as many from now on; the user is told once."""
        if not self.most:
            warnings.warn(
                f"{most} images at once do not fit into the GPU's memory; going on with fewer, results stay the same "
                "to float rounding (a smaller --batch-size avoids this)",
                stacklevel=2,
            )
        self.most = max(1, most // 2)
        torch.cuda.empty_cache()
        return self.most


@dataclass(frozen=True)
class _Reading(Dataset[Batch]):
    """A reader as torch's loader wants it: the index is the batch itself."""

    reader: ImageReader
    shared: bool  # pixels travel in shared memory (fast), or through a pipe

    def __getitem__(self, rows: Any) -> Batch:
        batch = self.reader.read(rows)
        # a tensor travels in shared memory by itself; who receives it makes a tensor of either
        pixels: Any = torch.from_numpy(batch.pixels) if self.shared else batch.pixels
        return batch._replace(pixels=pixels)


def _read(reader: ImageReader, batches: Iterable[list[Row]], workers: int) -> Iterator[Batch]:
    """Batches from reader processes, in order; on leaving, the processes are gone."""
    first, batches = _peeked(batches)
    loader: DataLoader[Batch] = DataLoader(
        _Reading(reader, _fits_shared_memory(reader, len(first), workers)),
        sampler=batches,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=_AHEAD if workers else None,
        worker_init_fn=_leave_interrupts_to_parent,
    )
    iterator = iter(loader)
    try:
        yield from iterator
    finally:
        getattr(iterator, "_shutdown_workers", lambda: None)()


def _as_it_is(batch: Any) -> Any:
    """A batch needs nothing of torch's loader, which would make tensors and lists of all that it holds."""
    return batch


def _peeked(batches: Iterable[list[Row]]) -> tuple[Sequence[Row], Any]:
    """The first batch, for its size, and all of them."""
    iterator = iter(batches)
    first = next(iterator, [])

    def everything() -> Iterator[list[Row]]:
        if first:
            yield first
        yield from iterator

    return first, everything()


def _fits_shared_memory(reader: ImageReader, batch_size: int, workers: int) -> bool:
    """Whether all batches under way fit into /dev/shm with room to spare; true where there is no such folder.

    Where that memory is small, as in containers, a reader would die of a bus error.
    """
    if not workers or not os.path.isdir("/dev/shm"):
        return True
    wanted = workers * (_AHEAD + 1) * batch_size * reader.image_bytes
    return shutil.disk_usage("/dev/shm").free > 1.25 * wanted


def _leave_interrupts_to_parent(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the parent ends its readers in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _is_dead_reader(error: RuntimeError) -> bool:
    """Whether torch says that a reader process is gone; what a reader itself raised comes with its traceback."""
    return "DataLoader worker" in str(error) and "Traceback" not in str(error)


def _reader_died(error: RuntimeError) -> InputError:
    """The sentence for a reader process that the system ended."""
    return InputError(
        f"a reader process ended ({str(error).partition(chr(10))[0][:120]}), most likely for want of memory; use fewer "
        "--workers or a smaller --batch-size and run again: finished shards stay"
    )
