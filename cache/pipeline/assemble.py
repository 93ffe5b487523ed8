"""Caches of features that are already there, merged or imported: a folder is filled shard by shard, as `extract` does.

The manifest is written first, a shard's record last; what is finished survives any interruption.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ulfine_fast.cache import manifest as manifests
from ulfine_fast.cache.io import lock
from ulfine_fast.cache.io.errors import CacheMismatch, InputError
from ulfine_fast.cache.io.files import make_folder
from ulfine_fast.cache.io.progress import progress_bar
from ulfine_fast.cache.manifest import Manifest
from ulfine_fast.cache.pipeline.contents import finished, refuse_strange_folder
from ulfine_fast.cache.shard import Shard, ShardRecord, shard_path, write_shard
from ulfine_fast.cache.sources.rows import Part
from ulfine_fast.cache.text import TextFeatures, read_text, write_text


@dataclass(frozen=True, slots=True)
class Piece:
    """A shard to be.

    Attributes:
        part: its number, split and rows.
        make: gives its content; called once, when its turn has come.
        skipped: {"id", "reason"} of each of the part's rows that `make` does not give.
    """

    part: Part
    make: Callable[[], Shard]
    skipped: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Assembled:
    """What a call of `assemble` did.

    Attributes:
        out: the cache's folder.
        images: rows in the cache now. classes: K.
        shards: in the cache. kept: those that were finished and intact before this call.
        seconds: wall seconds.
    """

    out: Path
    images: int
    classes: int
    shards: int
    kept: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The summary in JSON's types."""
        return {**{one.name: getattr(self, one.name) for one in fields(self)}, "out": str(self.out)}


def assemble(
    out: Path, manifest: Manifest, text: TextFeatures, pieces: Sequence[Piece], *, progress: bool | None = None
) -> Assembled:
    """Fills a cache folder; one shard at a time is in memory.

    Args:
        out: new, empty, or a cache of this very manifest, which is continued.
        manifest: what the features are.
        text: features of the classes.
        pieces: all shards in order.
        progress: whether to draw a bar on stderr; by default where that is a terminal.

    Raises:
        InputError: a folder that holds something else or that another process writes to, or a file system that
            refuses; and what `make` raises.
        CacheMismatch: the folder holds another cache.
        KeyboardInterrupt: Ctrl-C; its text says what is finished and how to continue.
    """
    refuse_strange_folder(out)
    with lock.writer(out):
        _prepare(out, manifest, text)
        return _fill(out, manifest, pieces, progress)


def _fill(out: Path, manifest: Manifest, pieces: Sequence[Piece], progress: bool | None) -> Assembled:
    """Writes the shards that are missing."""
    started = time.perf_counter()
    records = {p.part.number: record for p in pieces if (record := finished(out, p.part)) is not None}
    kept = len(records)
    try:
        with progress_bar(progress) as bar:
            total = sum(piece.part.rows or 0 for piece in pieces)
            done = sum(record.rows_read for record in records.values())
            task = bar.add_task("write", total=total, completed=done, unit="rows", note="")
            for piece in (one for one in pieces if one.part.number not in records):
                records[piece.part.number] = _put(out, piece)
                bar.update(task, advance=piece.part.rows or 0)
    except KeyboardInterrupt:
        said = f"stopped: {len(records)} of {len(pieces)} shards are finished in {out}"
        raise KeyboardInterrupt(f"{said}; run the same command again to continue") from None
    rows = sum(record.rows for record in records.values())
    return Assembled(out, rows, len(manifest.class_names), len(records), kept, round(time.perf_counter() - started, 4))


def _prepare(out: Path, manifest: Manifest, text: TextFeatures) -> None:
    """Leaves `out` with this manifest and text, and nothing of another cache."""
    make_folder(out / "shards")
    if (out / manifests.NAME).exists():
        _refuse_other(out, manifest)
    else:
        manifest.write(out)
    try:
        read_text(out, manifest)
    except InputError:
        write_text(out, text)


def _refuse_other(out: Path, manifest: Manifest) -> None:
    try:
        Manifest.read(out).refuse_mismatch(manifest)
    except CacheMismatch as error:
        way_out = f"{out} holds another cache, so choose another folder or remove it"
        raise CacheMismatch(error.field, error.found, error.wanted, way_out) from error


def _put(out: Path, piece: Piece) -> ShardRecord:
    """Writes the shard, then its record: only that makes it count."""
    started = time.perf_counter()
    part, shard = piece.part, piece.make()
    assert part.first_row is not None
    path = shard_path(out, part.number)
    digest, size = write_shard(path, shard)
    record = ShardRecord(
        shard=part.number,
        split=part.split,
        first_row=part.first_row,
        rows_read=len(shard.ids) + len(piece.skipped),
        rows=len(shard.ids),
        sha256=digest,
        bytes=size,
        seconds={"write": round(time.perf_counter() - started, 4)},
        skipped=piece.skipped,
    )
    record.write(path.with_suffix(".json"))
    return record
