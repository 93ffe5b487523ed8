"""All rows of a cache in memory, and the checks of arrays that a caller gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.names import did_you_mean
from ulfine_fast.cache.shard import VIEWED_SPLITS
from ulfine_fast.cache.sources.rows import SPLITS


@dataclass(frozen=True)
class Arrays:
    """All rows of a cache; m of the n rows have views.

    Attributes:
        ids: (n,) texts; None until they are read.
        labels: int64 (n,), -1 for unknown.
        splits: (n,) of `SPLITS`.
        plain: (n, D) features of the evaluation view.
        weak: (m, Vw, D).
        strong: (m, Vs, D).
        view_rows: int64 (m,), ascending.
        areas: float32 (m, Vw + Vs), fraction of the image's area that each view shows; None where it is unknown.
    """

    ids: list[str] | None
    labels: NDArray[np.int64]
    splits: NDArray[np.str_]
    plain: NDArray[Any]
    weak: NDArray[Any]
    strong: NDArray[Any]
    view_rows: NDArray[np.int64]
    areas: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Tokens:
    """Tokens of all rows of a cache; S tokens of length W for each view.

    Attributes:
        plain: (n, S, W).
        weak: (m, Vw, S, W).
        strong: (m, Vs, S, W).
    """

    plain: NDArray[Any]
    weak: NDArray[Any]
    strong: NDArray[Any]


def check_arrays(
    plain: ArrayLike,
    labels: ArrayLike,
    *,
    weak: ArrayLike | None,
    strong: ArrayLike | None,
    splits: Sequence[str] | None,
    ids: Sequence[str] | None,
) -> Arrays:
    """The arguments of `FeatureCache.from_arrays`, with their defaults.

    Raises:
        InputError: shapes that do not fit, values that are not finite, unknown splits, or ids that are not unique.
    """
    features = _finite_floats("plain", plain, axes=2)  # (n, D)
    n, dim = features.shape
    checked_labels = check_labels(labels, n)

    # Splits
    if splits is None:
        row_splits = np.where(checked_labels >= 0, "train", "unlabeled")
    else:
        row_splits = np.asarray(splits, dtype=np.str_)
    unknown = set(row_splits.tolist()) - set(SPLITS)
    if unknown or row_splits.shape != (n,):
        hint = did_you_mean(min(unknown), SPLITS) if unknown else ""
        raise InputError(f"splits must be {n} of {', '.join(SPLITS)}, got {sorted(unknown) or row_splits.shape}{hint}")

    # Ids
    names = [str(row) for row in range(n)] if ids is None else [str(name) for name in ids]
    if len(names) != n or len(set(names)) != n:
        raise InputError(f"ids must be {n} different texts, got {len(names)} with {len(set(names))} different")

    # Views
    view_rows = np.flatnonzero(np.isin(row_splits, VIEWED_SPLITS))  # (m,)
    views = {}
    for kind, values in (("weak", weak), ("strong", strong)):
        if values is None:
            views[kind] = np.empty((len(view_rows), 0, dim), dtype=features.dtype)
            continue
        views[kind] = _finite_floats(kind, values, axes=3)
        if (views[kind].shape[0], views[kind].shape[2]) != (len(view_rows), dim):
            raise InputError(
                f"{kind} must be (m, V, D) with the m = {len(view_rows)} rows of train and unlabeled and D = {dim}, "
                f"got {views[kind].shape}"
            )
    return Arrays(
        ids=names,
        labels=checked_labels,
        splits=row_splits,
        plain=features,
        weak=views["weak"],
        strong=views["strong"],
        view_rows=view_rows,
    )


def split_missing(values: Any) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Values as an array, and which of them are missing in the type that holds them.

    Args:
        values: (n,) of any array type: of pandas also nullable, text and categorical ones, of Polars, of Arrow, NumPy's
            masked arrays, or a list.

    Returns:
        The values (n,), with anything where one is missing, and a mask (n,). NaN, None, NaT and `pandas.NA` are
        missing. Where something is, the array has the type of the values that are not.
    """
    if np.ma.isMaskedArray(values):
        return np.asarray(values.data), np.ma.getmaskarray(values)
    categorical = getattr(values, "array", values)
    if hasattr(categorical, "codes") and hasattr(categorical, "categories"):
        # As a list, whole numbers beside a missing one would be floats.
        codes = np.asarray(categorical.codes)
        return np.asarray(categorical.categories)[codes] if len(categorical.categories) else codes, codes < 0
    # Polars and Arrow would make floats of whole numbers with missing ones, and pandas objects.
    to_list = getattr(values, "to_pylist", None) or getattr(values, "to_list", None)
    items: list[Any] = to_list() if to_list is not None and len(np.shape(values)) <= 1 else []
    if items:
        missing = np.array([_is_missing(item) for item in items], dtype=np.bool_)
        if not missing.any():
            return np.asarray(values), missing
        present = np.asarray([item for item, gone in zip(items, missing, strict=True) if not gone])
        filled = np.zeros(len(items), dtype=present.dtype)
        filled[~missing] = present
        return filled, missing
    array = np.asarray(values)
    if array.dtype.kind == "O":
        return array, np.array([_is_missing(item) for item in array.ravel()], dtype=np.bool_).reshape(array.shape)
    return array, array != array


def refuse_masked(name: str, values: Any) -> None:
    """Raises InputError for an array with masked values, under which anything may lie."""
    if np.ma.isMaskedArray(values) and np.ma.getmaskarray(values).any():
        count = int(np.ma.getmaskarray(values).sum())
        raise InputError(f"{name} has {count} masked value{'s' * (count > 1)}; fill them, or leave their rows out")


def _is_missing(item: Any) -> bool:
    """Whether a value is None, or not equal to itself (NaN, NaT), or does not know (`pandas.NA`)."""
    if item is None:
        return True
    try:
        return bool(item != item)
    except (TypeError, ValueError):
        return True


def check_labels(labels: ArrayLike, n: int) -> NDArray[np.int64]:
    """Labels (n,) as int64, missing ones of nullable and masked types as -1.

    Booleans and floats are refused, since a mask or a score would pass unnoticed.
    """
    array, missing = split_missing(labels)
    if missing.any() and np.issubdtype(array.dtype, np.integer):
        array = np.where(missing, -1, array.astype(np.int64))
    if array.shape != (n,) or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"labels must be {n} whole numbers, got shape {array.shape} of {array.dtype}")
    return array.astype(np.int64)


def refuse_bad_labels(labels: NDArray[np.int64], classes: int) -> None:
    """Raises InputError for a label that is neither -1 nor below the number of classes."""
    wrong = labels[(labels < -1) | (labels >= classes)]
    if len(wrong):
        raise InputError(f"labels must be -1 or a class index below {classes}, got {int(wrong[0])}")


def check_class_names(class_names: Sequence[str] | None, labels: NDArray[np.int64]) -> list[str]:
    """Class names (K,), by default the numbers up to the largest label; raises InputError for labels beyond them."""
    classes = int(labels.max(initial=-1)) + 1 if class_names is None else len(class_names)
    if classes < 1:
        raise InputError("there must be at least one class: give class_names, or a label that is not -1")
    refuse_bad_labels(labels, classes)
    return [str(k) for k in range(classes)] if class_names is None else [str(name) for name in class_names]


def refuse_equal_texts(text: NDArray[np.float32], class_names: Sequence[str]) -> None:
    """Raises InputError for two classes with the same text features (K, P, D), which no image could tell apart."""
    seen: dict[bytes, int] = {}
    for label, row in enumerate(text):
        other = seen.setdefault((row + 0.0).tobytes(), label)  # + 0.0: -0.0 is 0.0
        if other != label:
            raise InputError(
                f"the text features of the classes {class_names[other]!r} and {class_names[label]!r} are equal, so "
                "that no image can be told apart by them; encode texts that differ, or leave one class out"
            )


def check_text_features(values: ArrayLike, class_names: Sequence[str], dim: int) -> NDArray[np.float32]:
    """Text features as float32 (K, P, D), from that shape or from (K, D) for one prompt; raises InputError."""
    classes = len(class_names)
    shape = np.shape(values)
    array = _finite_floats("text_features", values, axes=2 if len(shape) == 2 else 3).astype(np.float32)
    array = array[:, None] if array.ndim == 2 else array  # (K, P, D)
    if (array.shape[0], array.shape[2]) != (classes, dim) or array.shape[1] == 0:
        raise InputError(f"text_features must be (K, P, D) = ({classes}, P, {dim}), got {array.shape}")
    refuse_equal_texts(array, class_names)
    return array


def _finite_floats(name: str, values: ArrayLike, *, axes: int) -> NDArray[Any]:
    """An array of finite float16 or float32 numbers; others become float32.

    Raises:
        InputError: another number of axes, or a value that is not finite or too large for float32.
    """
    refuse_masked(name, values)
    array = np.asarray(values)
    if array.dtype not in (np.float16, np.float32):
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    if array.ndim != axes:
        raise InputError(f"{name} must have {axes} axes, got shape {array.shape}")
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))[0])
        raise InputError(f"{name} must be finite, row {row} is not")
    # torch cannot share memory that is read backwards, such as that of x[::-1].
    return np.ascontiguousarray(array) if any(stride < 0 for stride in array.strides) else array
