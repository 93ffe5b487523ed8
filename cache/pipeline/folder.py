"""A folder that is to hold a cache: whether it may be written, its manifest and text, and its finished shards."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ulfine_fast.cache import descriptions
from ulfine_fast.cache import manifest as manifests
from ulfine_fast.cache import text as texts
from ulfine_fast.cache.io import lock
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import make_folder, refused_writes
from ulfine_fast.cache.manifest import Manifest
from ulfine_fast.cache.shard import ShardRecord, is_intact, shard_path
from ulfine_fast.cache.sources.rows import Part

_SHARD_FILE = re.compile(r"\d{5,}\.(h5|json)((\.\d+)?\.tmp)?")


def refuse_foreign_folder(out: Path) -> None:
    """Refuses a folder that holds something else: nothing is ever written into it or deleted from it.

    Raises:
        InputError: it is a file, or a folder with other files and no cache.
    """
    with refused_writes(out):
        if out.exists() and not out.is_dir():
            raise InputError(f"{out} is a file; choose a folder for the cache")
        others = sorted(path.name for path in out.iterdir() if not _is_first_write(path)) if out.exists() else []
        if others and not manifests.is_cache(out):
            raise InputError(f"{out} holds other files ({others[0]}) and no cache; choose a new or empty folder")


def prepare_folder(
    out: Path, manifest: Manifest, text: Callable[[], texts.TextFeatures], *, overwrite: bool = False
) -> Manifest:
    """Leaves `out` with this manifest and its text features, and nothing of another cache.

    Args:
        out: a folder that `refuse_foreign_folder` accepts and whose lock is held.
        manifest: what the features are.
        text: makes the text features; called only where they are missing or damaged.
        overwrite: whether a cache that is there is deleted; else it must have this manifest.

    Returns:
        The manifest in the format version that the folder has: a cache that was begun in an older one stays in it.

    Raises:
        InputError: the file system refuses.
        CacheMismatch: the folder holds another cache.
    """
    make_folder(out / "shards")
    known = (out / manifests.NAME).exists()
    # The old manifest stays until its shards are gone: a kill in between leaves a folder that still counts as a cache.
    if known and overwrite:
        _remove_features(out)
    elif known:
        stored = Manifest.read(out)
        stored.refuse_mismatch(manifest)
        manifest = replace(manifest, with_digests=stored.with_digests)
    if not known or overwrite:
        manifest.write(out)
    # Text takes a second, so a missing or damaged file is written anew without a question.
    try:
        texts.read_text(out, manifest)
    except InputError:
        texts.write_text(out, text(), manifest)
    return manifest


def recorded_shard(out: Path, part: Part, manifest: Manifest) -> ShardRecord | None:
    """The record of a shard of this cache that covers what the plan says; its HDF5 file is not read."""
    try:
        record = ShardRecord.read(shard_path(out, part.number).with_suffix(".json"))
        record.refuse_other_cache(manifest.identity_of(part.number))
    except InputError:  # missing, damaged or of another cache: either way the shard does not count
        return None
    return record if record.covers(part) else None


def finished_shard(out: Path, part: Part, manifest: Manifest) -> ShardRecord | None:
    """The record of a shard that is complete, intact and what the plan says; None where it must be made."""
    record = recorded_shard(out, part, manifest)
    return record if record is not None and is_intact(shard_path(out, part.number), record) else None


def _remove_features(out: Path) -> None:
    """Deletes text features and shards by their names, records first: a shard without a record does not count."""
    with refused_writes(out):
        files = [path for path in (out / "shards").iterdir() if _SHARD_FILE.fullmatch(path.name)]
        for path in sorted(files, key=lambda path: path.suffix != ".json"):
            path.unlink()
        (out / texts.NAME).unlink(missing_ok=True)
        (out / descriptions.NAME).unlink(missing_ok=True)


def _is_first_write(path: Path) -> bool:
    """Whether a run killed at its very first write may have left this file or folder."""
    if path.name == "shards":
        return path.is_dir() and not any(path.iterdir())
    return path.name in (manifests.NAME + ".tmp", *lock.FILES)
