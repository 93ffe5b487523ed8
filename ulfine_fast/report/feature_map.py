"""The section with a map: the cached features of the test images in two dimensions, mistakes marked."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.names import one_of
from ulfine_fast.cache.plane import fit_plane
from ulfine_fast.report.charts import map_chart
from ulfine_fast.report.choices import Projection
from ulfine_fast.report.groups import Group
from ulfine_fast.runs.files import RunFiles

_POINTS = 1200  # more would make the page slow
_SEED = 0


@dataclass(frozen=True, slots=True)
class FeatureMap:
    """Positions of a run's test images.

    Attributes:
        name: of the projection, for readers.
        rows: indices into the run's predictions (m,).
        positions: (m, 2).
    """

    name: str
    rows: np.ndarray
    positions: np.ndarray


def mapper(projection: str) -> Callable[[RunFiles], FeatureMap | None] | None:
    """A function that maps the test images of a run, which returns None without its cache; None for no map.

    Args:
        projection: "pca"; "umap", if the package is installed; "none".

    Raises:
        InputError: another projection, or a package that is missing.
    """
    choices = get_args(Projection)
    if projection not in choices:
        raise one_of("the map", projection, choices)
    if projection == "umap" and importlib.util.find_spec("umap") is None:
        raise InputError('a map by UMAP needs umap-learn; pip install "ulfine-fast[umap]", or take --map pca')
    return None if projection == "none" else lambda run: _map_run(run, projection)


def map_section(shown: Group, map_run: Callable[[RunFiles], FeatureMap | None] | None) -> dict[str, Any] | None:
    """Template values: the chart of the first seed's test images; None without a map.

    Args:
        shown: the group.
        map_run: as :func:`mapper` returns it.
    """
    run = shown.runs[0]
    feature_map = None if map_run is None else map_run(run)
    if feature_map is None:
        return None
    predictions = run.predictions()
    return {
        "chart": map_chart(
            feature_map.name,
            feature_map.positions,
            labels=predictions.labels[feature_map.rows],
            predicted=predictions.predicted[feature_map.rows],
            names=run.class_names,
        ),
        "name": feature_map.name,
        "seed": run.seed,
        "drawn": len(feature_map.rows),
        "of": len(predictions.ids),
    }


def _map_run(run: RunFiles, projection: str) -> FeatureMap | None:
    """The map; None where the cache is gone, was only in memory or no longer has these images."""
    # loaded on use: the page itself needs no features
    from ulfine_fast.cache.store import FeatureCache

    if run.local_cache is None:
        return None
    ids = run.predictions().ids
    try:
        cache = FeatureCache.open(run.local_cache)
        rows = cache.row_of(ids, source="the run", fix="use the cache it was fitted on")
        features = np.asarray(cache.plain[rows], dtype=np.float32)  # (n, D)
    except (InputError, OSError):
        return None
    if len(features) < 3:
        return None
    # evenly through the test images, which are in the order of their classes
    rows = np.unique(np.linspace(0, len(features) - 1, min(_POINTS, len(features))).astype(np.int64))
    if projection == "umap":
        unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        import umap

        reducer = umap.UMAP(n_components=2, metric="cosine", random_state=_SEED, n_jobs=1)
        return FeatureMap("UMAP", rows, np.asarray(reducer.fit_transform(unit[rows]), dtype=np.float64))
    # fitted on all images, not only on those that are drawn
    plane = fit_plane([features], features.shape[1])
    return FeatureMap(f"PCA, {100 * plane.variance:.0f}% of the variance", rows, plane.positions(features[rows]))
