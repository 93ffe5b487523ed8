"""The extraction pipeline: images of a source to a cache that can be interrupted at any instant and continued."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import torch
from rich.progress import Progress, TaskID

from ulfine_fast._version import __version__
from ulfine_fast.cache import manifest as manifests
from ulfine_fast.cache import text as texts
from ulfine_fast.cache.io import lock
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import make_folder, write_error
from ulfine_fast.cache.io.paths import open_place
from ulfine_fast.cache.io.progress import progress_bar
from ulfine_fast.cache.manifest import DTYPES, Manifest
from ulfine_fast.cache.models.prompts import DEFAULT_PROMPTS, fill_prompts
from ulfine_fast.cache.pipeline.contents import finished, recorded, refuse_strange_folder
from ulfine_fast.cache.pipeline.encode import Done, encoded
from ulfine_fast.cache.pipeline.plan import (
    batches_of,
    identity,
    is_listed,
    opened,
    plan_parts,
    refuse_bad_rows,
    refuse_empty_class,
)
from ulfine_fast.cache.pipeline.read import ImageReader
from ulfine_fast.cache.pipeline.views import ViewRecipe
from ulfine_fast.cache.pipeline.write import OpenPart, ShardWriter
from ulfine_fast.cache.shard import ShardRecord, shard_path, verify_shard

if TYPE_CHECKING:
    from ulfine_fast.cache.models.encoder import Encoder
    from ulfine_fast.cache.sources.rows import Part, Row, Source

MODES = ("resume", "overwrite", "verify")
_PRECISIONS = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Works on parts as `extract_parts` does, here or elsewhere.
Engine = Callable[..., None]
_OWN_FILE = re.compile(r"\d{5,}\.(h5|json)((\.\d+)?\.tmp)?")


@dataclass(frozen=True)
class ExtractSummary:
    """What a call of `extract` did.

    Attributes:
        out: the cache's folder.
        images: rows in the cache now. encoded: rows encoded by this call.
        shards: finished shards in the cache. kept: those that were finished and intact before this call.
        skipped: {"id", "reason"} of every image left out.
        seconds: wall seconds of this call's reading, encoding and writing.
        stages: seconds of work on each; where threads work at once these add up to more than the wall's.
    """

    out: Path
    images: int
    encoded: int
    shards: int
    kept: int
    skipped: list[dict[str, str]]
    seconds: float
    stages: dict[str, float]

    @property
    def images_per_second(self) -> float:
        """Rate of this call, 0 where it had nothing to do."""
        return self.encoded / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The summary in JSON's types."""
        told = {one.name: getattr(self, one.name) for one in fields(self)}
        return {**told, "out": str(self.out), "images_per_second": self.images_per_second}


def extract(
    source: Source,
    encoder: Encoder,
    out: str | Path,
    *,
    views: ViewRecipe | None = None,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    dtype: str = "float16",
    batch_size: int = 32,
    shard_size: int = 1024,
    workers: int | None = None,
    mode: str = "resume",
    max_skipped: float = 0.01,
    progress: bool | None = None,
    engine: Engine | None = None,
) -> ExtractSummary:
    """Extracts the features of a source into a cache folder.

    Args:
        source: images with ids, labels and splits.
        encoder: the frozen model.
        out: folder of the cache, or a URL that fsspec knows, such as s3://bucket/cache; new, empty, or a cache.
        views: what to draw beside the plain view; one weak and one strong view by default.
        prompts: (P,) texts with {} for the class name.
        dtype: "float16", "float32" or "int8" with a scale a row, of the stored features.
        batch_size: images encoded together, at least 1. Part of the cache's identity: it moves the last bits.
        shard_size: source rows a shard covers, at least 1; an interruption loses at most this much work.
        workers: threads that read and encode (on a processor), or processes that read (beside a GPU); 0 for none, by
            default one for each core.
        mode: "resume" keeps intact finished shards, "overwrite" starts anew, "verify" checks and extracts nothing.
        max_skipped: share of all images that may be unreadable, 0..1.
        progress: whether to draw a bar on stderr; by default where that is a terminal.
        engine: where the parts are worked on; by default here (`extract_parts`).

    Raises:
        InputError: a value out of range, two rows with one id, a class without labelled images, too many unreadable
            images, features that are not finite, a file system that refuses, or (verify) any problem found.
        CacheMismatch: the folder's cache was made with other settings.
        KeyboardInterrupt: Ctrl-C; its text says what is finished and how to continue.
    """
    recipe = ViewRecipe() if views is None else views
    _refuse_bad_options(dtype, batch_size, shard_size, workers, mode, max_skipped)
    if not prompts:
        raise InputError("there must be at least one prompt, such as 'a photo of a {}.'")
    if not -(2**63) <= recipe.seed < 2**63:
        raise InputError(f"view seed must fit into 64 bits, got {recipe.seed}")
    parts = plan_parts(source, shard_size)
    _refuse_bad_source(source, parts)
    wanted = describe(
        source,
        parts,
        encoder,
        recipe,
        prompts,
        dtype=dtype,
        batch_size=batch_size,
        shard_size=shard_size,
        max_skipped=max_skipped,
    )
    # Everything up to here reads no image and writes nothing, so that bad input costs a moment.
    place = open_place(out)
    if mode == "verify":
        return _verify(place, wanted, parts)
    refuse_strange_folder(place)
    with lock.writer(place):
        _prepare_folder(place, wanted, encoder, mode)
        job = Job(source, recipe, place, wanted)
        return _Work(job, encoder, parts, engine or extract_parts).run(workers, progress)


@dataclass(frozen=True)
class Job:
    """What to extract and whereto; it holds no model, so that it can travel to other processes.

    Attributes:
        source: where images come from. recipe: of the drawn views.
        out: the cache's folder. manifest: what its features are.
    """

    source: Source
    recipe: ViewRecipe
    out: Path
    manifest: Manifest


def extract_parts(
    job: Job,
    encoder: Encoder,
    parts: Sequence[Part],
    *,
    workers: int | None,
    on_batch: Callable[[Done], None],
    on_shard: Callable[[ShardRecord], None],
) -> None:
    """Extracts some parts of a source, in order: reads, encodes and writes each shard, its record last.

    Args:
        job: what to extract.
        encoder: the model that the job's manifest names.
        parts: which.
        workers: see `extract`.
        on_batch: called after each encoded batch, with what became of its rows.
        on_shard: called with each finished shard's record.

    Raises:
        InputError: features that are not finite, a file system that refuses, a part that cannot be read to its end.
    """
    reader = ImageReader.of(job.source, encoder, job.recipe)
    under_way: deque[OpenPart] = deque()
    try:
        with ShardWriter(job.out, job.manifest, on_shard) as writer:
            with closing(encoded(reader, encoder, _batches(job, parts, under_way), workers=workers)) as stream:
                for batch in stream:
                    # a part without a single row brings no batch
                    _write_finished(job, under_way, writer)
                    under_way[0].add(batch, job.manifest.layout("train").array_dtype)
                    on_batch(batch.done)
                    _write_finished(job, under_way, writer)
            _write_finished(job, under_way, writer)
    finally:
        for part in under_way:
            _close(job, part.part)


def _batches(job: Job, parts: Sequence[Part], under_way: deque[OpenPart]) -> Iterator[list[Row]]:
    """The batches of all parts; each part is noted in `under_way` before its first one."""
    for part, rows in opened(job.source, parts):
        batches = batches_of(rows, job.manifest.batch_size)
        under_way.append(OpenPart(part, len(rows), len(batches)))
        yield from batches


def _write_finished(job: Job, under_way: deque[OpenPart], writer: ShardWriter) -> None:
    while under_way and under_way[0].left == 0:
        done = under_way.popleft()
        _close(job, done.part)
        writer.write(done)


def _close(job: Job, part: Part) -> None:
    """A stream may now forget the part."""
    if not is_listed(job.source):
        job.source.close(part)


def describe(
    source: Source,
    parts: Sequence[Part],
    encoder: Encoder,
    recipe: ViewRecipe,
    prompts: Sequence[str],
    *,
    dtype: str,
    batch_size: int,
    shard_size: int,
    max_skipped: float,
) -> Manifest:
    """The manifest of the cache that such a request makes."""
    return Manifest(
        model={**asdict(encoder.spec), "normalized": True},
        preprocessing=encoder.preprocessing,
        mean=list(encoder.mean),
        std=list(encoder.std),
        views=asdict(recipe),
        dtype=dtype,
        precision=_PRECISIONS[encoder.dtype],
        batch_size=batch_size,
        shard_size=shard_size,
        class_names=list(source.class_names),
        prompts=list(prompts),
        source=identity(source, parts),
        tokens=list(encoder.token_kinds),
        token_width=encoder.token_width,
        exact=encoder.exact,
        compiled=encoder.compiled,
        max_skipped=max_skipped,
        libraries=_libraries(),
        created_by=f"ulfine-fast {__version__}",
    )


def _refuse_bad_source(source: Source, parts: Sequence[Part]) -> None:
    if not parts:
        raise InputError("there are no images in the source; give a folder, a table or the name of a data set")
    if is_listed(source):  # of a stream each part is looked at when it is opened
        refuse_bad_rows(source.rows)
        refuse_empty_class(source, set())


class _Work:
    """One run of the pipeline; what it has done so far can be asked for at any time."""

    def __init__(self, job: Job, encoder: Encoder, parts: Sequence[Part], engine: Engine) -> None:
        self.job, self.encoder, self.parts, self.engine = job, encoder, parts, engine
        self.records = {p.number: record for p in parts if (record := finished(job.out, p)) is not None}
        self.kept = len(self.records)
        self.skipped = [one for record in self.records.values() for one in record.skipped]
        self.rows_seen = sum(record.rows_read for record in self.records.values())
        self.encoded = 0
        self.stages = {"read": 0.0, "encode": 0.0, "write": 0.0}

    def run(self, workers: int | None, progress: bool | None) -> ExtractSummary:
        """Extracts what is missing."""
        started = time.perf_counter()
        # What finished shards have skipped counts: a continued run has the same limit as an undisturbed one.
        self._refuse_many_skipped()
        todo = [part for part in self.parts if part.number not in self.records]
        try:
            if todo:
                self._extract(todo, workers, progress)
        except KeyboardInterrupt:
            # Still an interrupt for whoever calls, but one that says what was saved.
            raise KeyboardInterrupt(self._interrupted()) from None
        if is_listed(self.job.source):  # only now is it known which labelled images could be read
            refuse_empty_class(self.job.source, {one["id"] for one in self.skipped})
        return self._summary(time.perf_counter() - started if todo else 0.0)

    def _extract(self, todo: list[Part], workers: int | None, progress: bool | None) -> None:
        with progress_bar(progress) as bar:
            task = bar.add_task("extract", total=self._total(), completed=self.rows_seen, unit="images", note="")
            self.engine(
                self.job,
                self.encoder,
                todo,
                workers=workers,
                on_batch=lambda batch: self._note_batch(batch, bar, task),
                on_shard=self._note_shard,
            )

    def _total(self) -> int | None:
        """Rows of the source; None for a stream, where nobody counts ahead."""
        return len(self.job.source.rows) if is_listed(self.job.source) else None

    def _note_batch(self, done: Done, bar: Progress, task: TaskID) -> None:
        for stage, seconds in done.seconds.items():
            self.stages[stage] += seconds
        self.rows_seen += done.rows
        self.skipped += done.skipped
        self._refuse_many_skipped()
        bar.update(task, advance=done.rows, note=self._shares())

    def _note_shard(self, record: ShardRecord) -> None:
        self.records[record.shard] = record
        self.encoded += record.rows
        self.stages["write"] += record.seconds["write"]

    def _refuse_many_skipped(self) -> None:
        total, allowed = self._total(), self.job.manifest.max_skipped
        # Of a stream's first few images any share may be bad; what counts is what there is so far, from a shard on.
        of = total if total is not None else max(self.rows_seen, self.job.manifest.shard_size)
        if len(self.skipped) > allowed * of:
            first = self.skipped[0]
            raise InputError(
                f"{len(self.skipped)} of {of} images cannot be read so far, more than the share of {allowed:g} "
                f"that may be skipped (the first: {first['id']}: {first['reason']}); mend them or raise --max-skipped; "
                "finished shards stay"
            )

    def _shares(self) -> str:
        whole = sum(self.stages.values()) or 1.0
        return "  ".join(f"{stage} {seconds / whole:.0%}" for stage, seconds in self.stages.items())

    def _interrupted(self) -> str:
        return (
            f"stopped: {len(self.records)} of {len(self.parts)} shards are finished in {self.job.out}; "
            "run the same command again to continue"
        )

    def _summary(self, seconds: float) -> ExtractSummary:
        images = sum(record.rows for record in self.records.values())
        skipped = [one for number in sorted(self.records) for one in self.records[number].skipped]
        stages = {stage: round(value, 4) for stage, value in self.stages.items()}
        return ExtractSummary(
            self.job.out, images, self.encoded, len(self.records), self.kept, skipped, round(seconds, 4), stages
        )


def _prepare_folder(out: Path, wanted: Manifest, encoder: Encoder, mode: str) -> None:
    """Leaves `out` with this manifest and its text features, and nothing of another cache."""
    make_folder(out / "shards")
    # The old manifest stays until its shards are gone: a kill in between leaves a folder that is still known as ours.
    known = (out / manifests.NAME).exists()
    if known and mode == "resume":
        Manifest.read(out).refuse_mismatch(wanted)
    elif known:
        _remove_features(out)
    if not known or mode == "overwrite":
        wanted.write(out)
    # Text takes a second, so a missing or damaged file is not worth a question.
    try:
        texts.read_text(out, wanted)
    except InputError:
        texts.write_text(out, texts.encode_classes(encoder, fill_prompts(wanted.class_names, wanted.prompts)))


def _remove_features(out: Path) -> None:
    """Deletes text features and shards by their own names, records first: a shard without one does not count."""
    try:
        own = [path for path in (out / "shards").iterdir() if _OWN_FILE.fullmatch(path.name)]
        for path in sorted(own, key=lambda path: path.suffix != ".json"):
            path.unlink()
        (out / texts.NAME).unlink(missing_ok=True)
    except OSError as error:
        raise write_error(out, error) from error


def _verify(out: Path, wanted: Manifest, parts: Sequence[Part]) -> ExtractSummary:
    found = Manifest.read(out)
    found.refuse_mismatch(wanted)
    problems: list[str] = []
    try:
        texts.read_text(out, found)
    except InputError as error:
        problems.append(str(error))
    for part in parts:
        problems += verify_shard(shard_path(out, part.number), found.layout(part.split))[1]
    records = [record for part in parts if (record := recorded(out, part)) is not None]
    if not problems and len(records) < len(parts):  # what a missing record would say of the rows is no news
        there = {record.shard for record in records}
        problems += [f"shard {p.number:05d} covers other rows" for p in parts if p.number not in there]
    if problems:
        raise InputError(f"{out} has {len(problems)} problem{'s' * (len(problems) > 1)}: " + "; ".join(problems))
    skipped = [one for record in records for one in record.skipped]
    return ExtractSummary(out, sum(r.rows for r in records), 0, len(records), len(records), skipped, 0.0, {})


def _refuse_bad_options(
    dtype: str, batch_size: int, shard_size: int, workers: int | None, mode: str, max_skipped: float
) -> None:
    if dtype not in DTYPES:
        raise InputError(f"dtype must be {' or '.join(DTYPES)}, got {dtype!r}")
    if mode not in MODES:
        raise InputError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    for name, value, least in (("batch size", batch_size, 1), ("shard size", shard_size, 1), ("workers", workers, 0)):
        if value is not None and value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    if not 0 <= max_skipped <= 1:
        raise InputError(f"max skipped must be a share from 0 to 1, got {max_skipped}")


def _libraries() -> dict[str, str]:
    packages = ("torch", "torchvision", "open_clip_torch", "timm", "transformers", "numpy", "pillow", "h5py")
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # an optional one
            continue
    return {**found, "hdf5": h5py.version.hdf5_version}
