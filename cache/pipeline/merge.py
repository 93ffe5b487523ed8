"""Several caches to one: rows one after another, classes united by name."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulfine_fast._version import __version__
from ulfine_fast.cache.ids import read_ids, refuse_shared_ids
from ulfine_fast.cache.io.errors import CacheMismatch, InputError
from ulfine_fast.cache.io.paths import open_place
from ulfine_fast.cache.manifest import Manifest
from ulfine_fast.cache.pipeline.assemble import Assembled, Piece, assemble
from ulfine_fast.cache.shard import Shard, ShardRecord, read_shard, shard_path
from ulfine_fast.cache.sources.rows import SPLITS, Part
from ulfine_fast.cache.store import read_records
from ulfine_fast.cache.text import TextFeatures, read_text

# What two caches may differ in and still be one: where the rows come from, and how they were counted out.
_MAY_DIFFER = ("class_names", "source", "batch_size", "shard_size", "max_skipped", "libraries", "created_by", "version")
# The same weights may lie in another folder on another machine; their digest tells.
_NOT_THE_MODEL = ("name", "pretrained")
# Largest difference between two encodings of one text by one model: they may come from different machines.
_TEXT_TOLERANCE = 1e-3


class CachesDiffer(CacheMismatch):
    """Two caches whose features cannot stand side by side.

    Attributes:
        field: dotted name of the first manifest field that differs.
        found: its value in the first cache. wanted: in the other one.
    """

    def __init__(self, field: str, one: Path, found: object, other: Path, wanted: object) -> None:
        """Names the field and both caches."""
        self.field, self.found, self.wanted = field, found, wanted
        InputError.__init__(
            self,
            f"{field} is {found!r} in {one} and {wanted!r} in {other}; only caches of one model, preprocessing, views, "
            "dtype and prompts can be merged, so extract one of them again",
        )


@dataclass(frozen=True)
class _Input:
    """A finished cache.

    Attributes:
        folder: absolute. manifest, text, records: what it says of itself.
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

    def describe(self) -> dict[str, Any]:
        """Where it is and what went into it, for the manifest of the whole."""
        rows = sum(record.rows_read for record in self.records)
        said = {"path": str(self.folder), "rows": rows, "batch_size": self.manifest.batch_size}
        return {**said, "source": self.manifest.source} | ({"prefix": self.prefix} if self.prefix else {})

    def ids(self) -> Iterator[list[str]]:
        """The ids as they will be, shard by shard."""
        for record in self.records:
            yield [self.prefix + name for name in read_ids(self.folder, record)]


def merge(
    caches: Sequence[str | Path], out: str | Path, *, prefix: bool = False, progress: bool | None = None
) -> Assembled:
    """Makes one cache of several; they stay as they are.

    The rows are ordered split by split, inside a split cache by cache in the order given. A class is the same where its
    name is; classes are numbered in the order in which they are met. One shard is in memory at a time, and 8 bytes
    of every row while ids are compared.

    Args:
        caches: folders of finished caches, at least two.
        out: folder of the new cache: new, empty, or what an interrupted merge of the same caches left.
        prefix: whether to put a cache's folder name and "/" before its ids, for caches that share ids.
        progress: whether to draw a bar on stderr; by default where that is a terminal.

    Raises:
        InputError: fewer than two caches, one that is unfinished or damaged, an id in two of them.
        CacheMismatch: two of them, or what lies in `out`, were made with other settings.
    """
    inputs = [_Input.open(open_place(cache), prefix) for cache in caches]
    _refuse_bad_choice(inputs, open_place(out), prefix)
    for other in inputs[1:]:
        _refuse_difference(inputs[0], other)
    class_names = list(dict.fromkeys(name for one in inputs for name in one.manifest.class_names))
    text = _united_text(inputs, class_names)
    if not prefix:  # the folders' names differ, and each cache's ids do too
        way_out = "give --prefix to put the name of its cache before each id"
        refuse_shared_ids(lambda: (ids for one in inputs for ids in one.ids()), way_out)
    manifest = _manifest(inputs, class_names)
    return assemble(open_place(out), manifest, text, _pieces(inputs, manifest), progress=progress)


def _refuse_bad_choice(inputs: Sequence[_Input], out: Path, prefix: bool) -> None:
    if len(inputs) < 2:
        raise InputError(f"there must be at least two caches to merge, got {len(inputs)}")
    for at, one in enumerate(inputs):
        if one.folder.resolve() == out.resolve():
            raise InputError(f"{out} is one of the caches to merge; choose another folder with --out")
        if any(one.folder.resolve() == other.folder.resolve() for other in inputs[:at]):
            raise InputError(f"{one.folder} is given twice; a cache can go into a merge once")
        if prefix and any(one.prefix == other.prefix for other in inputs[:at]):
            raise InputError(f"two caches have the folder name {one.folder.name!r}, which --prefix needs to differ")


def _refuse_difference(one: _Input, other: _Input) -> None:
    for name, found in _of_features(one.manifest).items():
        wanted = _of_features(other.manifest).get(name)
        if found != wanted:
            field, left, right = _first_leaf(name, found, wanted)
            raise CachesDiffer(field, one.folder, left, other.folder, right)
    if not one.manifest.model["sha256"] and one.manifest.model["name"] != other.manifest.model["name"]:
        names = (cache.manifest.model["name"] for cache in (one, other))
        raise CachesDiffer("model.name", one.folder, next(names), other.folder, next(names))


def _of_features(manifest: Manifest) -> dict[str, Any]:
    values = {name: value for name, value in manifest.to_dict().items() if name not in _MAY_DIFFER}
    return {**values, "model": {k: v for k, v in values["model"].items() if k not in _NOT_THE_MODEL}}


def _first_leaf(name: str, found: Any, wanted: Any) -> tuple[str, Any, Any]:
    """The first value inside that differs: a whole section would make no readable sentence."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        key = next(key for key in [*found, *wanted] if found.get(key) != wanted.get(key))
        return _first_leaf(f"{name}.{key}", found.get(key), wanted.get(key))
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        place = next(k for k, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1])
        return _first_leaf(f"{name}.{place}", found[place], wanted[place])
    return name, found, wanted


def _united_text(inputs: Sequence[_Input], class_names: Sequence[str]) -> TextFeatures:
    """Each class's texts from the first cache that has it; (K, P, D) in the order of `class_names`."""
    first: dict[str, tuple[_Input, int]] = {}
    for one in inputs:
        for label, name in enumerate(one.manifest.class_names):
            owner, place = first.setdefault(name, (one, label))
            _refuse_other_text(name, owner, place, one, label)
    found = [first[name] for name in class_names]
    return dataclasses.replace(
        inputs[0].text,
        prompts=[one.text.prompts[label] for one, label in found],
        features=np.stack([one.text.features[label] for one, label in found]),  # (K, P, D)
        prototypes=np.stack([one.text.prototypes[label] for one, label in found]),  # (K, D)
    )


def _refuse_other_text(name: str, owner: _Input, place: int, one: _Input, label: int) -> None:
    known, again = owner.text, one.text
    if known.prompts[place] != again.prompts[label]:
        raise CachesDiffer(
            f"text of {name!r}", owner.folder, known.prompts[place][0], one.folder, again.prompts[label][0]
        )
    gap = float(np.abs(known.features[place] - again.features[label]).max())
    if gap > _TEXT_TOLERANCE:
        raise InputError(
            f"the text features of class {name!r} differ by up to {gap:.2g} between {owner.folder} and {one.folder}, "
            "so two models made them; extract one of the caches again"
        )


def _manifest(inputs: Sequence[_Input], class_names: list[str]) -> Manifest:
    described = [one.describe() for one in inputs]
    source = {
        "kind": "merged",
        "name": " + ".join(one.folder.name for one in inputs),
        "rows": sum(one["rows"] for one in described),
        "fingerprint": _fingerprint(inputs),
        "caches": described,
    }
    return dataclasses.replace(
        inputs[0].manifest,
        class_names=class_names,
        source=source,
        batch_size=max(one.manifest.batch_size for one in inputs),
        shard_size=max(one.manifest.shard_size for one in inputs),
        max_skipped=max(one.manifest.max_skipped for one in inputs),
        created_by=f"ulfine-fast {__version__}",
    )


def _fingerprint(inputs: Sequence[_Input]) -> str:
    """Hex sha256 over prefix and shards' digests of each cache: it changes when any of their features does."""
    digest = hashlib.sha256()
    for one in inputs:
        digest.update(f"{one.prefix}\0{len(one.records)}\n".encode())
        digest.update("".join(f"{record.sha256}\n" for record in one.records).encode())
    return digest.hexdigest()


def _pieces(inputs: Sequence[_Input], manifest: Manifest) -> list[Piece]:
    """A shard for each shard of the caches that has rows at all: split by split, then cache by cache."""
    index = {name: label for label, name in enumerate(manifest.class_names)}
    labels = [np.array([*(index[name] for name in one.manifest.class_names), -1], np.int32) for one in inputs]
    pieces: list[Piece] = []
    reached = 0
    for split in SPLITS:
        for one, new_labels in zip(inputs, labels, strict=True):
            for record in (found for found in one.records if found.split == split and found.rows_read):
                pieces.append(_piece(Part(len(pieces), split, reached, record.rows_read), one, record, new_labels))
                reached += record.rows_read
    return pieces


def _piece(part: Part, one: _Input, record: ShardRecord, new_labels: NDArray[np.int32]) -> Piece:
    skipped = [{**row, "id": one.prefix + row["id"]} for row in record.skipped]
    return Piece(part, lambda: _remade(one, record, new_labels), skipped)


def _remade(one: _Input, record: ShardRecord, new_labels: NDArray[np.int32]) -> Shard:
    """The shard with its ids and labels as they are in the whole; features as they are."""
    path = shard_path(one.folder, record.shard)
    shard = read_shard(path, one.manifest.layout(record.split))
    if ((shard.labels < -1) | (shard.labels >= len(new_labels) - 1)).any():
        raise InputError(f"shard {path.stem} of {one.folder} has a label that names no class; extract it again")
    # -1 is the last entry, where Python's index -1 finds it.
    return dataclasses.replace(shard, ids=[one.prefix + name for name in shard.ids], labels=new_labels[shard.labels])
