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

from ulfine_fast.cache.interop.external_features import (
    FeatureBlock,
    Ids,
    OpenedFiles,
    RowLabels,
    check_features,
    numbered_ids,
    read_array,
    split_indices,
    text_labels,
)
from ulfine_fast.cache.io.errors import InputError, one_line
from ulfine_fast.cache.io.files import refuse_irregular_file
from ulfine_fast.cache.io.names import did_you_mean, listed
from ulfine_fast.cache.sources.rows import UNKNOWN

# Columns of the metadata that identify rows, the surest first.
ID_COLUMNS = ("id", "image_path", "key")
_NUMBERED = re.compile(r"_(\d+)\.(npy|parquet)$")


def open_clip_retrieval(path: Path, label_column: str | None, id_column: str | None) -> OpenedFiles:
    """Opens the folders below `path`.

    Args:
        path: what holds img_emb and metadata; without metadata rows are numbered.
        label_column: "label" by default, where there is one.
        id_column: id, image_path or key by default.

    Raises:
        InputError: files that do not go together, or a column that is missing; names the file.
    """
    images = _by_number(path / "img_emb", "npy")
    if not images:
        raise InputError(f"{path / 'img_emb'} holds no file such as img_emb_0.npy")
    tables = _by_number(path / "metadata", "parquet")
    unpaired = sorted(set(images) ^ set(tables))
    if tables and unpaired:
        raise InputError(
            f"{path}: number {unpaired[0]} is in only one of img_emb and metadata; both must have every number"
        )
    blocks: list[FeatureBlock] = []
    rows: list[RowLabels] = []
    for number, file in images.items():
        # All like the first one: files that disagree among themselves belong to different models.
        features = check_features(read_array(file), str(file), blocks[0].features.shape[1] if blocks else None)
        table = tables.get(number)
        rows.append(_read_rows(table, len(features), label_column))
        blocks.append(FeatureBlock(str(file), features, _read_ids(table, number, id_column)))
    # What this tool's own export writes of the classes beside clip-retrieval's folders.
    arrays = {
        name: read_array(path / f"{name}.npy")
        for name in ("class_names", "text_features")
        if (path / f"{name}.npy").is_file()
    }
    return OpenedFiles(arrays, _joined(rows), blocks, [*images.values(), *tables.values()])


def _by_number(folder: Path, suffix: str) -> dict[int, Path]:
    """Files by the number in their names, in the order of the numbers: img_emb_10 comes after img_emb_9."""
    numbered = [(match, file) for file in folder.glob(f"*.{suffix}") if (match := _NUMBERED.search(file.name))]
    return dict(sorted((int(match[1]), file) for match, file in numbered))


def _read_rows(table: Path | None, n: int, label_column: str | None) -> RowLabels:
    """Labels and splits of the n rows of one file; all unknown without a table."""
    labels = np.full(n, UNKNOWN, np.int32)
    splits = np.full(n, -1, np.int8)
    if table is None:
        return RowLabels(labels, splits)
    names = None
    columns = _columns(table)
    column = label_column or ("label" if "label" in columns else None)
    if column is not None and column not in columns:
        hint = did_you_mean(column, columns)
        raise InputError(f"{table} has no column {column!r}; it has {listed(columns)}{hint}")
    if column is not None:
        labels, names = column_labels(_read_column(table, column, n), table, column)
    if "split" in columns:
        splits = split_indices(_read_column(table, "split", n).to_pylist(), table)
    return RowLabels(labels, splits, names)


def _columns(table: Path) -> list[str]:
    try:
        refuse_irregular_file(table)
        return list(parquet.read_schema(table).names)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{table} is not a parquet file: {one_line(error)}") from error


def _read_column(table: Path, name: str, n: int | None) -> Any:
    """One column of a table, which must have n rows where n is known."""
    try:
        refuse_irregular_file(table)
        column = parquet.read_table(table, columns=[name])[name].combine_chunks()
    # KeyError: the name occurs twice
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise InputError(f"{table}: column {name!r} cannot be read: {one_line(error)}") from error
    try:
        column.validate(full=True)  # text that is not UTF-8, in a damaged file
    except pa.ArrowException as error:
        raise InputError(f"{table}: column {name!r} cannot be read: {one_line(error)}") from error
    if n is not None and len(column) != n:
        raise InputError(f"{table} has {len(column)} rows, the features beside it {n}; they must go together")
    return column


def column_labels(column: Any, table: Path, name: str) -> tuple[NDArray[np.int32], list[str] | None]:
    """Labels of a column of numbers or texts, see `RowLabels`.

    Args:
        column: of Arrow.
        table: its file, for messages.
        name: of the column, likewise.

    Raises:
        InputError: labels of another type, or a number that is not whole.
    """
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_dictionary(column.type):
        # As pandas writes categories.
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return text_labels([value or "" for value in column.to_pylist()])
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_null(column.type)):
        raise InputError(f"{table}: column {name!r} is {column.type}, labels are whole numbers or texts")
    # Tables with missing numbers hold floats, and nan where one is missing.
    values = column.cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy(zero_copy_only=False)
    labels = np.where(np.isnan(values), UNKNOWN, values)
    if (labels != np.rint(labels)).any():
        raise InputError(
            f"{table}: column {name!r} holds {labels[labels != np.rint(labels)][0]}, labels are whole numbers"
        )
    return labels.clip(-2, 2**31 - 1).astype(np.int32), None


def _read_ids(table: Path | None, number: int, id_column: str | None) -> Ids:
    """Ids of the rows of file `number`: a column of its table, or without one the file's and the row's number."""
    if table is None:
        return lambda rows: [f"{number}/{name}" for name in numbered_ids(rows)]
    columns = _columns(table)
    column = id_column or next((name for name in ID_COLUMNS if name in columns), None)
    if column not in columns:
        raise InputError(
            f"{table} has no column {id_column or ', '.join(ID_COLUMNS)} to tell rows apart; give --id-column: "
            f"one of {', '.join(columns)}"
        )

    def ids(rows: NDArray[np.int64]) -> list[str]:
        values = _last_id_column(table, column).take(pa.array(rows)).to_pylist()
        return ["" if value is None else str(value) for value in values]

    return ids


# Shards ask for the ids of one file after another; a file of a million rows should not be read for each of them.
@functools.lru_cache(maxsize=1)
def _last_id_column(table: Path, name: str) -> Any:
    return _read_column(table, name, None)


def _joined(files: Sequence[RowLabels]) -> RowLabels:
    """The rows of all files; names of classes are united."""
    splits = np.concatenate([rows.splits for rows in files])
    named = [rows.names for rows in files if rows.names is not None]
    if not named:
        return RowLabels(np.concatenate([rows.labels for rows in files]), splits)
    if any(rows.names is None and (rows.labels >= 0).any() for rows in files):
        raise InputError(
            "the labels are texts in some files and numbers in others; give one --label-column that all have"
        )
    names = list(dict.fromkeys(name for names in named for name in names))
    index = {name: label for label, name in enumerate(names)}
    # label -1 finds the last entry
    maps = [np.array([*(index[name] for name in rows.names or []), UNKNOWN], np.int32) for rows in files]
    labels = np.concatenate([new[rows.labels] for rows, new in zip(files, maps, strict=True)])
    return RowLabels(labels, splits, names)
