"""FeatureCache: opens a cache, checks it, and returns its features as arrays."""

from __future__ import annotations

import copy
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ulfine_fast.cache.arrays import (
    Arrays,
    Tokens,
    check_arrays,
    check_class_names,
    check_labels,
    check_text_features,
    refuse_bad_labels,
)
from ulfine_fast.cache.descriptions import Descriptions, read_descriptions
from ulfine_fast.cache.ids import RowIndex, read_ids
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.paths import is_remote, to_path
from ulfine_fast.cache.io.prefetch import prefetch
from ulfine_fast.cache.manifest import Manifest
from ulfine_fast.cache.shard import (
    VIEWED_SPLITS,
    Shard,
    ShardRecord,
    read_labels,
    read_shard,
    shard_path,
    verify_shard,
)
from ulfine_fast.cache.sources.rows import SPLITS
from ulfine_fast.cache.text import average, read_text

UNKNOWN = "(unknown)"
_PARALLEL_REQUESTS = 16  # records requested together of a remote store
_READ_AHEAD_BYTES = 1 << 17  # that the system is asked to read ahead in one request


class FeatureCache:
    """Frozen features of a set of images, from a folder or from arrays.

    Rows are in the order of the source: train, unlabeled, val, test. The big arrays are read on first use.

    Attributes:
        path: the folder, None for a cache in memory.
        manifest: what the features are, None for a cache in memory.
        class_names: (K,) texts.
        dim: D, length of a feature.
        text_features: float32 (K, P, D), None for a cache without text.
        prototypes: float32 (K, D) of length 1, None for a cache without text.
        logit_scale: the model's factor on cosine similarities.
        head: the last layers of an open_clip ViT, see `ulfine_fast.cache.text.TextFeatures`; else empty.
        records: the record of each shard, in order.
        relabeled: hex SHA-256 of labels that replace the cache's own; None where they do not.
        descriptions: sentences about classes beside the prompts; None where there are none.
        second: the cache of the same images by a second encoder, whose features are behind this one's in every row, see
            `ulfine_fast.cache.two_encoders.beside`; None for one encoder.
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
        arrays: Arrays | None = None,
        head: dict[str, NDArray[np.float32]] | None = None,
    ) -> None:
        """Use `FeatureCache.open` or `FeatureCache.from_arrays`."""
        self.path = path
        self.manifest = manifest
        self.class_names: list[str] = list(class_names)
        self.dim = dim
        self.text_features = text_features
        self.prototypes = prototypes
        self.logit_scale: float = float(logit_scale)
        self.head: dict[str, NDArray[np.float32]] = head or {}
        self.records: list[ShardRecord] = list(records)
        self.relabeled: str | None = None
        self.descriptions: Descriptions | None = None
        self.second: FeatureCache | None = None
        self._loaded = arrays
        self._tokens: Tokens | None = None
        self._ids: list[str] | None = None
        self._row_index: RowIndex | None = None

    @classmethod
    def open(cls, path: str | Path) -> FeatureCache:
        """Opens what `extract` made, a folder or a URL; reads its manifest, text features and records, no features.

        Raises:
            InputError: not a cache, damaged, or a shard is missing; names the shard.
        """
        folder = to_path(path)
        manifest = Manifest.read(folder)
        text = read_text(folder, manifest)
        cache = cls(
            class_names=manifest.class_names,
            dim=manifest.dim,
            text_features=text.features if manifest.prompts else None,
            prototypes=text.prototypes if manifest.prompts else None,
            logit_scale=text.logit_scale,
            path=folder,
            manifest=manifest,
            records=read_records(folder, manifest),
            head=text.head,
        )
        cache.descriptions = read_descriptions(folder, manifest)
        return cache

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
        arrays = check_arrays(plain, labels, weak=weak, strong=strong, splits=splits, ids=ids)
        dim = arrays.plain.shape[1]
        names = check_class_names(class_names, arrays.labels)
        text = None if text_features is None else check_text_features(text_features, names, dim)
        return cls(
            class_names=names,
            dim=dim,
            text_features=text,
            prototypes=None if text is None else average(text),
            logit_scale=logit_scale,
            arrays=arrays,
        )

    def with_labels(self, labels: ArrayLike) -> FeatureCache:
        """The same images with other labels; memory is shared, nothing is written.

        A row of "unlabeled" that gets a label is in "train", which has views too; no other row changes its split.

        Args:
            labels: (n,) whole numbers below K, -1 for unknown.

        Raises:
            InputError: other shapes, types or numbers.
        """
        new = check_labels(labels, len(self))
        refuse_bad_labels(new, len(self.class_names))
        splits = np.where((self.splits == "unlabeled") & (new >= 0), "train", self.splits)
        other = copy.copy(self)
        other._loaded = replace(self._arrays, labels=new, splits=splits)
        other.relabeled = hashlib.sha256(new.tobytes()).hexdigest()
        return other

    def __len__(self) -> int:
        """Number of rows."""
        return sum(record.rows for record in self.records) if self._loaded is None else len(self._loaded.labels)

    @property
    def ids(self) -> list[str]:
        """Ids of the n rows; read on first use, without the features."""
        if self._ids is None:
            self._ids = self._read_ids() if self._arrays.ids is None else self._arrays.ids
        return self._ids

    def row_of(
        self, ids: Iterable[str], *, source: str = "the request", fix: str = "use another cache or remove it"
    ) -> NDArray[np.int64]:
        """Row numbers of images by their ids.

        Args:
            ids: (m,) to look up.
            source: what names the ids, the beginning of the message about one that is missing.
            fix: what to do about it, the end of that message.

        Returns:
            (m,), in the order of `ids`.

        Raises:
            InputError: an id that no row has; names the first.
        """
        if self._row_index is None:
            self._row_index = RowIndex(self.ids)
        return self._row_index.rows(ids, source=source, fix=fix)

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
        views: NDArray[Any] = getattr(self._arrays, kind)
        return views

    def view_areas(self, kind: str) -> NDArray[np.float32]:
        """Fraction of the image's area that each augmented view shows.

        Args:
            kind: "weak" or "strong".

        Returns:
            (m, V) in (0, 1], in the order of `view_rows`; zeros where the cache does not know.

        Raises:
            InputError: another kind.
        """
        rows, views = self.views(kind).shape[:2]
        areas = self._arrays.areas
        if areas is None:
            return np.zeros((rows, views), dtype=np.float32)
        # The columns of the weak views come first.
        return areas[:, :views] if kind == "weak" else areas[:, areas.shape[1] - views :]

    @property
    def token_kinds(self) -> list[str]:
        """Names of the S tokens stored beside each feature; often none."""
        return [] if self.manifest is None else list(self.manifest.tokens)

    @property
    def trainable_tokens(self) -> list[str]:
        """The same where trials can train on them, through the encoder's own end and with its texts; else none."""
        return self.token_kinds if "projection" in self.head and self.prototypes is not None else []

    def tokens(self, kind: str) -> NDArray[Any]:
        """The model's values of each view before its last layers; read on first use, without the features.

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
            with self._refused_memory():
                self._tokens = self._load_tokens()
        tokens: NDArray[Any] = getattr(self._tokens, kind)
        return tokens

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
        manifest = {} if self.manifest is None else self.manifest.to_dict()
        copied = ("model", "dtype", "tokens", "precision", "prompts", "views", "source", "created_by")
        files = [] if self.path is None else [path for path in self.path.rglob("*") if path.is_file()]
        return {
            "path": None if self.path is None else str(self.path),
            **{name: manifest.get(name) for name in copied},
            "dim": self.dim,
            "class_names": self.class_names,
            "images": len(self),
            "shards": len(self.records),
            "bytes": sum(path.stat().st_size for path in files),
            "counts": counts,
            "skipped": [image for record in self.records for image in record.skipped],
            "problems": problems,
        }

    @property
    def _arrays(self) -> Arrays:
        if self._loaded is None:
            with self._refused_memory():
                self._loaded = self._load()
        return self._loaded

    @contextmanager
    def _refused_memory(self) -> Iterator[None]:
        """Turns memory that the system refuses into one sentence."""
        try:
            yield
        except MemoryError as error:
            raise InputError(
                f"the features of {len(self)} images in {self.path} do not fit into memory; end other programs or use "
                "a machine with more"
            ) from error

    def _load(self) -> Arrays:
        """Reads each shard once into arrays, whose sizes are known from the records."""
        assert self.manifest is not None
        layout = self.manifest.layout("train")
        shard_rows = [record.rows for record in self.records]
        has_views = np.repeat([record.split in VIEWED_SPLITS for record in self.records], shard_rows)  # (n,)
        n, m = sum(shard_rows), int(has_views.sum())
        labels = np.empty(n, dtype=np.int64)
        plain = np.empty((n, self.dim), dtype=layout.array_dtype)
        weak = np.empty((m, layout.weak, self.dim), dtype=layout.array_dtype)
        strong = np.empty((m, layout.strong, self.dim), dtype=layout.array_dtype)
        areas = np.empty((m, layout.weak + layout.strong), dtype=np.float32)

        def copy_shard(shard: Shard, rows: slice, view_rows: slice) -> None:
            plain[rows] = shard.plain[:, 0]
            labels[rows] = shard.labels
            if shard.split in VIEWED_SPLITS:
                weak[view_rows] = shard.weak
                strong[view_rows] = shard.strong
                areas[view_rows] = shard.scale

        self._read_shards(copy_shard)
        refuse_bad_labels(labels, len(self.class_names))
        return Arrays(
            ids=None,
            labels=labels,
            splits=np.repeat(np.array([record.split for record in self.records]), shard_rows),
            plain=plain,
            weak=weak,
            strong=strong,
            view_rows=np.flatnonzero(has_views),
            areas=areas,
        )

    def _load_tokens(self) -> Tokens:
        """As `_load`; a fit needs either features or tokens, and tokens are the larger."""
        assert self.manifest is not None
        layout = self.manifest.layout("train")
        token_shape = (layout.tokens, layout.token_width)
        m = sum(record.rows for record in self.records if record.split in VIEWED_SPLITS)
        plain = np.empty((len(self), *token_shape), dtype=layout.array_dtype)
        weak = np.empty((m, layout.weak, *token_shape), dtype=layout.array_dtype)
        strong = np.empty((m, layout.strong, *token_shape), dtype=layout.array_dtype)

        def copy_shard(shard: Shard, rows: slice, view_rows: slice) -> None:
            assert shard.tokens is not None
            plain[rows] = shard.tokens[:, 0]
            if shard.split in VIEWED_SPLITS:
                weak[view_rows] = shard.tokens[:, 1 : 1 + layout.weak]
                strong[view_rows] = shard.tokens[:, 1 + layout.weak :]

        self._read_shards(copy_shard, tokens=True)
        return Tokens(plain, weak, strong)

    def _read_shards(self, copy_shard: Callable[[Shard, slice, slice], None], *, tokens: bool = False) -> None:
        """Reads and checks all shards, in threads.

        Args:
            copy_shard: takes a shard, its slice of all rows, and its slice of the rows with views (empty for a shard
                without); called from several threads.
            tokens: whether to read the tokens.
        """
        assert self.path is not None
        assert self.manifest is not None
        path, manifest = self.path, self.manifest
        first_row = np.cumsum([0, *(record.rows for record in self.records)])
        view_counts = (record.rows if record.split in VIEWED_SPLITS else 0 for record in self.records)
        first_view_row = np.cumsum([0, *view_counts])

        def work(number: int) -> None:
            self._read_ahead(number + _threads())
            record = self.records[number]
            layout = manifest.layout(record.split)
            # Tokens that are not needed are not read from the file, so that they need no memory.
            shard = read_shard(
                shard_path(path, record.shard), layout if tokens else replace(layout, tokens=0), record, ids=False
            )
            copy_shard(
                shard,
                slice(first_row[number], first_row[number + 1]),
                slice(first_view_row[number], first_view_row[number + 1]),
            )

        with ThreadPoolExecutor(_threads()) as pool:
            # A thread's error is raised where its result is taken.
            for _ in pool.map(work, range(len(self.records))):
                pass

    def _read_ahead(self, number: int) -> None:
        """Lets the system read a shard's file ahead, so that the disk does not wait while others are checked."""
        assert self.path is not None
        if number >= len(self.records) or not hasattr(os, "posix_fadvise") or is_remote(self.path):
            return
        with suppress(OSError):
            # A pipe of that name would be waited for without the flag.
            file = os.open(shard_path(self.path, self.records[number].shard), os.O_RDONLY | os.O_NONBLOCK)
            try:
                # Linux reads no more for one request than the disk reads together, so there are many.
                for start in range(0, self.records[number].bytes, _READ_AHEAD_BYTES):
                    os.posix_fadvise(file, start, _READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)

    def _read_ids(self) -> list[str]:
        assert self.path is not None
        path = self.path
        with ThreadPoolExecutor(_threads()) as pool:
            return [name for ids in pool.map(lambda record: read_ids(path, record), self.records) for name in ids]

    def _survey(self) -> tuple[dict[str, dict[str, int]], list[str]]:
        """Rows by split and class of what can be read, and one sentence for each problem."""
        problems: list[str] = []
        rows: Counter[tuple[str, int]] = Counter()  # by split and label
        if self.path is None or self.manifest is None:
            rows.update(zip(self.splits.tolist(), self.labels.tolist(), strict=True))
        else:
            path, manifest = self.path, self.manifest
            try:
                read_text(path, manifest)
                read_descriptions(path, manifest)
            except InputError as error:
                problems.append(str(error))
            ids: Counter[str] = Counter()
            with ThreadPoolExecutor(_threads()) as pool:
                checked = pool.map(
                    lambda one: verify_shard(shard_path(path, one.shard), manifest.layout(one.split), one),
                    self.records,
                )
                for shard, shard_problems in checked:
                    problems += shard_problems
                    if shard is not None:
                        rows.update((shard.split, label) for label in shard.labels.tolist())
                        ids.update(shard.ids)
            problems += [f"two rows have the id {name!r}" for name, times in ids.items() if times > 1]

        wrong = sorted({label for _, label in rows if not -1 <= label < len(self.class_names)})
        if wrong:
            problems.append(f"labels {wrong} name no class, there are {len(self.class_names)}")
        return _rows_by_class(rows, self.class_names), problems


def count_classes(folder: Path, manifest: Manifest) -> dict[str, dict[str, int]]:
    """Rows of a finished cache by split and class name, the unknown ones last; of each shard only labels are decoded.

    The records do not hold these counts, so every shard's file is read and compared with its record.

    Raises:
        InputError: the cache is damaged.
    """
    records = read_records(folder, manifest)
    rows: Counter[tuple[str, int]] = Counter()  # by split and label
    with ThreadPoolExecutor(_threads()) as pool:
        for record, labels in zip(records, pool.map(partial(read_labels, folder), records), strict=True):
            rows.update((record.split, label) for label in labels.tolist())
    return _rows_by_class(rows, manifest.class_names)


def _rows_by_class(rows: Counter[tuple[str, int]], class_names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Rows by split and class name, the unknown ones last, of rows by split and label."""
    counts: dict[str, dict[str, int]] = {}
    for split, label in sorted(rows, key=lambda pair: (SPLITS.index(pair[0]), pair[1] < 0, pair[1])):
        name = class_names[label] if 0 <= label < len(class_names) else UNKNOWN
        by_class = counts.setdefault(split, {})
        by_class[name] = by_class.get(name, 0) + rows[split, label]
    return counts


def read_records(folder: Path, manifest: Manifest) -> list[ShardRecord]:
    """The records of all shards, in order.

    Raises:
        InputError: one is missing, or they do not follow one another; names the shard.
    """
    records: list[ShardRecord] = []
    # Shards of a stream are independent; others continue one another until all rows are covered.
    streamed = manifest.parts > 0
    total = manifest.parts or manifest.rows or 0
    next_row = 0
    with closing(_numbered_records(folder)) as numbered:
        while (len(records) if streamed else next_row) < total:
            record = next(numbered)
            # A shard that covers no rows would never lead to the end.
            follows = record.first_row == 0 if streamed else record.first_row == next_row and record.rows_read > 0
            if record.shard != len(records) or not follows:
                name = shard_path(folder, len(records)).stem
                raise InputError(f"shard {name} does not follow the one before it; extract with --mode overwrite")
            record.refuse_other_cache(manifest.identity_of(record.shard))
            # What memory is allocated by must fit into the file.
            if record.rows * manifest.layout(record.split).row_bytes > record.bytes:
                raise InputError(
                    f"shard {record.shard:05d} has {record.rows} rows in its record, more than fit into the "
                    f"{record.bytes} bytes of its file; extract with --mode overwrite"
                )
            records.append(record)
            next_row += record.rows_read
    if not streamed and next_row != total:
        raise InputError(
            f"the shards of {folder} have {next_row} rows up to where manifest.json has {total}; extract with --mode "
            "overwrite"
        )
    return records


def _numbered_records(folder: Path) -> Generator[ShardRecord, None, None]:
    """The records by number; a remote store, which answers slowly, is asked for many together."""

    def read(number: int) -> ShardRecord:
        path = shard_path(folder, number)
        record = ShardRecord.read(path.with_suffix(".json"))
        try:
            size = path.stat().st_size if path.is_file() else None
        except OSError:
            size = None
        if size is None:
            raise InputError(f"shard {path.stem} is missing: no {path}; run the same extract command again to redo it")
        if size != record.bytes:
            raise InputError(
                f"shard {path.stem} is damaged: {path} has {size} bytes and not the {record.bytes} of its record; run "
                "the same extract command again to redo it"
            )
        return record

    threads = _PARALLEL_REQUESTS if is_remote(folder) else 0
    yield from prefetch(read, count(), threads=threads, in_hand=_PARALLEL_REQUESTS)


def _threads() -> int:
    # Hashing keeps a core busy, and one thread more fills the gaps; HDF5 has a global lock, so that others only wait.
    return min(8, (os.cpu_count() or 1) + 1)
