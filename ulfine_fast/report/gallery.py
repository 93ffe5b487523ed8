"""The section of images: the test rows worth looking at, as thumbnails."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ulfine_fast.report.formats import number_range
from ulfine_fast.report.groups import Group, rank_order
from ulfine_fast.report.images import UNREADABLE, encode_preview
from ulfine_fast.runs.files import Predictions

_LIMIT = 12  # images below a heading: divides by the number of columns on phones and desktops
_TAIL_CLASSES = 3
_SIDE = 144  # pixels of the longer side: sharp at 72 CSS pixels on dense screens


@dataclass(frozen=True, slots=True)
class Shot:
    """One test row in the gallery.

    Attributes:
        id: row id; untrusted text.
        true: class index, -1 where unknown.
        predicted: class index.
        confidence: probability of the predicted class, 0..1.
        image: data URI of the thumbnail, None where the image cannot be read.
        small: whether the image has so few pixels that it is drawn enlarged without smoothing.
    """

    id: str
    true: int
    predicted: int
    confidence: float
    image: str | None
    small: bool


def gallery_section(
    shown: Group, predictions: Predictions, images: Callable[[str], Image.Image] | None
) -> dict[str, Any] | None:
    """Template values: shots below headings; None without images.

    Args:
        shown: the group; its first run is shown, since the tail classes differ from seed to seed.
        predictions: the test rows of that run.
        images: returns the image of a row id.
    """
    if images is None:
        return None
    run = shown.runs[0]
    counts = run.per_class("class_counts")
    chosen = [
        ("Most confident wrong", most_confident_wrong(predictions, _LIMIT)),
        ("Least confident", least_confident(predictions, _LIMIT)),
    ]
    for k in rank_order(run)[::-1][:_TAIL_CLASSES].tolist():
        heading = f"Tail class: {run.class_names[k]} ({number_range([counts[k]])} labelled)"
        chosen.append((heading, rows_of_class(predictions, k, _LIMIT)))
    headings = [(heading, load_shots(predictions, rows, images)) for heading, rows in chosen]
    unreadable = sum(shot.image is None for _, shots in headings for shot in shots)
    return {"seed": run.seed, "headings": headings, "unreadable": unreadable}


def most_confident_wrong(predictions: Predictions, limit: int) -> np.ndarray:
    """Indices of wrong predictions, highest confidence first."""
    wrong = np.flatnonzero((predictions.labels >= 0) & (predictions.labels != predictions.predicted))
    return _sorted_rows(predictions, wrong, -predictions.confidence)[:limit]


def least_confident(predictions: Predictions, limit: int) -> np.ndarray:
    """Indices of the lowest confidence, lowest first."""
    return _sorted_rows(predictions, np.arange(len(predictions.ids)), predictions.confidence)[:limit]


def rows_of_class(predictions: Predictions, label: int, limit: int) -> np.ndarray:
    """Indices of one true class, spread evenly from its most to its least confident row.

    Spread evenly, so that the images represent the class and not its best or worst rows.
    """
    rows = _sorted_rows(predictions, np.flatnonzero(predictions.labels == label), -predictions.confidence)
    if len(rows) <= limit:
        return rows
    return rows[np.linspace(0, len(rows) - 1, limit).round().astype(np.int64)]


def load_shots(predictions: Predictions, rows: np.ndarray, images: Callable[[str], Image.Image]) -> list[Shot]:
    """Read the images of the given rows; one that cannot be read keeps its caption."""
    shots = []
    for i in rows.tolist():
        image, small = None, False
        with contextlib.suppress(*UNREADABLE):
            image, small = thumbnail(images(predictions.ids[i]))
        shots.append(
            Shot(
                id=predictions.ids[i],
                true=int(predictions.labels[i]),
                predicted=int(predictions.predicted[i]),
                confidence=float(predictions.confidence[i]),
                image=image,
                small=small,
            )
        )
    return shots


def thumbnail(image: Image.Image) -> tuple[str, bool]:
    """A data URI with a longer side of at most 144 pixels, and whether the image has few pixels."""
    data, kind = encode_preview(image, side=_SIDE, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}", kind == "png"


def _sorted_rows(predictions: Predictions, rows: np.ndarray, key: np.ndarray) -> np.ndarray:
    # ids break ties, so that the page does not depend on the order of the file
    return np.array(sorted(rows.tolist(), key=lambda i: (key[i], predictions.ids[i])), dtype=np.int64)
