"""Two caches of the same images by two encoders, as one cache whose rows hold both features side by side."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.cache.arrays import Arrays, Tokens
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.store import FeatureCache

_KINDS = ("weak", "strong")


def beside(cache: FeatureCache, second: FeatureCache) -> FeatureCache:
    """The images of a cache with the features of a second encoder behind its own.

    Labels, splits, order of the rows and texts per prompt are those of the first cache.

    Args:
        cache: features (n, D), and tokens (n, S, W) where it holds some.
        second: features (n, E) of the same images, in any order.

    Returns:
        A cache with features (n, D + E), each part of length one, prototypes (K, D + E), zero where a cache has no
        texts, and tokens (n, 1, S W + E), where the first cache holds some. Its `second` is the second cache.

    Raises:
        InputError: other images or classes, images that only the first cache has views of, or another number of views.
    """
    if cache.class_names != second.class_names:
        raise InputError(
            f"{_name(second)} has other classes ({_some(second.class_names)}) than {_name(cache)} "
            f"({_some(cache.class_names)}); extract both from the same images"
        )
    _refuse_other_images(cache, second)
    order = second.row_of(cache.ids)  # (n,)
    view_order = _view_order(cache, second, order)  # (m,)

    joined = copy.copy(cache)
    joined.second = second
    joined.dim = cache.dim + second.dim
    if cache.prototypes is not None or second.prototypes is not None:
        joined.prototypes = np.concatenate([_prototypes(cache), _prototypes(second)], axis=1)  # (K, D + E)
    others = {kind: second.views(kind)[view_order] for kind in _KINDS}
    joined._loaded = Arrays(
        ids=cache.ids,
        labels=cache.labels,
        splits=cache.splits,
        plain=_side_by_side(_unit(cache.plain), _unit(second.plain[order])),
        weak=_side_by_side(_unit(cache.views("weak")), _unit(others["weak"])),
        strong=_side_by_side(_unit(cache.views("strong")), _unit(others["strong"])),
        view_rows=cache.view_rows,
        areas=np.concatenate([cache.view_areas(kind) for kind in _KINDS], axis=1),
    )
    if cache.token_kinds:
        joined._tokens = Tokens(
            plain=_beside_tokens(cache.tokens("plain"), second.plain[order]),
            weak=_beside_tokens(cache.tokens("weak"), others["weak"]),
            strong=_beside_tokens(cache.tokens("strong"), others["strong"]),
        )
    return joined


def _refuse_other_images(cache: FeatureCache, second: FeatureCache) -> None:
    """Refuses caches that do not hold the same images; says how many differ, and one of them."""
    own, others = set(cache.ids), set(second.ids)
    for owner, missing, lacking in ((cache, own - others, second), (second, others - own, cache)):
        if missing:
            raise InputError(
                f"{len(missing)} of the {len(owner)} images of {_name(owner)} are not in {_name(lacking)}, such as "
                f"{min(missing)!r}; extract both from the same images"
            )


def _view_order(cache: FeatureCache, second: FeatureCache, order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the views of the second cache's images are (m,), in the order of the first cache's views."""
    counts = {name: [one.views(kind).shape[1] for kind in _KINDS] for name, one in (("a", cache), ("b", second))}
    if counts["a"] != counts["b"]:
        raise InputError(
            f"{_name(second)} has {counts['b'][0]} weak and {counts['b'][1]} strong views of an image, {_name(cache)} "
            f"has {counts['a'][0]} and {counts['a'][1]}; extract both with the same --weak and --strong"
        )
    drawn = [{} if one.manifest is None else one.manifest.views for one in (cache, second)]
    if any(counts["a"]) and all(drawn) and drawn[0] != drawn[1]:
        raise InputError(
            f"the views of {_name(second)} are drawn in another way than those of {_name(cache)}; extract both with "
            "the same --view-seed and --smallest-crop"
        )
    position = np.full(len(second), -1, dtype=np.int64)
    position[second.view_rows] = np.arange(len(second.view_rows))
    positions = position[order[cache.view_rows]]
    if (positions < 0).any():
        name = cache.ids[int(cache.view_rows[int(np.flatnonzero(positions < 0)[0])])]
        raise InputError(
            f"{int((positions < 0).sum())} training images of {_name(cache)} are held out in {_name(second)}, such as "
            f"{name!r}; extract both from the same images"
        )
    return positions


def _side_by_side(first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
    """Arrays (..., D) and (..., E) as (..., D + E), in the wider of their types."""
    return np.concatenate([first, second], axis=-1)


def _beside_tokens(tokens: NDArray[Any], features: NDArray[Any]) -> NDArray[Any]:
    """Tokens (..., S, W) and features (..., E) as one token (..., 1, S W + E)."""
    flat = tokens.reshape(*tokens.shape[:-2], tokens.shape[-2] * tokens.shape[-1])
    return _side_by_side(flat, _unit(features))[..., None, :]


def _unit(rows: NDArray[Any]) -> NDArray[Any]:
    """Rows (..., D) of length one, in their type."""
    lengths = np.sqrt((rows.astype(np.float32) ** 2).sum(axis=-1, keepdims=True))
    scaled: NDArray[Any] = (rows / np.maximum(lengths, 1e-12)).astype(rows.dtype)
    return scaled


def _prototypes(cache: FeatureCache) -> NDArray[np.float32]:
    """Prototypes (K, D), zeros where the cache has no texts."""
    if cache.prototypes is None:
        return np.zeros((len(cache.class_names), cache.dim), np.float32)
    return cache.prototypes


def _name(cache: FeatureCache) -> str:
    return "the cache in memory" if cache.path is None else str(cache.path)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
