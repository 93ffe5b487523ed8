"""What a fit says of its own evidence, in sentences: what unlabelled images and text were worth on held-out labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ulfine_fast.config import FitConfig

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache

LEAST_HELD_OUT = 20
"""Held-out labels below which no gain is told."""


def unread_lines(cache: FeatureCache, config: FitConfig) -> list[str]:
    """A line where the cache holds a wider feature that this method could read and was not told to."""
    if getattr(config, "feature", None) != "projected" or not cache.trainable_tokens:
        return []
    return ["the cache also holds what the encoder has before its projection; --feature pre-projection reads it"]


def evidence_lines(metrics: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> list[str]:
    """A line for each thing that was measured; none for methods that measure nothing.

    Several runs are averaged, gains with the mean ends of their intervals.

    Args:
        metrics: of each run of one method.
        class_names: of K classes.
    """
    unfinished = _unfinished(metrics)
    metrics = [values for values in metrics if values.get("held_out") is not None]
    if not metrics:
        return unfinished
    held_out = round(_mean(metrics, "held_out"))
    seeds = f", mean of {len(metrics)} seeds" if len(metrics) > 1 else ""

    # gains
    gains = [
        f"{title} {gain}"
        for title, key in (
            ("unlabelled images", "gain_unlabeled"),
            ("text", "gain_text"),
            ("second encoder", "gain_second"),
            ("descriptions", "gain_descriptions"),
        )
        if (gain := _gain(metrics, key))
    ]
    if held_out < LEAST_HELD_OUT or not gains:
        lines = [f"evidence: {held_out} held-out labels are too few to say what unlabelled images are worth{seeds}"]
    else:
        lines = [f"evidence on {held_out} held-out labels, points of balanced accuracy: {'; '.join(gains)}{seeds}"]

    # what predicts
    for title, key in (("the second encoder", "weight_of_second"), ("the descriptions", "weight_of_descriptions")):
        chosen = [float(values[key]) for values in metrics if values.get(key) is not None]
        used = [weight for weight in chosen if weight]
        if chosen:
            fraction = f" as {np.mean(used):.2f} of the feature" if used and key == "weight_of_second" else ""
            lines.append(f"{title}: read by {len(used)} of {len(chosen)} fits{fraction}")
    probe = _mean(metrics, "weight_of_probe")
    if probe > 0.5:
        lines.append(
            f"fell back to the labelled-only probe (weight {probe:.2f}): the clusters do not follow the classes"
        )

    # the unlabelled set
    prior = np.mean([values["estimated_prior"] for values in metrics if values.get("estimated_prior")], axis=0)
    if np.ndim(prior):
        order = np.argsort(-prior, kind="stable")
        some = order if len(order) <= 10 else [*order[:3], *order[-3:]]
        shown = [f"{class_names[k]} {100 * prior[k]:.1f}%" for k in some]
        if len(order) > 10:
            shown.insert(3, "...")
        lines.append(f"estimated classes of the unlabelled images: {', '.join(shown)}")
    outside = round(_mean(metrics, "no_class"))
    lines.append(f"{outside} unlabelled image{'s fit' if outside != 1 else ' fits'} no class")
    return lines


def _unfinished(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which fits by a solver have not reached a minimum, and why; empty where all have."""
    separable = sum(bool(values.get("separable")) for values in metrics)
    stopped = sum(values.get("converged") == 0 for values in metrics) - separable
    lines = []
    if separable:
        lines.append(
            f"{separable} of {len(metrics)} fits have no minimum: their classes are separable and ridge is 0, so that "
            "weights would grow without end; set ridge above 0"
        )
    if stopped:
        lines.append(f"{stopped} of {len(metrics)} fits stopped before they converged; raise ridge")
    return lines


def _mean(metrics: Sequence[Mapping[str, Any]], key: str) -> float:
    values = [float(run[key]) for run in metrics if run.get(key) is not None]
    return sum(values) / len(values) if values else 0.0


def _gain(metrics: Sequence[Mapping[str, Any]], key: str) -> str:
    """Mean and interval in points; empty where no run has them."""
    values = [run[key] for run in metrics if run.get(key) and None not in run[key]]
    if not values:
        return ""
    mean, low, high = 100 * np.mean(values, axis=0)
    return f"{mean:+.1f} [{low:.1f}, {high:.1f}]"
