"""A map of test images: their cached features in two dimensions, what a run took them for beside what they are."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.report.charts import map_chart
from ulfine_fast.report.groups import Group
from ulfine_fast.runs.files import RunFiles

KINDS = ("pca", "umap", "none")
_POINTS = 1200  # as many as a page holds without growing heavy
_SEED = 0


@dataclass(frozen=True, slots=True)
class FeatureMap:
    """Places of a run's test images.

    Attributes:
        name: of the projection, for readers.
        rows: which of the run's predictions are drawn (m,).
        places: where (m, 2).
    """

    name: str
    rows: np.ndarray
    places: np.ndarray


def mapper(kind: str) -> Callable[[RunFiles], FeatureMap | None] | None:
    """The function that maps a run by its cache; None for no map.

    Args:
        kind: "pca"; "umap", where the package is installed; "none".

    Raises:
        InputError: another kind, or a package that is missing.
    """
    if kind not in KINDS:
        raise InputError(f"the map must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "umap" and importlib.util.find_spec("umap") is None:
        raise InputError('a map by UMAP needs umap-learn; pip install "ulfine-fast[umap]", or take --map pca')
    return None if kind == "none" else lambda run: _mapped(run, kind)


def map_section(shown: Group, mapped: Callable[[RunFiles], FeatureMap | None] | None) -> dict[str, Any] | None:
    """The chart of the first seed's test images; None where there is no map of it."""
    run = shown.runs[0]
    found = None if mapped is None else mapped(run)
    if found is None:
        return None
    rows = run.predictions()
    labels, predicted = rows.labels[found.rows], rows.predicted[found.rows]
    return {
        "chart": map_chart(found.name, found.places, labels, predicted, run.class_names),
        "name": found.name,
        "seed": run.seed,
        "drawn": len(found.rows),
        "of": len(rows.ids),
    }


def _mapped(run: RunFiles, kind: str) -> FeatureMap | None:
    """None where the cache is gone, was only in memory, or is another one now."""
    # the page itself needs no features
    from ulfine_fast.cache.store import FeatureCache

    if run.cache is None:
        return None
    ids = run.predictions().ids
    try:
        cache = FeatureCache.open(run.cache)
        rows = cache.row_of(ids, source="the run", fix="use the cache it was fitted on")
        features = np.asarray(cache.plain[rows], dtype=np.float32)  # (n, D)
    except (InputError, OSError):
        return None
    if len(features) < 3:
        return None
    # evenly through the test images, which stand class by class
    rows = np.unique(np.linspace(0, len(features) - 1, min(_POINTS, len(features))).astype(np.int64))
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return FeatureMap(*_projected(unit, rows, kind))


def _projected(unit: np.ndarray, rows: np.ndarray, kind: str) -> tuple[str, np.ndarray, np.ndarray]:
    if kind == "umap":
        import umap

        places = umap.UMAP(n_components=2, metric="cosine", random_state=_SEED, n_jobs=1).fit_transform(unit[rows])
        return "UMAP", rows, np.asarray(places, dtype=np.float64)
    from sklearn.decomposition import PCA

    # of all images, not only of those that are drawn
    fitted = PCA(n_components=2, svd_solver="full").fit(unit)
    share = 100 * float(fitted.explained_variance_ratio_.sum())
    return f"PCA, {share:.0f}% of the variance", rows, fitted.transform(unit[rows]).astype(np.float64)
