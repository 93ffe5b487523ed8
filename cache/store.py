"""FeatureCache: open a cache, check it, hand its features out as arrays."""

from __future__ import annotations

import copy
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ulfine_fast.cache.ids import read_ids
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.paths import is_remote, to_path
from ulfine_fast.cache.io.prefetch import prefetch
from ulfine_fast.cache.manifest import Manifest
from ulfine_fast.cache.shard import VIEWED_SPLITS, Shard, ShardRecord, read_shard, shard_path, verify_shard
from ulfine_fast.cache.sources.rows import SPLITS
from ulfine_fast.cache.text import average, read_text

UNKNOWN = "(unknown)"
_ASKED_AT_ONCE = 16  # records of a store
_HINT = 1 << 17  # bytes that the system is asked to read ahead at a time


@dataclass(frozen=True)
class _Arrays:
    """All rows of a cache in memory; m of the n rows have views."""

    ids: list[str] | None  # None until somebody asks for them
    labels: NDArray[np.int64]  # (n,)
    splits: NDArray[np.str_]  # (n,)
    plain: NDArray[Any]  # (n, D)
    weak: NDArray[Any]  # (m, Vw, D)
    strong: NDArray[Any]  # (m, Vs, D)
    view_rows: NDArray[np.int64]  # (m,)
    areas: NDArray[np.float32] | None = None  # (m, Vw + Vs), None where nobody cut crops


@dataclass(frozen=True)
class _Tokens:
    """Tokens of all rows in memory."""

    plain: NDArray[Any]  # (n, S, W)
    weak: NDArray[Any]  # (m, Vw, S, W)
    strong: NDArray[Any]  # (m, Vs, S, W)


class FeatureCache:
    """Frozen features of a set of images, from a folder or from arrays.

    Attributes:
        path: the folder, None for a cache in memory. manifest: what the features are, None for a cache in memory.
        class_names: (K,) texts.
        dim: D, length of a feature.
        text_features: float32 (K, P, D), None for a cache in memory without text.
        prototypes: float32 (K, D) of length 1, None for a cache in memory without text.
        logit_scale: the model's factor on cosine similarities.
        head: what an open_clip ViT does to its class token last, see `ulfine_fast.cache.text.TextFeatures`; else empty.
        records: what is known of each shard, in order.
        relabeled: hex SHA-256 of labels that were put in the place of the cache's own, None where they are its own.

    Rows are in the order of the source: train, unlabeled, val, test. The big arrays are read on first use.
    """

    def __init__(
        self,
        *,
        class_names: Sequence[str],
        dim: int,
        text_features: NDArray[np.float32] | None,
        prototypes: NDArray[np.float32] | None,
        logit_scale: float,
        path: Path | None = None,
        manifest: Manifest | None = None,
        records: Sequence[ShardRecord] = (),
        arrays: _Arrays | None = None,
        head: dict[str, NDArray[np.float32]] | None = None,
    ) -> None:
        """Use `FeatureCache.open` or `FeatureCache.from_arrays`."""
        self.class_names, self.dim, self.logit_scale = list(class_names), dim, float(logit_scale)
        self.text_features, self.prototypes = text_features, prototypes
        self.path, self.manifest, self.records = path, manifest, list(records)
        self._loaded, self.head = arrays, head or {}
        self.relabeled: str | None = None
        self._tokens: _Tokens | None = None
        self._ids: list[str] | None = None

    @classmethod
    def open(cls, path: str | Path) -> FeatureCache:
        """Opens what `extract` made, a folder or a URL; reads its manifest, text features and records, nothing big yet.

        Raises:
            InputError: not a cache, damaged, or a shard is missing; names the shard.
        """
        folder = to_path(path)
        manifest = Manifest.read(folder)
        text = read_text(folder, manifest)
        return cls(
            class_names=manifest.class_names,
            dim=manifest.dim,
            text_features=text.features,
            prototypes=text.prototypes,
            logit_scale=text.logit_scale,
            path=folder,
            manifest=manifest,
            records=read_records(folder, manifest),
            head=text.head,
        )

    @classmethod
    def from_arrays(
        cls,
        plain: ArrayLike,
        labels: ArrayLike,
        *,
        class_names: Sequence[str] | None = None,
        text_features: ArrayLike | None = None,
        weak: ArrayLike | None = None,
        strong: ArrayLike | None = None,
        splits: Sequence[str] | None = None,
        ids: Sequence[str] | None = None,
        logit_scale: float = 100.0,
    ) -> FeatureCache:
        """Makes a cache in memory.

        Args:
            plain: (n, D) floating; float16 and float32 are kept as they are, others become float32.
            labels: (n,) whole numbers, -1 for unknown.
            class_names: (K,); by default the numbers 0 .. K-1 as text.
            text_features: (K, P, D), or (K, D) for one prompt.
            weak: (m, Vw, D) views of the rows of train and unlabeled, in their order; None for no views.
            strong: (m, Vs, D) likewise.
            splits: (n,) of train, unlabeled, val, test; by default train where the label is known, else unlabeled.
            ids: (n,) unique texts; by default the row numbers.
            logit_scale: factor on cosine similarities.

        Raises:
            InputError: shapes that do not fit, values that are not finite, labels or splits that do not exist.
        """
        arrays = _arrays_from(plain, labels, weak, strong, splits, ids)
        names = _class_names(class_names, arrays.labels)
        text = None if text_features is None else _text_array(text_features, len(names), arrays.plain.shape[1])
        return cls(
            class_names=names,
            dim=arrays.plain.shape[1],
            text_features=text,
            prototypes=None if text is None else average(text),
            logit_scale=logit_scale,
            arrays=arrays,
        )

    def with_labels(self, labels: ArrayLike) -> FeatureCache:
        """The same images with other labels; memory is shared, nothing is written.

        A row of "unlabeled" that is given a label is in "train", which has views too; no other row changes its split.

        Args:
            labels: (n,) whole numbers below K, -1 for unknown.

        Raises:
            InputError: other shapes, types or numbers.
        """
        known = _known_labels(labels, len(self))
        _refuse_bad_labels(known, len(self.class_names))
        splits = np.where((self.splits == "unlabeled") & (known >= 0), "train", self.splits)
        other = copy.copy(self)
        other._loaded = replace(self._arrays, labels=known, splits=splits)
        other.relabeled = hashlib.sha256(known.tobytes()).hexdigest()
        return other

    def __len__(self) -> int:
        return sum(record.rows for record in self.records) if self._loaded is None else len(self._loaded.labels)

    @property
    def ids(self) -> list[str]:
        """Ids of the n rows; read on first use, apart from the features."""
        if self._ids is None:
            self._ids = self._read_ids() if self._arrays.ids is None else self._arrays.ids
        return self._ids

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class index of the n rows, -1 for unknown: int64 (n,)."""
        return self._arrays.labels

    @property
    def splits(self) -> NDArray[np.str_]:
        """Split of the n rows, "train", "unlabeled", "val" or "test": text (n,)."""
        return self._arrays.splits

    @property
    def plain(self) -> NDArray[Any]:
        """Features of the n rows in the evaluation view, as stored: (n, D)."""
        return self._arrays.plain

    @property
    def view_rows(self) -> NDArray[np.int64]:
        """Rows that have views, those of train and unlabeled: int64 (m,), ascending."""
        return self._arrays.view_rows

    def views(self, kind: str) -> NDArray[Any]:
        """Features of augmented views.

        Args:
            kind: "weak" or "strong".

        Returns:
            (m, V, D) as stored, in the order of `view_rows`; V may be 0.

        Raises:
            InputError: another kind.
        """
        if kind not in ("weak", "strong"):
            raise InputError(f"views are weak or strong, got {kind!r}")
        found: NDArray[Any] = getattr(self._arrays, kind)
        return found

    def view_areas(self, kind: str) -> NDArray[np.float32]:
        """Shares of the image's area that augmented views show.

        Args:
            kind: "weak" or "strong".

        Returns:
            (m, V) in (0, 1], in the order of `view_rows`; zeros where the cache does not know.

        Raises:
            InputError: another kind.
        """
        shape, areas = self.views(kind).shape[:2], self._arrays.areas
        if areas is None:
            return np.zeros(shape, dtype=np.float32)
        return areas[:, : shape[1]] if kind == "weak" else areas[:, areas.shape[1] - shape[1] :]

    @property
    def token_kinds(self) -> list[str]:
        """Names of the S tokens stored beside each feature; often none."""
        return [] if self.manifest is None else list(self.manifest.tokens)

    def tokens(self, kind: str) -> NDArray[Any]:
        """What the model held of each view before its last layers; read on first use, apart from the features.

        Args:
            kind: "plain", "weak" or "strong".

        Returns:
            (n, S, W) of the plain view, in the order of the rows, or (m, V, S, W) in the order of `view_rows`; S as
            `token_kinds` names them, float16 or float32, of any length.

        Raises:
            InputError: another kind, or a cache without tokens.
        """
        if kind not in ("plain", "weak", "strong"):
            raise InputError(f"tokens are of plain, weak or strong views, got {kind!r}")
        if not self.token_kinds:
            raise InputError("this cache holds no tokens; extract again with --features last-block or pre-projection")
        if self._tokens is None:
            self._tokens = self._load_tokens()
        found: NDArray[Any] = getattr(self._tokens, kind)
        return found

    def verify(self) -> list[str]:
        """Checks text and every shard in full (checksums of files and datasets, layout, finite values, unique ids).

        Returns:
            One sentence for each problem; empty when all is well.
        """
        return self._survey()[1]

    def summary(self) -> dict[str, Any]:
        """What is in the cache, in JSON's types; reads and checks every shard for it.

        Returns:
            path, model, dim, dtype, tokens, precision, prompts, views, source, created_by, class_names, images,
            shards, bytes (on the disk), counts (split -> class -> rows), skipped ({"id", "reason"}), problems (texts).
        """
        counts, problems = self._survey()
        about = {} if self.manifest is None else self.manifest.to_dict()
        kept = ("model", "dtype", "tokens", "precision", "prompts", "views", "source", "created_by")
        return {
            "path": None if self.path is None else str(self.path),
            **{name: about.get(name) for name in kept},
            "dim": self.dim,
            "class_names": self.class_names,
            "images": len(self),
            "shards": len(self.records),
            "bytes": _bytes_on_disk(self.path),
            "counts": counts,
            "skipped": [one for record in self.records for one in record.skipped],
            "problems": problems,
        }

    @property
    def _arrays(self) -> _Arrays:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def _load(self) -> _Arrays:
        """Reads each shard once, in threads, into arrays whose size the records tell beforehand."""
        assert self.manifest is not None
        rows, splits = [record.rows for record in self.records], [record.split for record in self.records]
        viewed = np.repeat([split in VIEWED_SPLITS for split in splits], rows)  # (n,)
        layout = self.manifest.layout("train")
        plain = np.empty((sum(rows), self.dim), dtype=layout.array_dtype)
        weak, strong = (
            np.empty((int(viewed.sum()), v, self.dim), layout.array_dtype) for v in (layout.weak, layout.strong)
        )
        labels = np.empty(len(plain), dtype=np.int64)
        areas = np.empty((len(weak), layout.weak + layout.strong), dtype=np.float32)

        def place(shard: Shard, here: slice, there: slice) -> None:
            plain[here], labels[here] = shard.plain[:, 0], shard.labels
            if shard.split in VIEWED_SPLITS:
                weak[there], strong[there], areas[there] = shard.weak, shard.strong, shard.scale

        self._place(place)
        _refuse_bad_labels(labels, len(self.class_names))
        of_row, viewed_rows = np.repeat(np.array(splits), rows), np.flatnonzero(viewed)
        return _Arrays(None, labels, of_row, plain, weak, strong, viewed_rows, areas)

    def _read_ids(self) -> list[str]:
        assert self.path is not None
        path = self.path
        with ThreadPoolExecutor(_threads()) as pool:
            return [name for ids in pool.map(lambda record: read_ids(path, record), self.records) for name in ids]

    def _load_tokens(self) -> _Tokens:
        """As `_load`; a fit needs either, and tokens are the larger."""
        assert self.manifest is not None
        layout = self.manifest.layout("train")
        shape, m = (layout.tokens, layout.token_width), sum(r.rows for r in self.records if r.split in VIEWED_SPLITS)
        plain = np.empty((len(self), *shape), layout.array_dtype)
        weak, strong = (np.empty((m, views, *shape), layout.array_dtype) for views in (layout.weak, layout.strong))

        def place(shard: Shard, here: slice, there: slice) -> None:
            assert shard.tokens is not None
            plain[here] = shard.tokens[:, 0]
            if shard.split in VIEWED_SPLITS:
                weak[there] = shard.tokens[:, 1 : 1 + layout.weak]
                strong[there] = shard.tokens[:, 1 + layout.weak :]

        self._place(place, tokens=True)
        return _Tokens(plain, weak, strong)

    def _place(self, place: Callable[[Shard, slice, slice], None], *, tokens: bool = False) -> None:
        """Reads and checks all shards, in threads, each of which puts its own in place.

        Args:
            place: takes a shard, its place among all rows, and that among the rows with views (empty for a shard
                without); called from several threads at once.
            tokens: whether to take the tokens out of the files.
        """
        rows = np.cumsum([0, *(record.rows for record in self.records)])
        viewed = np.cumsum([0, *(record.rows if record.split in VIEWED_SPLITS else 0 for record in self.records)])

        def work(number: int) -> None:
            self._expect(number + _threads())
            shard = self._shard(self.records[number], tokens)
            place(shard, slice(rows[number], rows[number + 1]), slice(viewed[number], viewed[number + 1]))

        with ThreadPoolExecutor(_threads()) as pool:
            # to the end: an error of a thread is raised where its result is asked for
            for _ in pool.map(work, range(len(self.records))):
                pass

    def _expect(self, number: int) -> None:
        """Lets the system read a shard's file ahead, so that the disk does not wait while others are checked."""
        assert self.path is not None
        if number >= len(self.records) or not hasattr(os, "posix_fadvise") or is_remote(self.path):
            return
        with suppress(OSError), shard_path(self.path, number).open("rb") as file:
            # Linux takes no more of one hint than the disk reads at once, so the file is named piece by piece.
            for start in range(0, os.fstat(file.fileno()).st_size, _HINT):
                os.posix_fadvise(file.fileno(), start, _HINT, os.POSIX_FADV_WILLNEED)

    def _shard(self, record: ShardRecord, tokens: bool) -> Shard:
        assert self.path is not None
        assert self.manifest is not None
        layout = self.manifest.layout(record.split)
        # What is not asked for is not taken out of the file, so that it needs no memory.
        wanted = layout if tokens else replace(layout, tokens=0)
        return read_shard(shard_path(self.path, record.shard), wanted, ids=False)

    def _survey(self) -> tuple[dict[str, dict[str, int]], list[str]]:
        """Rows by split and class of what can be read, and the problems."""
        if self.path is None or self.manifest is None:
            return _count(
                [(str(split), int(label)) for split, label in zip(self.splits, self.labels, strict=True)], self
            )
        path, manifest = self.path, self.manifest
        problems = _text_problems(path, manifest)
        pairs: list[tuple[str, int]] = []
        seen: Counter[str] = Counter()
        with ThreadPoolExecutor(_threads()) as pool:
            checks = pool.map(lambda r: verify_shard(shard_path(path, r.shard), manifest.layout(r.split)), self.records)
            for shard, found in checks:
                problems += found
                if shard is not None:
                    pairs += [(shard.split, int(label)) for label in shard.labels]
                    seen.update(shard.ids)
        problems += [f"two rows have the id {name!r}" for name, times in seen.items() if times > 1]
        counts, unknown = _count(pairs, self)
        return counts, problems + unknown


def read_records(folder: Path, manifest: Manifest) -> list[ShardRecord]:
    """The records of all shards, in order.

    Raises:
        InputError: one is missing, or they do not join up; names the shard.
    """
    records: list[ShardRecord] = []
    reached = 0
    # Shards of a stream stand alone; others continue one another until all rows are covered.
    streamed, total = manifest.parts > 0, manifest.parts or manifest.rows or 0
    with closing(_each_record(folder)) as found:
        while (len(records) if streamed else reached) < total:
            record = next(found)
            # rows_read of 0 would never reach the end.
            follows = record.first_row == (0 if streamed else reached) and (streamed or record.rows_read > 0)
            if record.shard != len(records) or not follows:
                name = shard_path(folder, len(records)).stem
                raise InputError(f"shard {name} does not follow the one before it; extract with --mode overwrite")
            records.append(record)
            reached += record.rows_read
    return records


def _each_record(folder: Path) -> Generator[ShardRecord, None, None]:
    """The records by number, as long as somebody asks; of a store, which answers slowly, many are asked for at once."""

    def read(number: int) -> ShardRecord:
        path = shard_path(folder, number)
        record = ShardRecord.read(path.with_suffix(".json"))
        if not path.is_file():
            raise InputError(f"shard {path.stem} is missing: no {path}; run the same extract command again to redo it")
        return record

    threads = _ASKED_AT_ONCE if is_remote(folder) else 0
    yield from prefetch(read, count(), threads=threads, in_hand=_ASKED_AT_ONCE)


def _threads() -> int:
    # Hashing keeps a core busy, one thread more fills the gaps; HDF5 holds its lock, and others only queue up.
    return min(8, (os.cpu_count() or 1) + 1)


def _text_problems(folder: Path, manifest: Manifest) -> list[str]:
    try:
        read_text(folder, manifest)
    except InputError as error:
        return [str(error)]
    return []


def _count(pairs: list[tuple[str, int]], cache: FeatureCache) -> tuple[dict[str, dict[str, int]], list[str]]:
    """(split, label) pairs -> rows by split and class name, and a sentence for labels that name no class."""
    counts: dict[str, dict[str, int]] = {}
    classes = len(cache.class_names)
    found = Counter(pairs)
    for split, label in sorted(found, key=lambda pair: (SPLITS.index(pair[0]), pair[1] < 0, pair[1])):
        name = cache.class_names[label] if 0 <= label < classes else UNKNOWN
        of_split = counts.setdefault(split, {})
        of_split[name] = of_split.get(name, 0) + found[split, label]
    wrong = sorted({label for _, label in found if not -1 <= label < classes})
    return counts, [f"labels {wrong} name no class, there are {classes}"] if wrong else []


def _bytes_on_disk(folder: Path | None) -> int:
    return 0 if folder is None else sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _known_labels(labels: ArrayLike, n: int) -> NDArray[np.int64]:
    """Labels (n,) as int64; booleans and floats are refused: a mask or a score would pass unseen."""
    known = np.asarray(labels)
    if known.shape != (n,) or not np.issubdtype(known.dtype, np.integer):
        raise InputError(f"labels must be {n} whole numbers, got shape {known.shape} of {known.dtype}")
    return known.astype(np.int64)


def _arrays_from(
    plain: ArrayLike,
    labels: ArrayLike,
    weak: ArrayLike | None,
    strong: ArrayLike | None,
    splits: Sequence[str] | None,
    ids: Sequence[str] | None,
) -> _Arrays:
    features = _floating("plain", plain, 2)  # (n, D)
    n = len(features)
    known = _known_labels(labels, n)
    of_row = np.where(known >= 0, "train", "unlabeled") if splits is None else np.asarray(splits, dtype=np.str_)
    strange = set(of_row.tolist()) - set(SPLITS)
    if strange or of_row.shape != (n,):
        raise InputError(f"splits must be {n} of {', '.join(SPLITS)}, got {sorted(strange) or of_row.shape}")
    names = [str(row) for row in range(n)] if ids is None else [str(name) for name in ids]
    if len(names) != n or len(set(names)) != n:
        raise InputError(f"ids must be {n} different texts, got {len(names)} with {len(set(names))} different")
    rows = np.flatnonzero(np.isin(of_row, VIEWED_SPLITS))  # (m,)
    easy, hard = _view_array("weak", weak, len(rows), features), _view_array("strong", strong, len(rows), features)
    return _Arrays(names, known, of_row, features, easy, hard, rows)


def _view_array(name: str, given: ArrayLike | None, m: int, plain: NDArray[Any]) -> NDArray[Any]:
    """(m, V, D) as given; V = 0 where nothing was."""
    if given is None:
        return np.empty((m, 0, plain.shape[1]), dtype=plain.dtype)
    views = _floating(name, given, 3)
    if (views.shape[0], views.shape[2]) != (m, plain.shape[1]):
        raise InputError(
            f"{name} must be (m, V, D) with the m = {m} rows of train and unlabeled and D = {plain.shape[1]}, "
            f"got {views.shape}"
        )
    return views


def _floating(name: str, values: ArrayLike, axes: int) -> NDArray[Any]:
    array = np.asarray(values)
    if array.dtype not in (np.float16, np.float32):
        array = array.astype(np.float32)
    if array.ndim != axes:
        raise InputError(f"{name} must have {axes} axes, got shape {array.shape}")
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))[0])
        raise InputError(f"{name} must be finite, row {row} is not")
    return array


def _class_names(given: Sequence[str] | None, labels: NDArray[np.int64]) -> list[str]:
    classes = int(labels.max(initial=-1)) + 1 if given is None else len(given)
    if classes < 1:
        raise InputError("there must be at least one class: give class_names, or a label that is not -1")
    _refuse_bad_labels(labels, classes)
    return [str(k) for k in range(classes)] if given is None else [str(name) for name in given]


def _refuse_bad_labels(labels: NDArray[np.int64], classes: int) -> None:
    wrong = labels[(labels < -1) | (labels >= classes)]
    if len(wrong):
        raise InputError(f"labels must be -1 or a class index below {classes}, got {int(wrong[0])}")


def _text_array(values: ArrayLike, classes: int, dim: int) -> NDArray[np.float32]:
    array = np.asarray(values, dtype=np.float32)
    array = array[:, None] if array.ndim == 2 else array  # (K, P, D)
    if array.ndim != 3 or (array.shape[0], array.shape[2]) != (classes, dim) or array.shape[1] == 0:
        raise InputError(f"text_features must be (K, P, D) = ({classes}, P, {dim}), got {array.shape}")
    return array
