"""The text half of a cache: what the model makes of the class names, as one small HDF5 file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ulfine_fast.cache import hdf5
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import write_atomically

if TYPE_CHECKING:
    from ulfine_fast.cache.manifest import Manifest
    from ulfine_fast.cache.models.encoder import Encoder

NAME = "text.h5"
_HEAD = ("ln_post_weight", "ln_post_bias", "ln_post_eps", "projection")


@dataclass(frozen=True)
class TextFeatures:
    """Features of every class in every prompt.

    Attributes:
        prompts: (K, P) the texts, class names filled in.
        features: float32 (K, P, D), rows of length 1, not averaged.
        prototypes: float32 (K, D), mean over the prompts, then length 1.
        logit_scale: the model's factor on cosine similarities.
        head: `ln_post_weight` (W,), `ln_post_bias` (W,), `ln_post_eps` (1,), `projection` (W, D) of an open_clip ViT,
            else empty.
    """

    prompts: list[list[str]]
    features: NDArray[np.float32]
    prototypes: NDArray[np.float32]
    logit_scale: float
    head: dict[str, NDArray[np.float32]] = field(default_factory=dict)


def average(features: NDArray[Any]) -> NDArray[np.float32]:
    """Prototypes of classes: (K, P, D) -> (K, D), mean over the prompts, then length 1."""
    mean = features.astype(np.float32).mean(axis=1)  # (K, D)
    # The small term keeps prompts that cancel out from becoming NaN.
    return mean / np.sqrt((mean**2).sum(axis=1, keepdims=True) + 1e-12)


def encode_classes(encoder: Encoder, texts: Sequence[Sequence[str]]) -> TextFeatures:
    """Encodes the classes.

    Args:
        encoder: the model.
        texts: (K, P) one row of filled prompts per class.

    Raises:
        InputError: the model gives a feature that is not finite.
    """
    flat = [text for row in texts for text in row]
    features = encoder.encode_texts(flat).numpy().reshape(len(texts), -1, encoder.spec.dim)  # (K, P, D)
    if not np.isfinite(features).all():
        bad = int(np.flatnonzero(~np.isfinite(features).all(axis=2).reshape(-1))[0])
        raise InputError(f"the model gives a feature that is not finite for the text {flat[bad]!r}; use another model")
    rows = [list(row) for row in texts]
    return TextFeatures(rows, features, average(features), encoder.spec.logit_scale, encoder.vision_head())


def write_text(folder: Path, text: TextFeatures) -> None:
    """Writes FOLDER/text.h5 atomically.

    Raises:
        InputError: the file system refused.
    """
    prompts = np.asarray(text.prompts, dtype=object)  # (K, P)
    datasets: dict[str, hdf5.Content] = {"prompts": prompts, "features": text.features, "prototypes": text.prototypes}
    write_atomically(folder / NAME, hdf5.pack(datasets | text.head, {"logit_scale": float(text.logit_scale)}))


def read_text(folder: Path, manifest: Manifest) -> TextFeatures:
    """Reads FOLDER/text.h5 and checks it against its checksums and the manifest.

    Raises:
        InputError: missing or damaged.
    """
    path = folder / NAME
    classes, prompts = len(manifest.class_names), len(manifest.prompts)
    try:
        data = path.read_bytes()
        with hdf5.unpacked(data) as file:
            found = _classes_in(file, classes, prompts * manifest.dim, len(data))
            return _first(_from_file(file, found, prompts, manifest.dim), classes)
    except (OSError, InputError) as error:
        raise InputError(f"{path} cannot be used: {error}; run the same extract command again to redo it") from error


def _classes_in(file: h5py.File, classes: int, numbers: int, size: int) -> int:
    """How many classes the file holds: more than the manifest's, where more are being appended."""
    shape = hdf5.shape_of(file, "features") or (0,)
    # A declared shape costs nothing in a file, so one that cannot be true is not believed.
    believable = shape[0] > classes and 4 * shape[0] * numbers <= size
    return shape[0] if believable else classes


def _first(text: TextFeatures, classes: int) -> TextFeatures:
    """The first of the classes: appended ones come last."""
    return replace(
        text,
        prompts=text.prompts[:classes],
        features=text.features[:classes],
        prototypes=text.prototypes[:classes],
    )


def _from_file(file: h5py.File, classes: int, prompts: int, dim: int) -> TextFeatures:
    features = hdf5.take(file, "features", shape=(classes, prompts, dim), dtype="float32")
    prototypes = hdf5.take(file, "prototypes", shape=(classes, dim), dtype="float32")
    scale = float(file.attrs["logit_scale"])
    if not (np.isfinite(features).all() and np.isfinite(prototypes).all() and np.isfinite(scale)):
        raise InputError("it holds values that are not finite")
    head = {}
    for name in _HEAD:
        shape = hdf5.shape_of(file, name)
        if shape is not None:
            head[name] = hdf5.take(file, name, shape=shape, dtype="float32")
    texts = hdf5.take(file, "prompts", shape=(classes, prompts)).tolist()
    return TextFeatures(texts, features, prototypes, scale, head)
