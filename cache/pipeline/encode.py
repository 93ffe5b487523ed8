"""Images to shards: rows read, encoded in batches and put together part by part.

Threads read and encode on a processor; beside a GPU, processes read and the model runs here.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from ulfine_fast.cache.io.device import current_device
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.prefetch import prefetch
from ulfine_fast.cache.pipeline.fill import MakeShards, RowsDone, ShardContent, ShardWriter
from ulfine_fast.cache.pipeline.plan import batches_of, is_listed, open_parts
from ulfine_fast.cache.pipeline.read import Batch, ImageReader
from ulfine_fast.cache.pipeline.threads import cores, map_on_cores
from ulfine_fast.cache.shard import Shard, ShardRecord

if TYPE_CHECKING:
    from ulfine_fast.cache.manifest import Manifest
    from ulfine_fast.cache.models.encoder import Encoder
    from ulfine_fast.cache.pipeline.views import ViewRecipe
    from ulfine_fast.cache.sources.rows import Part, Row, Source

# Images in one call of the model on a processor: more do not fit into its caches (Lite0 at 224 pixels: 190 images/s
# with 16 on two cores, 150 with 32, 87 with 64), fewer give small products.
_IMAGES_ON_CORE = 16
_AHEAD = 2  # batches that each reader process prepares ahead


# -- parts to shards


@dataclass(frozen=True)
class EncodeJob:
    """What to encode and the cache to write; it holds no model, so that it can travel to other processes.

    Attributes:
        source: of the images.
        recipe: of the drawn views.
        out: the cache's folder.
        manifest: what its features are.
    """

    source: Source
    recipe: ViewRecipe
    out: Path
    manifest: Manifest


class Engine(Protocol):
    """Encodes parts of a source and writes their shards, in this process (`encode_parts`) or in others."""

    def __call__(
        self,
        job: EncodeJob,
        encoder: Encoder,
        parts: Sequence[Part],
        *,
        workers: int | None,
        on_rows: Callable[[RowsDone], None],
        on_shard: Callable[[ShardRecord], None],
    ) -> None:
        """See `encode_parts`."""


def image_shards(
    out: Path,
    source: Source,
    recipe: ViewRecipe,
    encoder: Encoder,
    *,
    workers: int | None = None,
    engine: Engine | None = None,
) -> MakeShards:
    """Makes shards of images.

    Args:
        out: the cache's folder.
        source: of the images.
        recipe: of the drawn views.
        encoder: the frozen model.
        workers: see `encoded`.
        engine: what encodes the parts; by default this process (`encode_parts`).
    """

    def make(
        parts: Sequence[Part],
        *,
        manifest: Manifest,
        on_rows: Callable[[RowsDone], None],
        on_shard: Callable[[ShardRecord], None],
    ) -> None:
        job = EncodeJob(source, recipe, out, manifest)
        (engine or encode_parts)(job, encoder, parts, workers=workers, on_rows=on_rows, on_shard=on_shard)

    return make


def encode_parts(
    job: EncodeJob,
    encoder: Encoder,
    parts: Sequence[Part],
    *,
    workers: int | None,
    on_rows: Callable[[RowsDone], None],
    on_shard: Callable[[ShardRecord], None],
) -> None:
    """Reads and encodes the images of some parts, in order, and writes the shard of each, its record last.

    Args:
        job: what to encode.
        encoder: the model that the job's manifest names.
        parts: which parts of the source.
        workers: see `encoded`.
        on_rows: called after each encoded batch, with what became of its rows.
        on_shard: called with each finished shard's record.

    Raises:
        InputError: features that are not finite, a file system that refuses, a part that cannot be read to its end.
    """
    reader = ImageReader.for_encoder(job.source, encoder, job.recipe)
    dtype = job.manifest.layout("train").array_dtype
    # Parts under way, in order: batches are drawn a few ahead of what is encoded, perhaps those of several parts.
    under_way: deque[_OpenPart] = deque()

    def batches() -> Iterator[list[Row]]:
        for part, rows in open_parts(job.source, parts):
            part_batches = batches_of(rows, job.manifest.batch_size)
            under_way.append(_OpenPart(part, len(part_batches)))
            yield from part_batches

    def close(part: Part) -> None:
        if not is_listed(job.source):
            job.source.close(part)

    def write_finished(writer: ShardWriter) -> None:
        while under_way and under_way[0].batches_left == 0:
            finished = under_way.popleft()
            close(finished.part)
            writer.write(finished.part, partial(finished.content, job.manifest))

    try:
        with current_device(encoder.device), ShardWriter(job.out, job.manifest, on_shard) as writer:
            with closing(encoded(reader, encoder, batches(), workers=workers)) as stream:
                for batch in stream:
                    # a part without a single row brings no batch
                    write_finished(writer)
                    under_way[0].add(batch, dtype)
                    on_rows(batch.done)
                    write_finished(writer)
            write_finished(writer)
    finally:
        for unfinished in under_way:
            close(unfinished.part)


@dataclass
class _OpenPart:
    """What has been encoded of a part.

    Attributes:
        part: what the shard covers.
        batches_left: batches that are still to come.
        kept: rows whose images could be read.
        skipped: {"id", "reason"} of the others.
        features: (B, V, D + S W) of each batch, in the stored type.
        scale: (B, V - 1) of each batch.
        flip: (B, V - 1) of each batch.
        seconds: of work by stage.
    """

    part: Part
    batches_left: int
    kept: list[Row] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    features: list[NDArray[Any]] = field(default_factory=list)
    scale: list[NDArray[np.float32]] = field(default_factory=list)
    flip: list[NDArray[np.uint8]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"read": 0.0, "encode": 0.0})

    def add(self, batch: EncodedBatch, dtype: str) -> None:
        """Takes the next batch.

        Raises:
            InputError: a feature that is not finite in the stored type; names the image.
        """
        self.batches_left -= 1
        self.skipped += batch.done.skipped
        for stage, seconds in batch.seconds.items():
            self.seconds[stage] += seconds
        if not batch.kept:  # the arrays of a batch without images have no number of views
            return
        features = batch.features.astype(dtype)  # (B, V, D + S W)
        # After the cast: what float16 cannot hold would be noticed only by the reader of the cache.
        bad = np.flatnonzero(~np.isfinite(features).all(axis=(1, 2)))
        if len(bad):
            raise InputError(
                f"the model gives features that are not finite for the image {batch.kept[int(bad[0])].id!r}; use "
                "--precision fp32, or leave the image out; finished shards stay"
            )
        self.kept += batch.kept
        self.features.append(features)
        self.scale.append(batch.scale)
        self.flip.append(batch.flip)

    def content(self, manifest: Manifest) -> ShardContent:
        """The rows of all batches in one shard; n is 0 where no image could be read."""
        layout = manifest.layout(self.part.split)
        # Gives the result its shape and type where there is nothing to join.
        no_rows = np.empty((0, layout.views, layout.columns), dtype=layout.array_dtype)
        no_views = np.empty((0, layout.weak + layout.strong))
        features, tokens = layout.split_columns(np.concatenate([no_rows, *self.features]))  # (n, V, D), (n, V, S, W)
        shard = Shard(
            split=self.part.split,
            ids=[row.id for row in self.kept],
            labels=np.asarray([row.label for row in self.kept], dtype=np.int32),
            plain=features[:, :1],
            weak=features[:, 1 : 1 + layout.weak],
            strong=features[:, 1 + layout.weak :],
            scale=np.concatenate([no_views.astype(np.float32), *self.scale]),
            flip=np.concatenate([no_views.astype(np.uint8), *self.flip]),
            view_seed=manifest.views["seed"],
            quantized=layout.dtype == "int8",
            tokens=tokens,
        )
        return ShardContent(shard, self.skipped, self.seconds)


# -- batches to features


class EncodedBatch(NamedTuple):
    """Features of a batch of rows.

    Attributes:
        kept: the B rows whose images could be read.
        skipped: (row, reason) of the others.
        features: float32 (B, V, D + S W), rows of length 1 and behind each its tokens, if any; plain view first, then
            weak, then strong ones.
        scale: float32 (B, V - 1), of the drawn views.
        flip: uint8 (B, V - 1), of the drawn views.
        seconds: of work on "read" and "encode"; where several threads work together they add up.
    """

    kept: list[Row]
    skipped: list[tuple[Row, str]]
    features: NDArray[np.float32]
    scale: NDArray[np.float32]
    flip: NDArray[np.uint8]
    seconds: dict[str, float]

    @property
    def done(self) -> RowsDone:
        """The same without the features."""
        skipped = [{"id": row.id, "reason": reason} for row, reason in self.skipped]
        return RowsDone(len(self.kept) + len(self.skipped), skipped, self.seconds)


def encoded(
    reader: ImageReader, encoder: Encoder, batches: Iterable[list[Row]], *, workers: int | None = None
) -> Generator[EncodedBatch, None, None]:
    """Reads and encodes batches, in their order.

    Args:
        reader: makes the views.
        encoder: the frozen model.
        batches: rows of one split each; drawn a few ahead, never all of them.
        workers: on a processor threads, which read and encode a batch each; elsewhere processes, which read. 0 for
            none; by default one for each core, of processes two fewer and at most 16.

    Raises:
        InputError: a reader process ended, or a single image is too large for the GPU's memory.
    """
    count = default_workers(encoder.device) if workers is None else workers
    if encoder.device.type == "cpu":
        yield from map_on_cores(lambda rows: _encode_on_core(reader, encoder, rows), batches, count)
    else:
        yield from _encode_on_device(reader, encoder, batches, count)


def default_workers(device: torch.device) -> int:
    """Threads or processes where the user gives no number."""
    # two cores launch the GPU's work and pin its memory
    return cores() if device.type == "cpu" else max(1, min(cores() - 2, 16))


def _encode_on_core(reader: ImageReader, encoder: Encoder, rows: list[Row]) -> EncodedBatch:
    batch = reader.read(rows)
    started = time.perf_counter()
    pieces = reader.pixels_on(encoder.device, batch).split(_IMAGES_ON_CORE)  # (b, H, W, 3) each
    features = torch.cat([encoder.encode_pixels(pixels) for pixels in pieces]) if batch.kept else None
    return _with_features(batch, features, encoder.columns, time.perf_counter() - started)


def _encode_on_device(
    reader: ImageReader, encoder: Encoder, batches: Iterable[list[Row]], workers: int
) -> Iterator[EncodedBatch]:
    """The model runs here, one batch behind what was started on it, so that a GPU never waits for the copy back."""
    model = _DeviceModel(encoder)
    running: tuple[Batch, _CopyToHost | None] | None = None
    started = time.perf_counter()
    for batch in _read_in_processes(reader, batches, workers):
        # the copy is queued before the next batch, or it would wait for that one too
        copy = _CopyToHost(model.encode(reader, batch)) if batch.kept else None
        if running is not None:
            yield _from_device(*running, encoder.columns, started)
        running = batch, copy
        started = time.perf_counter()
    if running is not None:
        yield _from_device(*running, encoder.columns, started)


class _CopyToHost:
    """Features on their way from a GPU to main memory; nothing waits until they are asked for.

    Args:
        features: on the device, complete once the work queued so far is done.
    """

    def __init__(self, features: torch.Tensor) -> None:
        self._ready: torch.cuda.Event | None = None
        if features.is_cuda:
            self._features = features.to("cpu", non_blocking=True)  # to pinned memory
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(features.device))
        else:
            self._features = features.cpu()

    def wait(self) -> torch.Tensor:
        """The features, when they are there."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._features


def _from_device(batch: Batch, copy: _CopyToHost | None, columns: int, started: float) -> EncodedBatch:
    """A batch whose features may still be on their way; `started` is when its work was started."""
    features = None if copy is None else copy.wait()
    return _with_features(batch, features, columns, time.perf_counter() - started)


def _with_features(batch: Batch, features: torch.Tensor | None, columns: int, seconds: float) -> EncodedBatch:
    """A batch and its features (B * V, D + S W); None where no image could be read."""
    if features is None:
        by_image = np.empty((0, 1, columns), np.float32)
    else:
        by_image = features.numpy().reshape(len(batch.kept), -1, columns)  # (B, V, D + S W)
    times = {"read": batch.seconds, "encode": seconds}
    return EncodedBatch(batch.kept, batch.skipped, by_image, batch.scale, batch.flip, times)


class _DeviceModel:
    """The encoder on a GPU: all views of a batch together, for as long as they fit into its memory."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.limit = 0  # images in one call; 0 for no limit

    def encode(self, reader: ImageReader, batch: Batch) -> torch.Tensor:
        """A batch to the features of its views (B * V, D + S W) on the device."""
        total = len(batch.kept) * batch.views
        while True:
            count = self.limit or total
            try:
                return torch.cat(list(self._pieces(reader, batch, count)))
            except torch.OutOfMemoryError as error:
                if count == 1:
                    raise InputError("a single image is too large for the GPU's memory; use --device cpu") from error
            # From now on half as many; the user is warned once.
            if not self.limit:
                warnings.warn(
                    f"{count} images together do not fit into the GPU's memory; going on with fewer, results stay the "
                    "same to float rounding (a smaller --batch-size avoids this)",
                    stacklevel=2,
                )
            self.limit = max(1, count // 2)
            torch.cuda.empty_cache()

    def _pieces(self, reader: ImageReader, batch: Batch, count: int) -> Iterator[torch.Tensor]:
        """Features of at most `count` views at a time, which are made on the device for as many images at a time."""
        images = max(1, count // batch.views)
        for start in range(0, len(batch.kept), images):
            pixels = reader.pixels_on(self.encoder.device, batch.pixels_of(start, start + images))
            for piece in pixels.split(count):
                yield self.encoder.encode_pixels(piece)


# -- readers


def read_batches(
    reader: ImageReader, batches: Iterable[list[Row]], device: torch.device, *, workers: int | None = None
) -> Generator[Batch, None, None]:
    """Reads batches for a model that computes in this thread, in their order and a few ahead.

    Args:
        reader: makes the views.
        batches: rows, all of splits with views or all of splits without.
        device: of the model. For a processor threads read, and PyTorch keeps its own; else processes do.
        workers: threads or processes; by default as of `encoded`.

    Raises:
        InputError: a reader process ended.
    """
    count = default_workers(device) if workers is None else workers
    if device.type == "cpu":
        yield from prefetch(reader.read, batches, threads=count, in_hand=count + _AHEAD)
    else:
        yield from _read_in_processes(reader, batches, count)


@dataclass(frozen=True)
class _BatchReader(Dataset[Batch]):
    """A reader as torch's loader wants it: the index is the batch itself.

    Attributes:
        reader: makes the views.
        shared: whether pixels travel in shared memory (fast), or through a pipe.
    """

    reader: ImageReader
    shared: bool

    def __getitem__(self, rows: Any) -> Batch:
        batch = self.reader.read(rows)
        # a tensor travels in shared memory by itself; the receiver makes a tensor of either
        pixels: Any = torch.from_numpy(batch.pixels) if self.shared else batch.pixels
        return batch._replace(pixels=pixels)


def _read_in_processes(reader: ImageReader, batches: Iterable[list[Row]], workers: int) -> Iterator[Batch]:
    """Batches from reader processes, in order; when it ends, the processes are gone."""
    iterator = iter(batches)
    first = list(islice(iterator, 1))  # tells the size of a batch
    batch_size = len(first[0]) if first else 0
    loader: DataLoader[Batch] = DataLoader(
        _BatchReader(reader, _fits_shared_memory(reader, batch_size, workers)),
        sampler=chain(first, iterator),  # any iterable of indices will do
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=_AHEAD if workers else None,
        worker_init_fn=_ignore_interrupts,
    )
    loading = iter(loader)
    try:
        yield from loading
    except RuntimeError as error:
        # torch says so when a reader process is gone; what a reader itself raised comes with its traceback
        if "DataLoader worker" not in str(error) or "Traceback" in str(error):
            raise
        raise InputError(
            f"a reader process ended ({str(error).partition(chr(10))[0][:120]}), most likely for want of memory; use "
            "fewer --workers or a smaller --batch-size and run again: what is finished stays"
        ) from error
    finally:
        getattr(loading, "_shutdown_workers", lambda: None)()


def _unchanged(batch: Any) -> Any:
    """Instead of torch's own collation, which would make tensors and lists of all that a batch holds."""
    return batch


def _fits_shared_memory(reader: ImageReader, batch_size: int, workers: int) -> bool:
    """Whether all batches under way fit into /dev/shm with room to spare; true where there is no such folder.

    Where that memory is small, as in containers, a reader would die of a bus error.
    """
    if not workers or not os.path.isdir("/dev/shm"):
        return True
    wanted = workers * (_AHEAD + 1) * batch_size * reader.image_bytes
    return shutil.disk_usage("/dev/shm").free > 1.25 * wanted


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the parent ends its readers in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
