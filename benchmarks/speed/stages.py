"""How fast a machine does each stage of an extraction alone, and the rate that follows for all of them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from ulfine_fast.cache.models.encoder import Encoder
from ulfine_fast.cache.pipeline.plan import batches_of
from ulfine_fast.cache.pipeline.read import ImageReader
from ulfine_fast.cache.pipeline.threads import cores, map_on_cores
from ulfine_fast.cache.pipeline.views import ViewRecipe
from ulfine_fast.cache.shard import Shard, write_shard
from ulfine_fast.cache.sources import ListedSource

_BATCH = 16


def stage_rates(source: ListedSource, encoder: Encoder, *, device_shares_cores: bool = True) -> dict[str, float]:
    """Images per second of each stage, with all cores at it, and of the whole.

    Args:
        source: images; each is read twice, so that files are in memory for all stages.
        encoder: the model, on the processor.
        device_shares_cores: whether the stages take the cores from one another, so that their times add up; otherwise
            the slowest stage is the bound.

    Returns:
        "read" (open, decode, resize, crop), "encode", "write", and "bound".
    """
    reader = ImageReader.for_encoder(source, encoder, ViewRecipe(weak=0, strong=0))
    batches = batches_of(source.rows, _BATCH)
    list(map_on_cores(reader.read, batches, cores()))
    rates = {
        "read": _rate(map_on_cores(reader.read, batches, cores()), len(source.rows)),
        "encode": _encode_rate(encoder, len(source.rows)),
        "write": write_rate(encoder.spec.dim, len(source.rows)),
    }
    times = [1 / rate for rate in rates.values()]
    return {**rates, "bound": 1 / (sum(times) if device_shares_cores else max(times))}


def _encode_rate(encoder: Encoder, count: int) -> float:
    """The better of two ways: a batch on each core, or all cores on each batch."""
    size = encoder.spec.image_size
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (_BATCH, size, size, 3), dtype=np.uint8))
    batches = [pixels] * max(2 * cores(), count // _BATCH)
    ways: list[Callable[[], Iterable[torch.Tensor]]] = [
        lambda: map_on_cores(encoder.encode_pixels, batches, cores()),
        lambda: map(encoder.encode_pixels, [torch.cat([pixels, pixels])] * (len(batches) // 2)),
    ]
    for way in ways:  # warm up: buffers and kernels are chosen in the first batches
        list(islice(way(), 2 * cores()))
    return max(_rate(way(), _BATCH * (len(batches) // 2 * 2)) for way in ways)


def write_rate(dim: int, count: int, drawn: int = 0) -> float:
    """Images per second of a shard with the plain view, and so many weak and strong ones each, flushed to the disk."""
    views = np.ones((count, drawn, dim), np.float16)
    shard = Shard(
        split="train",
        ids=[f"class/{number}" for number in range(count)],
        labels=np.zeros(count, np.int32),
        plain=np.ones((count, 1, dim), np.float16),
        weak=views,
        strong=views,
        scale=np.ones((count, 2 * drawn), np.float32),
        flip=np.zeros((count, 2 * drawn), np.uint8),
    )
    with tempfile.TemporaryDirectory() as folder:
        return _rate((write_shard(path, shard) for path in [Path(folder) / "00000.h5"]), count)


def _rate(work: Iterable[object], count: int) -> float:
    started = time.perf_counter()
    for _ in work:
        pass
    return count / (time.perf_counter() - started)
