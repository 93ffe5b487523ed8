"""The text part of a cache: features of the class names in every prompt, as one small HDF5 file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ulfine_fast.cache import hdf5
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import read_regular_file, write_atomically
from ulfine_fast.cache.io.json_files import parse_json
from ulfine_fast.cache.io.paths import is_remote
from ulfine_fast.cache.models.prompts import fill_prompts, readable

if TYPE_CHECKING:
    from ulfine_fast.cache.manifest import Manifest
    from ulfine_fast.cache.models.encoder import Encoder

NAME = "text.h5"
_HDF5 = b"\x89HDF\r\n\x1a\n"
_USER_BLOCK = 512  # bytes before the HDF5 file itself, which HDF5 leaves aside
_ROOM = 64 << 20  # bytes that the last layers of a model and the texts may take
_HEAD = ("ln_post_weight", "ln_post_bias", "ln_post_eps", "projection")


@dataclass(frozen=True)
class TextFeatures:
    """Features of every class in every prompt.

    Attributes:
        prompts: (K, P) texts with the class names filled in; P is 0 for a model without a text tower.
        features: float32 (K, P, D), rows of length 1, not averaged.
        prototypes: float32 (K, D), mean over the prompts, then length 1; zeros where there are no prompts.
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
    """Prototypes of classes: (K, P, D) -> (K, D), mean over the prompts, then length 1; zeros without prompts."""
    if not features.shape[1]:
        return np.zeros((features.shape[0], features.shape[2]), np.float32)
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
    features = encoder.encode_texts(flat).numpy().reshape(len(texts), len(texts[0]), encoder.spec.dim)  # (K, P, D)
    if not np.isfinite(features).all():
        bad = int(np.flatnonzero(~np.isfinite(features).all(axis=2).reshape(-1))[0])
        raise InputError(f"the model gives a feature that is not finite for the text {flat[bad]!r}; use another model")
    rows = [list(row) for row in texts]
    return TextFeatures(rows, features, average(features), encoder.spec.logit_scale, encoder.vision_head())


def refuse_same_texts(encoder: Encoder, texts: Sequence[Sequence[str]]) -> None:
    """Refuses two classes of the same tokens in every prompt, whose prototypes would be equal."""
    seen: dict[bytes, Sequence[str]] = {}
    for row in filter(None, texts):
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


def write_text(folder: Path, text: TextFeatures, manifest: Manifest) -> None:
    """Writes FOLDER/text.h5 atomically.

    Args:
        folder: of the cache.
        text: features of all classes.
        manifest: of the cache; from format version 3 on, its digest and the file's own come first.

    Raises:
        InputError: the file system refused.
    """
    prompts = np.asarray(text.prompts, dtype=object)  # (K, P)
    datasets: dict[str, hdf5.Content] = {"prompts": prompts, "features": text.features, "prototypes": text.prototypes}
    identity = manifest.identity_of(0)
    data = hdf5.pack(
        datasets | text.head,
        {"logit_scale": float(text.logit_scale)},
        user_block=0 if identity is None else _USER_BLOCK,
    )
    if identity is not None:
        content = data[_USER_BLOCK:]
        header = {"manifest": identity, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(data)}
        data = json.dumps(header, sort_keys=True).encode().ljust(_USER_BLOCK, b"\0") + content
    write_atomically(folder / NAME, data)


def read_text(folder: Path, manifest: Manifest) -> TextFeatures:
    """Reads FOLDER/text.h5 and checks it against its checksums and the manifest.

    Raises:
        InputError: missing, damaged, of another cache, or of other classes or prompts.
    """
    path = folder / NAME
    classes, prompts, dim = len(manifest.class_names), len(manifest.prompts), manifest.dim
    try:
        data = path.read_bytes() if is_remote(path) else read_regular_file(path, _most_bytes(manifest))
        _refuse_other_file(data, manifest)
        with hdf5.unpacked(data) as file:
            # The file has more classes than the manifest while more are being appended; the appended ones come last.
            # A declared shape costs nothing in a file, so one that is larger than the file is not believed.
            stored = (hdf5.shape_of(file, "features") or (0,))[0]
            if not (stored > classes and 4 * stored * prompts * dim <= len(data)):
                stored = classes

            features = hdf5.take(file, "features", shape=(stored, prompts, dim), dtype="float32")
            prototypes = hdf5.take(file, "prototypes", shape=(stored, dim), dtype="float32")
            scale = _logit_scale(file)
            if not (np.isfinite(features).all() and np.isfinite(prototypes).all() and np.isfinite(scale)):
                raise InputError("it holds values that are not finite")
            head = {
                name: hdf5.take(file, name, shape=shape, dtype="float32")
                for name in _HEAD
                if (shape := hdf5.shape_of(file, name)) is not None
            }
            texts = hdf5.take(file, "prompts", shape=(stored, prompts)).tolist()
        _refuse_other_texts(texts[:classes], scale, manifest)
    except (OSError, MemoryError, InputError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "not enough memory"
        raise InputError(f"{path} cannot be used: {reason}; run the same extract command again to redo it") from error
    return TextFeatures(texts[:classes], features[:classes], prototypes[:classes], scale, head)


@dataclass(frozen=True)
class _Header:
    """What comes before the HDF5 file in text.h5, from format version 3 on.

    Attributes:
        manifest: see `Manifest.identity_of`; of the cache as it was before any append.
        sha256: hex digest of the HDF5 file.
        bytes: size of text.h5.
    """

    manifest: str
    sha256: str
    bytes: int


def _refuse_other_file(data: bytes, manifest: Manifest) -> None:
    """Compares the file's bytes with the digests before it, as far as the format version has them.

    Raises:
        InputError: they differ.
    """
    identity = manifest.identity_of(0)
    if identity is None:
        if not data.startswith(_HDF5):
            raise InputError(f"it is not an HDF5 file, which a cache of format version {manifest.version} has")
        return
    header = parse_json(
        data[:_USER_BLOCK].rstrip(b"\0"), _Header, name="its header", fix="it is damaged or of another format version"
    )
    if header.bytes != len(data) or header.sha256 != hashlib.sha256(memoryview(data)[_USER_BLOCK:]).hexdigest():
        raise InputError("it is damaged: it does not match its checksum")
    if header.manifest != identity:
        raise InputError("it was made for another cache: it does not name this manifest.json")


def _most_bytes(manifest: Manifest) -> int:
    """The size of the largest text.h5 that is read: with many more classes than the manifest, as in an append."""
    return _ROOM + 8 * 4 * len(manifest.class_names) * (len(manifest.prompts) + 1) * manifest.dim


def _logit_scale(file: h5py.File) -> float:
    value = np.asarray(file.attrs["logit_scale"])
    if value.dtype.kind != "f" or value.size != 1:
        raise InputError("logit_scale is not a number")
    return float(value.reshape(-1)[0])


def _refuse_other_texts(texts: list[list[str]], scale: float, manifest: Manifest) -> None:
    """Compares the (K, P) texts with the classes and prompts of the manifest, and the logit scale with the model's.

    Raises:
        InputError: they differ; names the first.
    """
    for name, row, filled in zip(
        manifest.class_names, texts, fill_prompts(manifest.class_names, manifest.prompts), strict=True
    ):
        for text, wanted in zip(row, filled, strict=True):
            # Another program may have left class names as they are.
            if text != wanted and readable(text) != readable(wanted):
                raise InputError(f"it holds {text!r} where manifest.json has {wanted!r} for class {name!r}")
    if scale != manifest.model["logit_scale"]:
        raise InputError(f"its logit scale is {scale!r}, that of manifest.json {manifest.model['logit_scale']!r}")
