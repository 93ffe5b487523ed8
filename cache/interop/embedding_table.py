"""Features in a table with a column of embeddings: parquet, Lance, a saved data set of Hugging Face, a data frame."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import ipc, parquet

from ulfine_fast.cache.interop.clip_retrieval import ID_COLUMNS, column_labels
from ulfine_fast.cache.interop.external_features import (
    FeatureBlock,
    OpenedFiles,
    RowLabels,
    check_features,
    numbered_ids,
    read_array,
    split_indices,
)
from ulfine_fast.cache.interop.lance_table import LANCE, is_lance, open_lance
from ulfine_fast.cache.io.errors import InputError, one_line
from ulfine_fast.cache.io.files import refuse_irregular_file
from ulfine_fast.cache.io.json_files import read_json
from ulfine_fast.cache.io.names import did_you_mean, listed
from ulfine_fast.cache.sources.huggingface import is_saved
from ulfine_fast.cache.sources.rows import SPLITS, UNKNOWN
from ulfine_fast.cache.sources.streams import split_named

FILE = "features.parquet"
"""The table in the folder of an export."""

CLASS_NAMES = b"class_names"
"""The key of the class names in a table's metadata, as JSON."""

FRAME = Path("the data frame")
"""What messages and the manifest call a table in memory."""

# the key under which `datasets` describes its columns in a table's metadata
_HUGGING_FACE = b"huggingface"
_SUFFIX = ".parquet"


@dataclass(frozen=True)
class _ArrowTable:
    """A table whose columns are read on demand.

    Attributes:
        where: its path, for messages.
        schema: of all columns.
        read: the columns of these names.
        files: that it is in; none for a data frame.
        splits: the split of each row where files are of one each, else empty.
        arrays: those beside it, by name.
    """

    where: Path
    schema: pa.Schema
    read: Callable[[list[str]], pa.Table]
    files: list[Path]
    splits: Sequence[str] = ()
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)


def is_embedding_table(where: Any) -> bool:
    """Whether :func:`open_embedding_table` is for it: by its name and what is in the folder; any data frame."""
    if not isinstance(where, Path):
        return True
    if where.is_dir():
        own = (where / FILE).is_file() or is_lance(where / LANCE) or is_lance(where) or is_saved(where)
        return own or (any(where.glob(f"*{_SUFFIX}")) and not (where / "img_emb").is_dir())
    return where.suffix.lower() == _SUFFIX


def open_embedding_table(
    where: Path | Any, column: str | None, label_column: str | None, id_column: str | None
) -> OpenedFiles:
    """Opens a table with a column of embeddings.

    The features are in memory, as many as there are rows.

    Args:
        where: a parquet file, a folder of them, a Lance data set, a folder that `datasets.save_to_disk` wrote, the
            folder of an export; or a data frame of pandas, Polars or anything that gives Arrow's C stream.
        column: of the features; by default the only one of lists of floats.
        label_column: "label" by default, where there is one.
        id_column: id, image_path or key by default; without one rows are numbered.

    Raises:
        InputError: no such table, a column that is missing, or cells that cannot be features; names the column.
    """
    try:
        opened = _opened(where)
        file, schema = opened.where, opened.schema
        column = _chosen_column(file, schema, column)
        for name in (label_column, id_column):
            if name is not None and name not in schema.names:
                hint = did_you_mean(name, schema.names)
                raise InputError(f"{file} has no column {name!r}; it has {listed(schema.names)}{hint}")
        label = label_column or ("label" if "label" in schema.names else None)
        identity = id_column or next((name for name in ID_COLUMNS if name in schema.names), None)
        kept = list(dict.fromkeys(name for name in (column, label, identity) if name is not None))
        kept += ["split"] if "split" in schema.names and "split" not in kept else []
        table = opened.read(kept).combine_chunks()
        table.validate(full=True)
    except InputError:
        raise
    # KeyError: a name occurs twice
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        kind = "a parquet table" if isinstance(where, Path) and where.suffix.lower() == _SUFFIX else "a table"
        raise InputError(f"{where} cannot be read as {kind}: {one_line(error)}") from error
    n = len(table)
    labels, names = (np.full(n, UNKNOWN, np.int32), None) if label is None else column_labels(table[label], file, label)
    splits = np.full(n, -1, np.int8)
    if opened.splits:
        splits = split_indices(opened.splits, file)
    elif "split" in table.column_names:
        splits = split_indices(table["split"].to_pylist(), file)
    arrays = dict(opened.arrays)
    declared = (schema.metadata or {}).get(CLASS_NAMES)
    if "class_names" not in arrays:
        if declared is not None:
            arrays["class_names"] = _declared_names(declared, file)
        elif names is None and label is not None:
            arrays |= _names_of_datasets(schema, label)

    ids = None if identity is None else table[identity]

    def ids_of(rows: NDArray[np.int64]) -> list[str]:
        values = [] if ids is None else ids.take(pa.array(rows)).to_pylist()
        return numbered_ids(rows) if ids is None else ["" if value is None else str(value) for value in values]

    features = check_features(_vectors(table[column], file, column), f"column {column!r} of {file}", None)
    blocks = [FeatureBlock(str(file), features, ids_of)]
    return OpenedFiles(arrays, RowLabels(labels, splits, names), blocks, opened.files)


def _opened(where: Path | Any) -> _ArrowTable:
    """The table, by what it is."""
    if not isinstance(where, Path):
        return _data_frame(where)
    beside = where.glob("*.npy") if where.is_dir() else ()
    arrays = {one.stem: read_array(one) for one in beside if one.stem in ("class_names", "text_features")}
    if is_lance(where) or is_lance(where / LANCE):
        folder = where if is_lance(where) else where / LANCE
        data = open_lance(folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return _ArrowTable(folder, data.schema, lambda names: data.to_table(columns=names), files, arrays=arrays)
    if where.is_dir() and is_saved(where):
        return _saved_data_set(where)
    tables = [where]
    if where.is_dir():
        tables = [where / FILE] if (where / FILE).is_file() else sorted(where.glob(f"*{_SUFFIX}"))
    for file in tables:
        refuse_irregular_file(file)

    def read(names: list[str]) -> pa.Table:
        return pa.concat_tables(parquet.ParquetFile(file).read(columns=names) for file in tables)

    # a single file is what messages name
    return _ArrowTable(
        tables[0] if len(tables) == 1 else where, parquet.read_schema(tables[0]), read, tables, (), arrays
    )


def _data_frame(frame: Any) -> _ArrowTable:
    try:
        table = frame if isinstance(frame, pa.Table) else pa.table(frame)
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise InputError(
            f"expected a path or a data frame with a column of lists of floats, got {type(frame)} ({one_line(error)})"
        ) from error
    return _ArrowTable(FRAME, table.schema, table.select, [])


def _saved_data_set(folder: Path) -> _ArrowTable:
    """What `datasets.save_to_disk` wrote: one data set, or a folder for each split; `datasets` itself is not needed."""
    fix = "save the data set again"
    parts: dict[str, Path] = {"": folder}
    if (folder / "dataset_dict.json").is_file():
        names = read_json(folder / "dataset_dict.json", dict[str, Any], fix=fix).get("splits") or []
        parts = {str(name): folder / str(name) for name in names}
    files: list[Path] = []
    splits: list[str] = []
    rows_of: list[pa.Table] = []
    for name, part in parts.items():
        split = split_named(name) if name else ""
        if split is None:
            raise InputError(
                f"{folder} has the split {name!r}; known are {', '.join(SPLITS)}, so save it without others"
            )
        state = read_json(part / "state.json", dict[str, Any], fix=fix)
        for entry in state.get("_data_files") or []:
            file = part / Path(str(entry["filename"])).name
            refuse_irregular_file(file)
            # mapped, so that columns that are not wanted stay on the disk
            rows_of.append(ipc.open_stream(pa.memory_map(str(file))).read_all())
            files.append(file)
            splits += [split] * len(rows_of[-1]) if name else []
    if not rows_of:
        raise InputError(f"{folder} holds no rows; {fix}")
    schema = rows_of[0].schema
    return _ArrowTable(
        folder, schema, lambda names: pa.concat_tables(rows.select(names) for rows in rows_of), files, splits
    )


def _names_of_datasets(schema: pa.Schema, column: str) -> dict[str, NDArray[np.str_]]:
    """The class names of a column of `datasets.ClassLabel`, where there are any."""
    text = (schema.metadata or {}).get(_HUGGING_FACE)
    try:
        names = json.loads(text or "{}")["info"]["features"][column]["names"]
    # of another program, or of a column without names
    except (ValueError, KeyError, TypeError):
        return {}
    return {"class_names": np.array(names, dtype=np.str_)} if names else {}


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
