"""More images and classes for a finished cache; whoever reads it meanwhile sees it as it was.

The new manifest lies beside the old one until its shards and texts are there, and then takes its name in one step.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ulfine_fast._version import __version__
from ulfine_fast.cache.ids import KnownIds, read_ids
from ulfine_fast.cache.io import lock
from ulfine_fast.cache.io.errors import CacheMismatch, InputError
from ulfine_fast.cache.io.files import write_atomically, write_error
from ulfine_fast.cache.io.paths import open_place
from ulfine_fast.cache.io.progress import progress_bar
from ulfine_fast.cache.manifest import Manifest
from ulfine_fast.cache.models.prompts import fill_prompts
from ulfine_fast.cache.pipeline.contents import finished
from ulfine_fast.cache.pipeline.extract import Engine, ExtractSummary, Job, describe, extract_parts
from ulfine_fast.cache.pipeline.plan import cut_rows, identity, is_listed, refuse_bad_rows
from ulfine_fast.cache.pipeline.views import ViewRecipe
from ulfine_fast.cache.shard import ShardRecord, shard_path
from ulfine_fast.cache.sources.rows import UNKNOWN, Part, Row, fingerprint
from ulfine_fast.cache.store import read_records
from ulfine_fast.cache.text import encode_classes, read_text, write_text

if TYPE_CHECKING:
    from PIL import Image

    from ulfine_fast.cache.models.encoder import Encoder
    from ulfine_fast.cache.pipeline.encode import Done
    from ulfine_fast.cache.sources.rows import Source, StreamedSource

PENDING = "manifest.append.json"


@dataclass(frozen=True)
class AppendSummary(ExtractSummary):
    """What a call of `append` did.

    Attributes:
        known: images of the source that were in the cache already and stay as they are.
        classes: classes that the cache did not have.
    """

    known: int = 0
    classes: int = 0


def append(
    source: Source,
    encoder: Encoder,
    cache: str | Path,
    *,
    workers: int | None = None,
    progress: bool | None = None,
    engine: Engine | None = None,
) -> AppendSummary:
    """Adds what a source has more than a cache: images of other ids, and classes of other names.

    Existing rows and classes keep their places; new ones come after them. Everything else, such as prompts, views and
    batch size, is as the cache has it. Where only classes are new, no image is read. While ids are compared, memory
    holds 16 bytes of each row of the cache.

    Args:
        source: images; those whose ids the cache has (also as unreadable ones) are left aside.
        encoder: the model that made the cache.
        cache: folder of a finished cache.
        workers: see `extract`.
        progress: see `extract`.
        engine: see `extract`.

    Raises:
        InputError: no finished cache, one that another process writes to, another append that is unfinished; and what
            `extract` raises.
        CacheMismatch: the encoder is not the one that made the cache.
        KeyboardInterrupt: Ctrl-C; the same call continues.
    """
    out = open_place(cache)
    Manifest.read(out)  # before the lock, which would make a folder of a mistyped name
    with lock.writer(out):
        return _append(source, encoder, out, workers, progress, engine or extract_parts)


def _append(
    source: Source, encoder: Encoder, out: Path, workers: int | None, progress: bool | None, engine: Engine
) -> AppendSummary:
    _drop_finished(out)
    before = Manifest.read(out)
    records = read_records(out, before)
    addition = _Addition(before, records, source, _known_ids(out, records))
    recipe = _recipe(before)
    _refuse_other_model(before, encoder, recipe, addition)
    after = _after(before, addition, len(records))
    if after is None:
        return _summary(out, records, addition)
    _note_pending(out, after, len(records))
    work = _Work(Job(addition, recipe, out, after), encoder, addition.parts, records)
    seconds = work.run(engine, workers, progress)
    _write_new_text(out, before, after, encoder)
    # The one step in which readers change over; killed before it, nothing has happened for them.
    after.write(out)
    _remove_pending(out)
    return _summary(out, records, addition, work, seconds)


class _Addition:
    """The rows that are new, as a stream whose parts continue the cache's shards.

    It has no `rows`, so that each part's own number of the first row reaches its record.

    Attributes:
        kind: of the source. class_names: of the cache, then those that are new.
        parts: numbered after the cache's shards.
        known: rows of the source that the cache has. new_classes: classes that it does not have.
    """

    def __init__(self, before: Manifest, records: Sequence[ShardRecord], source: Source, known: KnownIds) -> None:
        self.source, self.kind, self._known = source, source.kind, known
        self.class_names = list(dict.fromkeys([*before.class_names, *source.class_names]))
        self.new_classes = len(self.class_names) - len(before.class_names)
        index = {name: label for label, name in enumerate(self.class_names)}
        self._labels = [*(index[name] for name in source.class_names), UNKNOWN]  # label -1 finds the last entry
        self.parts: list[Part] = []
        self.known, self._digest = 0, hashlib.sha256()
        self._inner: dict[int, Part] = {}
        self._rows: list[Row] = []
        first = before.rows  # None in the cache of a stream, whose shards stand alone
        for inner, rows in self._pieces(before.shard_size):
            part = Part(len(records) + len(self.parts), inner.split, first, len(rows), inner.name)
            self.parts.append(part)
            self._inner[part.number] = inner
            self._digest.update(fingerprint(rows).encode())
            first = None if first is None else first + len(rows)

    def plan(self, shard_size: int) -> list[Part]:
        """The parts."""
        return self.parts

    def open(self, part: Part) -> list[Row]:
        """The new rows of a part, with labels as they are among the classes of the whole."""
        inner = self._inner[part.number]
        if is_listed(self.source):
            return self._slice(inner)
        return self._new(_stream(self.source).open(inner))

    def close(self, part: Part) -> None:
        """Lets go of a part."""
        if not is_listed(self.source):
            _stream(self.source).close(self._inner[part.number])

    def read(self, row: Row) -> Image.Image:
        """The image of `row` as RGB; raises UnreadableImage."""
        return self.source.read(row)

    def describe(self) -> dict[str, Any]:
        """What the source says of itself."""
        return self.source.describe()

    def fingerprint(self) -> str:
        """Hex digest over the new rows."""
        return self._digest.hexdigest()

    def _pieces(self, shard_size: int) -> Iterator[tuple[Part, list[Row]]]:
        """The source's parts that have new rows, and these."""
        if is_listed(self.source):
            self._rows = self._counted(self.source.rows)
            for part in cut_rows(self._rows, shard_size):
                yield part, self._slice(part)
            return
        # Every part is opened here and once more for its images: only so is it known which rows are new.
        stream = _stream(self.source)
        for part in stream.plan(shard_size):
            rows = self._counted(stream.open(part))
            stream.close(part)
            if rows:
                yield part, rows

    def _slice(self, part: Part) -> list[Row]:
        assert part.first_row is not None
        assert part.rows is not None
        return self._rows[part.first_row : part.first_row + part.rows]

    def _counted(self, rows: Sequence[Row]) -> list[Row]:
        new = self._new(rows)
        refuse_bad_rows(new)
        self.known += len(rows) - len(new)
        return new

    def _new(self, rows: Sequence[Row]) -> list[Row]:
        known = self._known.holds([row.id for row in rows])
        return [replace(row, label=self._labels[row.label]) for row, old in zip(rows, known, strict=True) if not old]


def _stream(source: Source) -> StreamedSource:
    """The source, which has no list of rows."""
    return cast("StreamedSource", source)


def _known_ids(out: Path, records: Sequence[ShardRecord]) -> KnownIds:
    """Ids that the cache has, those of unreadable images included."""
    ids = (read_ids(out, record) for record in records)
    return KnownIds(itertools.chain(ids, ([one["id"] for one in record.skipped] for record in records)))


def _recipe(manifest: Manifest) -> ViewRecipe:
    views: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in manifest.views.items()}
    try:
        recipe = ViewRecipe(**views)
    except TypeError as error:
        raise InputError(f"the cache's views were drawn in a way unknown here ({error}); extract anew") from error
    if recipe.weak + recipe.strong and "weak_scale" not in views:
        raise InputError("the cache was imported, so nobody knows how its views were drawn; extract the images anew")
    return recipe


def _refuse_other_model(before: Manifest, encoder: Encoder, recipe: ViewRecipe, addition: _Addition) -> None:
    wanted = describe(
        addition,
        addition.parts,
        encoder,
        recipe,
        before.prompts,
        dtype=before.dtype,
        batch_size=before.batch_size,
        shard_size=before.shard_size,
        max_skipped=before.max_skipped,
    )
    # The same weights may lie in another folder; and what is appended is another source by its nature.
    same = {"name": before.model["name"], "pretrained": before.model["pretrained"]}
    wanted = replace(wanted, model={**wanted.model, **same}, class_names=before.class_names, source=before.source)
    try:
        before.refuse_mismatch(replace(wanted, views=before.views))
    except CacheMismatch as error:
        way_out = "append with the model, precision and features that the cache was made with"
        raise CacheMismatch(error.field, error.found, error.wanted, way_out) from error


def _after(before: Manifest, addition: _Addition, shards: int) -> Manifest | None:
    """The manifest of the whole; None where nothing is new."""
    rows = sum(part.rows or 0 for part in addition.parts)
    if not rows and not addition.new_classes:
        return None
    part = {**identity(addition, addition.parts), "rows": rows, "first_shard": shards, "classes": addition.new_classes}
    source = {**before.source, "appended": [*before.source.get("appended", []), part]}
    if before.rows is None:
        source["parts"] = before.parts + len(addition.parts)
    else:
        source["rows"] = before.rows + rows
    return replace(before, class_names=addition.class_names, source=source, created_by=f"ulfine-fast {__version__}")


# -- the pending manifest


def _read_pending(out: Path) -> Manifest | None:
    path = out / PENDING
    try:
        return Manifest.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove it and append again") from error


def _note_pending(out: Path, after: Manifest, shards: int) -> None:
    """Leaves the pending manifest in `out`; refuses to take over from the append of another source."""
    pending = _read_pending(out)
    if pending is not None:
        if _same(pending, after):
            return
        # A source that has changed since is begun anew; nobody else waits for its shards.
        theirs, ours = (one.source["appended"][-1] for one in (pending, after))
        if any(theirs.get(name) != ours.get(name) for name in ("kind", "path", "name")):
            raise InputError(
                f"an append of {theirs.get('path') or theirs.get('name')} to {out} is unfinished; run its command "
                f"again first, or give it up by removing {out / PENDING}"
            )
    _remove_given_up(out, shards)
    content = json.dumps(after.to_dict(), indent=2, sort_keys=True) + "\n"
    write_atomically(out / PENDING, content.encode())


def _remove_given_up(out: Path, shards: int) -> None:
    """Deletes shards that an append left when it was given up: they may be of other images, and as many."""
    number = shards
    try:
        # In order, and records first: what a kill leaves has no gap, and does not count.
        while any(path.exists() for path in (shard_path(out, number), shard_path(out, number).with_suffix(".json"))):
            shard_path(out, number).with_suffix(".json").unlink(missing_ok=True)
            shard_path(out, number).unlink(missing_ok=True)
            number += 1
    except OSError as error:
        raise write_error(out, error) from error


def _drop_finished(out: Path) -> None:
    """Removes the pending manifest where it has become the cache's own, and a kill came before its removal."""
    pending = _read_pending(out)
    if pending is not None and _same(pending, Manifest.read(out)):
        _remove_pending(out)


def _same(one: Manifest, other: Manifest) -> bool:
    try:
        one.refuse_mismatch(other)
    except CacheMismatch:
        return False
    return True


def _remove_pending(out: Path) -> None:
    try:
        (out / PENDING).unlink(missing_ok=True)
    except OSError as error:
        raise write_error(out / PENDING, error) from error


def _write_new_text(out: Path, before: Manifest, after: Manifest, encoder: Encoder) -> None:
    """Text features of all classes; those who read the old manifest take the first ones."""
    new = after.class_names[len(before.class_names) :]
    if not new:
        return
    old = read_text(out, before)
    more = encode_classes(encoder, fill_prompts(new, after.prompts))
    joined = replace(
        old,
        prompts=[*old.prompts, *more.prompts],
        features=np.concatenate([old.features, more.features]),  # (K, P, D)
        prototypes=np.concatenate([old.prototypes, more.prototypes]),  # (K, D)
    )
    write_text(out, joined)


# -- the pipeline


class _Work:
    """The new parts on their way to shards."""

    def __init__(self, job: Job, encoder: Encoder, parts: Sequence[Part], old: Sequence[ShardRecord]) -> None:
        self.job, self.encoder, self.parts = job, encoder, parts
        self.records = {p.number: record for p in parts if (record := finished(job.out, p)) is not None}
        self.kept, self.encoded = len(self.records), 0
        self.skipped = [one for record in [*old, *self.records.values()] for one in record.skipped]
        self.stages = {"read": 0.0, "encode": 0.0, "write": 0.0}
        self.total = sum(part.rows or 0 for part in parts)
        # One bad image among a few new ones is no sign of anything, so the share is that of the whole cache.
        self.allowed = job.manifest.max_skipped * (self.total + sum(record.rows_read for record in old))

    def run(self, engine: Engine, workers: int | None, progress: bool | None) -> float:
        """Extracts what is missing; returns wall seconds."""
        started = time.perf_counter()
        todo = [part for part in self.parts if part.number not in self.records]
        if not todo:
            return 0.0
        seen = sum(record.rows_read for record in self.records.values())
        try:
            with progress_bar(progress) as bar:
                task = bar.add_task("append", total=self.total, completed=seen, unit="images", note="")

                def on_batch(done: Done) -> None:
                    self._note_batch(done)
                    bar.update(task, advance=done.rows)

                engine(self.job, self.encoder, todo, workers=workers, on_batch=on_batch, on_shard=self._note_shard)
        except KeyboardInterrupt:
            said = f"stopped: {len(self.records)} of {len(self.parts)} new shards are finished in {self.job.out}"
            raise KeyboardInterrupt(f"{said}; run the same command again to continue") from None
        return time.perf_counter() - started

    def _note_batch(self, done: Done) -> None:
        for stage, seconds in done.seconds.items():
            self.stages[stage] += seconds
        self.skipped += done.skipped
        if done.skipped and len(self.skipped) > self.allowed:
            last = self.skipped[-1]
            raise InputError(
                f"{len(self.skipped)} images of the cache and the new ones cannot be read so far, more than the "
                f"share of {self.job.manifest.max_skipped:g} that may be skipped (the last: {last['id']}: "
                f"{last['reason']}); mend or remove them and append again"
            )

    def _note_shard(self, record: ShardRecord) -> None:
        self.records[record.shard] = record
        self.encoded += record.rows
        self.stages["write"] += record.seconds["write"]


def _summary(
    out: Path, old: Sequence[ShardRecord], addition: _Addition, work: _Work | None = None, seconds: float = 0.0
) -> AppendSummary:
    new = [] if work is None else [work.records[part.number] for part in addition.parts]
    return AppendSummary(
        out=out,
        images=sum(record.rows for record in [*old, *new]),
        encoded=work.encoded if work else 0,
        shards=len(old) + len(new),
        kept=len(old) + (work.kept if work else 0),
        skipped=[one for record in new for one in record.skipped],
        seconds=round(seconds, 4),
        stages={stage: round(spent, 4) for stage, spent in work.stages.items()} if work else {},
        known=addition.known,
        classes=addition.new_classes,
    )


def features_of(manifest: Manifest) -> str:
    """What `load_encoder` must be told to take along, so that the tokens are those of the cache."""
    if not manifest.tokens:
        return "projected"
    return "last-block" if "pre" in manifest.tokens else "pre-projection"
