"""A cache folder filled shard by shard: the one pipeline of extract, append, merge and import.

The manifest comes first, and a shard's record after the shard. So what is finished survives a kill at any instant, and
the same call continues with what is missing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ulfine_fast.cache.io import lock
from ulfine_fast.cache.io.errors import CacheMismatch, InputError
from ulfine_fast.cache.io.progress import progress_bar
from ulfine_fast.cache.pipeline.folder import finished_shard, prepare_folder, refuse_foreign_folder
from ulfine_fast.cache.shard import Shard, ShardRecord, shard_path, write_shard

if TYPE_CHECKING:
    from ulfine_fast.cache.manifest import Manifest
    from ulfine_fast.cache.sources.rows import Part
    from ulfine_fast.cache.text import TextFeatures


@dataclass(frozen=True)
class FillSummary:
    """What a call that fills a cache did.

    Attributes:
        out: the cache's folder.
        images: rows in the cache now.
        encoded: rows that this call encoded; rows copied by a merge or an import do not count.
        shards: finished shards in the cache.
        kept: shards that were finished and intact before this call.
        skipped: {"id", "reason"} of every image left out; of an append, only those of the new images.
        seconds: wall seconds of this call's reading, encoding and writing.
        stages: seconds of work by stage; where threads work together these add up to more than the wall seconds.
        classes: classes that came with this call: all K of a new cache, or those that an append added.
        known: images of an appended source that were in the cache already and stay as they are.
        normalised: rows of an import (views included) that had another length and got length 1.
    """

    out: Path
    images: int
    encoded: int
    shards: int
    kept: int
    skipped: list[dict[str, str]]
    seconds: float
    stages: dict[str, float]
    classes: int
    known: int = 0
    normalised: int = 0

    @property
    def images_per_second(self) -> float:
        """Rate of encoding of this call, 0 where it had nothing to encode."""
        return self.encoded / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The summary in JSON's types."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {**values, "out": str(self.out), "images_per_second": self.images_per_second}


class RowsDone(NamedTuple):
    """What became of some rows of a part, without their features.

    Attributes:
        rows: how many.
        skipped: {"id", "reason"} of those whose image could not be read.
        seconds: of work by stage.
    """

    rows: int
    skipped: list[dict[str, str]]
    seconds: dict[str, float]


class MakeShards(Protocol):
    """Makes the shards of some parts, in order, and writes each, its record last."""

    def __call__(
        self,
        parts: Sequence[Part],
        *,
        manifest: Manifest,
        on_rows: Callable[[RowsDone], None],
        on_shard: Callable[[ShardRecord], None],
    ) -> None:
        """Calls `on_rows` as rows are done, and `on_shard` with the record of each finished shard.

        `manifest` is that of the folder, in its format version.
        """


@dataclass(frozen=True)
class SkipLimit:
    """How many images may be unreadable.

    Attributes:
        fraction: of all images, 0..1.
        shard_size: of a stream's first rows any fraction may be unreadable, so it counts from this many rows on.
        fix: what the user can do, part of the sentence.
    """

    fraction: float
    shard_size: int
    fix: str

    def check(self, count: int, rows: int, first: dict[str, str]) -> None:
        """Raises InputError where `count` of `rows` images are too many; names the first one."""
        if count > self.fraction * rows:
            raise InputError(
                f"{count} of {rows} images cannot be read so far, more than the fraction of {self.fraction:g} that may "
                f"be skipped (the first: {first['id']}: {first['reason']}); {self.fix}; finished shards stay"
            )


def create_cache(
    out: Path,
    manifest: Manifest,
    parts: Sequence[Part],
    make_shards: MakeShards,
    *,
    text: Callable[[], TextFeatures],
    overwrite: bool = False,
    mismatch_fix: str | None = None,
    label: str = "write",
    skip_limit: SkipLimit | None = None,
    progress: bool | None = None,
) -> FillSummary:
    """Makes a cache, or continues one with the same manifest.

    Args:
        out: new, empty, or a cache.
        manifest: what the features are.
        parts: all of the cache, one for each shard, in order.
        make_shards: makes the shards that are missing.
        text: makes the text features of the classes, where they are missing.
        overwrite: whether a cache in `out` is deleted first.
        mismatch_fix: what to do where `out` holds another cache, the end of that sentence.
        label: what the progress bar says.
        skip_limit: how many images may be unreadable; None where that was decided before.
        progress: whether to draw a bar on stderr; by default where that is a terminal.

    Raises:
        InputError: a folder that holds something else or that another process writes to, too many unreadable images,
            a file system that refuses; and what `make_shards` raises.
        CacheMismatch: the folder holds another cache.
        KeyboardInterrupt: Ctrl-C; its text says what is finished and how to continue.
    """
    refuse_foreign_folder(out)
    with lock.writer(out):
        try:
            manifest = prepare_folder(out, manifest, text, overwrite=overwrite)
        except CacheMismatch as error:
            if mismatch_fix is None:
                raise
            raise error.with_fix(mismatch_fix) from error
        return fill_shards(out, manifest, parts, make_shards, label=label, skip_limit=skip_limit, progress=progress)


def fill_shards(
    out: Path,
    manifest: Manifest,
    parts: Sequence[Part],
    make_shards: MakeShards,
    *,
    label: str,
    earlier: Sequence[ShardRecord] = (),
    skip_limit: SkipLimit | None = None,
    progress: bool | None = None,
) -> FillSummary:
    """Makes and writes the shards that are missing in a folder whose lock is held.

    Args:
        out: the cache's folder.
        manifest: see `create_cache`.
        parts: see `create_cache`.
        make_shards: see `create_cache`.
        label: see `create_cache`.
        earlier: records of the shards before these parts, which an append leaves as they are.
        skip_limit: see `create_cache`.
        progress: see `create_cache`.
    """
    # Shards that an earlier call finished stay, and the images that it skipped count: a continued run has the same
    # limit as an undisturbed one.
    records = {part.number: record for part in parts if (record := finished_shard(out, part, manifest)) is not None}
    missing = [part for part in parts if part.number not in records]
    kept = len(records)
    skipped = [row for record in records.values() for row in record.skipped]
    rows_done = sum(record.rows_read for record in records.values())
    total = None if any(part.rows is None for part in parts) else sum(part.rows or 0 for part in parts)
    stages = {"read": 0.0, "encode": 0.0, "write": 0.0}

    def check_skipped() -> None:
        if skip_limit is not None and skipped:
            count = len(skipped) + sum(len(record.skipped) for record in earlier)
            rows = max(rows_done, skip_limit.shard_size) if total is None else total
            skip_limit.check(count, rows + sum(record.rows_read for record in earlier), skipped[0])

    def on_rows(done: RowsDone) -> None:
        nonlocal rows_done
        rows_done += done.rows
        skipped.extend(done.skipped)
        check_skipped()
        for stage, seconds in done.seconds.items():
            stages[stage] += seconds
        work = sum(stages.values()) or 1.0
        note = "  ".join(f"{stage} {seconds / work:.0%}" for stage, seconds in stages.items())
        bar.update(task, advance=done.rows, note=note)

    def on_shard(record: ShardRecord) -> None:
        records[record.shard] = record
        stages["write"] += record.seconds["write"]

    # The missing shards are made; an interrupt stays one for the caller, but says what was saved.
    check_skipped()
    started = time.perf_counter()
    try:
        if missing:
            with progress_bar(progress) as bar:
                task = bar.add_task(label, total=total, completed=rows_done, unit="images", note="")
                make_shards(missing, manifest=manifest, on_rows=on_rows, on_shard=on_shard)
    except KeyboardInterrupt:
        new = "new " if earlier else ""
        raise KeyboardInterrupt(
            f"stopped: {len(records)} of {len(parts)} {new}shards are finished in {out}; "
            "run the same command again to continue"
        ) from None

    ordered = [records[part.number] for part in parts]
    made = [records[part.number] for part in missing]
    return FillSummary(
        out=out,
        images=sum(record.rows for record in [*earlier, *ordered]),
        encoded=sum(record.rows for record in made if "encode" in record.seconds),
        shards=len(earlier) + len(ordered),
        kept=len(earlier) + kept,
        skipped=[row for record in ordered for row in record.skipped],
        seconds=round(time.perf_counter() - started, 4) if missing else 0.0,
        stages={stage: round(seconds, 4) for stage, seconds in stages.items()},
        classes=len(manifest.class_names),
    )


@dataclass(frozen=True)
class ShardContent:
    """What a shard is made of.

    Attributes:
        shard: its rows.
        skipped: {"id", "reason"} of each row of the part that the shard leaves out.
        seconds: of work on it so far, by stage.
    """

    shard: Shard
    skipped: list[dict[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


class ShardWriter:
    """Writes one shard while the next is made; beside these two none is in memory.

    Used as a context: on leaving, what was passed to `write` is on the disk, whatever ended the work.

    Args:
        out: the cache's folder.
        manifest: of the cache, which the records name.
        on_shard: called with the record of each finished shard, from the thread that calls `write`.
    """

    def __init__(self, out: Path, manifest: Manifest, on_shard: Callable[[ShardRecord], None]) -> None:
        self.out = out
        self.manifest = manifest
        self.on_shard = on_shard
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._finished: deque[ShardRecord] = deque()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._pool.shutdown()
        self._report()
        if self._writing is not None:
            self._writing.result()

    def write(self, part: Part, content: Callable[[], ShardContent]) -> None:
        """Writes a shard in a thread, once the one before is written; raises what the writing of that one raised.

        Args:
            part: what the shard covers.
            content: makes the shard; called in that thread.
        """
        if self._writing is not None:
            self._writing.result()
            self._writing = None
            self._report()
        self._writing = self._pool.submit(self._write, part, content)

    def _report(self) -> None:
        while self._finished:
            self.on_shard(self._finished.popleft())

    def _write(self, part: Part, content: Callable[[], ShardContent]) -> None:
        """Writes the shard, then its record: only that makes it count."""
        started = time.perf_counter()
        made = content()
        path = shard_path(self.out, part.number)
        identity = self.manifest.identity_of(part.number)
        checksum, size = write_shard(path, made.shard, identity)
        seconds = {stage: round(spent, 4) for stage, spent in made.seconds.items()}
        seconds["write"] = round(time.perf_counter() - started, 4)
        record = ShardRecord(
            shard=part.number,
            split=part.split,
            first_row=part.first_row or 0,
            rows_read=len(made.shard.ids) + len(made.skipped),
            rows=len(made.shard.ids),
            checksum=checksum,
            bytes=size,
            seconds=seconds,
            skipped=made.skipped,
            manifest=identity,
        )
        record.write(path.with_suffix(".json"))
        # An interrupt of the caller may lose the future, but not this.
        self._finished.append(record)


def ready_shards(out: Path, content: Callable[[Part], ShardContent]) -> MakeShards:
    """Makes shards of features that exist already; one at a time is in memory.

    Args:
        out: the cache's folder.
        content: makes the shard of a part.
    """

    def make(
        parts: Sequence[Part],
        *,
        manifest: Manifest,
        on_rows: Callable[[RowsDone], None],
        on_shard: Callable[[ShardRecord], None],
    ) -> None:
        def finished(record: ShardRecord) -> None:
            on_rows(RowsDone(record.rows_read, record.skipped, {}))
            on_shard(record)

        with ShardWriter(out, manifest, finished) as writer:
            for part in parts:
                writer.write(part, partial(content, part))

    return make
