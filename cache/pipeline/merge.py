"""Several caches to one: rows one after another, classes united by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ulfine_fast._version import __version__
from ulfine_fast.cache.ids import read_ids, refuse_shared_ids
from ulfine_fast.cache.io.errors import CacheMismatch, InputError
from ulfine_fast.cache.io.paths import to_path
from ulfine_fast.cache.io.progress import working
from ulfine_fast.cache.io.tables import label_key
from ulfine_fast.cache.manifest import Manifest
from ulfine_fast.cache.pipeline.fill import FillSummary, ShardContent, create_cache, ready_shards
from ulfine_fast.cache.shard import ShardRecord, read_shard, shard_path
from ulfine_fast.cache.sources.rows import SPLITS, UNKNOWN, Part
from ulfine_fast.cache.store import read_records
from ulfine_fast.cache.text import TextFeatures, read_text

# What two caches may differ in and still be merged: where the rows come from, and how they were counted.
_MAY_DIFFER = (
    "class_names",
    "source",
    "batch_size",
    "shard_size",
    "max_skipped",
    "libraries",
    "created_by",
    "version",
    "digest",
)
# The same weights may be in another folder on another machine; their digest tells.
_MODEL_MAY_DIFFER = ("name", "pretrained")
# Largest difference between two encodings of one text by one model: they may come from different machines.
_TEXT_TOLERANCE = 1e-3


class CachesDiffer(CacheMismatch):
    """Two caches whose features cannot be in one cache.

    Attributes:
        field: dotted name of the first manifest field that differs.
        found: its value in the first cache.
        wanted: its value in the other one.
    """

    def __init__(self, field: str, one: Path, found: object, other: Path, wanted: object) -> None:
        """Names the field and both caches."""
        self.field = field
        self.found = found
        self.wanted = wanted
        InputError.__init__(
            self,
            f"{field} is {found!r} in {one} and {wanted!r} in {other}; only caches of one model, preprocessing, views, "
            "dtype and prompts can be merged, so extract one of them again",
        )


@dataclass(frozen=True)
class _Input:
    """A finished cache.

    Attributes:
        folder: absolute.
        manifest: what its features are.
        text: features of its classes.
        records: of its shards.
        prefix: what comes before its ids.
    """

    folder: Path
    manifest: Manifest
    text: TextFeatures
    records: list[ShardRecord]
    prefix: str

    @classmethod
    def open(cls, folder: Path, prefixed: bool) -> _Input:
        """Reads all but the shards."""
        folder = folder.absolute()
        manifest = Manifest.read(folder)
        prefix = f"{folder.resolve().name}/" if prefixed else ""
        return cls(folder, manifest, read_text(folder, manifest), read_records(folder, manifest), prefix)

    def ids(self) -> Iterator[list[str]]:
        """The ids as they will be, shard by shard."""
        for record in self.records:
            yield [self.prefix + name for name in read_ids(self.folder, record)]


def merge(
    caches: Sequence[str | Path], out: str | Path, *, prefix: bool = False, progress: bool | None = None
) -> FillSummary:
    """Makes one cache of several; they stay as they are.

    The rows are ordered split by split, inside a split cache by cache in the order of `caches`. A class is the same
    where its name is, in any form of Unicode and with any blanks around it; classes are numbered in the order in which
    they are met. One shard is in memory at a time, and 8 bytes of every row while ids are compared.

    Args:
        caches: folders of finished caches, at least two.
        out: folder of the new cache: new, empty, or what an interrupted merge of the same caches left.
        prefix: whether to put a cache's folder name and "/" before its ids, for caches that share ids.
        progress: whether to draw a bar on stderr; by default where that is a terminal.

    Raises:
        InputError: fewer than two caches, one that is unfinished or damaged, an id in two of them.
        CacheMismatch: two of them, or the cache in `out`, were made with other settings.
    """
    # The inputs, and whether they go together.
    path = to_path(out)
    inputs = [_Input.open(to_path(cache), prefix) for cache in caches]
    _refuse_bad_choice(inputs, path, prefix)
    for other in inputs[1:]:
        _refuse_difference(inputs[0], other)
    # A name as it is met first; caches of version 0.1 keep names in the form that the source had.
    spelled: dict[str, str] = {}
    for cache in inputs:
        for name in cache.manifest.class_names:
            spelled.setdefault(label_key(name), name)
    class_names = list(spelled.values())
    text = _united_text(inputs, list(spelled))
    if not prefix:  # else the folders' names differ, and each cache's ids do too
        fix = "give --prefix to put the name of its cache before each id"
        with working("compare ids", progress):
            refuse_shared_ids(lambda: (ids for cache in inputs for ids in cache.ids()), fix)

    # A part for each of their shards that has rows: split by split, then cache by cache.
    origin: dict[int, tuple[_Input, ShardRecord]] = {}
    parts: list[Part] = []
    first_row = 0
    for split in SPLITS:
        for cache in inputs:
            for record in cache.records:
                if record.split == split and record.rows_read:
                    origin[len(parts)] = cache, record
                    parts.append(Part(len(parts), split, first_row, record.rows_read))
                    first_row += record.rows_read

    # The shards, with ids and labels as they are in the new cache.
    index = {key: label for label, key in enumerate(spelled)}

    def content(part: Part) -> ShardContent:
        cache, record = origin[part.number]
        shard = read_shard(shard_path(cache.folder, record.shard), cache.manifest.layout(record.split), record)
        # label -1 finds the last entry
        new_labels = np.array([*(index[label_key(name)] for name in cache.manifest.class_names), UNKNOWN], np.int32)
        if ((shard.labels < UNKNOWN) | (shard.labels >= len(new_labels) - 1)).any():
            raise InputError(
                f"shard {record.shard:05d} of {cache.folder} has a label that names no class; extract it again"
            )
        ids = [cache.prefix + name for name in shard.ids]
        skipped = [{**row, "id": cache.prefix + row["id"]} for row in record.skipped]
        return ShardContent(replace(shard, ids=ids, labels=new_labels[shard.labels]), skipped)

    return create_cache(
        path,
        _merged_manifest(inputs, class_names),
        parts,
        ready_shards(path, content),
        text=lambda: text,
        mismatch_fix=f"{path} holds another cache, so choose another folder or remove it",
        label="merge",
        progress=progress,
    )


def _refuse_bad_choice(inputs: Sequence[_Input], out: Path, prefix: bool) -> None:
    if len(inputs) < 2:
        raise InputError(f"there must be at least two caches to merge, got {len(inputs)}")
    for number, cache in enumerate(inputs):
        if cache.folder.resolve() == out.resolve():
            raise InputError(f"{out} is one of the caches to merge; choose another folder with --out")
        if any(cache.folder.resolve() == other.folder.resolve() for other in inputs[:number]):
            raise InputError(f"{cache.folder} is given twice; a cache can go into a merge once")
        if prefix and any(cache.prefix == other.prefix for other in inputs[:number]):
            raise InputError(f"two caches have the folder name {cache.folder.name!r}, which --prefix needs to differ")


def _refuse_difference(one: _Input, other: _Input) -> None:
    """Refuses two caches whose features are not of one kind."""
    left, right = _feature_fields(one.manifest), _feature_fields(other.manifest)
    for name, value in left.items():
        if value != right.get(name):
            field, left_value, right_value = _first_difference(name, value, right.get(name))
            raise CachesDiffer(field, one.folder, left_value, other.folder, right_value)
    left_name, right_name = one.manifest.model["name"], other.manifest.model["name"]
    if not one.manifest.model["sha256"] and left_name != right_name:
        raise CachesDiffer("model.name", one.folder, left_name, other.folder, right_name)


def _feature_fields(manifest: Manifest) -> dict[str, Any]:
    """The fields of a manifest that must be equal in caches to merge."""
    values = {name: value for name, value in manifest.to_dict().items() if name not in _MAY_DIFFER}
    return {**values, "model": {k: v for k, v in values["model"].items() if k not in _MODEL_MAY_DIFFER}}


def _first_difference(name: str, one: Any, other: Any) -> tuple[str, Any, Any]:
    """The first value inside that differs: a whole section would make no readable sentence."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        key = next(key for key in [*one, *other] if one.get(key) != other.get(key))
        return _first_difference(f"{name}.{key}", one.get(key), other.get(key))
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        index = next(index for index, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
        return _first_difference(f"{name}.{index}", one[index], other[index])
    return name, one, other


def _united_text(inputs: Sequence[_Input], keys: Sequence[str]) -> TextFeatures:
    """Each class's texts from the first cache that has it.

    Args:
        inputs: the caches.
        keys: (K,) class names as they are compared, see `label_key`.

    Returns:
        Features (K, P, D), in the order of `keys`.

    Raises:
        InputError: two caches have other texts or other features of one class.
    """
    first: dict[str, tuple[_Input, int]] = {}
    for cache in inputs:
        for label, name in enumerate(cache.manifest.class_names):
            owner, owner_label = first.setdefault(label_key(name), (cache, label))
            known, again = owner.text.prompts[owner_label], cache.text.prompts[label]
            if name != owner.manifest.class_names[owner_label]:
                continue  # another form of the name, which a model may read as another text: the first one counts
            if known != again:
                raise CachesDiffer(f"text of {name!r}", owner.folder, known[0], cache.folder, again[0])
            gap = float(np.abs(owner.text.features[owner_label] - cache.text.features[label]).max(initial=0.0))
            if gap > _TEXT_TOLERANCE:
                raise InputError(
                    f"the text features of class {name!r} differ by up to {gap:.2g} between {owner.folder} and "
                    f"{cache.folder}, so two models made them; extract one of the caches again"
                )
    rows = [first[key] for key in keys]
    return replace(
        inputs[0].text,
        prompts=[cache.text.prompts[label] for cache, label in rows],
        features=np.stack([cache.text.features[label] for cache, label in rows]),  # (K, P, D)
        prototypes=np.stack([cache.text.prototypes[label] for cache, label in rows]),  # (K, D)
    )


def _merged_manifest(inputs: Sequence[_Input], class_names: list[str]) -> Manifest:
    digest = hashlib.sha256()  # changes when any feature or prefix does
    described: list[dict[str, Any]] = []
    for cache in inputs:
        digest.update(f"{cache.prefix}\0{len(cache.records)}\n".encode())
        digest.update("".join(f"{record.checksum}\n" for record in cache.records).encode())
        description = {
            "path": str(cache.folder),
            "rows": sum(record.rows_read for record in cache.records),
            "batch_size": cache.manifest.batch_size,
            "source": cache.manifest.source,
        }
        described.append(description | ({"prefix": cache.prefix} if cache.prefix else {}))
    source = {
        "kind": "merged",
        "name": " + ".join(cache.folder.name for cache in inputs),
        "rows": sum(description["rows"] for description in described),
        "fingerprint": digest.hexdigest(),
        "caches": described,
    }
    manifests = [cache.manifest for cache in inputs]
    return replace(
        manifests[0],
        class_names=class_names,
        source=source,
        batch_size=max(manifest.batch_size for manifest in manifests),
        shard_size=max(manifest.shard_size for manifest in manifests),
        max_skipped=max(manifest.max_skipped for manifest in manifests),
        created_by=f"ulfine-fast {__version__}",
        with_digests=True,
    )
