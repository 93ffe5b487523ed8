"""Nearest images of a cache: near-duplicates within and across splits, and test images that were trained on."""

from __future__ import annotations

import io
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import write_atomically

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache

THRESHOLD = 0.98
EXACT_ROWS = 100_000  # up to this many rows, every pair is compared
_QUERY_BLOCK = 4096  # queries searched together, which bounds the memory of the results
_MAX_DUPLICATES = 64  # near-duplicates of one image; a larger group is still found, by its other members
_RECALL_QUERIES = 500  # queries on which an approximate index is compared with the exact one
_MIN_RECALL = 0.98  # of an approximate index
_FIRST_CELLS = 4  # that a query visits at first
_SEED = 0
_QUICK_PAIRS = 400_000_000  # compared without being asked for; about ten seconds
_ROUNDING = 1e-6  # a float32 product of a row with itself may be a little below one
_TRAINED = ("train", "unlabeled")
_HELD_OUT = ("val", "test")


@dataclass(frozen=True)
class Index:
    """Rows that can be searched.

    Attributes:
        rows: float32 (n, D), unit length.
        exact: whether every pair is compared.
        recall: fraction of the ten nearest rows that a search returns, measured on a sample; 1 where exact.
        device: "cpu" or "gpu".
    """

    rows: NDArray[np.float32]
    exact: bool
    recall: float
    device: str
    _index: Any

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Cosines and row numbers (q, k) of the nearest rows, nearest first; -1 where there are fewer."""
        cosines = np.empty((len(queries), k), np.float32)
        rows = np.empty((len(queries), k), np.int64)
        for start in range(0, len(queries), _QUERY_BLOCK):
            block = slice(start, start + _QUERY_BLOCK)
            cosines[block], rows[block] = self._index.search(queries[block], k)
        return cosines, rows


@dataclass(frozen=True)
class Duplicates:
    """Pairs of images so similar that one may be a copy of the other.

    Attributes:
        first: int64 (p,), a row number of each pair.
        second: int64 (p,), the other; first < second.
        cosine: float32 (p,).
        group: int64 (n,), for every row the number of its group, -1 where it has no near-duplicate.
        threshold: least cosine of a pair.
        exact: of the index.
        recall: of the index.
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
    """A held-out image that is nearly the same as a training image.

    Attributes:
        held_out: row number.
        trained: row number.
        cosine: of the two.
        same_label: whether both labels are known and agree.
    """

    held_out: int
    trained: int
    cosine: float
    same_label: bool


def build_index(features: NDArray[Any], *, exact_rows: int = EXACT_ROWS) -> Index:
    """An index of features by cosine: flat where there are few, cells of similar rows (IVF) where there are many.

    Args:
        features: (n, D), of any length; a row of zeros is similar to nothing.
        exact_rows: up to this many rows, every pair is compared.

    Raises:
        InputError: no row at all.
    """
    import faiss

    if not len(features):
        raise InputError("there are no images to compare; extract some first")
    rows = _unit(features)
    exact = len(rows) <= exact_rows
    index = _flat_index(faiss, rows) if exact else _ivf_index(faiss, rows)
    device = "cpu"
    # Builds of faiss for the CPU alone do not have this function.
    if getattr(faiss, "get_num_gpus", lambda: 0)() > 0:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
        device = "gpu"
    recall = 1.0 if exact else _widen_search(faiss, index, rows)
    return Index(rows, exact, recall, device, index)


def near_duplicates(cache: FeatureCache, *, threshold: float = THRESHOLD, index: Index | None = None) -> Duplicates:
    """All pairs of a cache whose plain features have at least a given cosine.

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
    n = len(index.rows)

    # Pairs, block by block; each is often found from both sides
    firsts, seconds, cosines = [], [], []
    for start in range(0, n, _QUERY_BLOCK):
        near_cosines, near_rows = index.search(index.rows[start : start + _QUERY_BLOCK], min(_MAX_DUPLICATES + 1, n))
        query, rank = np.nonzero((near_cosines >= threshold - _ROUNDING) & (near_rows >= 0))
        one, other = query + start, near_rows[query, rank]
        different = one != other
        firsts.append(np.minimum(one, other)[different])
        seconds.append(np.maximum(one, other)[different])
        cosines.append(near_cosines[query, rank][different])
    first, second, cosine = np.concatenate(firsts), np.concatenate(seconds), np.concatenate(cosines)
    _, unique = np.unique(np.stack([first, second], 1), axis=0, return_index=True)
    first, second, cosine = first[unique], second[unique], cosine[unique]

    # Groups of connected images, numbered by their first row
    links = coo_array((np.ones(len(first), np.int8), (first, second)), shape=(n, n))
    _, component = connected_components(links, directed=False)  # (n,)
    numbers: dict[int, int] = {}
    group = np.full(n, -1, dtype=np.int64)
    for row in np.flatnonzero(np.bincount(component)[component] > 1):
        group[row] = numbers.setdefault(int(component[row]), len(numbers))
    return Duplicates(first, second, cosine, group, threshold, index.exact, index.recall)


def leaks(cache: FeatureCache, duplicates: Duplicates) -> list[Leak]:
    """Images of val and test with a near-duplicate in train or unlabeled: of each the nearest, most similar first."""
    trained, held_out = np.isin(cache.splits, _TRAINED), np.isin(cache.splits, _HELD_OUT)
    nearest: dict[int, Leak] = {}
    pairs = zip(duplicates.first.tolist(), duplicates.second.tolist(), duplicates.cosine.tolist(), strict=True)
    for one, other, cosine in pairs:
        for held, seen in ((one, other), (other, one)):
            if held_out[held] and trained[seen] and (held not in nearest or cosine > nearest[held].cosine):
                nearest[held] = Leak(held, seen, cosine, _same_label(cache, held, seen))
    return sorted(nearest.values(), key=lambda leak: (-leak.cosine, leak.held_out))


def find_leaks(
    cache: FeatureCache, *, threshold: float = THRESHOLD, max_pairs: int = _QUICK_PAIRS
) -> list[Leak] | None:
    """As `leaks`, by comparing the held-out images with the training images alone.

    Args:
        cache: features.
        threshold: least cosine, in (0, 1].
        max_pairs: pairs that may be compared.

    Returns:
        As `leaks`; None where there are more pairs than that.
    """
    trained, held_out = (np.flatnonzero(np.isin(cache.splits, names)) for names in (_TRAINED, _HELD_OUT))
    if len(trained) * len(held_out) > max_pairs:
        return None
    if not len(trained) or not len(held_out):
        return []
    index = build_index(cache.plain[trained], exact_rows=len(trained))
    cosines, nearest = index.search(_unit(cache.plain[held_out]), 1)
    nearly_seen = []
    for query in np.flatnonzero(cosines[:, 0] >= threshold - _ROUNDING):
        held, seen = int(held_out[query]), int(trained[nearest[query, 0]])
        nearly_seen.append(Leak(held, seen, float(cosines[query, 0]), _same_label(cache, held, seen)))
    return sorted(nearly_seen, key=lambda leak: (-leak.cosine, leak.held_out))


def label_conflicts(cache: FeatureCache, duplicates: Duplicates) -> NDArray[np.int64]:
    """Indices of the pairs whose labels are both known and differ: (c,)."""
    one, other = cache.labels[duplicates.first], cache.labels[duplicates.second]
    return np.flatnonzero((one >= 0) & (other >= 0) & (one != other))


def duplicates_summary(cache: FeatureCache, duplicates: Duplicates) -> dict[str, Any]:
    """The near-duplicates of a cache, in JSON's types.

    Returns:
        images, threshold, exact, recall, pairs, groups (counts), by_splits (pairs by the splits they join),
        different_labels (pairs whose labels are known and differ), leaks (held-out images nearly trained on), and
        near_duplicates: {"first", "second", "cosine", "splits", "different_labels"} of each pair, most similar first.
    """
    conflicts = set(label_conflicts(cache, duplicates).tolist())
    pairs: list[dict[str, Any]] = []
    for pair in np.lexsort((duplicates.first, -duplicates.cosine)).tolist():
        one, other = int(duplicates.first[pair]), int(duplicates.second[pair])
        pairs.append(
            {
                "first": cache.ids[one],
                "second": cache.ids[other],
                "cosine": round(float(duplicates.cosine[pair]), 5),
                "splits": [str(cache.splits[one]), str(cache.splits[other])],
                "different_labels": pair in conflicts,
            }
        )
    by_splits = Counter(" - ".join(sorted(pair["splits"])) for pair in pairs)
    return {
        "images": len(cache),
        "threshold": duplicates.threshold,
        "exact": duplicates.exact,
        "recall": round(duplicates.recall, 4),
        "pairs": len(pairs),
        "groups": int(duplicates.group.max(initial=-1)) + 1,
        "by_splits": dict(sorted(by_splits.items())),
        "different_labels": len(conflicts),
        "leaks": len(leaks(cache, duplicates)),
        "near_duplicates": pairs,
    }


def nearest_columns(cache: FeatureCache, index: Index, k: int) -> dict[str, NDArray[Any]]:
    """The nearest images of each image, itself left out, as columns of a table.

    Args:
        cache: features.
        index: of its plain features.
        k: number of images for each, at most all others.

    Returns:
        id, neighbor (None where an approximate index found fewer), rank (from 1) and cosine, n k rows.
    """
    k = min(k, len(cache) - 1)
    cosines, rows = index.search(index.rows, k + 1)
    itself = rows == np.arange(len(rows))[:, None]
    # A copy may come before the image itself; where that is not among its nearest, the last one is left out.
    itself[~itself.any(1), -1] = True
    ids = np.asarray(cache.ids, dtype=object)
    near = rows[~itself]  # (n k,)
    names = ids[near]
    names[near < 0] = None
    ranks = np.tile(np.arange(1, k + 1), len(ids))
    return {"id": np.repeat(ids, k), "neighbor": names, "rank": ranks, "cosine": cosines[~itself]}


def check_table_name(path: Path) -> None:
    """Raises InputError for a name that `write_columns` does not take, before any work is done."""
    if path.suffix != ".parquet":
        raise InputError(f"out must end in .parquet, got {path.name!r}")


def write_columns(path: Path, columns: dict[str, NDArray[Any]]) -> None:
    """Writes columns as a .parquet file.

    Raises:
        InputError: another suffix, or a path that cannot be written.
    """
    import pyarrow as pa
    from pyarrow import parquet

    check_table_name(path)
    data = io.BytesIO()
    parquet.write_table(pa.table(columns), data)
    write_atomically(path, data.getvalue())


def leakage_warning(cache: FeatureCache) -> str | None:
    """One sentence for readers of metrics on the cache's val and test; None where nothing leaks.

    A large cache is not searched; the sentence then names the command that does it.
    """
    leaked = find_leaks(cache)
    if leaked is None:
        return (
            "this cache is too large for a quick search for test images among the training images; "
            "`ulfine-fast neighbors CACHE` does it"
        )
    if not leaked:
        return None
    total = int(np.isin(cache.splits, _HELD_OUT).sum())
    first = leaked[0]
    images = "1 image" if len(leaked) == 1 else f"{len(leaked)} images"
    return (
        f"{images} of the {total:,} in val and test {'is' if len(leaked) == 1 else 'are'} nearly the same as one in "
        f"train or unlabeled (cosine {THRESHOLD:g} or more; {cache.ids[first.held_out]} and "
        f"{cache.ids[first.trained]}, {first.cosine:.4f}), so metrics on them are too good; `ulfine-fast neighbors "
        "CACHE` lists them: leave them out and extract again"
    )


def _same_label(cache: FeatureCache, one: int, other: int) -> bool:
    """Whether both labels are known and agree."""
    return bool(cache.labels[one] == cache.labels[other] >= 0)


def _unit(features: NDArray[Any]) -> NDArray[np.float32]:
    rows = np.ascontiguousarray(features, dtype=np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _flat_index(faiss: Any, rows: NDArray[np.float32]) -> Any:
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    return index


def _ivf_index(faiss: Any, rows: NDArray[np.float32]) -> Any:
    """Rows in 4 sqrt(n) cells, of about sqrt(n) / 4 rows each; the number of cells that a query visits is set later."""
    cells = int(4 * math.sqrt(len(rows)))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(rows.shape[1]), rows.shape[1], cells, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = _SEED
    # The centres need some forty rows each, and more make no better ones.
    sample = np.random.default_rng(_SEED).choice(len(rows), min(len(rows), 40 * cells), replace=False)
    index.train(rows[np.sort(sample)])
    index.add(rows)
    return index


def _widen_search(faiss: Any, index: Any, rows: NDArray[np.float32]) -> float:
    """Doubles the number of cells that a query visits until the recall is high enough; returns the recall.

    It is measured on a sample, as the fraction of the ten nearest rows that the index returns. The number of cells
    depends on the features: with clear groups it is small, in one even cloud nearly all are visited.
    """
    queries = rows[np.random.default_rng(_SEED).choice(len(rows), min(_RECALL_QUERIES, len(rows)), replace=False)]
    nearest = _flat_index(faiss, rows).search(queries, 10)[1]
    index.nprobe = min(_FIRST_CELLS, index.nlist)
    while True:
        approximate = index.search(queries, 10)[1]
        hits = [len(np.intersect1d(one, other)) for one, other in zip(nearest, approximate, strict=True)]
        recall = float(np.mean([count / 10 for count in hits]))
        if recall >= _MIN_RECALL or index.nprobe == index.nlist:
            return recall
        index.nprobe = min(2 * index.nprobe, index.nlist)
