from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from ulfine_fast import ULFineClassifier
from ulfine_fast.cache.arrays import split_missing
from ulfine_fast.cache.interop.import_features import import_features, open_features
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.store import FeatureCache

TEXTS = ["cat", None, "dog", "cat"]
NUMBERS = [0, None, 1, 0]


class Polars:
    """What is asked of a Polars series."""

    def __init__(self, values):
        self.values = values
        self.shape = (len(values),)

    def to_list(self):
        return self.values

    def __array__(self, dtype=None, copy=None):
        return np.array([np.nan if value is None else value for value in self.values])


def missing_types(values, masked):
    yield pd.Series(values, dtype="category")
    yield pd.Categorical(values)
    yield pa.array(values)
    yield pa.chunked_array([values[:2], values[2:]])
    yield Polars(values)
    yield values
    yield np.ma.MaskedArray(masked, mask=[value is None for value in values])
    if isinstance(values[0], str):
        yield pd.Series(values, dtype="string")
        yield pd.Series(values, dtype="string[pyarrow]")
        yield pd.Series(values, dtype=object).fillna(pd.NA)
        yield pd.Series(values, dtype="str")
    else:
        yield pd.Series(values, dtype="Int64")
        yield pd.Series(values, dtype="UInt8")
        yield pd.Series(values, dtype="int64[pyarrow]")


CASES = [*missing_types(TEXTS, ["cat", "dog", "dog", "cat"]), *missing_types(NUMBERS, [0, 1, 1, 0])]


@pytest.mark.parametrize("values", CASES, ids=[f"{type(values).__name__}-{n}" for n, values in enumerate(CASES)])
def test_missing_values_of_every_type(values):
    array, missing = split_missing(values)
    assert missing.tolist() == [False, True, False, False]
    assert array[~missing].tolist() in (["cat", "dog", "cat"], [0, 1, 0])
    assert array.dtype.kind in "iuOU"


def test_what_is_whole_stays_as_it_is():
    for values in (np.array([1, 2]), pd.Series([1, 2]), [1, 2], pd.Series([1, 2], dtype="Int64"), (1, 2)):
        array, missing = split_missing(values)
        assert (array.tolist(), missing.any(), array.dtype.kind) == ([1, 2], False, "i")
    assert split_missing(np.array([1.0, np.nan]))[1].tolist() == [False, True]


@pytest.mark.parametrize(
    "labels",
    [
        pd.Series(NUMBERS, dtype="Int64"),
        pd.Categorical(NUMBERS),
        pa.array(NUMBERS),
        Polars(NUMBERS),
        np.ma.MaskedArray([0, 1, 1, 0], mask=[0, 1, 0, 0]),
    ],
    ids=["Int64", "categorical", "arrow", "polars", "masked"],
)
def test_missing_labels_of_a_cache_in_memory_are_unknown(labels):
    cache = FeatureCache.from_arrays(np.eye(4, dtype=np.float32), labels)
    assert cache.labels.tolist() == [0, -1, 1, 0]
    assert cache.splits.tolist() == ["train", "unlabeled", "train", "train"]
    assert cache.with_labels(labels).labels.tolist() == [0, -1, 1, 0]


def test_masked_features_are_refused():
    features = np.ma.MaskedArray(np.eye(2, dtype=np.float32), mask=[[0, 1], [0, 0]])
    with pytest.raises(InputError, match=r"plain has 1 masked value; fill them"):
        FeatureCache.from_arrays(features, [0, 1])
    with pytest.raises(InputError, match="text_features has 1 masked value"):
        FeatureCache.from_arrays(np.eye(2, dtype=np.float32), [0, 1], text_features=features)


def test_equal_text_features_are_refused(tmp_path):
    """No image could be told apart by them."""
    texts = np.eye(3, 4, dtype=np.float32)
    texts[2] = texts[0]
    message = "text features of the classes 'a' and 'c' are equal"
    names = ["a", "b", "c"]
    with pytest.raises(InputError, match=message):
        FeatureCache.from_arrays(np.eye(4)[:3], [0, 1, 2], class_names=names, text_features=texts)
    two = np.stack([texts, np.eye(3, 4, 1)], axis=1)
    FeatureCache.from_arrays(np.eye(4)[:3], [0, 1, 2], class_names=names, text_features=two)
    np.savez(tmp_path / "f.npz", features=np.eye(4)[:3], labels=np.arange(3), class_names=names, text_features=texts)
    with pytest.raises(InputError, match=message):
        import_features(open_features(tmp_path / "f.npz"), tmp_path / "cache", progress=False)
    with pytest.raises(InputError, match="text features of the classes '0' and '2' are equal"):
        ULFineClassifier(steps=2, text_features=texts).fit(np.eye(4)[[0, 1, 2, 0, 1, 2]], [0, 1, 2] * 2)
