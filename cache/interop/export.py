"""A cache as plain arrays: for clip-retrieval and autofaiss, or for anything that reads .npy files."""

from __future__ import annotations

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
from rich.progress import Progress, TaskID

from ulfine_fast._version import __version__
from ulfine_fast.cache.ids import read_ids
from ulfine_fast.cache.interop.growing import GrowingArray, GrowingTable
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import make_folder, write_atomically
from ulfine_fast.cache.io.paths import open_place
from ulfine_fast.cache.io.progress import progress_bar
from ulfine_fast.cache.manifest import Manifest
from ulfine_fast.cache.shard import VIEWED_SPLITS, Shard, ShardRecord, read_shard, shard_path
from ulfine_fast.cache.sources.rows import SPLITS
from ulfine_fast.cache.store import read_records
from ulfine_fast.cache.text import TextFeatures, read_text

FORMAT = "ulfine-fast-export"
NOTE = "ulfine-fast.json"
LAYOUTS = ("clip-retrieval", "npy")
# Sources whose ids are paths below (the folder of) their own path.
_BELOW = {"folder": lambda path: path, "table": os.path.dirname}
_COLUMNS = pa.schema(
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
class Exported:
    """What a call of `export` did.

    Attributes:
        out: the folder. rows: of the cache. files: written by this call. kept: finished before and kept.
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
) -> Exported:
    """Writes the features of a cache as plain arrays, shard by shard; the cache stays as it is.

    Args:
        cache: folder of a finished cache.
        out: folder to write to: new, empty, or what an interrupted export of the same cache left.
        to: "clip-retrieval" (img_emb, text_emb and metadata, as its index and back end read them) or "npy" (one
            array for each of features, views, labels, splits, ids, class names and text features).
        rows_per_file: rows of a file of "clip-retrieval" at most, at least 1; a shard is never cut.
        progress: whether to draw a bar on stderr; by default where that is a terminal.

    Raises:
        InputError: another layout, a folder that holds something else, a damaged cache, or a disk that refuses.
    """
    if to not in LAYOUTS:
        raise InputError(f"a cache can be exported to {' or '.join(LAYOUTS)}, got {to!r}")
    if rows_per_file < 1:
        raise InputError(f"rows per file must be at least 1, got {rows_per_file}")
    work = _Export.open(open_place(cache), Path(out))
    _prepare(work, to, rows_per_file)
    with progress_bar(progress) as bar:
        task = bar.add_task("export", total=work.rows, unit="rows", note="")
        done = _for_clip_retrieval(work, rows_per_file, bar, task) if to == LAYOUTS[0] else _as_arrays(work, bar, task)
    return Exported(work.out, work.rows, done[0] + _write_classes(work), done[1])


@dataclass(frozen=True)
class _Export:
    """A finished cache and where it goes."""

    folder: Path
    out: Path
    manifest: Manifest
    text: TextFeatures
    records: list[ShardRecord]

    @classmethod
    def open(cls, folder: Path, out: Path) -> _Export:
        manifest = Manifest.read(folder)
        return cls(folder, out, manifest, read_text(folder, manifest), read_records(folder, manifest))

    @property
    def rows(self) -> int:
        return sum(record.rows for record in self.records)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the features as they are read: what is stored as whole numbers comes back as float16."""
        return np.dtype("float32" if self.manifest.dtype == "float32" else "float16")

    def shard(self, record: ShardRecord) -> Shard:
        shard = read_shard(shard_path(self.folder, record.shard), self.manifest.layout(record.split))
        if ((shard.labels < -1) | (shard.labels >= len(self.manifest.class_names))).any():
            raise InputError(f"shard {record.shard:05d} of {self.folder} has a label that names no class")
        return shard


def _prepare(work: _Export, to: str, rows_per_file: int) -> None:
    """Leaves `out` with the note of this export; what else is there must be the beginning of the same one."""
    digest = hashlib.sha256("".join(record.sha256 for record in work.records).encode()).hexdigest()
    note = {
        "format": FORMAT,
        "version": 1,
        "created_by": f"ulfine-fast {__version__}",
        "layout": to,
        "rows": work.rows,
        "rows_per_file": rows_per_file,
        "shards_sha256": digest,
        "manifest": work.manifest.to_dict(),
    }
    if work.out.exists() and any(path.name != NOTE + ".tmp" for path in _entries(work.out)):
        if _read_note(work.out) != note:
            raise InputError(f"{work.out} holds other files; choose a new or empty folder, or remove it")
        return
    make_folder(work.out)
    write_atomically(work.out / NOTE, (json.dumps(note, indent=2, sort_keys=True) + "\n").encode())


def _entries(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; choose a folder to export to")
    return folder.iterdir()


def _read_note(folder: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return None


def _write_classes(work: _Export) -> int:
    """What both layouts say of the classes; returns the number of files."""
    small = {"text_features": work.text.features, "class_names": np.asarray(work.manifest.class_names)}
    for name, content in small.items():
        with GrowingArray(work.out / f"{name}.npy", content.shape, content.dtype) as array:
            array.append(content)
    return len(small)


# -- clip-retrieval


def _for_clip_retrieval(work: _Export, rows_per_file: int, bar: Progress, task: TaskID) -> tuple[int, int]:
    """Files written and kept: three for each group of shards, numbered with as many digits as the last one needs."""
    groups = _groups(work.records, rows_per_file)
    digits = len(str(len(groups)))
    for folder in ("img_emb", "text_emb", "metadata"):
        make_folder(work.out / folder)
    kept = 0
    for number, group in enumerate(groups):
        paths = [work.out / folder / f"{folder}_{number:0{digits}d}.npy" for folder in ("img_emb", "text_emb")]
        metadata = work.out / "metadata" / f"metadata_{number:0{digits}d}.parquet"
        # Renamed last, so that it says that the arrays beside it are whole.
        if metadata.is_file():
            kept += 3
            bar.update(task, advance=sum(record.rows for record in group))
        else:
            _write_group(work, group, paths, metadata, lambda n: bar.update(task, advance=n))
    return 3 * len(groups) - kept, kept


def _groups(records: Sequence[ShardRecord], rows_per_file: int) -> list[list[ShardRecord]]:
    """Shards that go into a file together; those without rows go nowhere."""
    groups: list[list[ShardRecord]] = []
    held = rows_per_file
    for record in (one for one in records if one.rows):
        if held + record.rows > rows_per_file:
            groups.append([])
            held = 0
        groups[-1].append(record)
        held += record.rows
    return groups


def _write_group(
    work: _Export, group: Sequence[ShardRecord], paths: Sequence[Path], metadata: Path, advance: Callable[[int], None]
) -> None:
    shape = (sum(record.rows for record in group), work.manifest.dim)
    # Of an unknown class nothing can be said: zeros are as far from every text as can be.
    of_class = np.concatenate([work.text.prototypes, np.zeros((1, work.manifest.dim), np.float32)])  # (K + 1, D)
    with ExitStack() as stack:
        table = stack.enter_context(GrowingTable(metadata, _COLUMNS))
        images, texts = (stack.enter_context(GrowingArray(path, shape, work.dtype)) for path in paths)
        for record in group:
            shard = work.shard(record)
            images.append(shard.plain[:, 0])  # (n, D)
            texts.append(of_class[shard.labels].astype(work.dtype))  # (n, D); -1 is the last row
            table.append(_metadata(work.manifest, shard))
            advance(record.rows)


def _metadata(manifest: Manifest, shard: Shard) -> pa.Table:
    """What clip-retrieval shows of each row (image_path and caption), and what it is."""
    names = [*manifest.class_names, ""]
    classes = [names[label] for label in shard.labels]
    source = manifest.source
    below = _BELOW.get(source["kind"])
    root = below(source["path"]) if below is not None and source.get("path") else ""
    columns = {
        "image_path": [os.path.join(root, name) for name in shard.ids],
        "caption": classes,
        "id": shard.ids,
        "label": shard.labels,
        "class_name": classes,
        "split": [shard.split] * len(shard.ids),
    }
    return pa.table(columns, schema=_COLUMNS)


# -- arrays


def _as_arrays(work: _Export, bar: Progress, task: TaskID) -> tuple[int, int]:
    """Files written and kept (none: there is one of each, so an interrupted one is written again)."""
    rows, manifest = work.rows, work.manifest
    viewed = sum(record.rows for record in work.records if record.split in VIEWED_SPLITS)
    # Texts of fixed width can be mapped into memory; how wide is known only once all were seen.
    width = max((len(name) for record in work.records for name in read_ids(work.folder, record)), default=1)
    files: dict[str, tuple[tuple[int, ...], Any]] = {
        "features": ((rows, manifest.dim), work.dtype),
        "labels": ((rows,), np.dtype(np.int32)),
        "splits": ((rows,), np.dtype(f"<U{max(map(len, SPLITS))}")),
        "ids": ((rows,), np.dtype(f"<U{width}")),
    }
    for kind in ("weak", "strong"):
        if manifest.views[kind]:
            files[kind] = ((viewed, int(manifest.views[kind]), manifest.dim), work.dtype)
    with ExitStack() as stack:
        arrays = {
            name: stack.enter_context(GrowingArray(work.out / f"{name}.npy", *what)) for name, what in files.items()
        }
        for record in work.records:
            _append_shard(arrays, work.shard(record))
            bar.update(task, advance=record.rows)
    return len(files), 0


def _append_shard(arrays: dict[str, GrowingArray], shard: Shard) -> None:
    arrays["features"].append(shard.plain[:, 0])  # (n, D)
    arrays["labels"].append(shard.labels)
    for name, texts in (("splits", [shard.split] * len(shard.ids)), ("ids", shard.ids)):
        arrays[name].append(np.asarray(texts, dtype=arrays[name].dtype))
    if shard.split in VIEWED_SPLITS:
        for kind, views in (("weak", shard.weak), ("strong", shard.strong)):
            if kind in arrays:
                arrays[kind].append(views)  # (n, V, D)
