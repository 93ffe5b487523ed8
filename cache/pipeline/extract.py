"""Images of a source to a cache, with a frozen model; it can be interrupted at any instant and continued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import h5py

from ulfine_fast._version import __version__
from ulfine_fast.cache import text as texts
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.names import one_of
from ulfine_fast.cache.io.paths import to_path
from ulfine_fast.cache.io.progress import working
from ulfine_fast.cache.manifest import DTYPES, Manifest
from ulfine_fast.cache.models.prompts import DEFAULT_PROMPTS, fill_prompts
from ulfine_fast.cache.pipeline.encode import Engine, image_shards
from ulfine_fast.cache.pipeline.fill import FillSummary, SkipLimit, create_cache
from ulfine_fast.cache.pipeline.plan import (
    describe_source,
    is_listed,
    plan_parts,
    refuse_bad_rows,
    refuse_empty_class,
)
from ulfine_fast.cache.pipeline.views import ViewRecipe
from ulfine_fast.cache.shard import ShardRecord, shard_path, verify_shard

if TYPE_CHECKING:
    from ulfine_fast.cache.models.encoder import Encoder
    from ulfine_fast.cache.sources.rows import Part, Source

MODES = ("resume", "overwrite", "verify")
_LIBRARIES = ("torch", "torchvision", "open_clip_torch", "timm", "transformers", "numpy", "pillow", "h5py")


def extract(
    source: Source,
    encoder: Encoder,
    out: str | Path,
    *,
    views: ViewRecipe | None = None,
    prompts: Sequence[str] | None = None,
    dtype: str = "float16",
    batch_size: int = 32,
    shard_size: int = 1024,
    workers: int | None = None,
    mode: str = "resume",
    max_skipped: float = 0.01,
    progress: bool | None = None,
    engine: Engine | None = None,
) -> FillSummary:
    """Extracts the features of a source into a cache folder.

    Args:
        source: images with ids, labels and splits.
        encoder: the frozen model.
        out: folder of the cache, or a URL that fsspec knows, such as s3://bucket/cache; new, empty, or a cache.
        views: what to draw beside the plain view; one weak and one strong view by default.
        prompts: (P,) texts with {} for the class name; `DEFAULT_PROMPTS` by default, and none for a model without a
            text tower.
        dtype: "float16", "float32" or "int8" with a scale a row, of the stored features.
        batch_size: images encoded together, at least 1. Part of the cache's identity: it moves the last bits.
        shard_size: source rows a shard covers, at least 1; an interruption loses at most this much work.
        workers: threads that read and encode (on a processor), or processes that read (beside a GPU); 0 for none, by
            default one for each core.
        mode: "resume" keeps intact finished shards, "overwrite" starts anew, "verify" checks and extracts nothing.
        max_skipped: fraction of all images that may be unreadable, 0..1.
        progress: whether to draw a bar on stderr; by default where that is a terminal.
        engine: what encodes the parts; by default this process (`encode_parts`).

    Raises:
        InputError: a value out of range, two rows with one id, a class without labelled images, too many unreadable
            images, features that are not finite, a file system that refuses, or (verify) any problem.
        CacheMismatch: the folder's cache was made with other settings.
        KeyboardInterrupt: Ctrl-C; its text says what is finished and how to continue.
    """
    # Values out of range.
    recipe = ViewRecipe() if views is None else views
    if dtype not in DTYPES:
        raise one_of("dtype", dtype, DTYPES)
    if mode not in MODES:
        raise one_of("mode", mode, MODES)
    for name, value, least in (("batch size", batch_size, 1), ("shard size", shard_size, 1), ("workers", workers, 0)):
        if value is not None and value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    if not 0 <= max_skipped <= 1:
        raise InputError(f"max skipped must be a fraction from 0 to 1, got {max_skipped}")
    if prompts and not encoder.reads_texts:
        raise InputError(f"{encoder.spec.name} encodes images alone and reads no prompts; leave them out")
    if prompts is None:
        prompts = DEFAULT_PROMPTS if encoder.reads_texts else ()
    if not prompts and encoder.reads_texts:
        raise InputError("there must be at least one prompt, such as 'a photo of a {}.'")
    if not -(2**63) <= recipe.seed < 2**63:
        raise InputError(f"view seed must fit into 64 bits, got {recipe.seed}")

    # What the cache will hold. No image is read and nothing written up to here, so that bad input costs a moment.
    parts = plan_parts(source, shard_size)
    if not parts:
        raise InputError("there are no images in the source; give a folder, a table or the name of a data set")
    if is_listed(source):  # the rows of a stream are checked part by part, when it is opened
        refuse_bad_rows(source.rows)
        refuse_empty_class(source, set())
    manifest = make_manifest(
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
    manifest.check()
    path = to_path(out)
    if mode == "verify":
        return _verify(path, manifest, parts)
    if mode == "overwrite" or not (path / texts.NAME).exists():  # a cache of bad class names is not even begun
        texts.refuse_same_texts(encoder, fill_prompts(manifest.class_names, manifest.prompts))

    def encode_texts() -> texts.TextFeatures:
        with working("encode class names", progress):
            return texts.encode_classes(encoder, fill_prompts(manifest.class_names, manifest.prompts))

    # The shards.
    summary = create_cache(
        path,
        manifest,
        parts,
        image_shards(path, source, recipe, encoder, workers=workers, engine=engine),
        text=encode_texts,
        overwrite=mode == "overwrite",
        label="extract",
        skip_limit=SkipLimit(max_skipped, shard_size, fix="fix them or raise --max-skipped"),
        progress=progress,
    )
    if is_listed(source):  # only now is it known which labelled images could be read
        refuse_empty_class(source, {row["id"] for row in summary.skipped})
    return summary


def make_manifest(
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
    """The manifest of the cache that such a request makes; the arguments are those of `extract`."""
    libraries = {}
    for package in _LIBRARIES:
        try:
            libraries[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # an optional one
            continue
    return Manifest(
        model={**asdict(encoder.spec), "normalized": True},
        preprocessing=encoder.preprocessing,
        mean=list(encoder.mean),
        std=list(encoder.std),
        views=asdict(recipe),
        dtype=dtype,
        precision=encoder.precision,
        batch_size=batch_size,
        shard_size=shard_size,
        class_names=list(source.class_names),
        prompts=list(prompts),
        source=describe_source(source, parts),
        tokens=list(encoder.token_kinds),
        token_width=encoder.token_width,
        exact=encoder.exact,
        compiled=encoder.compiled,
        max_skipped=max_skipped,
        libraries={**libraries, "hdf5": h5py.version.hdf5_version},
        created_by=f"ulfine-fast {__version__}",
    )


def _verify(out: Path, manifest: Manifest, parts: Sequence[Part]) -> FillSummary:
    """Checks that a finished cache is what `manifest` and `parts` say, and intact."""
    cached = Manifest.read(out)
    cached.refuse_mismatch(manifest)
    problems: list[str] = []
    try:
        texts.read_text(out, cached)
    except InputError as error:
        problems.append(str(error))
    records: list[ShardRecord] = []
    for part in parts:
        path = shard_path(out, part.number)
        try:
            record = ShardRecord.read(path.with_suffix(".json"))
            record.refuse_other_cache(cached.identity_of(part.number))
        except InputError as error:
            problems.append(str(error))
            continue
        records.append(record)
        problems += verify_shard(path, cached.layout(part.split), record)[1]
        if not record.covers(part):
            problems.append(f"shard {part.number:05d} covers other rows")
    if problems:
        raise InputError(f"{out} has {len(problems)} problem{'s' * (len(problems) > 1)}: " + "; ".join(problems))
    return FillSummary(
        out=out,
        images=sum(record.rows for record in records),
        encoded=0,
        shards=len(records),
        kept=len(records),
        skipped=[row for record in records for row in record.skipped],
        seconds=0.0,
        stages={},
        classes=len(cached.class_names),
    )
