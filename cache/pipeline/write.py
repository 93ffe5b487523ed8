"""Encoded batches to shards: joined, packed and written beside the encoding, in a thread of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.shard import Shard, ShardRecord, shard_path, write_shard

if TYPE_CHECKING:
    from ulfine_fast.cache.manifest import Manifest
    from ulfine_fast.cache.pipeline.encode import Encoded
    from ulfine_fast.cache.sources.rows import Part, Row


@dataclass
class OpenPart:
    """What has been encoded of a part.

    Attributes:
        part: what the shard covers. rows: how many source rows that is.
        left: batches that are still to come.
    """

    part: Part
    rows: int
    left: int
    kept: list[Row] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    features: list[NDArray[Any]] = field(default_factory=list)
    scale: list[NDArray[np.float32]] = field(default_factory=list)
    flip: list[NDArray[np.uint8]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"read": 0.0, "encode": 0.0})

    def add(self, batch: Encoded, dtype: str) -> None:
        """Takes the next batch.

        Raises:
            InputError: a feature that is not finite in the stored type; names the image.
        """
        self.left -= 1
        self.skipped += [{"id": row.id, "reason": reason} for row, reason in batch.skipped]
        for stage, seconds in batch.seconds.items():
            self.seconds[stage] += seconds
        if not batch.kept:  # the arrays of no image have no shape to speak of
            return
        features = batch.features.astype(dtype)  # (B, V, D + S W)
        _refuse_not_finite(features, batch.kept)
        self.kept += batch.kept
        self.features.append(features)
        self.scale.append(batch.scale)
        self.flip.append(batch.flip)

    def shard(self, manifest: Manifest) -> Shard:
        """The rows together; n is 0 where no image could be read."""
        layout = manifest.layout(self.part.split)
        views, n = layout.weak + layout.strong, len(self.kept)
        # Gives the result its shape and type where there is nothing to join.
        empty = np.empty((0, layout.views, layout.columns), dtype=layout.array_dtype)
        features, tokens = layout.split_columns(np.concatenate([empty, *self.features]))  # (n, V, D), (n, V, S, W)
        return Shard(
            split=self.part.split,
            ids=[row.id for row in self.kept],
            labels=np.asarray([row.label for row in self.kept], dtype=np.int32),
            plain=features[:, :1],
            weak=features[:, 1 : 1 + layout.weak],
            strong=features[:, 1 + layout.weak :],
            scale=np.concatenate(self.scale).astype(np.float32) if n else np.empty((0, views), np.float32),
            flip=np.concatenate(self.flip).astype(np.uint8) if n else np.empty((0, views), np.uint8),
            view_seed=manifest.views["seed"],
            quantized=layout.dtype == "int8",
            tokens=tokens,
        )


class ShardWriter:
    """Writes one shard while the next is encoded; two are never in memory beside that.

    Used as a context: on leaving, what was handed over is on the disk, whatever ended the work.

    Args:
        out: the cache's folder.
        manifest: what the shards look like.
        on_shard: called with the record of each finished shard, from the thread that hands parts over.
    """

    def __init__(self, out: Path, manifest: Manifest, on_shard: Callable[[ShardRecord], None]) -> None:
        self.out, self.manifest, self.on_shard = out, manifest, on_shard
        self._pool = ThreadPoolExecutor(1)
        self._under_way: Future[ShardRecord] | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self._collect()
        finally:
            self._pool.shutdown()

    def write(self, part: OpenPart) -> None:
        """Hands a part over, once the one before is written; raises what its writing raised."""
        self._collect()
        self._under_way = self._pool.submit(_write, self.out, self.manifest, part)

    def _collect(self) -> None:
        if self._under_way is not None:
            future, self._under_way = self._under_way, None
            self.on_shard(future.result())


def _write(out: Path, manifest: Manifest, open_part: OpenPart) -> ShardRecord:
    """Writes the shard, then its record: only that makes it count."""
    started = time.perf_counter()
    part, shard = open_part.part, open_part.shard(manifest)
    path = shard_path(out, part.number)
    digest, size = write_shard(path, shard)
    seconds = {stage: round(spent, 4) for stage, spent in open_part.seconds.items()}
    seconds["write"] = round(time.perf_counter() - started, 4)
    record = ShardRecord(
        shard=part.number,
        split=part.split,
        first_row=part.first_row or 0,
        rows_read=open_part.rows,
        rows=len(shard.ids),
        sha256=digest,
        bytes=size,
        seconds=seconds,
        skipped=open_part.skipped,
    )
    record.write(path.with_suffix(".json"))
    return record


def _refuse_not_finite(features: NDArray[Any], rows: list[Row]) -> None:
    # After the cast: what float16 cannot hold would be found only by the reader of the cache.
    bad = np.flatnonzero(~np.isfinite(features).all(axis=(1, 2)))
    if len(bad):
        raise InputError(
            f"the model gives features that are not finite for the image {rows[int(bad[0])].id!r}; use --precision "
            "fp32, or leave the image out; finished shards stay"
        )
