"""Checkpoints of training: one file for each trial batch, replaced as a whole after each validation.

The folder has head.json, which identifies configs, splits and cache, and batch-N.safetensors for the trial batch whose
first trial is N, with its tensors and, as JSON in the file's header, its progress and the file's digest.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from ulfine_fast._version import __version__
from ulfine_fast.cache.io.digests import BLANK, is_sealed, safetensors_header_end, sealed
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import make_folder, opened_regular_file, write_atomically
from ulfine_fast.cache.io.json_files import parse_json, read_json
from ulfine_fast.config import FitConfig
from ulfine_fast.core.heads import Tensors
from ulfine_fast.data.splits import Split

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache

_FORMAT = "ulfine-fast-checkpoint"
_BATCHES = "batch-*.safetensors"
_ROLES = ("labeled", "unlabeled", "val", "test")


class _Head(msgspec.Struct):
    """head.json."""

    format: str
    version: str
    cache: str
    engine: str
    splits: str
    configs: list[dict[str, Any]]


class _Notes(msgspec.Struct):
    """The progress of a trial batch, as far as it is read before the batch is restored."""

    trials: list[int]
    step: int


class _Header(msgspec.Struct):
    """The header of a batch file, but for its tensors."""

    metadata: dict[str, str] = msgspec.field(name="__metadata__")


class SavedBatch(NamedTuple):
    """A trial batch in the state of its last save.

    Attributes:
        trials: positions of its trials among all.
        tensors: as `TrialBatch.saved` returned them.
        notes: JSON values, likewise.
    """

    trials: list[int]
    tensors: Tensors
    notes: dict[str, Any]


class Checkpoint:
    """A folder that the trial batches of one call of :func:`ulfine_fast.fit_many` are saved in.

    Raises:
        InputError: the folder holds a checkpoint of other configs, splits, another cache or version, or something
            else, or cannot be written.
    """

    def __init__(
        self, folder: Path, cache: FeatureCache, configs: Sequence[FitConfig], splits: Sequence[Split], engine: str
    ) -> None:
        self.folder = folder
        self.head = {
            "format": _FORMAT,
            "version": __version__,
            "cache": cache_fingerprint(cache),
            "engine": engine,
            "splits": _splits_digest(splits),
            "configs": [config.to_dict() for config in configs],
        }
        path = folder / "head.json"
        # a head alone is of a fit that made no progress, and another fit may replace it
        if path.exists() and any(folder.glob(_BATCHES)):
            _refuse_other(folder, _read_head(path), self.head)
        elif folder.exists() and (not folder.is_dir() or _other_files(folder)):
            raise InputError(f"{folder} exists and is no checkpoint; name a new folder")

    def load(self) -> list[SavedBatch]:
        """The saved trial batches.

        Raises:
            InputError: a damaged file.
        """
        from safetensors.torch import load

        batches = []
        for path in sorted(self.folder.glob(_BATCHES)):
            notes, data = _read_batch(path)
            try:
                tensors = load(data)
            except Exception as error:  # the library has errors of its own for a damaged file
                raise damaged(path.parent, error, path.name) from error
            batches.append(SavedBatch(trials=notes.pop("trials"), tensors=tensors, notes=notes))
        return batches

    def save(self, trials: Sequence[int], tensors: Tensors, notes: dict[str, Any]) -> None:
        """Save the trial batch of these trials; replaces its last save.

        Raises:
            InputError: the file system refused.
        """
        from safetensors.torch import save

        if not any(self.folder.glob(_BATCHES)):
            make_folder(self.folder)
            write_atomically(self.folder / "head.json", json.dumps(self.head).encode())
        content = save(tensors, {"notes": json.dumps({"trials": list(trials), **notes}), "digest": BLANK})
        write_atomically(
            self.folder / f"batch-{trials[0]}.safetensors", sealed(content, safetensors_header_end(content))
        )

    def remove(self) -> None:
        """Remove the folder, once all trial batches are done."""
        shutil.rmtree(self.folder, ignore_errors=True)


def saved_step(folder: Path) -> int | None:
    """The step that training continues from, None without a checkpoint; the last one of several trial batches."""
    steps = [int(_read_batch(path)[0]["step"]) for path in folder.glob(_BATCHES)]
    return max(steps, default=None)


def cache_fingerprint(cache: FeatureCache) -> str:
    """Hex digest of a cache's content: by the digests of its shards, or over all arrays of one in memory."""
    digest = hashlib.sha256()
    if cache.manifest is not None:
        digest.update(json.dumps(cache.manifest.to_dict(), sort_keys=True, default=str).encode())
        for record in cache.records:
            digest.update(record.checksum.encode())
        digest.update((cache.relabeled or "").encode())
        if cache.descriptions is not None:
            digest.update(json.dumps([cache.descriptions.classes, cache.descriptions.sentences]).encode())
        if cache.second is not None:
            digest.update(cache_fingerprint(cache.second).encode())
        return digest.hexdigest()
    digest.update(json.dumps([cache.class_names, cache.ids, cache.splits.tolist()]).encode())
    arrays = [cache.labels, cache.plain, cache.views("weak"), cache.views("strong"), cache.view_rows]
    if cache.prototypes is not None:
        arrays.append(cache.prototypes)
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _splits_digest(splits: Sequence[Split]) -> str:
    digest = hashlib.sha256()
    # trials often share a split
    digests = {id(split): hashlib.sha256(_bytes(split)).digest() for split in splits}
    for split in splits:
        digest.update(digests[id(split)])
    return digest.hexdigest()


def _bytes(split: Split) -> bytes:
    rows = [np.ascontiguousarray(getattr(split, role), dtype=np.int64) for role in _ROLES]
    parts = [array.tobytes() for array in rows]
    if split.extra:
        parts.append(json.dumps(split.extra, sort_keys=True).encode())
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


def _refuse_other(folder: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Name the first thing in which a checkpoint differs from what is to be trained."""
    if saved["version"] != wanted["version"]:
        reason = f"version {saved['version']}, not {wanted['version']}"
    elif saved["cache"] != wanted["cache"]:
        reason = "a fit of another cache"
    elif saved["configs"] != wanted["configs"]:
        reason = _config_difference(saved["configs"], wanted["configs"])
    elif saved["splits"] != wanted["splits"]:
        reason = "a fit of other splits"
    elif saved["engine"] != wanted["engine"]:
        reason = f"a fit with engine {saved['engine']}, not {wanted['engine']}"
    else:
        return
    raise InputError(f"{folder} is the checkpoint of {reason}; finish that one, or remove the folder to start anew")


def _config_difference(saved: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> str:
    if len(saved) != len(wanted):
        return f"a fit of {len(saved)} trials, not {len(wanted)}"
    for old, new in zip(saved, wanted, strict=True):
        for name in new:
            if old.get(name) != new[name]:
                return f"a fit with {name} = {old.get(name)}, not {new[name]}"
    return "a fit of other options"


def _read_head(path: Path) -> dict[str, Any]:
    head = read_json(path, _Head, fix=f"remove {path.parent} to start anew")
    if head.format != _FORMAT:
        raise InputError(f"{path.parent} exists and is no checkpoint; name a new folder")
    return msgspec.structs.asdict(head)


def _read_batch(path: Path) -> tuple[dict[str, Any], bytes]:
    """The notes of a batch file, and all of its bytes, which are those that were written."""
    try:
        with opened_regular_file(path) as file:
            data = file.read()
        end = safetensors_header_end(data)
        if not is_sealed(data, end):
            raise ValueError("it has changed since it was written")
    except (OSError, ValueError) as error:
        raise damaged(path.parent, error, path.name) from error
    fix = f"remove {path.parent} to start anew"
    text = parse_json(data[8:end], _Header, name=str(path), fix=fix).metadata.get("notes", "").encode()
    parse_json(text, _Notes, name=str(path), fix=fix)
    return parse_json(text, dict[str, Any], name=str(path), fix=fix), data


def damaged(folder: Path, error: Exception, name: str = "the checkpoint") -> InputError:
    """The sentence for a checkpoint, or a file in it, that training cannot continue from."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return InputError(f"{name} in {folder} is damaged ({reason}); remove {folder} to start anew")


def _other_files(folder: Path) -> list[Path]:
    """Files that no interrupted checkpoint leaves."""
    known = ("head.json", "head.json.tmp")
    return [path for path in folder.iterdir() if path.name not in known and not path.match(_BATCHES + ".tmp")]
