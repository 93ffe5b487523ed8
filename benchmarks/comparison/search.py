"""Random search with the same number of draws for every method; it never sees a test image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from benchmarks.comparison.cells import Cell
from benchmarks.comparison.contenders import ORACLE, Figures, Settings, fit_cell, without_test
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.data.splits import Split

Choice = TypeVar("Choice", bool, int, float, str)


class Draws:
    """One draw of settings; draw i of a search is the same for all methods where they share a knob."""

    def __init__(self, i: int) -> None:
        """The i-th draw."""
        self._seed = i

    def _random(self, knob: str) -> np.random.Generator:
        # a generator for each knob, so that a space that gains a knob draws the others as before
        return np.random.default_rng([self._seed, 0x5EA, *knob.encode()])

    def uniform(self, knob: str, low: float, high: float) -> float:
        """A value between low and high."""
        return float(self._random(knob).uniform(low, high))

    def log_uniform(self, knob: str, low: float, high: float) -> float:
        """A value whose logarithm is uniform."""
        return math.exp(self._random(knob).uniform(math.log(low), math.log(high)))

    def choice(self, knob: str, options: Sequence[Choice]) -> Choice:
        """One of the options."""
        return options[int(self._random(knob).integers(len(options)))]


def nothing(draws: Draws) -> Settings:
    """Methods with no knob, zero_shot."""
    return {}


def probe(draws: Draws) -> Settings:
    """Classifiers trained on labelled images alone, the oracle among them."""
    return {
        "lr": draws.log_uniform("lr", 3e-3, 0.3),
        "tau": draws.uniform("tau", 0.0, 2.0),
        "weight_decay": draws.log_uniform("weight_decay", 1e-5, 1e-2),
        "feature_noise": draws.choice("feature_noise", (0.0, 0.25, 0.5, 1.0)),
    }


def semi_supervised(draws: Draws) -> Settings:
    """Methods that train on pseudo-labels in mini-batches; those without a space of their own."""
    return {
        **probe(draws),
        "threshold": draws.uniform("threshold", 0.5, 0.98),
        "lambda_u": draws.log_uniform("lambda_u", 0.1, 2.0),
        "tau_u": draws.uniform("tau_u", 0.0, 2.5),
        "warmup": draws.uniform("warmup", 0.0, 1.0),
    }


def ulfine(draws: Draws) -> Settings:
    """ULFine: prototype step, weight of orthogonality, fusion."""
    return {
        **semi_supervised(draws),
        "mu": draws.log_uniform("mu", 1e-3, 0.1),
        "lambda_o": draws.log_uniform("lambda_o", 1e-2, 1.0),
        "eta": draws.uniform("eta", 0.2, 0.8),
    }


def finessl(draws: Draws) -> Settings:
    """FineSSL: margin and label smoothing."""
    return {
        **semi_supervised(draws),
        "margin": draws.uniform("margin", 1.0, 12.0),
        "smoothing": draws.uniform("smoothing", 0.0, 0.8),
    }


def tip_adapter(draws: Draws) -> Settings:
    """Tip-Adapter: weight and sharpness of the cache; the trained one has a learning rate too."""
    return {
        "lr": draws.log_uniform("lr", 3e-3, 0.3),
        "tau": draws.uniform("tau", 0.5, 2.0),
        "cache_weight": draws.log_uniform("cache_weight", 0.1, 30.0),
        "cache_sharpness": draws.log_uniform("cache_sharpness", 1.0, 50.0),
    }


def label_propagation(draws: Draws) -> Settings:
    """Label propagation: the graph's degree, how far labels travel, and the edges to the texts."""
    return {
        "neighbors": draws.choice("neighbors", (3, 5, 7, 10, 15, 25)),
        "propagation": draws.uniform("propagation", 0.05, 0.95),
        "text_power": draws.uniform("text_power", 1.0, 10.0),
    }


def gmm(draws: Draws) -> Settings:
    """The mixture: degree of its graph, pull of the text, weight of the labelled images."""
    return {
        "neighbors": draws.choice("neighbors", (3, 5, 7, 10, 15, 25)),
        "anchor": draws.log_uniform("anchor", 0.05, 5.0),
        "labeled_weight": draws.log_uniform("labeled_weight", 0.1, 10.0),
    }


def ulfine_plus(draws: Draws) -> Settings:
    """ULFine plus: metric, anchor, and how sharply clusters and evidence decide."""
    return {
        "lean": draws.log_uniform("lean", 0.3, 2.0),
        "label_weight": draws.log_uniform("label_weight", 3.0, 30.0),
        "view_weight": draws.log_uniform("view_weight", 0.3, 3.0),
        "shrink": draws.log_uniform("shrink", 0.02, 0.3),
        "sharp": draws.log_uniform("sharp", 15.0, 50.0),
        "pull": draws.log_uniform("pull", 0.1, 1.0),
        "trust": draws.log_uniform("trust", 5.0, 50.0),
    }


def self_training(draws: Draws) -> Settings:
    """scikit-learn's self-training around a logistic regression."""
    return {
        "threshold": draws.uniform("threshold", 0.5, 0.98),
        "inverse_penalty": draws.log_uniform("inverse_penalty", 0.1, 100.0),
        "balanced": draws.choice("balanced", (False, True)),
    }


def label_spreading(draws: Draws) -> Settings:
    """scikit-learn's label spreading over a graph of nearest neighbours."""
    return {"neighbors": draws.choice("neighbors", (3, 5, 7, 10, 15, 25)), "alpha": draws.uniform("alpha", 0.01, 0.99)}


def draw(method: str, i: int) -> Settings:
    """Draw i of a method's space; draw 0 is its defaults, so that tuning starts from what everyone gets untuned."""
    spaces = {
        "zero_shot": nothing,
        "linear_probe": probe,
        ORACLE: probe,
        "lift": probe,
        "lift_head": probe,
        "poft": probe,
        "ulfine": ulfine,
        "ulfine_plus": ulfine_plus,
        **dict.fromkeys(("cross_entropy", "balanced_softmax", "class_balanced", "ldam", "cross_modal"), probe),
        "finessl": finessl,
        "tip_adapter": tip_adapter,
        "tip_adapter_f": tip_adapter,
        "label_propagation": label_propagation,
        "gmm": gmm,
        "sklearn_self_training": self_training,
        "sklearn_label_spreading": label_spreading,
    }
    return {} if i == 0 else spaces.get(method, semi_supervised)(Draws(i))


def search(
    method: str,
    cell: Cell,
    cache: FeatureCache,
    seeds: Sequence[int],
    splits: Sequence[Split],
    base: Settings,
    trials: int,
    device: str,
) -> Settings:
    """The drawn setting with the best validation balanced accuracy, averaged over the seeds.

    Args:
        method: who is tuned.
        cell: where.
        cache: its features.
        seeds: as the final fit has them.
        splits: one for each seed; their test part is taken away first.
        base: settings that hold for every draw.
        trials: how many settings are tried, at least 1. Ties go to the earlier draw.
        device: where the engine runs.
    """
    drawn = [{**draw(method, i), **base} for i in range(trials)]
    blind = [without_test(split) for split in splits]
    found = fit_cell(method, cell, cache, seeds, blind, drawn, device)
    return drawn[int(np.argmax([_score(figures) for figures in found]))]


def _score(figures: Sequence[Figures]) -> float:
    """Mean over the seeds that have validation images; 0 without any, which leaves the defaults."""
    scores = [one["val"]["balanced_accuracy"] for one in figures if one["val"]]
    return float(np.mean(scores)) if scores else 0.0
