"""Features of another program, opened from files: what is known of the rows, and the checks that all layouts share."""

from __future__ import annotations

import struct
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.cache.io.errors import InputError, one_line
from ulfine_fast.cache.io.files import refuse_irregular_file
from ulfine_fast.cache.io.names import did_you_mean
from ulfine_fast.cache.io.tables import label_key, whole_number
from ulfine_fast.cache.manifest import Manifest
from ulfine_fast.cache.shard import VIEWED_SPLITS
from ulfine_fast.cache.sources.rows import SPLITS, UNKNOWN

# Row numbers of one file -> their ids.
Ids = Callable[[NDArray[np.int64]], list[str]]


@dataclass(frozen=True)
class FeatureBlock:
    """Features of one file.

    Attributes:
        file: its path, for messages.
        features: floating (n, D), mapped.
        ids: row numbers of this file -> ids.
    """

    file: str
    features: NDArray[Any]
    ids: Ids


@dataclass(frozen=True)
class RowLabels:
    """Labels and splits of N rows as the files have them, before the classes are known.

    Attributes:
        labels: int32 (N,), class indices, or indices into `names`; -1 for unknown.
        splits: int8 (N,), indices into `SPLITS`; -1 where the files have none.
        names: labels as texts; None where they are numbers.
    """

    labels: NDArray[np.int32]
    splits: NDArray[np.int8]
    names: list[str] | None = None


class OpenedFiles(NamedTuple):
    """The content of one layout of files.

    Attributes:
        arrays: those beside the features, by name.
        rows: labels and splits.
        blocks: the features.
        files: all that were read.
    """

    arrays: dict[str, NDArray[Any]]
    rows: RowLabels
    blocks: list[FeatureBlock]
    files: list[Path]


@dataclass(frozen=True)
class ExternalFeatures:
    """Features of another program; N rows in all blocks together.

    Attributes:
        path: absolute.
        files: all that were read.
        blocks: the features.
        labels: int32 (N,), -1 for unknown.
        splits: int8 (N,), indices into `SPLITS`.
        class_names: (K,) texts.
        weak: (m, V, D) for the m rows of train and unlabeled in their order, or (N, V, D); None for no views.
        strong: likewise.
        text_features: (K, P, D) or (K, D), None where there are none.
        manifest: of the cache that was exported by this tool; None for features of another program.
    """

    path: Path
    files: list[Path]
    blocks: list[FeatureBlock]
    labels: NDArray[np.int32]
    splits: NDArray[np.int8]
    class_names: list[str]
    weak: NDArray[Any] | None = None
    strong: NDArray[Any] | None = None
    text_features: NDArray[Any] | None = None
    manifest: Manifest | None = None

    @property
    def dim(self) -> int:
        """D, length of a feature."""
        return int(self.blocks[0].features.shape[1])

    @property
    def dtype(self) -> str:
        """The type to store them in without loss: float16 where they are, else float32."""
        return "float16" if self.blocks[0].features.dtype == np.float16 else "float32"

    def features(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Features of some rows, ascending, in whichever blocks they are: (n, D)."""
        return np.concatenate([block.features[inside] for block, inside in self._by_block(rows)])

    def ids(self, rows: NDArray[np.int64]) -> list[str]:
        """Ids of some rows, ascending."""
        return [name for block, inside in self._by_block(rows) for name in block.ids(inside)]

    def _by_block(self, rows: NDArray[np.int64]) -> Iterator[tuple[FeatureBlock, NDArray[np.int64]]]:
        """The blocks that hold some of the rows, and the rows' numbers inside each."""
        first = 0
        for block in self.blocks:
            inside = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + len(block.features))]
            if len(inside):
                yield block, inside - first
            first += len(block.features)

    @cached_property
    def view_rows(self) -> NDArray[np.int64]:
        """Rows of train and unlabeled, ascending: (m,)."""
        return np.flatnonzero(np.isin(self.splits, [SPLITS.index(split) for split in VIEWED_SPLITS]))


# What numpy raises depends on where a file is damaged: it parses the header as Python.
UNREADABLE_ARRAY: tuple[type[Exception], ...] = (
    *(OSError, ValueError, EOFError, TypeError, KeyError, MemoryError, OverflowError, RecursionError),
    *(SyntaxError, tokenize.TokenError, struct.error),
)


def read_array(path: Path) -> NDArray[Any]:
    """A .npy file mapped into memory.

    Raises:
        InputError: it cannot be read, or is no array of plain values; names the file.
    """
    try:
        refuse_irregular_file(path)
        # Knows this one format alone: no archives, and no objects, which would have to be unpickled.
        return np.lib.format.open_memmap(path, mode="r")
    except UNREADABLE_ARRAY as error:
        raise InputError(f"{path} is not an array of plain numbers or texts ({one_line(error)})") from error


def check_features(array: NDArray[Any], file: str, dim: int | None) -> NDArray[Any]:
    """The array itself, if it can be features.

    Raises:
        InputError: not floats (n, D), without rows, or not of length `dim` where one is known.
    """
    if array.ndim != 2 or array.dtype.kind != "f" or 0 in array.shape:
        raise InputError(
            f"features in {file} must be floats (n, D) with n and D above 0, got {array.shape} of {array.dtype}"
        )
    if dim is not None and array.shape[1] != dim:
        raise InputError(
            f"features in {file} have length {array.shape[1]}, those before it {dim}; one model has one length"
        )
    return array


def text_labels(texts: Iterable[str]) -> tuple[NDArray[np.int32], list[str]]:
    """Labels that are texts, as indices into the list of those that occur; an empty text and -1 are unknown."""
    index: dict[str, int] = {}
    keys = [label_key(text) for text in texts]
    labels = [index.setdefault(key, len(index)) if key and whole_number(key) != UNKNOWN else UNKNOWN for key in keys]
    return np.asarray(labels, dtype=np.int32), list(index)


def split_indices(texts: Sequence[str | None], file: Path) -> NDArray[np.int8]:
    """Splits as indices into `SPLITS`, -1 for an empty one."""
    unknown = {text for text in texts if text} - set(SPLITS)
    if unknown:
        raise InputError(
            f"{file}: unknown split {min(unknown)!r}; use {', '.join(SPLITS)} or leave it empty"
            f"{did_you_mean(min(unknown), SPLITS)}"
        )
    index = {split: number for number, split in enumerate(SPLITS)}
    return np.fromiter((index[text] if text else -1 for text in texts), dtype=np.int8, count=len(texts))


def check_texts(array: NDArray[Any], n: int, what: str) -> list[str]:
    """The n texts of an array; raises InputError where it holds anything else."""
    if array.shape != (n,) or array.dtype.kind != "U":
        raise InputError(f"{what} must be {n} texts, got shape {array.shape} of {array.dtype}")
    return texts_in(array, what)


def texts_in(array: NDArray[Any], what: str) -> list[str]:
    """The texts of an array of texts (n,).

    Raises:
        InputError: a number in it is no character, of which numpy would make a text that crashes what uses it.
    """
    codes = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    if codes.dtype.itemsize and (codes.view(np.uint32) > sys.maxunicode).any():
        raise InputError(f"{what} hold something that is no text; write the file again")
    texts: list[str] = codes.tolist()
    return texts


def numbered_ids(rows: NDArray[np.int64]) -> list[str]:
    """Row numbers as ids, for rows that have no other."""
    return [f"{row:09d}" for row in rows.tolist()]
