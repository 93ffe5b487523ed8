"""Ids of images: the row of an id, and comparisons of more ids than fit in memory as texts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.cache import hdf5
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.shard import ShardRecord, read_shard_bytes, shard_path


class RowIndex:
    """Row numbers by image id.

    Args:
        ids: of all rows, in their order.
    """

    def __init__(self, ids: Sequence[str]) -> None:
        self._rows = {name: row for row, name in enumerate(ids)}

    def rows(self, ids: Iterable[str], *, source: str, fix: str) -> NDArray[np.int64]:
        """Row numbers of some ids, in their order: (m,).

        Args:
            ids: to look up.
            source: what names the ids, the beginning of the message.
            fix: what to do about an id that is missing, the end of the message.

        Raises:
            InputError: an id that no row has; names the first.
        """
        ids = list(ids)
        for name in ids:
            if name not in self._rows:
                like = f" (its ids look like {next(iter(self._rows))!r})" if self._rows else ""
                raise InputError(f"{source} names {name!r}, which this cache lacks{like}; {fix}")
        return np.array([self._rows[name] for name in ids], dtype=np.int64)


def read_ids(folder: Path, record: ShardRecord) -> list[str]:
    """The n ids of one finished shard; the whole file is read and compared with the record.

    Raises:
        InputError: missing or damaged; names the shard.
    """
    path = shard_path(folder, record.shard)
    try:
        with hdf5.unpacked(read_shard_bytes(path, record)) as file:
            ids: list[str] = hdf5.take(file, "id", shape=(record.rows,)).tolist()
            return ids
    except InputError as error:
        raise InputError(f"the ids of {folder} cannot be used: {error}") from error


def refuse_shared_ids(parts: Callable[[], Iterable[Sequence[str]]], fix: str) -> None:
    """Looks for an id that occurs twice, or that cannot be stored; holds eight bytes of each id.

    Args:
        parts: gives the ids part by part; called again only where two have the same digest.
        fix: what the user can do, the end of the sentence.

    Raises:
        InputError: names one such id.
    """
    digests = np.concatenate([np.empty(0, np.uint64), *(_digests(ids) for ids in parts())])  # (n,)
    values, counts = np.unique(digests, return_counts=True)
    suspects = set(values[counts > 1].tolist())
    if not suspects:
        return
    # Two texts may share a digest (one chance in 4000 among a hundred million), so the few suspects are compared whole.
    seen: set[str] = set()
    for ids in parts():
        for name, digest in zip(ids, _digests(ids).tolist(), strict=True):
            if digest in suspects:
                if name in seen:
                    raise InputError(f"two rows have the id {name!r}; {fix}")
                seen.add(name)


class KnownIds:
    """A set of ids as sixteen bytes each: two of a hundred million share a digest once in 10^22 caches.

    Args:
        parts: the ids, part by part.
    """

    def __init__(self, parts: Iterable[Sequence[str]]) -> None:
        joined = b"".join(_hashes(ids, 16) for ids in parts)
        self._digests = np.sort(np.frombuffer(joined, dtype="S16"))  # (n,)

    def holds(self, ids: Sequence[str]) -> NDArray[np.bool_]:
        """Whether each id is known: (m,)."""
        digests = np.frombuffer(_hashes(ids, 16), dtype="S16")
        if not len(self._digests):
            return np.zeros(len(digests), dtype=np.bool_)
        nearest = np.searchsorted(self._digests, digests).clip(max=len(self._digests) - 1)
        known: NDArray[np.bool_] = self._digests[nearest] == digests
        return known


def _digests(ids: Iterable[str]) -> NDArray[np.uint64]:
    """Eight bytes of each id's hash: (n,)."""
    return np.frombuffer(_hashes(ids, 8), dtype="<u8")


def _hashes(ids: Iterable[str], size: int) -> bytes:
    """`size` bytes of each id's hash, joined; raises InputError for an id that cannot be stored."""
    return b"".join(hashlib.blake2b(_storable(name), digest_size=size).digest() for name in ids)


def _storable(name: str) -> bytes:
    """The id in UTF-8, if HDF5 can hold it: half characters and zero bytes cannot be stored."""
    try:
        encoded = name.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the id {name!r} is not valid Unicode text and cannot be stored; rename it") from error
    if not encoded or b"\0" in encoded:
        raise InputError(f"the id {name!r} cannot be stored: ids are texts of at least one character, without NUL")
    return encoded
