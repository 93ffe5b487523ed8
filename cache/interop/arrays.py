"""Features in arrays of one name each: a folder of .npy files, an .npz file, or a single .npy file."""

from __future__ import annotations

import difflib
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    texts_of,
)
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.sources.rows import UNKNOWN

NAMES = ("features", "labels", "ids", "splits", "weak", "strong", "class_names", "text_features")
# What numpy and zipfile raise depends on where a file is damaged, and on what was never meant for them (encryption).
_UNREADABLE = (
    *(OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError),
    *(struct.error, zlib.error, zipfile.BadZipFile),
)
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a file in a zip: its last numbers are the lengths of name and extra field


def plain_arrays(path: Path) -> Opened:
    """Opens `features` and what lies beside it.

    Raises:
        InputError: no such file, an array of an unknown name, or arrays that do not fit together.
    """
    arrays, files = _arrays(path)
    if "features" not in arrays:
        raise InputError(
            f"{path} has no features: they must be named features ({', '.join(sorted(arrays)) or 'empty'})"
        )
    features = checked_features(arrays["features"], str(path), None)
    n = len(features)
    labels, names = _label_array(arrays.get("labels"), n, str(path))
    splits = split_codes(texts_of(arrays["splits"], n, f"splits of {path}") if "splits" in arrays else [None] * n, path)
    ids = numbers if "ids" not in arrays else _ids_of(arrays["ids"], n, path)
    return Opened(arrays, Said(labels, splits, names), [Block(str(path), features, ids)], files)


def _arrays(path: Path) -> tuple[dict[str, NDArray[Any]], list[Path]]:
    if path.is_dir():
        files = sorted(path.glob("*.npy"))
        if not files:
            raise InputError(
                f"{path} has neither img_emb nor features.npy; see docs/cache-verbs.md for what can be imported"
            )
        arrays = {file.stem: read_array(file) for file in files}
    elif not path.is_file():
        raise InputError(f"no such folder or file: {path}")
    else:
        arrays, files = _npz(path) if path.suffix == ".npz" else {"features": read_array(path)}, [path]
    for name in arrays:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(NAMES)}"
            raise InputError(f"{path} holds an array {name!r}, which nothing is known of{hint}")
    return arrays, files


def _npz(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file: mapped where they are stored as they are, in memory where they are compressed."""
    try:
        with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as loaded:
            found = {}
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                mapped = _mapped(path, info) if info.compress_type == zipfile.ZIP_STORED else None
                found[name] = loaded[name] if mapped is None else mapped
            return found
    except _UNREADABLE as error:
        raise InputError(f"{path} is not an .npz file of plain numbers or texts ({one_line(error)})") from error


def _mapped(path: Path, info: zipfile.ZipInfo) -> NDArray[Any] | None:
    """One array of an archive that is not compressed; None where only numpy itself can read it."""
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


def _label_array(labels: NDArray[Any] | None, n: int, where: str) -> tuple[NDArray[np.int32], list[str] | None]:
    if labels is None:
        return np.full(n, UNKNOWN, np.int32), None
    if labels.dtype.kind == "U":
        return coded(texts_of(labels, n, f"labels of {where}"))
    # Booleans and floats are refused: a mask or a score given as labels would pass unseen.
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise InputError(f"labels of {where} must be {n} whole numbers or texts, got {labels.shape} of {labels.dtype}")
    return np.asarray(labels, dtype=np.int64).clip(-2, 2**31 - 1).astype(np.int32), None


def _ids_of(array: NDArray[Any], n: int, path: Path) -> Ids:
    if array.shape != (n,) or array.dtype.kind not in "Uiu":
        raise InputError(f"ids of {path} must be {n} texts or whole numbers, got shape {array.shape} of {array.dtype}")
    return lambda rows: [str(one) for one in array[rows].tolist()]
