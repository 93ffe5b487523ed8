"""The text part of a cache: features of the class names in every prompt, as one small HDF5 file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
        prompts: (K, P) texts with the class names filled in.
        features: float32 (K, P, D), rows of length 1, not averaged.
        prototypes: float32 (K, D), mean over the prompts, then length 1.
        logit_scale: the model's factor on cosine similarities.
        head: the last layers of an open_clip ViT: `ln_post_weight` (W,), `ln_post_bias` (W,), `ln_post_eps` (1,) and
            `projection` (W, D); else empty.
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
        texts: (K, P), one row of filled prompts per class.

    Raises:
        InputError: two classes that are the same to the model in every prompt, or a feature that is not finite.
    """
    flat = [text for row in texts for text in row]
    refuse_same_texts(encoder, texts)
    features = encoder.encode_texts(flat).numpy().reshape(len(texts), -1, encoder.spec.dim)  # (K, P, D)
    if not np.isfinite(features).all():
        bad = int(np.flatnonzero(~np.isfinite(features).all(axis=2).reshape(-1))[0])
        raise InputError(f"the model gives a feature that is not finite for the text {flat[bad]!r}; use another model")
    rows = [list(row) for row in texts]
    return TextFeatures(rows, features, average(features), encoder.spec.logit_scale, encoder.vision_head())


def refuse_same_texts(encoder: Encoder, texts: Sequence[Sequence[str]]) -> None:
    """Refuses two classes of the same tokens in every prompt, whose prototypes would be equal."""
    seen: dict[bytes, Sequence[str]] = {}
    for row in texts:
        tokens = encoder.tokenize(row)  # (P, L)
        other = seen.setdefault(tokens.numpy().tobytes(), row)
        if other is not row:
            raise InputError(
                f"two classes are one text to the model, which reads {tokens.shape[1]} tokens and may not tell capital "
                f"letters: {_clip(other[0])} and {_clip(row[0])}; give shorter or other names with --class-names"
            )


def _clip(text: str, most: int = 60) -> str:
    """The beginning and the end of a text in quotes."""
    return repr(text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}")


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
    classes, prompts, dim = len(manifest.class_names), len(manifest.prompts), manifest.dim
    try:
        data = path.read_bytes()
        with hdf5.unpacked(data) as file:
            # The file has more classes than the manifest while more are being appended; the appended ones come last.
            # A declared shape costs nothing in a file, so one that is larger than the file is not believed.
            stored = (hdf5.shape_of(file, "features") or (0,))[0]
            if not (stored > classes and 4 * stored * prompts * dim <= len(data)):
                stored = classes

            features = hdf5.take(file, "features", shape=(stored, prompts, dim), dtype="float32")
            prototypes = hdf5.take(file, "prototypes", shape=(stored, dim), dtype="float32")
            scale = float(file.attrs["logit_scale"])
            if not (np.isfinite(features).all() and np.isfinite(prototypes).all() and np.isfinite(scale)):
                raise InputError("it holds values that are not finite")
            head = {
                name: hdf5.take(file, name, shape=shape, dtype="float32")
                for name in _HEAD
                if (shape := hdf5.shape_of(file, name)) is not None
            }
            texts = hdf5.take(file, "prompts", shape=(stored, prompts)).tolist()
    except (OSError, InputError) as error:
        raise InputError(f"{path} cannot be used: {error}; run the same extract command again to redo it") from error
    return TextFeatures(texts[:classes], features[:classes], prototypes[:classes], scale, head)
