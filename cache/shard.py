"""One HDF5 shard: its layout, and how it is written, read and verified.

`docs/cache-format.md` is the specification. The bytes of a shard depend on its arrays alone.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import h5py
import msgspec
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from ulfine_fast.cache import hdf5
from ulfine_fast.cache.digests import KEY, content_digest, refuse_other_digest
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import read_regular_file, write_atomically
from ulfine_fast.cache.io.json_files import check_schema, read_json
from ulfine_fast.cache.io.paths import is_remote
from ulfine_fast.cache.quantized import quantized, restored
from ulfine_fast.cache.sources.rows import SPLITS, Part

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**48)]
_Split = Annotated[str, msgspec.Meta(pattern=rf"^({'|'.join(SPLITS)})\Z")]
VIEWED_SPLITS = ("train", "unlabeled")  # val and test are not trained on, so they have the plain view only


@dataclass(frozen=True, slots=True)
class Layout:
    """What every shard of a split looks like.

    Attributes:
        dim: D, length of a feature.
        dtype: "float16", "float32", or "int8" with a scale for each row.
        weak: Vw, weak views of each image; 0 for none.
        strong: Vs, strong views of each image; 0 for none.
        tokens: S, tokens of each view; 0 for none.
        token_width: W, length of a token.
    """

    dim: int
    dtype: str
    weak: int = 0
    strong: int = 0
    tokens: int = 0
    token_width: int = 0

    @property
    def array_dtype(self) -> str:
        """Type of tokens, and of features in memory: int8 features are so in the file alone."""
        return "float32" if self.dtype == "float32" else "float16"

    @property
    def views(self) -> int:
        """1 + Vw + Vs, with the plain view."""
        return 1 + self.weak + self.strong

    @property
    def columns(self) -> int:
        """D + S W, numbers that the model computes for a view."""
        return self.dim + self.tokens * self.token_width

    @property
    def row_bytes(self) -> int:
        """Bytes of the features and tokens of a row in a shard's file, which holds more."""
        size, token_size = np.dtype(self.dtype).itemsize, np.dtype(self.array_dtype).itemsize
        return self.views * (self.dim * size + self.tokens * self.token_width * token_size)

    def split_columns(self, rows: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Features (n, V, D) and tokens (n, V, S, W), None without, of rows (n, V, D + S W) that hold both."""
        features, rest = rows[..., : self.dim], rows[..., self.dim :]
        return features, rest.reshape(*rows.shape[:2], self.tokens, self.token_width) if self.tokens else None


@dataclass(frozen=True, slots=True)
class Shard:
    """The rows of one shard, n of them, all of one split.

    Attributes:
        split: "train", "unlabeled", "val" or "test".
        ids: n unique texts.
        labels: int32 (n,), -1 for unknown.
        plain: (n, 1, D), float16 or float32, finite.
        weak: (n, Vw, D) of that type.
        strong: (n, Vs, D) of that type.
        scale: float32 (n, Vw + Vs), fraction of the image's area that the crop kept.
        flip: uint8 (n, Vw + Vs), 0 or 1.
        view_seed: the seed that the views were drawn from.
        quantized: whether features are stored as int8 with a scale for each row; in memory they are float16 then.
        tokens: (n, 1 + Vw + Vs, S, W) in the order plain, weak, strong, of the features' type; None without.
    """

    split: str
    ids: list[str]
    labels: NDArray[np.int32]
    plain: NDArray[Any]
    weak: NDArray[Any]
    strong: NDArray[Any]
    scale: NDArray[np.float32]
    flip: NDArray[np.uint8]
    view_seed: int = 0
    quantized: bool = False
    tokens: NDArray[Any] | None = None


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """The JSON file beside a shard; it is written last, so a shard that has one is finished.

    Attributes:
        shard: number, from 0.
        split: of all its rows.
        first_row: its first row in the source's order.
        rows_read: source rows that it covers.
        rows: rows that it holds, those of images that could be read.
        checksum: hex digest of the HDF5 file: BLAKE3, which is several times as fast, SHA-256 in format versions 1 and
            2. Named after the hash in the file.
        bytes: size of the HDF5 file.
        seconds: wall seconds spent on "read", "encode" and "write".
        skipped: {"id", "reason"} of each image left out.
        manifest: hex digest of what its features are, see `Manifest.identity_of`; None in format versions 1 and 2.
    """

    shard: _Count
    split: _Split
    first_row: _Count
    rows_read: _Count
    rows: _Count
    checksum: str
    bytes: _Count
    seconds: dict[str, float] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)
    manifest: str | None = None

    def write(self, path: Path) -> None:
        """Writes it to `path`, atomically; call this after the shard itself is on the disk."""
        values = asdict(self)
        values[_hash_name(self.manifest)] = values.pop("checksum")
        if self.manifest is None:
            del values["manifest"]
        else:
            values[KEY] = content_digest(values)
        write_atomically(path, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode(), concurrent=True)

    @classmethod
    def read(cls, path: Path) -> ShardRecord:
        """Reads a record.

        Raises:
            InputError: missing, not a regular file, damaged, with other fields, or changed since it was written.
        """
        missing = f"shard {path.stem} is missing: no {path.name} in {path.parent}; {_REDO}"
        name = f"shard {path.stem}: {path}"
        try:
            values = read_json(path, dict[str, Any], fix=_REDO, missing=missing)
        except InputError as error:
            raise InputError(missing if str(error) == missing else f"shard {path.stem}: {error}") from error
        if values.get("manifest") is not None:
            refuse_other_digest(values, name, _REDO)
        checksum = values.pop(_hash_name(values.get("manifest")), None)
        record = check_schema({**values, "checksum": checksum}, cls, name=name, fix=_REDO)
        skipped_well = all({"id", "reason"} <= set(row) for row in record.skipped)
        if not skipped_well or record.rows + len(record.skipped) != record.rows_read:
            raise InputError(f"{name} holds values that cannot be; {_REDO}")
        return record

    def refuse_other_cache(self, identity: str | None) -> None:
        """Refuses a record of a shard that belongs to another cache.

        Args:
            identity: what the cache's manifest says of this shard, see `Manifest.identity_of`.

        Raises:
            InputError: the record says something else.
        """
        if self.manifest != identity:
            raise InputError(
                f"shard {self.shard:05d} was made for another cache: its record does not name this manifest.json; "
                f"bring back the files that were made together, or {_REDO.replace('it redoes', 'which redoes')}"
            )

    def covers(self, part: Part) -> bool:
        """Whether the shard has the planned rows; of a stream only number and split are known beforehand."""
        if (self.shard, self.split) != (part.number, part.split):
            return False
        return part.first_row is None or (self.first_row, self.rows_read) == (part.first_row, part.rows)


_REDO = "run the same extract command again, it redoes what is missing or damaged"


def shard_path(cache: Path, number: int) -> Path:
    """CACHE/shards/00000.h5; its record has the same name with .json."""
    return cache / "shards" / f"{number:05d}.h5"


def pack_shard(shard: Shard) -> bytes:
    """The HDF5 file of a shard, the same bytes for the same rows.

    Args:
        shard: n rows.

    Raises:
        ValueError: arrays of different lengths.
    """
    n = len(shard.ids)
    arrays = {name: getattr(shard, name) for name in ("plain", "weak", "strong", "scale", "flip", "tokens")}
    wrong = {name: array.shape for name, array in arrays.items() if array is not None and len(array) != n}
    if wrong or len(shard.labels) != n:
        raise ValueError(f"{n} ids, {len(shard.labels)} labels and arrays of other lengths: {wrong}")

    # Rows
    datasets: dict[str, hdf5.Content] = {
        "id": shard.ids,
        "label": shard.labels.astype(np.int32),
        "split": np.full(n, SPLITS.index(shard.split), dtype=np.uint8),
    }

    # Features, without a dataset for a kind of view that the shard does not have
    weak, strong = shard.weak.shape[1], shard.strong.shape[1]
    for name, features, views in (
        ("plain", shard.plain, 1),
        ("weak", shard.weak, weak),
        ("strong", shard.strong, strong),
    ):
        if views and shard.quantized:
            datasets[name], datasets[f"{name}_scale"] = quantized(features)  # (n, V, D), (n, V)
        elif views:
            datasets[name] = features  # (n, V, D)

    # How the views were drawn
    if weak + strong:
        datasets["view/kind"] = ["weak"] * weak + ["strong"] * strong
        datasets["view/seed"] = np.asarray([shard.view_seed], dtype=np.int64)
        datasets["view/scale"] = shard.scale.astype(np.float32)  # (n, Vw + Vs)
        datasets["view/flip"] = shard.flip.astype(np.uint8)  # (n, Vw + Vs)

    if shard.tokens is not None:
        datasets["tokens"] = shard.tokens  # (n, V, S, W)
    return hdf5.pack(datasets, dataset_attributes={"split": {"names": SPLITS}})


def _hash_name(identity: str | None) -> str:
    """The hash of a shard's file, by what its record says of the manifest."""
    return "sha256" if identity is None else "blake3"


def _checksum(data: bytes, identity: str | None) -> str:
    return hashlib.sha256(data).hexdigest() if identity is None else blake3(data).hexdigest()


def is_recorded(record: ShardRecord, data: bytes) -> bool:
    """Whether bytes are those of the shard's file that the record is of."""
    return _checksum(data, record.manifest) == record.checksum


def write_shard(path: Path, shard: Shard, identity: str | None = None) -> tuple[str, int]:
    """Writes a shard beside its final name and renames it; it counts only once its record is written too.

    Args:
        path: CACHE/shards/NUMBER.h5.
        shard: n rows.
        identity: what the cache's manifest says of this shard, see `Manifest.identity_of`.

    Returns:
        Checksum and length in bytes of the file, for the record.

    Raises:
        InputError: the file system refused; names the shard and the reason.
    """
    data = pack_shard(shard)
    write_atomically(path, data, concurrent=True)
    return _checksum(data, identity), len(data)


def read_shard(
    path: Path, layout: Layout, record: ShardRecord | None = None, *, finite: bool = True, ids: bool = True
) -> Shard:
    """Reads a finished shard; the file is read whole, once, and no handle is kept.

    Args:
        path: CACHE/shards/NUMBER.h5.
        layout: that the manifest gives for this split.
        record: what the shard must be, as read when the cache was opened; by default the one beside the file.
        finite: whether to look for values that are not finite.
        ids: whether to read the ids, which takes longer than many features; else the shard has none.

    Raises:
        InputError: missing, unfinished, damaged, of another layout, or with NaN; names the shard (and the image).
    """
    record = record or ShardRecord.read(path.with_suffix(".json"))
    data = read_shard_bytes(path, record)
    shard = _unpack(path, data, record, layout, check_datasets=False, ids=ids)
    if finite:
        _refuse_not_finite(path, data, shard)
    return shard


def read_labels(folder: Path, record: ShardRecord) -> NDArray[np.int32]:
    """The labels of one finished shard, -1 for unknown: int32 (n,); its file is read and compared with its record.

    Raises:
        InputError: missing or damaged; names the shard.
    """
    # No features are decoded or searched for values that are not finite.
    nothing_else = Layout(dim=0, dtype="float32")
    return read_shard(shard_path(folder, record.shard), nothing_else, record, finite=False, ids=False).labels


def verify_shard(path: Path, layout: Layout, record: ShardRecord | None = None) -> tuple[Shard | None, list[str]]:
    """Checks a finished shard in full: the file's checksum, each dataset's, the layout, finite values.

    Args:
        path: see `read_shard`.
        layout: see `read_shard`.
        record: see `read_shard`.

    Returns:
        The shard where it could be read, and one sentence for each problem.
    """
    problems: list[str] = []
    shard = None
    try:
        record = record or ShardRecord.read(path.with_suffix(".json"))
        data = read_shard_bytes(path, record)
        shard = _unpack(path, data, record, layout, check_datasets=True, ids=True)
        _refuse_not_finite(path, data, shard)
    except InputError as error:
        problems.append(str(error))
    return shard, problems


def is_intact(path: Path, record: ShardRecord) -> bool:
    """Whether the shard's file has the bytes of its record; behind a URL, whether it has as many."""
    try:
        # A store takes a file whole or not at all, and to read all of it again could take hours.
        if is_remote(path):
            return path.stat().st_size == record.bytes
        # The size first: it shows a truncated file without reading it.
        if path.stat().st_size != record.bytes:
            return False
        return is_recorded(record, read_regular_file(path, record.bytes))
    except (OSError, MemoryError):
        return False


def read_shard_bytes(path: Path, record: ShardRecord) -> bytes:
    """The bytes of a shard's file, once they match its record: HDF5 may loop for ever over damaged ones.

    Raises:
        InputError: missing, not a regular file, or with other bytes than its record says.
    """
    try:
        data = path.read_bytes() if is_remote(path) else read_regular_file(path, record.bytes)
    except FileNotFoundError as error:
        raise InputError(f"shard {path.stem} is missing: there is no {path}; {_REDO}") from error
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "not enough memory"
        raise InputError(f"shard {path.stem} cannot be read: {path} ({reason}); {_REDO}") from error
    if not is_recorded(record, data):
        raise InputError(
            f"shard {path.stem} is damaged, or was replaced after the cache was opened: {path} does not match the "
            f"checksum in its record; {_REDO}"
        )
    return data


def _refuse_not_finite(path: Path, data: bytes, shard: Shard) -> None:
    arrays = {f"{name} features": getattr(shard, name) for name in ("plain", "weak", "strong")}
    if shard.tokens is not None:
        arrays["tokens"] = shard.tokens
    for name, array in arrays.items():
        row = hdf5.first_not_finite(array)
        if row is not None:
            # The shard may have been read without its ids.
            with hdf5.unpacked(data) as file:
                image = hdf5.take(file, "id", shape=(len(shard.labels),), check=False)[row]
            raise InputError(
                f"shard {path.stem}: the {name} of image {image!r} are not finite; "
                "leave it out of the source and extract with --mode overwrite"
            )


def _unpack(path: Path, data: bytes, record: ShardRecord, layout: Layout, *, check_datasets: bool, ids: bool) -> Shard:
    """The shard in an HDF5 file, after checks of every type and shape.

    Args:
        path: of the file, for messages.
        data: its content.
        record: of the shard, whose number of rows and split must hold.
        layout: of its features.
        check_datasets: whether to compare each dataset with its checksum.
        ids: whether to read the ids.
    """
    try:
        with hdf5.unpacked(data, texts=check_datasets or ids) as file:
            return _read_datasets(file, data, record, layout, check_datasets, ids)
    except InputError as error:
        raise InputError(f"shard {path.stem} cannot be used: {error}; {_REDO}") from error


def _read_datasets(file: h5py.File, data: bytes, record: ShardRecord, layout: Layout, check: bool, ids: bool) -> Shard:
    n, views = record.rows, layout.weak + layout.strong

    def features(name: str, count: int) -> NDArray[Any]:
        """Features (n, V, D) of V views; a kind without views has no dataset."""
        if count == 0 or layout.dim == 0:
            return np.empty((n, count, layout.dim), dtype=layout.array_dtype)
        shape = (n, count, layout.dim)
        stored = hdf5.take(file, name, shape=shape, dtype=layout.dtype, check=check, data=data)
        if layout.dtype != "int8":
            return stored
        return restored(stored, hdf5.take(file, f"{name}_scale", shape=shape[:2], dtype="float32", check=check))

    def view_values(name: str, dtype: str) -> NDArray[Any]:
        """Values (n, Vw + Vs) of each view; a split without views has no such dataset."""
        if views == 0:
            return np.empty((n, 0), dtype=dtype)
        return hdf5.take(file, name, shape=(n, views), dtype=dtype, check=check)

    # A shard has one split, so the record alone tells a reader how many rows have views.
    codes = hdf5.take(file, "split", shape=(n,), dtype="uint8", check=check)
    if (codes != SPLITS.index(record.split)).any():
        raise InputError(f"it holds rows of another split than its record says ({record.split})")
    tokens = None
    if layout.tokens:
        shape = (n, layout.views, layout.tokens, layout.token_width)
        tokens = hdf5.take(file, "tokens", shape=shape, dtype=layout.array_dtype, check=check, data=data)
    return Shard(
        split=record.split,
        ids=hdf5.take(file, "id", shape=(n,), check=check).tolist() if ids else [],
        labels=hdf5.take(file, "label", shape=(n,), dtype="int32", check=check),
        plain=features("plain", 1),
        weak=features("weak", layout.weak),
        strong=features("strong", layout.strong),
        scale=view_values("view/scale", "float32"),
        flip=view_values("view/flip", "uint8"),
        view_seed=int(hdf5.take(file, "view/seed", shape=(1,), dtype="int64", check=check)[0]) if views else 0,
        quantized=layout.dtype == "int8",
        tokens=tokens,
    )
