"""Images worth looking at: which rows, and their thumbnails as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ulfine_fast.runs.files import Predictions

_SIDE = 144  # pixels of the longer side: sharp at 72 CSS pixels on dense screens
_GONE = (OSError, ValueError, KeyError, Image.DecompressionBombError)


@dataclass(frozen=True, slots=True)
class Shot:
    """One test row in the gallery.

    Attributes:
        id: row id; untrusted text.
        true: class index, -1 where unknown.
        predicted: class index.
        confidence: probability of the predicted class, 0..1.
        image: data URI of the thumbnail, or None where the image could not be read.
        small: the image has so few pixels that it is drawn enlarged without smoothing.
    """

    id: str
    true: int
    predicted: int
    confidence: float
    image: str | None
    small: bool


def most_confident_wrong(rows: Predictions, limit: int) -> np.ndarray:
    """Row numbers of wrong predictions, highest confidence first."""
    wrong = np.flatnonzero((rows.labels >= 0) & (rows.labels != rows.predicted))
    return _ordered(rows, wrong, -rows.confidence)[:limit]


def least_confident(rows: Predictions, limit: int) -> np.ndarray:
    """Row numbers of the lowest confidence, lowest first."""
    return _ordered(rows, np.arange(len(rows.ids)), rows.confidence)[:limit]


def of_class(rows: Predictions, label: int, limit: int) -> np.ndarray:
    """Row numbers of one true class, spread evenly from its most to its least confident row.

    Spread, and not the best or the worst, so that the images stand for the class.
    """
    members = _ordered(rows, np.flatnonzero(rows.labels == label), -rows.confidence)
    if len(members) <= limit:
        return members
    return members[np.linspace(0, len(members) - 1, limit).round().astype(np.int64)]


def take(rows: Predictions, chosen: np.ndarray, images: Callable[[str], Image.Image]) -> list[Shot]:
    """Fetch the chosen rows' images; one that cannot be read leaves its caption."""
    return [_shot(rows, int(i), images) for i in chosen]


def unread(shots: Sequence[Shot]) -> int:
    """Count the images that could not be read."""
    return sum(shot.image is None for shot in shots)


def thumbnail(image: Image.Image) -> tuple[str, bool]:
    """Return a data URI with a longer side of at most 144 pixels, without metadata, and whether it was tiny."""
    small = image.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    # pasted on a blank: nothing of the file's metadata (place, camera, profile) may follow the image into the page
    clean = Image.new("RGB", small.size)
    clean.paste(small)
    tiny = max(clean.size) <= 64
    buffer = io.BytesIO()
    if tiny:
        clean.save(buffer, "PNG", optimize=True)
    else:
        clean.save(buffer, "JPEG", quality=80, optimize=True)
    kind = "png" if tiny else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}", tiny


def _ordered(rows: Predictions, chosen: np.ndarray, by: np.ndarray) -> np.ndarray:
    # ids break ties, so that the page does not depend on the order of the file
    return np.array(sorted(chosen.tolist(), key=lambda i: (by[i], rows.ids[i])), dtype=np.int64)


def _shot(rows: Predictions, i: int, images: Callable[[str], Image.Image]) -> Shot:
    try:
        image, small = thumbnail(images(rows.ids[i]))
    except _GONE:
        image, small = None, False
    return Shot(rows.ids[i], int(rows.labels[i]), int(rows.predicted[i]), float(rows.confidence[i]), image, small)
