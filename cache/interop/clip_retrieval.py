"""Features in clip-retrieval's folders: img_emb/img_emb_0.npy with metadata/metadata_0.parquet, and so on."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from ulfine_fast.cache.interop.found import (
    Block,
    Ids,
    Opened,
    Said,
    checked_features,
    coded,
    numbers,
    one_line,
    read_array,
    split_codes,
)
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.sources.rows import UNKNOWN

# Columns that tell rows apart in the metadata, the surest first.
_ID_COLUMNS = ("id", "image_path", "key")
_NUMBERED = re.compile(r"_(\d+)\.(npy|parquet)$")


def clip_retrieval(path: Path, label_column: str | None, id_column: str | None) -> Opened:
    """Opens the folders below `path`.

    Args:
        path: what holds img_emb and metadata; without metadata rows are numbered.
        label_column: "label" by default, where there is one.
        id_column: id, image_path or key by default.

    Raises:
        InputError: files that do not go together, or a column that is not there; names the file.
    """
    images = _by_number(path / "img_emb", "npy")
    if not images:
        raise InputError(f"{path / 'img_emb'} holds no file such as img_emb_0.npy")
    tables = _by_number(path / "metadata", "parquet")
    alone = sorted(set(images) ^ set(tables))
    if tables and alone:
        raise InputError(
            f"{path}: number {alone[0]} is in only one of img_emb and metadata; both must have every number"
        )
    blocks: list[Block] = []
    said: list[Said] = []
    for number, file in images.items():
        # Like the first one: files that disagree among themselves belong to different models.
        features = checked_features(read_array(file), str(file), blocks[0].features.shape[1] if blocks else None)
        table = tables.get(number)
        said.append(_nothing_said(len(features)) if table is None else _said(table, len(features), label_column))
        ids = _numbered(number) if table is None else _ids_in(table, id_column)
        blocks.append(Block(str(file), features, ids))
    return Opened(_class_arrays(path), _joined(said), blocks, [*images.values(), *tables.values()])


def _by_number(folder: Path, suffix: str) -> dict[int, Path]:
    """Files by the number in their names, in the order of the numbers: img_emb_10 comes after img_emb_9."""
    found = [(match, file) for file in folder.glob(f"*.{suffix}") if (match := _NUMBERED.search(file.name))]
    return dict(sorted((int(match[1]), file) for match, file in found))


def _class_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """What our own export says of the classes beside clip-retrieval's folders."""
    names = ("class_names", "text_features")
    return {name: read_array(path / f"{name}.npy") for name in names if (path / f"{name}.npy").is_file()}


def _nothing_said(n: int) -> Said:
    return Said(np.full(n, UNKNOWN, np.int32), np.full(n, -1, np.int8))


def _said(table: Path, n: int, label_column: str | None) -> Said:
    columns = _columns(table)
    wanted = label_column or ("label" if "label" in columns else None)
    if wanted is not None and wanted not in columns:
        raise InputError(f"{table} has no column {wanted!r}; it has {', '.join(columns)}")
    empty = _nothing_said(n)
    labels, names = (empty.labels, None) if wanted is None else _label_column(table, wanted, n)
    splits = split_codes(_column(table, "split", n).to_pylist(), table) if "split" in columns else empty.splits
    return Said(labels, splits, names)


def _columns(table: Path) -> list[str]:
    try:
        return list(parquet.read_schema(table).names)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{table} is not a parquet file: {one_line(error)}") from error


def _column(table: Path, name: str, n: int | None) -> Any:
    """One column of a table, which must have n rows."""
    try:
        column = parquet.read_table(table, columns=[name])[name].combine_chunks()
    # KeyError: the name occurs twice
    except (pa.ArrowException, OSError, KeyError) as error:
        raise InputError(f"{table}: column {name!r} cannot be read: {one_line(error)}") from error
    if n is not None and len(column) != n:
        raise InputError(f"{table} has {len(column)} rows, the features beside it {n}; they must go together")
    return column


def _label_column(table: Path, name: str, n: int) -> tuple[NDArray[np.int32], list[str] | None]:
    column = _column(table, name, n)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return coded([value or "" for value in column.to_pylist()])
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_null(column.type)):
        raise InputError(f"{table}: column {name!r} is {column.type}, labels are whole numbers or texts")
    # Tables with missing numbers hold floats, and nan where one is missing.
    values = column.cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy(zero_copy_only=False)
    known = np.where(np.isnan(values), UNKNOWN, values)
    if (known != np.rint(known)).any():
        raise InputError(
            f"{table}: column {name!r} holds {known[known != np.rint(known)][0]}, labels are whole numbers"
        )
    return known.clip(-2, 2**31 - 1).astype(np.int32), None


def _ids_in(table: Path, id_column: str | None) -> Ids:
    columns = _columns(table)
    name = id_column or next((one for one in _ID_COLUMNS if one in columns), None)
    if name not in columns:
        raise InputError(
            f"{table} has no column {id_column or ', '.join(_ID_COLUMNS)} to tell rows apart; give --id-column: "
            f"one of {', '.join(columns)}"
        )

    def ids(rows: NDArray[np.int64]) -> list[str]:
        """Ids of some rows."""
        return ["" if one is None else str(one) for one in _kept_column(table, name).take(pa.array(rows)).to_pylist()]

    return ids


# Shards ask for the ids of one file after another; a file of a million rows should not be read for each of them.
@functools.lru_cache(maxsize=1)
def _kept_column(table: Path, name: str) -> Any:
    return _column(table, name, None)


def _numbered(number: int) -> Ids:
    return lambda rows: [f"{number}/{name}" for name in numbers(rows)]


def _joined(said: Sequence[Said]) -> Said:
    """What all files say together; names of classes are united."""
    splits = np.concatenate([one.splits for one in said])
    named = [one.names for one in said if one.names is not None]
    if not named:
        return Said(np.concatenate([one.labels for one in said]), splits)
    names = list(dict.fromkeys(name for of_file in named for name in of_file))
    places = {name: place for place, name in enumerate(names)}
    if any(one.names is None and (one.labels >= 0).any() for one in said):
        raise InputError(
            "the labels are texts in some files and numbers in others; give one --label-column that all have"
        )
    maps = [np.array([*(places[name] for name in one.names or []), UNKNOWN], np.int32) for one in said]
    return Said(np.concatenate([new[one.labels] for one, new in zip(said, maps, strict=True)]), splits, names)
