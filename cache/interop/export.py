"""A cache as plain arrays: for clip-retrieval and autofaiss, or for anything that reads .npy files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ulfine_fast._version import __version__
from ulfine_fast.cache.ids import read_ids
from ulfine_fast.cache.interop.embedding_table import CLASS_NAMES, FILE
from ulfine_fast.cache.interop.lance_table import LANCE, require_lance, write_lance
from ulfine_fast.cache.interop.writers import array_writer, table_writer
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import make_folder, write_atomically
from ulfine_fast.cache.io.json_files import read_json
from ulfine_fast.cache.io.names import one_of
from ulfine_fast.cache.io.paths import to_path
from ulfine_fast.cache.io.progress import progress_bar
from ulfine_fast.cache.manifest import Manifest
from ulfine_fast.cache.plane import fit_plane
from ulfine_fast.cache.shard import VIEWED_SPLITS, Shard, ShardRecord, read_shard, shard_path
from ulfine_fast.cache.sources.rows import SPLITS
from ulfine_fast.cache.store import read_records
from ulfine_fast.cache.text import TextFeatures, read_text

FORMAT = "ulfine-fast-export"
NOTE = "ulfine-fast.json"
LAYOUTS = ("clip-retrieval", "npy", "parquet", "lance")
# Sources whose ids are paths below (the folder of) their own path.
_ROOTS = {"folder": lambda path: path, "table": os.path.dirname}
_METADATA = pa.schema(
    [
        ("image_path", pa.string()),
        ("caption", pa.string()),
        ("id", pa.string()),
        ("label", pa.int32()),
        ("class_name", pa.string()),
        ("split", pa.string()),
    ]
)


@dataclass(frozen=True)
class ExportSummary:
    """What a call of `export` did.

    Attributes:
        out: the folder.
        rows: of the cache.
        files: written by this call.
        kept: files that were finished before and are kept.
    """

    out: Path
    rows: int
    files: int
    kept: int

    def to_dict(self) -> dict[str, Any]:
        """The summary in JSON's types."""
        return {**asdict(self), "out": str(self.out)}


def export(
    cache: str | Path,
    out: str | Path,
    *,
    to: str = "clip-retrieval",
    rows_per_file: int = 1_000_000,
    progress: bool | None = None,
) -> ExportSummary:
    """Writes the features of a cache as plain arrays, shard by shard; the cache stays as it is.

    Args:
        cache: folder of a finished cache.
        out: folder to write to: new, empty, or what an interrupted export of the same cache left.
        to: "clip-retrieval" (img_emb, text_emb and metadata, as its index and back end read them) or "npy" (one
            array for each of features, views, labels, splits, ids, class names and text features) or "parquet" (one
            table of id, image_uri, label, split, vector, and x and y, a 2-d map by PCA) or "lance" (the same table).
        rows_per_file: rows of a file of "clip-retrieval" at most, at least 1; a shard is never split.
        progress: whether to draw a bar on stderr; by default where that is a terminal.

    Raises:
        InputError: another layout, a folder that holds something else, a damaged cache, or a disk that refuses.
    """
    if to not in LAYOUTS:
        raise one_of("the layout of an export", to, LAYOUTS)
    if rows_per_file < 1:
        raise InputError(f"rows per file must be at least 1, got {rows_per_file}")
    if to == "lance":
        require_lance()
    opened = _FinishedCache.open(to_path(cache))
    if to == "clip-retrieval" and not opened.manifest.prompts:
        raise InputError(f"{opened.folder} has no texts of its classes, which clip-retrieval reads; use --to npy")
    target = Path(out)
    _prepare_folder(opened, target, to, rows_per_file)
    rows = sum(record.rows for record in opened.records)
    kept = 0
    with progress_bar(progress) as bar:
        # a table reads the features twice, first for its map
        task = bar.add_task("export", total=2 * rows if to in ("parquet", "lance") else rows, unit="rows", note="")

        def advance(rows: int) -> None:
            bar.update(task, advance=rows)

        if to == "clip-retrieval":
            files, kept = _write_clip_retrieval(opened, target, rows_per_file, advance)
        elif to == "parquet":
            files = _write_parquet(opened, target, advance)
        elif to == "lance":
            write_lance(target / LANCE, *_as_tables(opened, advance))
            files = 1
        else:
            files = _write_arrays(opened, target, advance)
    # The classes, in every layout.
    classes = {"class_names": np.asarray(opened.manifest.class_names)}
    if opened.manifest.prompts:
        classes = {"text_features": opened.text.features, **classes}
    for name, content in classes.items():
        with array_writer(target / f"{name}.npy", content.shape, content.dtype) as append:
            append(content)
    return ExportSummary(target, rows, files + len(classes), kept)


@dataclass(frozen=True)
class _FinishedCache:
    """A cache that is read shard by shard.

    Attributes:
        folder: of the cache.
        manifest: what its features are.
        text: features of its classes.
        records: of its shards.
    """

    folder: Path
    manifest: Manifest
    text: TextFeatures
    records: list[ShardRecord]

    @classmethod
    def open(cls, folder: Path) -> _FinishedCache:
        manifest = Manifest.read(folder)
        return cls(folder, manifest, read_text(folder, manifest), read_records(folder, manifest))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the features as they are read: int8 features come back as float16."""
        return np.dtype("float32" if self.manifest.dtype == "float32" else "float16")

    def shard(self, record: ShardRecord) -> Shard:
        shard = read_shard(shard_path(self.folder, record.shard), self.manifest.layout(record.split), record)
        if ((shard.labels < -1) | (shard.labels >= len(self.manifest.class_names))).any():
            raise InputError(f"shard {record.shard:05d} of {self.folder} has a label that names no class")
        return shard


def _prepare_folder(cache: _FinishedCache, out: Path, to: str, rows_per_file: int) -> None:
    """Leaves `out` with the note of this export; other files there must be the beginning of the same export."""
    digest = hashlib.sha256("".join(record.checksum for record in cache.records).encode()).hexdigest()
    note = {
        "format": FORMAT,
        "version": 1,
        "created_by": f"ulfine-fast {__version__}",
        "layout": to,
        "rows": sum(record.rows for record in cache.records),
        "rows_per_file": rows_per_file,
        "shards_sha256": digest,
        "manifest": cache.manifest.to_dict(),
    }
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; choose a folder to export to")
    if out.exists() and any(path.name != NOTE + ".tmp" for path in out.iterdir()):
        existing = None
        with contextlib.suppress(InputError):
            existing = read_json(out / NOTE, dict[str, Any], fix="choose a new folder")
        if existing != note:
            raise InputError(f"{out} holds other files; choose a new or empty folder, or remove it")
        return
    make_folder(out)
    write_atomically(out / NOTE, (json.dumps(note, indent=2, sort_keys=True) + "\n").encode())


# -- clip-retrieval


def _write_clip_retrieval(
    cache: _FinishedCache, out: Path, rows_per_file: int, advance: Callable[[int], None]
) -> tuple[int, int]:
    """Files written and kept: three for each group of shards, numbered with as many digits as the last one needs."""
    # Shards that go into a file together; those without rows go nowhere.
    groups: list[list[ShardRecord]] = []
    held = rows_per_file
    for record in cache.records:
        if record.rows == 0:
            continue
        if held + record.rows > rows_per_file:
            groups.append([])
            held = 0
        groups[-1].append(record)
        held += record.rows

    for folder in ("img_emb", "text_emb", "metadata"):
        make_folder(out / folder)
    digits = len(str(len(groups)))
    kept = 0
    for number, group in enumerate(groups):
        images = out / "img_emb" / f"img_emb_{number:0{digits}d}.npy"
        texts = out / "text_emb" / f"text_emb_{number:0{digits}d}.npy"
        metadata = out / "metadata" / f"metadata_{number:0{digits}d}.parquet"
        # The metadata are renamed last, so that they say that the arrays beside them are whole.
        if metadata.is_file():
            kept += 3
            advance(sum(record.rows for record in group))
        else:
            _write_group(cache, group, images, texts, metadata, advance)
    return 3 * len(groups) - kept, kept


def _write_group(
    cache: _FinishedCache,
    group: Sequence[ShardRecord],
    images: Path,
    texts: Path,
    metadata: Path,
    advance: Callable[[int], None],
) -> None:
    """The shards of a group in three files."""
    dim = cache.manifest.dim
    shape = (sum(record.rows for record in group), dim)
    # An unknown class has no text: zeros are as far from every text as can be.
    prototypes = np.concatenate([cache.text.prototypes, np.zeros((1, dim), np.float32)])  # (K + 1, D)
    with (
        table_writer(metadata, _METADATA) as append_metadata,
        array_writer(images, shape, cache.dtype) as append_images,
        array_writer(texts, shape, cache.dtype) as append_texts,
    ):
        for record in group:
            shard = cache.shard(record)
            append_images(shard.plain[:, 0])  # (n, D)
            append_texts(prototypes[shard.labels].astype(cache.dtype))  # (n, D); label -1 is the last row
            append_metadata(_metadata_of(cache.manifest, shard))
            advance(record.rows)


def _metadata_of(manifest: Manifest, shard: Shard) -> pa.Table:
    """What clip-retrieval shows of each row (image_path and caption), and id, class and split."""
    names = [*manifest.class_names, ""]
    classes = [names[label] for label in shard.labels]
    root = _root(manifest) or ""
    columns = {
        "image_path": [os.path.join(root, name) for name in shard.ids],
        "caption": classes,
        "id": shard.ids,
        "label": shard.labels,
        "class_name": classes,
        "split": [shard.split] * len(shard.ids),
    }
    return pa.table(columns, schema=_METADATA)


def _root(manifest: Manifest) -> str | None:
    """The folder that ids are paths below; None where they are not."""
    source = manifest.source
    root_of = _ROOTS.get(source["kind"])
    return root_of(source["path"]) if root_of is not None and source.get("path") else None


# -- one table


def _write_parquet(cache: _FinishedCache, out: Path, advance: Callable[[int], None]) -> int:
    """One table, a row group for each shard, written again from the start after an interruption."""
    schema, tables = _as_tables(cache, advance)
    with table_writer(out / FILE, schema) as append:
        for table in tables:
            append(table)
    return 1


def _as_tables(cache: _FinishedCache, advance: Callable[[int], None]) -> tuple[pa.Schema, Iterator[pa.Table]]:
    """The columns of the one table, and its rows, shard by shard."""

    def plain_features() -> Iterator[NDArray[Any]]:
        for record in cache.records:
            yield cache.shard(record).plain[:, 0]  # (n, D)
            advance(record.rows)

    manifest = cache.manifest
    plane = fit_plane(plain_features(), manifest.dim)
    model = manifest.model
    metadata = {
        "model": model["name"],
        "pretrained": model["pretrained"] or "",
        "sha256": model["sha256"],
        "map": f"PCA, {100 * plane.variance:.0f}% of the variance",
        CLASS_NAMES: json.dumps(manifest.class_names),
    }
    vector = pa.list_(pa.from_numpy_dtype(cache.dtype), manifest.dim)
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("image_uri", pa.string()),
            ("label", pa.string()),
            ("split", pa.string()),
            ("vector", vector),
            ("x", pa.float32()),
            ("y", pa.float32()),
        ],
        metadata=metadata,
    )
    names, root = [*manifest.class_names, None], _root(manifest)  # label -1 is the last one

    def tables() -> Iterator[pa.Table]:
        for record in cache.records:
            shard = cache.shard(record)
            features = shard.plain[:, 0]  # (n, D)
            positions = plane.positions(features).astype(np.float32)  # (n, 2)
            columns = {
                "id": shard.ids,
                "image_uri": [None if root is None else os.path.join(root, name) for name in shard.ids],
                "label": [names[label] for label in shard.labels],
                "split": [shard.split] * len(shard.ids),
                "vector": pa.FixedSizeListArray.from_arrays(
                    np.require(features, requirements=["C", "A"]).ravel(), type=vector
                ),
                "x": positions[:, 0],
                "y": positions[:, 1],
            }
            yield pa.table(columns, schema=schema)
            advance(record.rows)

    return schema, tables()


# -- arrays


def _write_arrays(cache: _FinishedCache, out: Path, advance: Callable[[int], None]) -> int:
    """One array each, written again from the start after an interruption; returns the number of files."""
    manifest = cache.manifest
    rows = sum(record.rows for record in cache.records)
    viewed = sum(record.rows for record in cache.records if record.split in VIEWED_SPLITS)
    # Texts of fixed width can be mapped into memory; the width is known only once all ids are read.
    width = max((len(name) for record in cache.records for name in read_ids(cache.folder, record)), default=1)
    arrays: dict[str, tuple[tuple[int, ...], Any]] = {
        "features": ((rows, manifest.dim), cache.dtype),
        "labels": ((rows,), np.dtype(np.int32)),
        "splits": ((rows,), np.dtype(f"<U{max(map(len, SPLITS))}")),
        "ids": ((rows,), np.dtype(f"<U{width}")),
    }
    for kind in ("weak", "strong"):
        if manifest.views[kind]:
            arrays[kind] = ((viewed, int(manifest.views[kind]), manifest.dim), cache.dtype)
    with ExitStack() as stack:
        append = {
            name: stack.enter_context(array_writer(out / f"{name}.npy", shape, dtype))
            for name, (shape, dtype) in arrays.items()
        }
        for record in cache.records:
            shard = cache.shard(record)
            append["features"](shard.plain[:, 0])  # (n, D)
            append["labels"](shard.labels)
            append["splits"]([shard.split] * len(shard.ids))
            append["ids"](shard.ids)
            if shard.split in VIEWED_SPLITS:
                for kind, views in (("weak", shard.weak), ("strong", shard.strong)):
                    if kind in append:
                        append[kind](views)  # (n, V, D)
            advance(record.rows)
    return len(arrays)
