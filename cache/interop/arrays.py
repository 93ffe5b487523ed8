"""Features in arrays of one name each: a folder of .npy files, an .npz file, or a single .npy file."""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.cache.interop.external_features import (
    UNREADABLE_ARRAY,
    FeatureBlock,
    Ids,
    OpenedFiles,
    RowLabels,
    check_features,
    check_texts,
    numbered_ids,
    read_array,
    split_indices,
    text_labels,
    texts_in,
)
from ulfine_fast.cache.io.errors import InputError, one_line
from ulfine_fast.cache.io.files import refuse_irregular_file
from ulfine_fast.cache.io.names import did_you_mean
from ulfine_fast.cache.sources.rows import UNKNOWN

NAMES = ("features", "labels", "ids", "splits", "weak", "strong", "class_names", "text_features")
# What zipfile raises depends on where a file is damaged, and on what it cannot read at all (encryption).
_UNREADABLE: tuple[type[Exception], ...] = (*UNREADABLE_ARRAY, RuntimeError, zlib.error, zipfile.BadZipFile)
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a file in a zip: its last numbers are the lengths of name and extra field


def open_arrays(path: Path) -> OpenedFiles:
    """Opens `features` and the arrays beside it.

    Raises:
        InputError: no such file, an array of an unknown name, or arrays that do not fit together.
    """
    # The arrays by name.
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.npy"))
        if not files:
            raise InputError(
                f"{path} has neither img_emb nor features.npy; see docs/cache-verbs.md for what can be imported"
            )
        arrays = {file.stem: read_array(file) for file in files}
    elif not path.is_file():
        raise InputError(f"no such folder or file: {path}")
    elif path.suffix == ".npz":
        arrays = _read_npz(path)
    else:
        arrays = {"features": read_array(path)}
    for name in arrays:
        if name not in NAMES:
            hint = did_you_mean(name, NAMES, f"known are {', '.join(NAMES)}")
            raise InputError(f"{path} holds an array {name!r} of unknown meaning{hint}")
    if "features" not in arrays:
        raise InputError(
            f"{path} has no features: they must be named features ({', '.join(sorted(arrays)) or 'empty'})"
        )

    # What they say of each row.
    features = check_features(arrays["features"], str(path), None)
    n = len(features)
    labels, names = _read_labels(arrays.get("labels"), n, path)
    splits = np.full(n, -1, np.int8)
    if "splits" in arrays:
        splits = split_indices(check_texts(arrays["splits"], n, f"splits of {path}"), path)
    ids = _read_ids(arrays["ids"], n, path) if "ids" in arrays else numbered_ids
    return OpenedFiles(arrays, RowLabels(labels, splits, names), [FeatureBlock(str(path), features, ids)], files)


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file: mapped where they are stored uncompressed, else in memory."""
    try:
        refuse_irregular_file(path)
        with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as loaded:
            arrays = {}
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                mapped = _map_array(path, info) if info.compress_type == zipfile.ZIP_STORED else None
                arrays[name] = loaded[name] if mapped is None else mapped
            return arrays
    except _UNREADABLE as error:
        raise InputError(f"{path} is not an .npz file of plain numbers or texts ({one_line(error)})") from error


def _map_array(path: Path, info: zipfile.ZipInfo) -> NDArray[Any] | None:
    """One uncompressed array of an archive; None where only numpy itself can read it."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        start = info.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size)))
        file.seek(start)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        reader = readers.get(np.lib.format.read_magic(file))
        if reader is None:
            return None
        shape, fortran, dtype = reader(file)
        # Objects would be unpickled; numpy says so better than a map of their bytes.
        if dtype.hasobject or 0 in shape:
            return None
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def _read_labels(labels: NDArray[Any] | None, n: int, path: Path) -> tuple[NDArray[np.int32], list[str] | None]:
    if labels is None:
        return np.full(n, UNKNOWN, np.int32), None
    if labels.dtype.kind == "U":
        return text_labels(check_texts(labels, n, f"labels of {path}"))
    # Booleans and floats are refused: a mask or a score would be taken for labels unseen.
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise InputError(f"labels of {path} must be {n} whole numbers or texts, got {labels.shape} of {labels.dtype}")
    return np.asarray(labels, dtype=np.int64).clip(-2, 2**31 - 1).astype(np.int32), None


def _read_ids(array: NDArray[Any], n: int, path: Path) -> Ids:
    if array.shape != (n,) or array.dtype.kind not in "Uiu":
        raise InputError(f"ids of {path} must be {n} texts or whole numbers, got shape {array.shape} of {array.dtype}")
    if array.dtype.kind == "U":
        return lambda rows: texts_in(array[rows], f"ids of {path}")
    return lambda rows: [str(name) for name in array[rows].tolist()]
