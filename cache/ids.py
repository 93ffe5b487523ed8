"""Ids of many rows, looked at without holding them all: each is remembered as eight bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.cache import hdf5
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.shard import ShardRecord, shard_path


def read_ids(folder: Path, record: ShardRecord) -> list[str]:
    """The n ids of one finished shard, checked against their checksum; its features are not read.

    Raises:
        InputError: missing or damaged; names the shard.
    """
    path = shard_path(folder, record.shard)
    try:
        with path.open("rb") as file, hdf5.unpacked(file) as opened:
            ids: list[str] = hdf5.take(opened, "id", shape=(record.rows,)).tolist()
            return ids
    except (OSError, InputError) as error:
        raise InputError(f"shard {path.stem} of {folder} cannot be used: {error}; extract it again") from error


def refuse_shared_ids(parts: Callable[[], Iterable[Sequence[str]]], way_out: str) -> None:
    """Looks for an id that occurs twice, or that cannot be stored.

    Args:
        parts: gives the ids part by part; called again only where two have the same digest.
        way_out: what the user can do, the end of the sentence.

    Raises:
        InputError: names one such id.
    """
    digests = np.concatenate([np.empty(0, np.uint64), *(_digests(ids) for ids in parts())])  # (n,)
    found, counts = np.unique(digests, return_counts=True)
    suspects = set(found[counts > 1].tolist())
    if not suspects:
        return
    # Two texts may share a digest (one chance in 4000 among a hundred million), so the few suspects are compared whole.
    seen: set[str] = set()
    for name in _with_digest(parts(), suspects):
        if name in seen:
            raise InputError(f"two rows have the id {name!r}; {way_out}")
        seen.add(name)


class KnownIds:
    """Ids that can be asked for, as sixteen bytes each: two of a hundred million share a digest once in 10^22 caches.

    Args:
        parts: the ids, part by part.
    """

    def __init__(self, parts: Iterable[Sequence[str]]) -> None:
        joined = b"".join(_long_digests(ids) for ids in parts)
        self._digests = np.sort(np.frombuffer(joined, dtype="S16"))  # (n,)

    def holds(self, ids: Sequence[str]) -> NDArray[np.bool_]:
        """Whether each id is known: (m,)."""
        wanted = np.frombuffer(_long_digests(ids), dtype="S16")
        if not len(self._digests):
            return np.zeros(len(wanted), dtype=np.bool_)
        places = np.searchsorted(self._digests, wanted).clip(max=len(self._digests) - 1)
        found: NDArray[np.bool_] = self._digests[places] == wanted
        return found


def _with_digest(parts: Iterable[Sequence[str]], wanted: set[int]) -> Iterator[str]:
    for ids in parts:
        yield from (name for name, digest in zip(ids, _digests(ids).tolist(), strict=True) if digest in wanted)


def _digests(ids: Sequence[str]) -> NDArray[np.uint64]:
    """Eight bytes of each id: (n,)."""
    joined = b"".join(hashlib.blake2b(_storable(name), digest_size=8).digest() for name in ids)
    return np.frombuffer(joined, dtype="<u8")


def _long_digests(ids: Sequence[str]) -> bytes:
    return b"".join(hashlib.blake2b(_storable(name), digest_size=16).digest() for name in ids)


def _storable(name: str) -> bytes:
    """The id in UTF-8, if HDF5 can hold it: it has no place for half characters and zero bytes."""
    try:
        encoded = name.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the id {name!r} is not valid Unicode text and cannot be stored; rename it") from error
    if not encoded or b"\0" in encoded:
        raise InputError(f"the id {name!r} cannot be stored: ids are texts of at least one character, without NUL")
    return encoded
