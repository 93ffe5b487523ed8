"""Features in a table with a column of embeddings: a parquet file, or this tool's own export to one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from ulfine_fast.cache.interop.clip_retrieval import ID_COLUMNS, column_labels
from ulfine_fast.cache.interop.external_features import (
    FeatureBlock,
    OpenedFiles,
    RowLabels,
    check_features,
    numbered_ids,
    one_line,
    read_array,
    split_indices,
)
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import refuse_irregular_file
from ulfine_fast.cache.io.names import did_you_mean, listed
from ulfine_fast.cache.sources.rows import UNKNOWN

FILE = "features.parquet"
"""The table in the folder of an export."""

CLASS_NAMES = b"class_names"
"""The key of the class names in a table's metadata, as JSON."""


def open_embedding_table(
    path: Path, column: str | None, label_column: str | None, id_column: str | None
) -> OpenedFiles:
    """Opens a parquet file, or a folder with `FILE` and the arrays that an export writes beside it.

    The features are in memory, as many as there are rows.

    Args:
        path: of the file or the folder.
        column: of the features; by default the only one of lists of floats.
        label_column: "label" by default, where there is one.
        id_column: id, image_path or key by default; without one rows are numbered.

    Raises:
        InputError: not a parquet file, a column that is missing, or cells that cannot be features; names the column.
    """
    file = path / FILE if path.is_dir() else path
    beside = path.glob("*.npy") if path.is_dir() else ()
    arrays = {one.stem: read_array(one) for one in beside if one.stem in ("class_names", "text_features")}
    try:
        refuse_irregular_file(file)
        schema = parquet.read_schema(file)
        column = _chosen_column(file, schema, column)
        for name in (label_column, id_column):
            if name is not None and name not in schema.names:
                hint = did_you_mean(name, schema.names)
                raise InputError(f"{file} has no column {name!r}; it has {listed(schema.names)}{hint}")
        label = label_column or ("label" if "label" in schema.names else None)
        identity = id_column or next((name for name in ID_COLUMNS if name in schema.names), None)
        kept = list(dict.fromkeys(name for name in (column, label, identity) if name is not None))
        kept += ["split"] if "split" in schema.names and "split" not in kept else []
        table = parquet.read_table(file, columns=kept).combine_chunks()
        table.validate(full=True)
    except InputError:
        raise
    # KeyError: a name occurs twice
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise InputError(f"{file} cannot be read as a parquet table: {one_line(error)}") from error
    n = len(table)
    labels, names = (np.full(n, UNKNOWN, np.int32), None) if label is None else column_labels(table[label], file, label)
    splits = np.full(n, -1, np.int8)
    if "split" in table.column_names:
        splits = split_indices(table["split"].to_pylist(), file)
    declared = (schema.metadata or {}).get(CLASS_NAMES)
    if declared is not None and "class_names" not in arrays:
        arrays["class_names"] = _declared_names(declared, file)

    ids = None if identity is None else table[identity]

    def ids_of(rows: NDArray[np.int64]) -> list[str]:
        values = [] if ids is None else ids.take(pa.array(rows)).to_pylist()
        return numbered_ids(rows) if ids is None else ["" if value is None else str(value) for value in values]

    features = check_features(_vectors(table[column], file, column), f"column {column!r} of {file}", None)
    return OpenedFiles(arrays, RowLabels(labels, splits, names), [FeatureBlock(str(file), features, ids_of)], [file])


def _is_vector(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(lists and pa.types.is_floating(kind.value_type))


def _chosen_column(file: Path, schema: pa.Schema, column: str | None) -> str:
    vectors = [field.name for field in schema if _is_vector(field.type)]
    if column is None and len(vectors) == 1:
        return vectors[0]
    if column is not None and column in vectors:
        return column
    there = f"columns of lists of floats are {', '.join(vectors) or 'none'}"
    if column is None:
        raise InputError(f"{file} has {len(vectors)} columns that may be features; give --column ({there})")
    raise InputError(f"{file} has no column {column!r} of features; {there}")


def _vectors(column: pa.ChunkedArray, file: Path, name: str) -> NDArray[Any]:
    """Lists of one length as an array (n, D)."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    if array.null_count:
        row = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise InputError(f"{file}: row {row + 1} of column {name!r} is empty; remove the row or fill it")
    if not pa.types.is_fixed_size_list(array.type):
        lengths = np.diff(array.offsets.to_numpy())
        if len(set(lengths.tolist())) > 1:
            row = int(np.flatnonzero(lengths != lengths[0])[0])
            raise InputError(
                f"{file}: row {row + 1} of column {name!r} has length {lengths[row]}, those before it {lengths[0]}; "
                "one model has one length"
            )
    values = array.flatten()
    if values.null_count:
        raise InputError(f"{file}: column {name!r} has empty numbers inside its lists; remove the rows or fill them")
    n = len(array)
    flat: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return flat.reshape(n, len(flat) // n if n else 0)


def _declared_names(text: bytes, file: Path) -> NDArray[np.str_]:
    try:
        names = json.loads(text)
    except ValueError as error:
        raise InputError(f"{file}: the class names in its metadata are no JSON; export the cache again") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{file}: the class names in its metadata are no list of texts; export the cache again")
    return np.array(names, dtype=np.str_)
