"""The extraction pipeline: pictures of a source to a cache that can be interrupted at any instant and continued."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import torch
from rich.progress import Progress, TaskID

from ulfine_fast._version import __version__
from ulfine_fast.cache import manifest as manifests
from ulfine_fast.cache import text as texts
from ulfine_fast.cache.atomic import make_folder, write_error
from ulfine_fast.cache.errors import InputError
from ulfine_fast.cache.manifest import DTYPES, Manifest
from ulfine_fast.cache.progress import progress_bar
from ulfine_fast.cache.prompts import DEFAULT_PROMPTS, fill_prompts
from ulfine_fast.cache.reading import Batch, PictureReader, batches, default_workers, is_dead_reader, reader_died
from ulfine_fast.cache.shard import Shard, ShardRecord, is_intact, shard_path, verify_shard, write_shard
from ulfine_fast.cache.sources import fingerprint
from ulfine_fast.cache.views import ViewRecipe

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ulfine_fast.cache.encoder import Encoder
    from ulfine_fast.cache.sources import Row, Source

MODES = ("resume", "overwrite", "verify")
_PRECISIONS = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_OWN_FILE = re.compile(r"\d{5,}\.(h5|json)(\.tmp)?")


@dataclass(frozen=True)
class ExtractSummary:
    """What a call of `extract` did.

    Attributes:
        out: the cache's folder.
        pictures: rows in the cache now. encoded: rows encoded by this call.
        shards: finished shards in the cache. kept: those that were finished and intact before this call.
        skipped: {"id", "reason"} of every picture left out.
        seconds: wall seconds of this call's reading, encoding and writing. stages: seconds of each.
    """

    out: Path
    pictures: int
    encoded: int
    shards: int
    kept: int
    skipped: list[dict[str, str]]
    seconds: float
    stages: dict[str, float]

    @property
    def pictures_per_second(self) -> float:
        """Rate of this call, 0 where it had nothing to do."""
        return self.encoded / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The summary in JSON's types."""
        return {**asdict(self), "out": str(self.out), "pictures_per_second": self.pictures_per_second}


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
) -> ExtractSummary:
    """Extracts the features of a source into a cache folder.

    Args:
        source: pictures with ids, labels and splits.
        encoder: the frozen model.
        out: folder of the cache; new, empty, or a cache.
        views: what to draw beside the plain view; one weak and one strong view by default.
        prompts: (P,) texts with {} for the class name.
        dtype: "float16" or "float32", of the stored features.
        batch_size: pictures encoded together, at least 1. Part of the cache's identity: it moves the last bits.
        shard_size: source rows a shard covers, at least 1; an interruption loses at most this much work.
        workers: reader processes, 0 for none; by default as many as the device can use.
        mode: "resume" keeps intact finished shards, "overwrite" starts anew, "verify" checks and extracts nothing.
        max_skipped: share of all pictures that may be unreadable, 0..1.
        progress: whether to draw a bar on stderr; by default where that is a terminal.

    Raises:
        InputError: a value out of range, two rows with one id, a class without labelled pictures, too many unreadable
            pictures, features that are not finite, a file system that refuses, or (verify) any problem found.
        CacheMismatch: the folder's cache was made with other settings.
        KeyboardInterrupt: Ctrl-C; its text says what is finished and how to continue.
    """
    recipe = ViewRecipe() if views is None else views
    _refuse_bad_options(dtype, batch_size, shard_size, workers, mode, max_skipped)
    if not prompts:
        raise InputError("there must be at least one prompt, such as 'a photo of a {}.'")
    if not -(2**63) <= recipe.seed < 2**63:
        raise InputError(f"view seed must fit into 64 bits, got {recipe.seed}")
    refuse_bad_rows(source)
    wanted = describe(
        source,
        encoder,
        recipe,
        prompts,
        dtype=dtype,
        batch_size=batch_size,
        shard_size=shard_size,
        max_skipped=max_skipped,
    )
    # Everything up to here reads no picture and writes nothing, so that bad input costs a moment.
    plans = plan_shards(source.rows, shard_size)
    if mode == "verify":
        return _verify(Path(out), wanted, plans)
    _prepare_folder(Path(out), wanted, encoder, mode)
    work = _Work(source, encoder, recipe, Path(out), wanted, plans)
    count = default_workers(encoder.device) if workers is None else workers
    return work.run(count, progress)


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The source rows [first_row, first_row + rows) that shard `number` covers, all of one split."""

    number: int
    split: str
    first_row: int
    rows: int

    def batches(self, size: int) -> list[list[int]]:
        """Row numbers, `size` at a time: batches never cross shards, so that bytes do not depend on interruptions."""
        numbers = list(range(self.first_row, self.first_row + self.rows))
        return [numbers[start : start + size] for start in range(0, self.rows, size)]


def plan_shards(rows: Sequence[Row], shard_size: int) -> list[ShardPlan]:
    """Cuts the rows into shards that never cross a split.

    Args:
        rows: in the source's order, split by split.
        shard_size: rows a shard covers at most, at least 1.
    """
    plans: list[ShardPlan] = []
    for split, group in itertools.groupby(enumerate(rows), key=lambda pair: pair[1].split):
        numbers = [number for number, _ in group]
        for start in range(0, len(numbers), shard_size):
            plans.append(ShardPlan(len(plans), split, numbers[start], len(numbers[start : start + shard_size])))
    return plans


def describe(
    source: Source,
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
        source={**source.describe(), "rows": len(source.rows), "fingerprint": fingerprint(source.rows)},
        max_skipped=max_skipped,
        libraries=_libraries(),
        created_by=f"ulfine-fast {__version__}",
    )


def refuse_bad_rows(source: Source) -> None:
    """Looks for what would make a source's cache useless, before anything is read.

    Raises:
        InputError: no rows, an id that occurs twice or cannot be stored, or a class without a labelled picture.
    """
    if not source.rows:
        raise InputError("there are no pictures in the source; give a folder, a table or the name of a data set")
    seen: set[str] = set()
    for row in source.rows:
        if row.id in seen:
            raise InputError(f"two pictures have the id {row.id!r}; ids must differ, so remove or rename one")
        seen.add(row.id)
    strange = next((name for name in seen if not _storable(name)), None)
    if strange is not None:
        raise InputError(f"the name {strange!r} is not valid Unicode text and cannot be stored; rename the picture")
    _refuse_empty_class(source, set())


class _Work:
    """One run of the pipeline; what it has done so far can be asked for at any time."""

    def __init__(
        self,
        source: Source,
        encoder: Encoder,
        recipe: ViewRecipe,
        out: Path,
        manifest: Manifest,
        plans: list[ShardPlan],
    ) -> None:
        self.source, self.encoder, self.recipe, self.out = source, encoder, recipe, out
        self.manifest, self.plans = manifest, plans
        self.records = {p.number: record for p in plans if (record := _finished(out, p)) is not None}
        self.kept = len(self.records)
        self.skipped = [one for record in self.records.values() for one in record.skipped]
        self.encoded = 0
        self.stages = {"read": 0.0, "encode": 0.0, "write": 0.0}

    def run(self, workers: int, progress: bool | None) -> ExtractSummary:
        """Extracts what is missing."""
        started = time.perf_counter()
        # What finished shards have skipped counts: a continued run has the same limit as an undisturbed one.
        self._refuse_many_skipped()
        todo = [plan for plan in self.plans if plan.number not in self.records]
        try:
            if todo:
                self._extract(todo, workers, progress)
        except KeyboardInterrupt:
            # Still an interrupt for whoever calls, but one that says what was saved.
            raise KeyboardInterrupt(self._interrupted()) from None
        except RuntimeError as error:
            if not is_dead_reader(error):
                raise
            raise reader_died(error) from error
        # Only now is it known which labelled pictures could be read.
        _refuse_empty_class(self.source, {one["id"] for one in self.skipped})
        return self._summary(time.perf_counter() - started if todo else 0.0)

    def _extract(self, todo: list[ShardPlan], workers: int, progress: bool | None) -> None:
        reader = PictureReader.of(self.source, self.encoder, self.recipe)
        numbers = [batch for plan in todo for batch in plan.batches(self.manifest.batch_size)]
        cuda = self.encoder.device.type == "cuda"
        with batches(reader, numbers, workers=workers, pin=cuda) as stream, progress_bar(progress) as bar:
            done = sum(record.rows_read for record in self.records.values())
            total = len(self.source.rows)
            task = bar.add_task("extract", total=total, completed=done, unit="pictures", note="")
            for plan in todo:
                self._extract_shard(plan, stream, bar, task)

    def _extract_shard(self, plan: ShardPlan, stream: Iterator[Batch], bar: Progress, task: TaskID) -> None:
        parts = _Parts(plan.split)
        before = dict(self.stages)
        for _ in plan.batches(self.manifest.batch_size):
            # Time spent waiting: with readers beside this process, their work hides behind the encoding.
            batch = self._timed("read", lambda: next(stream))
            self._note_skipped(batch, parts)
            features = self._timed("encode", lambda batch=batch: self._encode(batch))  # (B, V, D)
            parts.add(features, batch, [self.source.rows[number] for number in batch.kept])
            bar.update(task, advance=len(batch.rows), note=self._shares())
        self._timed("write", lambda: self._write(plan, parts, before))

    def _encode(self, batch: Batch) -> NDArray[Any]:
        """All views of a batch: (B, V, D) in the stored type."""
        if not batch.kept:
            return np.empty((0, 0, self.manifest.dim), dtype=self.manifest.dtype)
        pixels = torch.as_tensor(batch.pixels)  # (B, V, 3, H, W)
        flat = pixels.flatten(0, 1).split(self.manifest.batch_size)  # of (b, 3, H, W); bounds the model's memory
        features = torch.cat([self.encoder.encode_pictures(part) for part in flat])  # (B * V, D)
        # After the cast: what float16 cannot hold would be found only by the reader of the cache.
        result = features.view(len(pixels), -1, self.manifest.dim).numpy().astype(self.manifest.dtype)
        self._refuse_not_finite(result, batch)
        return result

    def _refuse_not_finite(self, features: NDArray[Any], batch: Batch) -> None:
        bad = np.flatnonzero(~np.isfinite(features).all(axis=(1, 2)))
        if len(bad):
            name = self.source.rows[batch.kept[int(bad[0])]].id
            raise InputError(
                f"the model gives features that are not finite for the picture {name!r}; use --precision fp32, "
                "or leave the picture out; finished shards stay"
            )

    def _write(self, plan: ShardPlan, parts: _Parts, before: dict[str, float]) -> None:
        """Writes the shard, then its record: only that makes it count."""
        started = time.perf_counter()
        shard = parts.shard(self.manifest, self.recipe)
        path = shard_path(self.out, plan.number)
        digest, size = write_shard(path, shard)
        seconds = {stage: round(self.stages[stage] - before[stage], 4) for stage in ("read", "encode")}
        seconds["write"] = round(time.perf_counter() - started, 4)
        kept = len(shard.ids)
        record = ShardRecord(
            plan.number, plan.split, plan.first_row, plan.rows, kept, digest, size, seconds, parts.skipped
        )
        record.write(path.with_suffix(".json"))
        self.records[plan.number] = record
        self.encoded += kept

    def _note_skipped(self, batch: Batch, parts: _Parts) -> None:
        new = [{"id": self.source.rows[number].id, "reason": reason} for number, reason in batch.skipped]
        parts.skipped += new
        self.skipped += new
        self._refuse_many_skipped()

    def _refuse_many_skipped(self) -> None:
        total, allowed = len(self.source.rows), self.manifest.max_skipped
        if len(self.skipped) > allowed * total:
            first = self.skipped[0]
            raise InputError(
                f"{len(self.skipped)} of {total} pictures cannot be read so far, more than the share of {allowed:g} "
                f"that may be skipped (the first: {first['id']}: {first['reason']}); mend them or raise --max-skipped; "
                "finished shards stay"
            )

    def _timed(self, stage: str, work: Any) -> Any:
        started = time.perf_counter()
        result = work()
        self.stages[stage] += time.perf_counter() - started
        return result

    def _shares(self) -> str:
        whole = sum(self.stages.values()) or 1.0
        return "  ".join(f"{stage} {seconds / whole:.0%}" for stage, seconds in self.stages.items())

    def _interrupted(self) -> str:
        return (
            f"stopped: {len(self.records)} of {len(self.plans)} shards are finished in {self.out}; "
            "run the same command again to continue"
        )

    def _summary(self, seconds: float) -> ExtractSummary:
        pictures = sum(record.rows for record in self.records.values())
        skipped = [one for number in sorted(self.records) for one in self.records[number].skipped]
        stages = {stage: round(value, 4) for stage, value in self.stages.items()}
        return ExtractSummary(
            self.out, pictures, self.encoded, len(self.records), self.kept, skipped, round(seconds, 4), stages
        )


@dataclass
class _Parts:
    """What has been encoded of the shard under way."""

    split: str
    ids: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    features: list[NDArray[Any]] = field(default_factory=list)
    scale: list[NDArray[np.float32]] = field(default_factory=list)
    flip: list[NDArray[np.uint8]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def add(self, features: NDArray[Any], batch: Batch, rows: Sequence[Row]) -> None:
        """Appends a batch: features (B, V, D) of B rows."""
        if not rows:  # nothing in the batch could be read, and its arrays have no shape to speak of
            return
        self.ids += [row.id for row in rows]
        self.labels += [row.label for row in rows]
        self.features.append(features)
        self.scale.append(batch.scale)
        self.flip.append(batch.flip)

    def shard(self, manifest: Manifest, recipe: ViewRecipe) -> Shard:
        """The rows together; n is 0 where no picture could be read."""
        layout = manifest.layout(self.split)
        views, n = layout.weak + layout.strong, len(self.ids)
        # Gives the result its shape and type where there is nothing to join.
        empty = np.empty((0, 1 + views, manifest.dim), dtype=manifest.dtype)
        features = np.concatenate([empty, *self.features])  # (n, 1 + Vw + Vs, D)
        return Shard(
            split=self.split,
            ids=self.ids,
            labels=np.asarray(self.labels, dtype=np.int32),
            plain=features[:, :1],
            weak=features[:, 1 : 1 + layout.weak],
            strong=features[:, 1 + layout.weak :],
            scale=np.concatenate(self.scale).astype(np.float32) if n else np.empty((0, views), np.float32),
            flip=np.concatenate(self.flip).astype(np.uint8) if n else np.empty((0, views), np.uint8),
            view_seed=recipe.seed,
        )


def _finished(out: Path, plan: ShardPlan) -> ShardRecord | None:
    """The record of a shard that is there, whole, and what the plan says; None where it must be extracted."""
    record = _recorded(out, plan)
    return record if record is not None and is_intact(shard_path(out, plan.number), record) else None


def _recorded(out: Path, plan: ShardPlan) -> ShardRecord | None:
    """The record of a shard that covers what the plan says; its file is not looked at."""
    try:
        record = ShardRecord.read(shard_path(out, plan.number).with_suffix(".json"))
    except InputError:  # absent or cut: either way the shard does not count
        return None
    planned = (plan.number, plan.split, plan.first_row, plan.rows)
    return record if (record.shard, record.split, record.first_row, record.rows_read) == planned else None


def _prepare_folder(out: Path, wanted: Manifest, encoder: Encoder, mode: str) -> None:
    """Leaves `out` with this manifest and its text features, and nothing of another cache."""
    _refuse_strange_folder(out)
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


def _refuse_strange_folder(out: Path) -> None:
    """Nothing is ever written into, or deleted from, a folder that holds something else."""
    try:
        if out.exists() and not out.is_dir():
            raise InputError(f"{out} is a file; choose a folder for the cache")
        others = sorted(path.name for path in out.iterdir() if not _is_beginning(path)) if out.exists() else []
        if others and not manifests.is_cache(out):
            raise InputError(f"{out} holds other files ({others[0]}) and no cache; choose a new or empty folder")
    except OSError as error:
        raise write_error(out, error) from error


def _is_beginning(path: Path) -> bool:
    """Whether a run killed at its very first write may have left this behind."""
    if path.name == "shards":
        return path.is_dir() and not any(path.iterdir())
    return path.name == manifests.NAME + ".tmp"


def _remove_features(out: Path) -> None:
    """Deletes text features and shards by their own names, records first: a shard without one does not count."""
    try:
        own = [path for path in (out / "shards").iterdir() if _OWN_FILE.fullmatch(path.name)]
        for path in sorted(own, key=lambda path: path.suffix != ".json"):
            path.unlink()
        (out / texts.NAME).unlink(missing_ok=True)
    except OSError as error:
        raise write_error(out, error) from error


def _verify(out: Path, wanted: Manifest, plans: Sequence[ShardPlan]) -> ExtractSummary:
    found = Manifest.read(out)
    found.refuse_mismatch(wanted)
    problems: list[str] = []
    try:
        texts.read_text(out, found)
    except InputError as error:
        problems.append(str(error))
    for plan in plans:
        problems += verify_shard(shard_path(out, plan.number), found.layout(plan.split))[1]
    records = [record for plan in plans if (record := _recorded(out, plan)) is not None]
    if not problems and len(records) < len(plans):  # what a missing record would say of the rows is no news
        there = {record.shard for record in records}
        problems += [f"shard {p.number:05d} covers other rows" for p in plans if p.number not in there]
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


def _refuse_empty_class(source: Source, missing: set[str]) -> None:
    """A class that nothing labelled is left of could never be learned; only where there are labelled rows at all."""
    labelled = [row for row in source.rows if row.split == "train" and row.label >= 0]
    left = {row.label for row in labelled if row.id not in missing}
    for label, name in enumerate(source.class_names):
        if labelled and label not in left:
            why = "none of its labelled pictures can be read" if missing else "it has no labelled picture in train"
            raise InputError(f"class {name!r} cannot be learned: {why}; add some, or leave the class out")


def _storable(name: str) -> bool:
    """Whether HDF5 can hold the text: it has no place for half characters and zero bytes."""
    try:
        return bool(name) and b"\0" not in name.encode()
    except UnicodeEncodeError:
        return False


def _libraries() -> dict[str, str]:
    packages = ("torch", "torchvision", "open_clip_torch", "timm", "transformers", "numpy", "pillow", "h5py")
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # an optional one
            continue
    return {**found, "hdf5": h5py.version.hdf5_version}
