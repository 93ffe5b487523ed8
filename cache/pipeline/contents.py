"""What lies in a folder that is to hold a cache: whether it may be written to, and which shards are finished."""

from __future__ import annotations

from pathlib import Path

from ulfine_fast.cache import manifest as manifests
from ulfine_fast.cache.io import lock
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import write_error
from ulfine_fast.cache.shard import ShardRecord, is_intact, shard_path
from ulfine_fast.cache.sources.rows import Part


def refuse_strange_folder(out: Path) -> None:
    """Nothing is ever written into, or deleted from, a folder that holds something else.

    Raises:
        InputError: it is a file, or a folder with other files and no cache.
    """
    try:
        if out.exists() and not out.is_dir():
            raise InputError(f"{out} is a file; choose a folder for the cache")
        others = sorted(path.name for path in out.iterdir() if not _is_beginning(path)) if out.exists() else []
        if others and not manifests.is_cache(out):
            raise InputError(f"{out} holds other files ({others[0]}) and no cache; choose a new or empty folder")
    except OSError as error:
        raise write_error(out, error) from error


def recorded(out: Path, part: Part) -> ShardRecord | None:
    """The record of a shard that covers what the plan says; its file is not looked at."""
    try:
        record = ShardRecord.read(shard_path(out, part.number).with_suffix(".json"))
    except InputError:  # absent or cut: either way the shard does not count
        return None
    return record if record.covers(part) else None


def finished(out: Path, part: Part) -> ShardRecord | None:
    """The record of a shard that is there, whole, and what the plan says; None where it must be made."""
    record = recorded(out, part)
    return record if record is not None and is_intact(shard_path(out, part.number), record) else None


def _is_beginning(path: Path) -> bool:
    """Whether a run killed at its very first write may have left this behind."""
    if path.name == "shards":
        return path.is_dir() and not any(path.iterdir())
    return path.name in (manifests.NAME + ".tmp", *lock.FILES)
