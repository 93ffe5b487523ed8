"""Sentences that describe classes, encoded beside a finished cache: one small file, no other one is touched."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.cache import hdf5
from ulfine_fast.cache.io.errors import CacheMismatch, InputError
from ulfine_fast.cache.io.files import read_regular_file, write_atomically
from ulfine_fast.cache.io.json_files import parse_json, read_json
from ulfine_fast.cache.io.names import near_names
from ulfine_fast.cache.io.paths import is_remote
from ulfine_fast.cache.io.tables import label_key, read_table
from ulfine_fast.cache.manifest import Manifest

if TYPE_CHECKING:
    from ulfine_fast.cache.models.encoder import Encoder

NAME = "descriptions.h5"
_USER_BLOCK = 512  # bytes before the HDF5 file itself, which HDF5 leaves aside
_MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Descriptions:
    """S sentences about classes.

    Attributes:
        classes: (S,) class names, of some of the cache's classes.
        sentences: (S,) texts.
        features: float32 (S, D), rows of length 1.
    """

    classes: list[str]
    sentences: list[str]
    features: NDArray[np.float32]

    def labels(self, class_names: Sequence[str]) -> NDArray[np.int64]:
        """Class index of each sentence (S,)."""
        index = {name: label for label, name in enumerate(class_names)}
        return np.array([index[name] for name in self.classes], dtype=np.int64)


def read_sentences(file: Path, class_names: Sequence[str]) -> dict[str, list[str]]:
    """Sentences by class from a file, in the order of the classes.

    Args:
        file: JSON, an object of class name to a sentence or a list of them; or a .csv, .tsv or .parquet table with the
            columns `class` and `sentence`, one sentence a row.
        class_names: of the cache.

    Raises:
        InputError: not such a file, a class that the cache does not have, or no sentence.
    """
    pairs: list[tuple[str, str]] = []
    if file.suffix.lower() == ".json":
        fix = 'write an object such as {"cat": ["a small animal with whiskers"]}'
        content = read_json(file, dict[str, str | list[str]], fix=fix)
        for name, texts in content.items():
            pairs += [(name, text) for text in ([texts] if isinstance(texts, str) else texts)]
    else:
        table = read_table(file, ["class", "sentence"])
        pairs = list(zip(table.texts("class"), table.texts("sentence"), strict=True))

    known = {label_key(name): name for name in class_names}
    by_class: dict[str, list[str]] = {}
    for name, text in pairs:
        key = label_key(name)
        if key not in known:
            near = near_names(name, known.values())
            hint = f"; did you mean {near[0]!r}?" if near else f": {', '.join(list(class_names)[:5])}"
            raise InputError(f"{file} describes {name!r}, which is none of the {len(known)} classes of the cache{hint}")
        sentence = " ".join(text.split())
        if sentence and sentence not in by_class.setdefault(known[key], []):
            by_class[known[key]].append(sentence)
    described = {name: by_class[name] for name in class_names if by_class.get(name)}
    if not described:
        raise InputError(f"{file} holds no sentence about a class of the cache; write one a class or more")
    return described


def describe(cache: Path, encoder: Encoder, sentences: Mapping[str, Sequence[str]]) -> Descriptions:
    """Encodes sentences with the text tower of the model that made a cache, and writes them beside it.

    Args:
        cache: folder of a finished cache; sentences that it had are replaced.
        encoder: that model.
        sentences: by class name.

    Raises:
        InputError: a model without a text tower, or a folder that cannot be written.
        CacheMismatch: another model than the cache's.
    """
    manifest = Manifest.read(cache)
    if encoder.spec.sha256 != manifest.model["sha256"]:
        raise CacheMismatch(
            "model.sha256",
            manifest.model["sha256"],
            encoder.spec.sha256,
            fix="describe the classes with the weights that the cache was made with",
        )
    classes = [name for name, texts in sentences.items() for _ in texts]
    flat = [text for texts in sentences.values() for text in texts]
    made = Descriptions(classes, flat, encoder.encode_texts(flat).numpy())
    write_descriptions(cache, made, manifest)
    return made


def write_descriptions(folder: Path, descriptions: Descriptions, manifest: Manifest) -> None:
    """Writes FOLDER/descriptions.h5 atomically, tied to the weights that the manifest names.

    Raises:
        InputError: the file system refused.
    """
    datasets: dict[str, hdf5.Content] = {
        "class": descriptions.classes,
        "sentence": descriptions.sentences,
        "features": descriptions.features,
    }
    content = hdf5.pack(datasets, user_block=_USER_BLOCK)[_USER_BLOCK:]
    header = {
        "model": manifest.model["sha256"],
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content) + _USER_BLOCK,
    }
    write_atomically(folder / NAME, json.dumps(header, sort_keys=True).encode().ljust(_USER_BLOCK, b"\0") + content)


@dataclass(frozen=True)
class _Header:
    """What comes before the HDF5 file.

    Attributes:
        model: hex digest of the weights of the text tower's model.
        sha256: hex digest of the HDF5 file.
        bytes: size of the file.
    """

    model: str
    sha256: str
    bytes: int


def read_descriptions(folder: Path, manifest: Manifest) -> Descriptions | None:
    """Reads FOLDER/descriptions.h5; None where there is none.

    Raises:
        InputError: damaged, of another model, or of a class that the cache does not have.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        data = path.read_bytes() if is_remote(path) else read_regular_file(path, _MAX_BYTES)
        header = parse_json(data[:_USER_BLOCK].rstrip(b"\0"), _Header, name="its header", fix="it is damaged")
        if header.bytes != len(data) or header.sha256 != hashlib.sha256(memoryview(data)[_USER_BLOCK:]).hexdigest():
            raise InputError("it is damaged: it does not match its checksum")
        if header.model != manifest.model["sha256"]:
            raise InputError("another model encoded it")
        with hdf5.unpacked(data) as file:
            count = (hdf5.shape_of(file, "class") or (0,))[0]
            classes = hdf5.take(file, "class", shape=(count,)).tolist()
            sentences = hdf5.take(file, "sentence", shape=(count,)).tolist()
            features = hdf5.take(file, "features", shape=(count, manifest.dim), dtype="float32")
        unknown = sorted(set(classes) - set(manifest.class_names))
        if unknown:
            raise InputError(f"it describes {unknown[0]!r}, which is no class of the cache")
        if not np.isfinite(features).all():
            raise InputError("it holds values that are not finite")
    except (OSError, MemoryError, InputError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "not enough memory"
        raise InputError(f"{path} cannot be used: {reason}; run cache describe again, or remove it") from error
    return Descriptions(classes, sentences, features)
