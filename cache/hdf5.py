"""HDF5 files as bytes: datasets are packed into bytes that depend on nothing else, and read with every check."""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ulfine_fast.cache.io.errors import InputError

# One fixed format of the file itself: with a range, HDF5 would pick by its own version and the bytes would differ.
_FILE_FORMAT = ("v110", "v110")
_BLOCK = 1 << 17  # values checked together
# A heap of texts in the file: signature, version, three zeros, its size, then objects with a header of 16 bytes each.
_HEAP = b"GCOL\x01\0\0\0"
_HEAP_HEADER = struct.Struct("<8sQ")
_OBJECT_HEADER = struct.Struct("<HHxxxxQ")
_TEXT = h5py.string_dtype("utf-8")

Content = NDArray[Any] | Sequence[str]


def pack(
    datasets: Mapping[str, Content],
    attributes: Mapping[str, float | Sequence[str]] | None = None,
    *,
    dataset_attributes: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
) -> bytes:
    """Makes an HDF5 file in memory.

    Args:
        datasets: path -> array (any shape), or a list of texts (n,); written in this order, each with its `sha256`.
        attributes: attributes of the file.
        dataset_attributes: further attributes by dataset path.

    Returns:
        The bytes of the file, a function of the arguments alone: no time stamps, no names of the machine.
    """
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=_FILE_FORMAT) as file:
        for name, content in datasets.items():
            made = _create(file, name, content)
            _attach(made, {"sha256": content_sha256(content), **(dataset_attributes or {}).get(name, {})})
        _attach(file, attributes or {})
    return buffer.getvalue()


def content_sha256(content: Content) -> str:
    """Hex digest of an array's raw little-endian bytes in C order, or of texts in UTF-8 joined by newlines."""
    if isinstance(content, np.ndarray) and content.dtype.kind != "O":
        ordered = np.ascontiguousarray(content, dtype=content.dtype.newbyteorder("<"))
        # A view of the array's own memory, no copy.
        return hashlib.sha256(ordered.reshape(-1).view(np.uint8).data).hexdigest()
    return hashlib.sha256("\n".join(np.asarray(content, dtype=object).reshape(-1)).encode()).hexdigest()


@contextmanager
def unpacked(data: bytes, *, texts: bool = True) -> Iterator[h5py.File]:
    """Opens an HDF5 file.

    Args:
        data: its bytes; compare them with their checksum before, wherever there is one.
        texts: whether texts or checksums of datasets will be read; their heaps are then checked too.

    Raises:
        InputError: not an HDF5 file, or its content is damaged.
    """
    try:
        if texts:
            _refuse_endless_heap(data)
        with h5py.File(io.BytesIO(data), "r") as file:
            yield file
    except InputError:
        raise
    # What h5py raises for damaged bytes depends on where the damage is.
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, MemoryError) as error:
        raise InputError(f"not a readable HDF5 file ({' '.join(str(error).split())[:120]})") from error


def take(
    file: h5py.File,
    name: str,
    *,
    shape: tuple[int, ...],
    dtype: str | None = None,
    check: bool = True,
    data: bytes | None = None,
) -> NDArray[Any]:
    """Reads one dataset whole.

    Args:
        file: an open file.
        name: path in the file.
        shape: that it must have, checked before anything is allocated.
        dtype: numpy name of the type it must have; None for texts, which become an object array of str.
        check: whether to compare it with its `sha256` attribute.
        data: the bytes of the whole file, if they are in memory; large arrays are then read-only views of them.

    Raises:
        InputError: missing, of another type or shape, stored outside of the file, or damaged.
    """
    dataset = _dataset_inside(file, name)
    # Before reading: a declared shape costs nothing in a file, and everything in memory.
    if dataset.shape != shape:
        raise InputError(f"{name} has shape {dataset.shape}, expected {shape}")
    if dtype is None:
        if h5py.check_string_dtype(dataset.dtype) is None:
            raise InputError(f"{name} does not hold text")
        _refuse_missing_data(file, dataset, name)
        content = dataset.asstr()[()]
    else:
        if dataset.dtype != np.dtype(dtype):
            raise InputError(f"{name} has type {dataset.dtype}, expected {dtype}")
        _refuse_missing_data(file, dataset, name)
        content = dataset[()] if data is None else _view_or_copy(dataset, data)
    if check and dataset.attrs.get("sha256") != content_sha256(content):
        raise InputError(f"{name} does not match its checksum")
    return content


def _refuse_missing_data(file: h5py.File, dataset: h5py.Dataset, name: str) -> None:
    """Refuses a dataset that the file does not hold in full: reading it would allocate whatever size it declares."""
    # Number of values times bytes of each; a text has a reference of 16 bytes here.
    size = dataset.size * dataset.id.get_type().get_size()
    if size > min(dataset.id.get_storage_size(), file.id.get_filesize()):
        raise InputError(f"{name} declares {size} bytes, which the file does not hold")


def _refuse_endless_heap(data: bytes) -> None:
    """Refuses heaps of texts with free space of size 0, over which HDF5 would step for ever."""
    start = data.find(_HEAP)
    while start >= 0:
        size = _HEAP_HEADER.unpack_from(data, start)[1] if start + _HEAP_HEADER.size <= len(data) else 0
        end = min(start + size, len(data))
        position = start + _HEAP_HEADER.size
        while position + _OBJECT_HEADER.size <= end:
            index, _, length = _OBJECT_HEADER.unpack_from(data, position)
            if index == 0 and length == 0:
                raise InputError("its texts are damaged")
            # The free space counts its header, and an object is padded to eight bytes.
            position += length if index == 0 else _OBJECT_HEADER.size + -(-length // 8) * 8
        start = data.find(_HEAP, start + len(_HEAP))


def _view_or_copy(dataset: h5py.Dataset, data: bytes) -> NDArray[Any]:
    """The content of a contiguous dataset as a view of the file's bytes; of any other, a copy."""
    offset = dataset.id.get_offset()  # None for chunked and for empty datasets
    length = dataset.size * dataset.dtype.itemsize
    if offset is None or length == 0 or offset + length > len(data) or not dataset.dtype.isnative:
        return dataset[()]
    return np.frombuffer(data, dataset.dtype, dataset.size, offset).reshape(dataset.shape)


def shape_of(file: h5py.File, name: str) -> tuple[int, ...] | None:
    """Shape of a dataset, None where there is none."""
    # `name in file` would follow a link; looking the link itself up does not.
    return None if file.get(name, getlink=True) is None else tuple(_dataset_inside(file, name).shape)


def first_not_finite(array: NDArray[Any]) -> int | None:
    """Row of the first value that is NaN or infinite in (n, ...) of float16 or float32; None where all are finite.

    These are the values whose exponent bits are all set; as integers they are compared several times faster.
    """
    integer, exponent = (np.uint16, 0x7C00) if array.dtype == np.float16 else (np.uint32, 0x7F800000)
    bits = np.ascontiguousarray(array).view(integer).reshape(-1)
    # A block at a time stays in the processor's cache.
    blocks = (bits[start : start + _BLOCK] for start in range(0, len(bits), _BLOCK))
    if not any(((block & exponent) == exponent).any() for block in blocks):
        return None
    return int(np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))[0])


def _dataset_inside(file: h5py.File, name: str) -> h5py.Dataset:
    """The dataset, if its content is in this very file: a link could reach any file of the reader."""
    # Every group on the way may itself be a link.
    parts = name.split("/")
    for depth in range(1, len(parts) + 1):
        link = file.get("/".join(parts[:depth]), getlink=True)
        if link is None:
            raise InputError(f"{name} is missing")
        if not isinstance(link, h5py.HardLink):
            raise InputError(f"{name} is a link, which a cache may not hold")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        raise InputError(f"{name} is not a dataset")
    if dataset.is_virtual or dataset.external:
        raise InputError(f"{name} keeps its content in another file, which a cache may not do")
    return dataset


def _create(file: h5py.File, name: str, content: Content) -> h5py.Dataset:
    if isinstance(content, np.ndarray) and content.dtype.kind != "O":
        ordered = np.ascontiguousarray(content, dtype=content.dtype.newbyteorder("<"))
        return file.create_dataset(name, data=ordered.reshape(content.shape), track_times=False)
    # As objects, or numpy would make fixed-width texts, which h5py does not take.
    texts = np.asarray(content, dtype=object)
    return file.create_dataset(name, data=texts, dtype=_TEXT, track_times=False)


def _attach(target: Any, attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        if isinstance(value, (list, tuple)):
            target.attrs.create(name, list(value), dtype=_TEXT)
        else:
            target.attrs[name] = value
