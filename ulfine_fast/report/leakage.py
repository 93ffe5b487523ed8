"""Warnings about test images that are nearly among the training images."""

from __future__ import annotations

from collections.abc import Sequence

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.runs.files import RunFiles


def find_leakage(runs: Sequence[RunFiles]) -> list[str]:
    """A warning for each cache of the runs whose held-out images are near-duplicates of training images.

    A cache that is gone, or that was only in memory, cannot be checked and gives no warning.
    """
    # loaded on use: the page itself needs neither features nor an index
    from ulfine_fast.cache.neighbors import leakage_warning
    from ulfine_fast.cache.store import FeatureCache

    warnings = []
    for path in dict.fromkeys(run.local_cache for run in runs if run.local_cache is not None):
        try:
            warning = leakage_warning(FeatureCache.open(path))
        except InputError:
            continue
        if warning is not None:
            warnings.append(warning.replace("CACHE", str(path)))
    return warnings
