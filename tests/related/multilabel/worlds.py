"""A cache of images that show several of five classes, and their labels."""

from __future__ import annotations

import numpy as np

from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.related.multilabel.labels import LabelTable

NAMES = [f"class {k}" for k in range(5)]


def make_images(n=240, dim=24, seed=0, noise=0.5, text=True):
    """Features are sums of the shown classes' directions; class k is shown by about 0.5 / (k + 1) of the images."""
    random = np.random.default_rng(seed)
    means = random.normal(size=(len(NAMES), dim)) / dim**0.5
    truth = (random.random((n, len(NAMES))) < 0.5 / (1 + np.arange(len(NAMES)))).astype(np.int8)
    truth[np.arange(len(NAMES)), np.arange(len(NAMES))] = 1
    plain = truth @ means + noise * random.normal(size=(n, dim)) / dim**0.5
    splits = ["train"] * (n // 2) + ["test"] * (n - n // 2)
    cache = FeatureCache.from_arrays(
        plain.astype(np.float32),
        np.zeros(n, dtype=np.int64),
        class_names=NAMES,
        text_features=means[:, None].astype(np.float32) if text else None,
        splits=splits,
        ids=[f"{split}/{row}" for row, split in enumerate(splits)],
    )
    return cache, truth


def hidden(cache, truth, fraction=0.4, seed=0):
    """The table of a user who names some of what training images show and nothing else; test labels are whole."""
    labels, train = truth.copy(), cache.splits == "train"
    hide = np.random.default_rng(seed).random(truth.shape) < fraction
    hide[np.arange(len(NAMES)), np.arange(len(NAMES))] = False
    labels[train] = np.where((truth == 1) & ~hide, 1, -1)[train]
    return LabelTable(NAMES, list(cache.ids), labels)
