"""Features that another program made to a cache: checked row by row, with the texts of its classes beside them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ulfine_fast._version import __version__
from ulfine_fast.cache.ids import refuse_shared_ids
from ulfine_fast.cache.interop.arrays import plain_arrays
from ulfine_fast.cache.interop.clip_retrieval import clip_retrieval
from ulfine_fast.cache.interop.export import FORMAT, NOTE
from ulfine_fast.cache.interop.found import FoundFeatures, Opened, Said, texts_of
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.paths import open_place
from ulfine_fast.cache.manifest import Manifest
from ulfine_fast.cache.models.prompts import DEFAULT_PROMPTS, fill_prompts
from ulfine_fast.cache.pipeline.assemble import Assembled, Piece, assemble
from ulfine_fast.cache.shard import VIEWED_SPLITS, Shard
from ulfine_fast.cache.sources.rows import SPLITS, UNKNOWN, Part
from ulfine_fast.cache.text import TextFeatures, average, encode_classes

if TYPE_CHECKING:
    from ulfine_fast.cache.models.encoder import Encoder

UNKNOWN_MODEL = "unknown"
DTYPES = ("float16", "float32")
_LOGIT_SCALE = 100.0  # what CLIP's models were trained up to
# Rows further from length 1 are made so: rounding to float16 moves a length by less, another normalisation by more.
_TOLERANCE = 0.01
_SAMPLES = 64  # rows of each file that stand for all of them in the fingerprint
_IDS_AT_ONCE = 65536


@dataclass(frozen=True)
class Imported(Assembled):
    """What a call of `import_features` did.

    Attributes:
        normalised: rows (views included) of this call that had another length and got length 1.
    """

    normalised: int = 0


def open_features(
    where: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    label_column: str | None = None,
    id_column: str | None = None,
    split: str | None = None,
) -> FoundFeatures:
    """Opens features of another program; nothing is unpickled, and features stay on the disk.

    Args:
        where: a folder of clip-retrieval (`img_emb` and `metadata`), a folder of .npy files or an .npz file with
            `features` and perhaps labels, ids, splits, weak, strong, class_names, text_features, or one .npy file.
        class_names: (K,) in the order of the labels; in place of what the files say.
        label_column: of the metadata; "label" by default, where there is one.
        id_column: of the metadata; id, image_path or key by default.
        split: of rows that no split is said of; by default train where the label is known, else unlabeled.

    Raises:
        InputError: nothing of this kind there, or files that do not fit together; names the file.
    """
    path = Path(where).expanduser().absolute()
    if split is not None and split not in SPLITS:
        raise InputError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if (path / "img_emb").is_dir():
        opened = clip_retrieval(path, label_column, id_column)
    elif label_column or id_column:
        raise InputError(f"{path} has no metadata with columns; leave out the names of columns")
    else:
        opened = plain_arrays(path)
    result = _together(path, opened, class_names, split)
    _refuse_bad_views(result)
    return result


def _together(path: Path, opened: Opened, class_names: Sequence[str] | None, split: str | None) -> FoundFeatures:
    arrays, said = opened.arrays, opened.said
    names = _names(path, class_names, arrays, said)
    labels = _labels(path, said, names)
    splits = np.where(said.splits >= 0, said.splits, _default_splits(labels, split)).astype(np.int8)
    return FoundFeatures(
        path=path,
        files=opened.files,
        blocks=opened.blocks,
        labels=labels,
        splits=splits,
        class_names=names,
        weak=arrays.get("weak"),
        strong=arrays.get("strong"),
        text_features=arrays.get("text_features"),
        manifest=_exported_manifest(path),
    )


def _names(path: Path, given: Sequence[str] | None, found: Mapping[str, NDArray[Any]], said: Said) -> list[str]:
    """Class names: those given, those in the files, or the labels themselves in their order."""
    if given is not None:
        names = list(given)
    elif "class_names" in found:
        array = found["class_names"]
        names = texts_of(array, len(array) if array.ndim else 0, f"class_names of {path}")
    else:
        names = sorted(said.names) if said.names else []
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1 or "" in names:
        raise InputError(
            f"the class names of {path} must be different texts, got {name!r} {times} times or an empty one"
        )
    if not names:
        raise InputError(
            f"nothing in {path} names the classes; give --class-names FILE, one name a line in label order"
        )
    return names


def _labels(path: Path, said: Said, names: list[str]) -> NDArray[np.int32]:
    """Labels as places in the class names."""
    if said.names is not None:
        strange = sorted(set(said.names) - set(names))
        if strange:
            raise InputError(f"{path} has the label {strange[0]!r}, which is none of the {len(names)} class names")
        index = {name: label for label, name in enumerate(names)}
        return np.array([*(index[name] for name in said.names), UNKNOWN], dtype=np.int32)[said.labels]
    wrong = said.labels[(said.labels < UNKNOWN) | (said.labels >= len(names))]
    if len(wrong):
        raise InputError(f"{path} has the label {wrong[0]}, labels are -1 or a place in the {len(names)} class names")
    return said.labels


def _default_splits(labels: NDArray[np.int32], split: str | None) -> NDArray[np.int8]:
    by_label = np.where(labels >= 0, SPLITS.index("train"), SPLITS.index("unlabeled"))
    return np.full_like(by_label, SPLITS.index(split)) if split else by_label


def _refuse_bad_views(found: FoundFeatures) -> None:
    n, m = len(found.labels), len(found.view_rows)
    for name, views in (("weak", found.weak), ("strong", found.strong)):
        if views is None:
            continue
        fits = views.ndim == 3 and views.shape[0] in (n, m) and views.shape[2] == found.dim and views.dtype.kind == "f"
        if not fits:
            raise InputError(
                f"{name} of {found.path} must be floats (m, V, D) with the m = {m} rows of train and unlabeled (or all "
                f"{n}) and D = {found.dim}, got {views.shape} of {views.dtype}"
            )


def _exported_manifest(path: Path) -> Manifest | None:
    """The manifest in the note of our own export; None where there is none that can be used."""
    try:
        note = json.loads((path / NOTE).read_text(encoding="utf-8"))
        return Manifest.from_dict(note["manifest"]) if note["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def import_features(
    found: FoundFeatures,
    out: str | Path,
    *,
    encoder: Encoder | None = None,
    text_features: NDArray[Any] | None = None,
    model: str | None = None,
    prompts: Sequence[str] | None = None,
    logit_scale: float | None = None,
    dtype: str | None = None,
    shard_size: int = 1024,
    progress: bool | None = None,
) -> Imported:
    """Makes a cache of features that were found in files.

    The texts of the classes come from `encoder`, else from `text_features`, else from what was found. Rows whose
    length is off by more than a hundredth are made of length 1; others are kept to the last bit. One shard is in
    memory at a time, beside labels and splits (5 bytes a row) and ids while they are compared (8 bytes a row).

    Args:
        found: see `open_features`.
        out: folder of the cache: new, empty, or what an interrupted import of the same files left.
        encoder: the model that made the features, for the texts of the classes.
        text_features: (K, P, D), or (K, D) for one prompt.
        model: name of the model where there is no `encoder`; for the record.
        prompts: (P,) texts with {} for the class name.
        logit_scale: the model's factor on cosine similarities, above 0; without `encoder` 100 by default.
        dtype: "float16" or "float32", of the stored features; by default that of the files, float64 becoming float32.
        shard_size: rows of a shard at most, at least 1.
        progress: whether to draw a bar on stderr; by default where that is a terminal.

    Raises:
        InputError: no texts for the classes, an id that occurs twice, a feature that is not finite or all zeros, shapes
            that do not fit, a value out of range, or a file system that refuses.
        CacheMismatch: `out` holds another cache.
    """
    if dtype not in (None, *DTYPES):
        raise InputError(f"dtype must be {' or '.join(DTYPES)}, got {dtype!r}")
    if shard_size < 1:
        raise InputError(f"shard size must be at least 1, got {shard_size}")
    if logit_scale is not None and not 0 < logit_scale < float("inf"):
        raise InputError(f"logit scale must be above 0, got {logit_scale}")
    text = _text(found, encoder, text_features, prompts, logit_scale)
    refuse_shared_ids(lambda: map(found.ids, _ranges(len(found.labels))), "give another --id-column, or leave ids out")
    manifest = _manifest(found, encoder, model, text, dtype or found.dtype, shard_size)
    rows = _Rows(found, manifest)
    done = assemble(open_place(out), manifest, text.features, rows.pieces(), progress=progress)
    return Imported(**{**asdict(done), "out": done.out}, normalised=rows.normalised)


@dataclass(frozen=True)
class _Text:
    """Texts of the classes: what is stored, and the prompts that the manifest names."""

    features: TextFeatures
    prompts: list[str]


def _text(
    found: FoundFeatures,
    encoder: Encoder | None,
    given: NDArray[Any] | None,
    prompts: Sequence[str] | None,
    logit_scale: float | None,
) -> _Text:
    if encoder is not None:
        if encoder.spec.dim != found.dim:
            raise InputError(
                f"{encoder.spec.name} gives features of length {encoder.spec.dim}, those of {found.path} have "
                f"{found.dim}; name the model that made them"
            )
        wanted = list(prompts or DEFAULT_PROMPTS)
        encoded = encode_classes(encoder, fill_prompts(found.class_names, wanted))
        return _Text(encoded if logit_scale is None else replace(encoded, logit_scale=logit_scale), wanted)
    array = found.text_features if given is None else given
    if array is None:
        raise InputError(
            f"nothing in {found.path} says what the classes mean to the model; give --model, which encodes their "
            "names, or --text-features FILE.npy"
        )
    features = _text_array(array, len(found.class_names), found.dim)
    wanted = _prompts_of(found, features.shape[1], prompts)
    known = _LOGIT_SCALE if found.manifest is None else float(found.manifest.model["logit_scale"])
    scale = logit_scale or known
    return _Text(TextFeatures(fill_prompts(found.class_names, wanted), features, average(features), scale), wanted)


def _text_array(array: NDArray[Any], classes: int, dim: int) -> NDArray[np.float32]:
    """(K, P, D) of length 1."""
    if array.dtype.kind != "f":
        raise InputError(f"text features must be floats, got {array.dtype}")
    shaped = np.asarray(array, dtype=np.float32)
    shaped = shaped[:, None] if shaped.ndim == 2 else shaped  # (K, P, D)
    if shaped.ndim != 3 or (shaped.shape[0], shaped.shape[2]) != (classes, dim) or shaped.shape[1] == 0:
        raise InputError(
            f"text features must be (K, P, D) = ({classes}, P, {dim}) or ({classes}, {dim}), got {array.shape}"
        )
    return _unit(shaped, lambda row: f"text features of class {row}")[0]


def _prompts_of(found: FoundFeatures, count: int, prompts: Sequence[str] | None) -> list[str]:
    """P prompts: those given, those of the exported cache, or names for texts that nobody knows."""
    if prompts is not None and len(prompts) != count:
        raise InputError(f"there are {count} text features a class and {len(prompts)} prompts; they must go together")
    known = prompts or ([] if found.manifest is None else found.manifest.prompts)
    if len(known) == count:
        return list(known)
    return ["{}"] if count == 1 else [f"{{}} (text {place + 1} of {count})" for place in range(count)]


# -- what the manifest says


def _manifest(
    found: FoundFeatures, encoder: Encoder | None, model: str | None, text: _Text, dtype: str, shard_size: int
) -> Manifest:
    weak, strong = (0 if views is None else views.shape[1] for views in (found.weak, found.strong))
    # Another model named on the command line is another model: then nothing of the exported cache holds.
    known = _known(found.manifest) if found.manifest and encoder is None and model is None else {}
    model_said = known.pop("model", None) or _model(encoder, model)
    said: dict[str, Any] = {
        "model": {**model_said, "dim": found.dim, "logit_scale": text.features.logit_scale, "normalized": True},
        "preprocessing": "unknown" if encoder is None else encoder.preprocessing,
        "mean": [] if encoder is None else list(encoder.mean),
        "std": [] if encoder is None else list(encoder.std),
        "precision": "unknown",
        "batch_size": 1,
        **known,
        "views": {**known.get("views", {"seed": 0}), "weak": weak, "strong": strong},
    }
    source = {"kind": "import", "path": str(found.path), "rows": len(found.labels)}
    return Manifest(
        **said,
        dtype=dtype,
        shard_size=shard_size,
        class_names=found.class_names,
        prompts=text.prompts,
        source={**source, "fingerprint": _fingerprint(found, text.features)},
        created_by=f"ulfine-fast {__version__}",
    )


def _known(manifest: Manifest) -> dict[str, Any]:
    """What an exported cache said of its features, for those that come back."""
    names = ("model", "preprocessing", "mean", "std", "precision", "batch_size", "views", "libraries")
    return {name: getattr(manifest, name) for name in names}


def _model(encoder: Encoder | None, name: str | None) -> dict[str, Any]:
    if encoder is not None:
        return asdict(encoder.spec)
    # An empty digest: nobody knows the weights, so nothing may pass for the same model but by its name.
    return {"name": name or UNKNOWN_MODEL, "pretrained": None, "sha256": "", "image_size": 0}


def _fingerprint(found: FoundFeatures, text: TextFeatures) -> str:
    """Hex sha256 over names and sizes of the files, labels, splits, texts, and some rows of each block and view."""
    digest = hashlib.sha256()
    for file in found.files:
        digest.update(f"{file.name}\0{file.stat().st_size}\n".encode())
    views = [views for views in (found.weak, found.strong) if views is not None and len(views)]
    for features in [*(block.features for block in found.blocks), *views]:
        rows = np.unique(np.linspace(0, len(features) - 1, _SAMPLES).astype(np.int64))
        digest.update(np.ascontiguousarray(features[rows]).tobytes())
    array: NDArray[Any]
    for array in (found.labels, found.splits, text.features):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


# -- rows to shards


def _ranges(n: int) -> list[NDArray[np.int64]]:
    return [np.arange(start, min(start + _IDS_AT_ONCE, n)) for start in range(0, n, _IDS_AT_ONCE)]


class _Rows:
    """The rows of found features as shards.

    Attributes:
        normalised: rows that had another length so far.
    """

    def __init__(self, found: FoundFeatures, manifest: Manifest) -> None:
        self.found, self.manifest, self.normalised = found, manifest, 0

    def pieces(self) -> list[Piece]:
        """Shards split by split, rows in their order inside a split."""
        pieces: list[Piece] = []
        reached, size = 0, self.manifest.shard_size
        for code, split in enumerate(SPLITS):
            rows = np.flatnonzero(self.found.splits == code)  # (n,)
            for start in range(0, len(rows), size):
                some = rows[start : start + size]
                pieces.append(self._piece(Part(len(pieces), split, reached, len(some)), some))
                reached += len(some)
        return pieces

    def _piece(self, part: Part, rows: NDArray[np.int64]) -> Piece:
        return Piece(part, lambda: self._shard(part.split, rows))

    def _shard(self, split: str, rows: NDArray[np.int64]) -> Shard:
        found, n, ids = self.found, len(rows), self.found.ids(rows)
        viewed = split in VIEWED_SPLITS
        weak, strong = (self._views(views if viewed else None, rows, ids) for views in (found.weak, found.strong))
        drawn = weak.shape[1] + strong.shape[1]
        return Shard(
            split=split,
            ids=ids,
            labels=found.labels[rows],
            plain=self._checked(found.features(rows), ids)[:, None],  # (n, 1, D)
            weak=weak,
            strong=strong,
            # Nobody knows how these views were drawn.
            scale=np.zeros((n, drawn), np.float32),
            flip=np.zeros((n, drawn), np.uint8),
            view_seed=self.manifest.views["seed"],
            quantized=self.manifest.dtype == "int8",
        )

    def _views(self, views: NDArray[Any] | None, rows: NDArray[np.int64], ids: list[str]) -> NDArray[Any]:
        """(n, V, D), V = 0 where there are none."""
        if views is None:
            return np.empty((len(rows), 0, self.found.dim), self.manifest.layout("train").array_dtype)
        every_row = len(views) == len(self.found.labels)
        places = rows if every_row else np.searchsorted(self.found.view_rows, rows)
        return self._checked(views[places], ids)

    def _checked(self, features: NDArray[Any], ids: list[str]) -> NDArray[Any]:
        unit, changed = _unit(features, lambda row: f"features of {ids[row]!r}")
        self.normalised += changed
        return unit.astype(self.manifest.layout("train").array_dtype)


def _unit(features: NDArray[Any], what: Callable[[int], str]) -> tuple[NDArray[Any], int]:
    """Rows (n, ..., D) of length 1, and how many were not; those that were stay to the last bit.

    Raises:
        InputError: a row that is not finite, or all zeros.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.sqrt(np.square(features, dtype=np.float32).sum(axis=-1))  # (n, ...)
    bad = ~np.isfinite(features).all(axis=-1) | ~np.isfinite(lengths) | (lengths == 0)
    if bad.any():
        row = int(np.argwhere(bad)[0][0])
        raise InputError(f"the {what(row)} are not finite, or all zeros; mend or remove the row and import again")
    off = np.abs(lengths - 1) > _TOLERANCE
    if not off.any():
        return features, 0
    unit = np.array(features, dtype=np.float32)
    unit[off] /= lengths[off][:, None]
    return unit, int(off.sum())
