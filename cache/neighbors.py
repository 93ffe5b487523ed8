"""Nearest images of a cache: near-duplicates within and across splits, and what of a test split was trained on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ulfine_fast.cache.io.errors import InputError

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache

THRESHOLD = 0.98
EXACT_ROWS = 100_000  # up to so many, every pair is compared
_BLOCK = 4096  # queries at a time: bounds the memory of what is found
_MOST = 64  # near-duplicates looked for of each image; a group of more is still found, by its other members
_SAMPLE = 500  # queries on which an approximate index is compared with the exact one
_RECALL = 0.98  # that an approximate index must reach
_FIRST_CELLS = 4  # that a query visits at first
_SEED = 0
_QUICK = 400_000_000  # pairs that are compared in passing
_TRAINED = ("train", "unlabeled")
_HELD_OUT = ("val", "test")


@dataclass(frozen=True)
class Index:
    """Rows that can be searched.

    Attributes:
        rows: float32 (n, D), unit length.
        exact: whether every pair is compared.
        recall: share of the ten nearest rows that are found, measured on a sample; 1 where exact.
        device: "cpu" or "gpu".
    """

    rows: NDArray[np.float32]
    exact: bool
    recall: float
    device: str
    _index: Any

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Cosines and row numbers (q, k) of the nearest rows, nearest first; -1 where there are fewer."""
        found = [self._index.search(queries[start : start + _BLOCK], k) for start in range(0, len(queries), _BLOCK)]
        none = np.empty((0, k), np.float32), np.empty((0, k), np.int64)
        cosines, places = zip(*found, strict=True) if found else ([none[0]], [none[1]])
        return np.concatenate(cosines), np.concatenate(places)


@dataclass(frozen=True)
class Duplicates:
    """Images so alike that one may be a copy of the other.

    Attributes:
        first, second: row numbers of each pair (p,), first < second.
        cosine: float32 (p,).
        group: for every row the number of its group (n,), -1 where it has no near-duplicate.
        threshold: least cosine of a pair. exact, recall: of the index.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    cosine: NDArray[np.float32]
    group: NDArray[np.int64]
    threshold: float
    exact: bool
    recall: float


@dataclass(frozen=True)
class Leak:
    """A held-out image that training has nearly seen.

    Attributes:
        held_out, trained: row numbers. cosine: how alike. same_label: whether both labels are known and agree.
    """

    held_out: int
    trained: int
    cosine: float
    same_label: bool


def build_index(features: NDArray[Any], *, exact_rows: int = EXACT_ROWS) -> Index:
    """An index over features by cosine: flat where there are few, cells of like rows (IVF) where there are many.

    Args:
        features: (n, D), any length; a row of zeros is like nothing.
        exact_rows: up to so many rows every pair is compared.

    Raises:
        InputError: no row at all.
    """
    import faiss

    if not len(features):
        raise InputError("there are no images to compare; extract some first")
    rows = _unit(features)
    exact = len(rows) <= exact_rows
    index, device = _on_gpu(faiss, _flat(faiss, rows) if exact else _cells(faiss, rows))
    return Index(rows, exact, 1.0 if exact else _widened(faiss, index, rows), device, index)


def near_duplicates(cache: FeatureCache, *, threshold: float = THRESHOLD, index: Index | None = None) -> Duplicates:
    """All pairs of a cache whose plain features have at least a cosine.

    Args:
        cache: features.
        threshold: in (0, 1].
        index: of the cache's plain features, where there is one already.

    Raises:
        InputError: a threshold out of range, or an empty cache.
    """
    if not 0 < threshold <= 1:
        raise InputError(f"threshold must be above 0 and at most 1, got {threshold:g}")
    index = index or build_index(cache.plain)
    pairs = [_pairs(*block, threshold) for block in _blocks(index)]
    first, second, cosine = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    _, places = np.unique(np.stack([first, second], 1), axis=0, return_index=True)
    first, second, cosine = first[places], second[places], cosine[places]
    group = _groups(first, second, len(index.rows))
    return Duplicates(first, second, cosine, group, threshold, index.exact, index.recall)


def leaks(cache: FeatureCache, found: Duplicates) -> list[Leak]:
    """Images of val and test with a near-duplicate in train or unlabeled: of each the nearest, most alike first."""
    trained, held_out = (np.isin(cache.splits, names) for names in (_TRAINED, _HELD_OUT))
    nearest: dict[int, Leak] = {}
    for one, other, cosine in zip(found.first.tolist(), found.second.tolist(), found.cosine.tolist(), strict=True):
        for held, seen in ((one, other), (other, one)):
            if held_out[held] and trained[seen] and (held not in nearest or cosine > nearest[held].cosine):
                same = bool(cache.labels[held] == cache.labels[seen] >= 0)
                nearest[held] = Leak(held, seen, cosine, same)
    return sorted(nearest.values(), key=lambda leak: (-leak.cosine, leak.held_out))


def contradictions(cache: FeatureCache, found: Duplicates) -> NDArray[np.int64]:
    """Places among the pairs whose labels are both known and differ: (c,)."""
    one, other = cache.labels[found.first], cache.labels[found.second]
    return np.flatnonzero((one >= 0) & (other >= 0) & (one != other))


def summary_of(cache: FeatureCache, found: Duplicates) -> dict[str, Any]:
    """What was found, in JSON's types.

    Returns:
        images, threshold, exact, recall, pairs, groups (counts), by_splits (pairs by the splits they join),
        different_labels (pairs whose labels are known and differ), leaks (held-out images nearly trained on), and
        near_duplicates: {"first", "second", "cosine", "splits", "different_labels"} of each pair, most alike first.
    """
    contradict = set(contradictions(cache, found).tolist())
    order = sorted(range(len(found.first)), key=lambda pair: (-found.cosine[pair], found.first[pair]))
    pairs = [_told_pair(cache, found, pair, pair in contradict) for pair in order]
    return {
        "images": len(cache),
        "threshold": found.threshold,
        "exact": found.exact,
        "recall": round(found.recall, 4),
        "pairs": len(pairs),
        "groups": int(found.group.max(initial=-1)) + 1,
        "by_splits": dict(sorted(Counter(" - ".join(sorted(pair["splits"])) for pair in pairs).items())),
        "different_labels": len(contradict),
        "leaks": len(leaks(cache, found)),
        "near_duplicates": pairs,
    }


def _told_pair(cache: FeatureCache, found: Duplicates, pair: int, different: bool) -> dict[str, Any]:
    one, other = int(found.first[pair]), int(found.second[pair])
    return {
        "first": cache.ids[one],
        "second": cache.ids[other],
        "cosine": round(float(found.cosine[pair]), 5),
        "splits": [str(cache.splits[one]), str(cache.splits[other])],
        "different_labels": different,
    }


def nearest_columns(cache: FeatureCache, index: Index, k: int) -> dict[str, NDArray[Any]]:
    """The nearest images of each image, itself left out, as columns of a table.

    Args:
        cache: features.
        index: of its plain features.
        k: how many of each, at most all others.

    Returns:
        id, neighbor (None where an approximate index found fewer), rank (from 1) and cosine, n k rows.
    """
    k = min(k, len(cache) - 1)
    cosines, places = index.search(index.rows, k + 1)
    itself = places == np.arange(len(places))[:, None]
    # a copy may stand before the image itself; where that is not among its nearest, the last one goes
    itself[~itself.any(1), -1] = True
    ids = np.asarray(cache.ids, dtype=object)
    near = places[~itself]  # (n k,)
    names = ids[near]
    names[near < 0] = None
    ranks = np.tile(np.arange(1, k + 1), len(ids))
    return {"id": np.repeat(ids, k), "neighbor": names, "rank": ranks, "cosine": cosines[~itself]}


def find_leaks(cache: FeatureCache, *, threshold: float = THRESHOLD, most: int = _QUICK) -> list[Leak] | None:
    """What of val and test is nearly in train or unlabeled, by comparing these alone.

    Args:
        cache: features.
        threshold: least cosine, in (0, 1].
        most: pairs that may be compared; some ten seconds of work by default.

    Returns:
        As `leaks`; None where there are more pairs than that.
    """
    trained, held_out = (np.flatnonzero(np.isin(cache.splits, names)) for names in (_TRAINED, _HELD_OUT))
    if len(trained) * len(held_out) > most:
        return None
    if not len(trained) or not len(held_out):
        return []
    index = build_index(cache.plain[trained], exact_rows=len(trained))
    cosines, places = index.search(_unit(cache.plain[held_out]), 1)
    return sorted(
        (
            Leak(int(held), int(seen), float(cosine), bool(cache.labels[held] == cache.labels[seen] >= 0))
            for held, seen, cosine in zip(held_out, trained[places[:, 0]], cosines[:, 0], strict=True)
            if cosine >= threshold - 1e-6
        ),
        key=lambda leak: (-leak.cosine, leak.held_out),
    )


def leakage(cache: FeatureCache) -> str | None:
    """One sentence for whoever reads figures on the cache's val and test; None where nothing leaks.

    Where the cache is too large to look in passing, the sentence says so.
    """
    found = find_leaks(cache)
    if found is None:
        return (
            "this cache is too large to look for test images among the training images in passing; "
            "`ulfine-fast neighbors CACHE` does it"
        )
    if not found:
        return None
    total, first = int(np.isin(cache.splits, _HELD_OUT).sum()), found[0]
    images = "1 image" if len(found) == 1 else f"{len(found)} images"
    return (
        f"{images} of the {total:,} in val and test {'is' if len(found) == 1 else 'are'} nearly the same as one in "
        f"train or unlabeled (cosine {THRESHOLD:g} or more; {cache.ids[first.held_out]} and "
        f"{cache.ids[first.trained]}, {first.cosine:.4f}), so figures on them flatter; `ulfine-fast neighbors CACHE` "
        "lists them: leave them out and extract again"
    )


def _unit(features: NDArray[Any]) -> NDArray[np.float32]:
    rows = np.ascontiguousarray(features, dtype=np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _flat(faiss: Any, rows: NDArray[np.float32]) -> Any:
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    return index


def _cells(faiss: Any, rows: NDArray[np.float32]) -> Any:
    """Rows sorted into 4 sqrt(n) cells, so that each holds about sqrt(n) / 4; how many are visited is not set here."""
    cells = int(4 * math.sqrt(len(rows)))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(rows.shape[1]), rows.shape[1], cells, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = _SEED
    # the centres need some forty rows each, and more make no better ones
    sample = np.random.default_rng(_SEED).choice(len(rows), min(len(rows), 40 * cells), replace=False)
    index.train(rows[np.sort(sample)])
    index.add(rows)
    return index


def _on_gpu(faiss: Any, index: Any) -> tuple[Any, str]:
    """The index on a GPU where faiss has one; the processor otherwise."""
    if getattr(faiss, "get_num_gpus", lambda: 0)() == 0:
        return index, "cpu"
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index), "gpu"


def _widened(faiss: Any, index: Any, rows: NDArray[np.float32]) -> float:
    """Lets a query visit more and more cells until enough is found; returns the recall.

    That is the share of the ten nearest rows that the index finds, over a sample. How many cells it takes depends on
    how the features lie: with clear groups a few, in one even cloud nearly all.
    """
    queries = rows[np.random.default_rng(_SEED).choice(len(rows), min(_SAMPLE, len(rows)), replace=False)]
    wanted = _flat(faiss, rows).search(queries, 10)[1]
    index.nprobe = min(_FIRST_CELLS, index.nlist)
    while True:
        found = index.search(queries, 10)[1]
        recall = float(np.mean([len(np.intersect1d(w, f)) / 10 for w, f in zip(wanted, found, strict=True)]))
        if recall >= _RECALL or index.nprobe == index.nlist:
            return recall
        index.nprobe = min(2 * index.nprobe, index.nlist)


def _blocks(index: Index) -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.int64]]]:
    """First row of each block of queries, and the cosines and places of what is near them."""
    k = min(_MOST + 1, len(index.rows))
    for start in range(0, len(index.rows), _BLOCK):
        yield start, *index.search(index.rows[start : start + _BLOCK], k)


def _pairs(
    start: int, cosines: NDArray[np.float32], places: NDArray[np.int64], threshold: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Pairs of a block of queries, smaller row number first."""
    # a float32 product of a row with itself may be a little below one
    near = (cosines >= threshold - 1e-6) & (places >= 0)
    query, rank = np.nonzero(near)
    one, other = query + start, places[query, rank]
    apart = one != other
    low, high = np.minimum(one, other)[apart], np.maximum(one, other)[apart]
    return low, high, cosines[query, rank][apart]


def _groups(first: NDArray[np.int64], second: NDArray[np.int64], rows: int) -> NDArray[np.int64]:
    """Connected images, numbered by their first row; -1 for those alone."""
    links = coo_array((np.ones(len(first), np.int8), (first, second)), shape=(rows, rows))
    _, label = connected_components(links, directed=False)
    members = np.bincount(label)[label] > 1
    names: dict[int, int] = {}
    numbered = zip(label.tolist(), members.tolist(), strict=True)
    return np.array([names.setdefault(one, len(names)) if member else -1 for one, member in numbered], dtype=np.int64)
