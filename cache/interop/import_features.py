"""Features that another program made to a cache: checked row by row, with the texts of its classes beside them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ulfine_fast._version import __version__
from ulfine_fast.cache.arrays import refuse_equal_texts
from ulfine_fast.cache.ids import refuse_shared_ids
from ulfine_fast.cache.interop.arrays import open_arrays
from ulfine_fast.cache.interop.clip_retrieval import open_clip_retrieval
from ulfine_fast.cache.interop.embedding_table import FRAME, is_embedding_table, open_embedding_table
from ulfine_fast.cache.interop.export import FORMAT, NOTE
from ulfine_fast.cache.interop.external_features import ExternalFeatures, OpenedFiles, RowLabels, check_texts
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.json_files import check_schema, read_json
from ulfine_fast.cache.io.names import did_you_mean, one_of
from ulfine_fast.cache.io.paths import to_path
from ulfine_fast.cache.io.tables import label_key
from ulfine_fast.cache.manifest import Manifest
from ulfine_fast.cache.models.prompts import DEFAULT_PROMPTS, fill_prompts
from ulfine_fast.cache.pipeline.fill import FillSummary, ShardContent, create_cache, ready_shards
from ulfine_fast.cache.shard import VIEWED_SPLITS, Shard
from ulfine_fast.cache.sources.rows import SPLITS, UNKNOWN, Part
from ulfine_fast.cache.text import TextFeatures, average, encode_classes

if TYPE_CHECKING:
    from ulfine_fast.cache.models.encoder import Encoder

UNKNOWN_MODEL = "unknown"
DTYPES = ("float16", "float32")
_LOGIT_SCALE = 100.0  # what CLIP's models were trained up to
# Rows further from length 1 are rescaled: rounding to float16 moves a length by less, another normalisation by more.
_TOLERANCE = 0.01
_SAMPLED_ROWS = 64  # of each file, in the fingerprint
_IDS_AT_A_TIME = 65536


# -- opening


def open_features(
    where: str | Path | Any,
    *,
    class_names: Sequence[str] | None = None,
    column: str | None = None,
    label_column: str | None = None,
    id_column: str | None = None,
    split: str | None = None,
) -> ExternalFeatures:
    """Opens features of another program; nothing is unpickled, and features stay on the disk.

    Args:
        where: a folder of clip-retrieval (`img_emb` and `metadata`), a folder of .npy files or an .npz file with
            `features` and perhaps labels, ids, splits, weak, strong, class_names, text_features, one .npy file; or
            a table with a column of features, as `open_embedding_table` takes it: parquet, Lance, a saved data set of
            Hugging Face, a data frame.
        class_names: (K,) in the order of the labels; replace those of the files.
        column: of a table's features; by default the only one of lists of floats.
        label_column: of the metadata or the table; "label" by default, where there is one.
        id_column: likewise; id, image_path or key by default.
        split: of rows without one; by default train where the label is known, else unlabeled.

    Raises:
        InputError: no such files, or files that do not fit together; names the file.
    """
    path = Path(where).expanduser().absolute() if isinstance(where, (str, Path)) else FRAME
    if split is not None and split not in SPLITS:
        raise one_of("split", split, SPLITS)
    table = path if isinstance(where, (str, Path)) else where
    is_table = is_embedding_table(table)
    if column is not None and not is_table:
        raise InputError(f"{path} is no table; leave out the column {column!r} of features")
    if is_table:
        opened = open_embedding_table(table, column, label_column, id_column)
    elif (path / "img_emb").is_dir():
        opened = open_clip_retrieval(path, label_column, id_column)
    elif label_column or id_column:
        raise InputError(f"{path} has no metadata with columns; leave out the names of columns")
    else:
        opened = open_arrays(path)

    names = _class_names(path, opened, class_names)
    labels = _class_indices(path, opened.rows, names)
    default_split = np.where(labels >= 0, SPLITS.index("train"), SPLITS.index("unlabeled"))
    if split is not None:
        default_split[:] = SPLITS.index(split)
    features = ExternalFeatures(
        path=path,
        files=opened.files,
        blocks=opened.blocks,
        labels=labels,
        splits=np.where(opened.rows.splits >= 0, opened.rows.splits, default_split).astype(np.int8),
        class_names=names,
        weak=opened.arrays.get("weak"),
        strong=opened.arrays.get("strong"),
        text_features=opened.arrays.get("text_features"),
        manifest=_exported_manifest(path),
    )

    n, m = len(features.labels), len(features.view_rows)
    for name, views in (("weak", features.weak), ("strong", features.strong)):
        if views is None:
            continue
        shape_fits = views.ndim == 3 and views.shape[0] in (n, m) and views.shape[2] == features.dim
        if not shape_fits or views.dtype.kind != "f":
            raise InputError(
                f"{name} of {path} must be floats (m, V, D) with the m = {m} rows of train and unlabeled (or all "
                f"{n}) and D = {features.dim}, got {views.shape} of {views.dtype}"
            )
    return features


def _class_names(path: Path, opened: OpenedFiles, class_names: Sequence[str] | None) -> list[str]:
    """The user's class names, those in the files, or the labels themselves in their order."""
    if class_names is not None:
        names = list(class_names)
    elif "class_names" in opened.arrays:
        array = opened.arrays["class_names"]
        names = check_texts(array, len(array) if array.ndim else 0, f"class_names of {path}")
    else:
        names = sorted(opened.rows.names or [])
    names = [label_key(name) for name in names]
    if not names:
        raise InputError(
            f"nothing in {path} names the classes; give --class-names FILE, one name a line in label order"
        )
    name, times = Counter(names).most_common(1)[0]
    if times > 1 or "" in names:
        raise InputError(
            f"the class names of {path} must be different texts, got {name!r} {times} times or an empty one"
        )
    return names


def _class_indices(path: Path, rows: RowLabels, class_names: list[str]) -> NDArray[np.int32]:
    """Labels (N,) as indices into the class names."""
    if rows.names is not None:
        unknown = sorted(set(rows.names) - set(class_names))
        if unknown:
            raise InputError(
                f"{path} has the label {unknown[0]!r}, which is none of the {len(class_names)} class names"
                f"{did_you_mean(unknown[0], class_names)}"
            )
        index = {name: label for label, name in enumerate(class_names)}
        return np.array([*(index[name] for name in rows.names), UNKNOWN], dtype=np.int32)[rows.labels]
    wrong = rows.labels[(rows.labels < UNKNOWN) | (rows.labels >= len(class_names))]
    if len(wrong):
        raise InputError(
            f"{path} has the label {wrong[0]}, labels are -1 or an index into the {len(class_names)} class names"
        )
    return rows.labels


def _exported_manifest(path: Path) -> Manifest | None:
    """The manifest in the note of this tool's own export; None where there is none.

    Raises:
        InputError: the note is damaged: without it the model, the prompts and the logit scale would be others.
    """
    if not (path / NOTE).exists():
        return None
    fix = "export the cache again, or remove this file to import the features as those of an unknown model"
    note = read_json(path / NOTE, dict[str, Any], fix=fix)
    if note.get("format") != FORMAT:
        return None
    try:
        return Manifest.from_dict(check_schema(note.get("manifest"), dict[str, Any], name=str(path / NOTE), fix=fix))
    except InputError as error:
        raise InputError(f"{path / NOTE} cannot be used: {error}; {fix}") from error


# -- importing


def import_features(
    features: ExternalFeatures,
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
) -> FillSummary:
    """Makes a cache of features that were opened from files.

    The texts of the classes come from `encoder`, else from `text_features`, else from the files. Rows whose length is
    off by more than a hundredth get length 1; others are kept to the last bit. One shard is in memory at a time, beside
    labels and splits (5 bytes a row) and ids while they are compared (8 bytes a row).

    Args:
        features: see `open_features`.
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
        raise one_of("dtype", dtype, DTYPES)
    if shard_size < 1:
        raise InputError(f"shard size must be at least 1, got {shard_size}")
    if logit_scale is not None and not 0 < logit_scale < float("inf"):
        raise InputError(f"logit scale must be above 0, got {logit_scale}")
    if encoder is not None:
        wanted = list(prompts or DEFAULT_PROMPTS)
        text = _encode_text(features, encoder, wanted, logit_scale)
    else:
        text, wanted = _text_from_arguments(features, text_features, prompts, logit_scale)
    n = len(features.labels)
    starts = range(0, n, _IDS_AT_A_TIME)
    refuse_shared_ids(
        lambda: (features.ids(np.arange(start, min(start + _IDS_AT_A_TIME, n))) for start in starts),
        "give another --id-column, or leave ids out",
    )
    manifest = _import_manifest(features, encoder, model, text, wanted, dtype or features.dtype, shard_size)

    # Shards split by split, rows in their order inside a split.
    parts: list[Part] = []
    rows_of_part: dict[int, NDArray[np.int64]] = {}
    first_row = 0
    for number, split in enumerate(SPLITS):
        rows = np.flatnonzero(features.splits == number)  # (n,)
        for start in range(0, len(rows), shard_size):
            chosen = rows[start : start + shard_size]
            rows_of_part[len(parts)] = chosen
            parts.append(Part(len(parts), split, first_row, len(chosen)))
            first_row += len(chosen)
    normalised = 0

    def content(part: Part) -> ShardContent:
        nonlocal normalised
        shard, changed = _make_shard(features, manifest, part.split, rows_of_part[part.number])
        normalised += changed
        return ShardContent(shard)

    path = to_path(out)
    summary = create_cache(
        path,
        manifest,
        parts,
        ready_shards(path, content),
        text=lambda: text,
        mismatch_fix=f"{path} holds another cache, so choose another folder or remove it",
        label="import",
        progress=progress,
    )
    return replace(summary, normalised=normalised)


def _encode_text(
    features: ExternalFeatures, encoder: Encoder, prompts: Sequence[str], logit_scale: float | None
) -> TextFeatures:
    """Texts of the classes from the model that made the features."""
    if encoder.spec.dim != features.dim:
        raise InputError(
            f"{encoder.spec.name} gives features of length {encoder.spec.dim}, those of {features.path} have "
            f"{features.dim}; name the model that made them"
        )
    text = encode_classes(encoder, fill_prompts(features.class_names, prompts))
    return text if logit_scale is None else replace(text, logit_scale=logit_scale)


def _text_from_arguments(
    features: ExternalFeatures,
    text_features: NDArray[Any] | None,
    prompts: Sequence[str] | None,
    logit_scale: float | None,
) -> tuple[TextFeatures, list[str]]:
    """Texts of the classes that exist already, and the P prompts that the manifest names."""
    array = features.text_features if text_features is None else text_features
    if array is None:
        raise InputError(
            f"{features.path} has no text features of the classes; give --model, which encodes their names, or "
            "--text-features FILE.npy"
        )
    if array.dtype.kind != "f":
        raise InputError(f"text features must be floats, got {array.dtype}")
    classes, dim = len(features.class_names), features.dim
    shaped = np.asarray(array, dtype=np.float32)
    shaped = shaped[:, None] if shaped.ndim == 2 else shaped  # (K, P, D)
    if shaped.ndim != 3 or (shaped.shape[0], shaped.shape[2]) != (classes, dim) or shaped.shape[1] == 0:
        raise InputError(
            f"text features must be (K, P, D) = ({classes}, P, {dim}) or ({classes}, {dim}), got {array.shape}"
        )
    unit = _unit_rows(shaped, lambda row: f"text features of class {row}")[0]
    refuse_equal_texts(unit, features.class_names)

    # Prompts: the user's, those of the exported cache, or names for texts that nothing is known of.
    count = unit.shape[1]
    if prompts is not None and len(prompts) != count:
        raise InputError(f"there are {count} text features a class and {len(prompts)} prompts; they must go together")
    names = list(prompts or ([] if features.manifest is None else features.manifest.prompts))
    if len(names) != count:
        names = ["{}"] if count == 1 else [f"{{}} (text {number} of {count})" for number in range(1, count + 1)]
    exported_scale = _LOGIT_SCALE if features.manifest is None else float(features.manifest.model["logit_scale"])
    filled = fill_prompts(features.class_names, names)
    return TextFeatures(filled, unit, average(unit), logit_scale or exported_scale), names


def _import_manifest(
    features: ExternalFeatures,
    encoder: Encoder | None,
    model: str | None,
    text: TextFeatures,
    prompts: list[str],
    dtype: str,
    shard_size: int,
) -> Manifest:
    """The manifest of the cache; `model` names a model that is not loaded."""
    if encoder is not None:
        model_fields = asdict(encoder.spec)
    else:
        # An empty digest: the weights are unknown, so only the name can tell that two models are the same.
        model_fields = {"name": model or UNKNOWN_MODEL, "pretrained": None, "sha256": "", "image_size": 0}
    fields: dict[str, Any] = {
        "model": model_fields,
        "preprocessing": "unknown" if encoder is None else encoder.preprocessing,
        "mean": [] if encoder is None else list(encoder.mean),
        "std": [] if encoder is None else list(encoder.std),
        "precision": "unknown",
        "batch_size": 1,
        "views": {"seed": 0},
    }
    # An exported cache knows more, unless the command line names another model.
    if features.manifest is not None and encoder is None and model is None:
        fields |= {name: getattr(features.manifest, name) for name in (*fields, "libraries")}
    fields["model"] = {
        **fields["model"],
        "dim": features.dim,
        "logit_scale": text.logit_scale,
        "normalized": True,
    }
    weak, strong = (0 if views is None else views.shape[1] for views in (features.weak, features.strong))
    fields["views"] = {**fields["views"], "weak": weak, "strong": strong}
    return Manifest(
        **fields,
        dtype=dtype,
        shard_size=shard_size,
        class_names=features.class_names,
        prompts=prompts,
        source={
            "kind": "import",
            "path": str(features.path),
            "rows": len(features.labels),
            "fingerprint": _fingerprint(features, text),
        },
        created_by=f"ulfine-fast {__version__}",
    )


def _fingerprint(features: ExternalFeatures, text: TextFeatures) -> str:
    """Hex sha256 over names and sizes of the files, labels, splits, texts, and some rows of each block and view."""
    digest = hashlib.sha256()
    for file in features.files:
        digest.update(f"{file.name}\0{file.stat().st_size}\n".encode())
    views = [views for views in (features.weak, features.strong) if views is not None and len(views)]
    for rows in [*(block.features for block in features.blocks), *views]:
        sampled = np.unique(np.linspace(0, len(rows) - 1, _SAMPLED_ROWS).astype(np.int64))
        digest.update(np.ascontiguousarray(rows[sampled]).tobytes())
    array: NDArray[Any]
    for array in (features.labels, features.splits, text.features):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _make_shard(
    features: ExternalFeatures, manifest: Manifest, split: str, rows: NDArray[np.int64]
) -> tuple[Shard, int]:
    """Some rows (n,) as a shard, and how many of them (views included) got length 1."""
    dtype = manifest.layout("train").array_dtype
    ids = features.ids(rows)
    plain, normalised = _unit_rows(features.features(rows), lambda row: f"features of {ids[row]!r}")
    views: dict[str, NDArray[Any]] = {}
    for kind, array in (("weak", features.weak), ("strong", features.strong)):
        if array is None or split not in VIEWED_SPLITS:
            views[kind] = np.empty((len(rows), 0, features.dim), dtype)
            continue
        has_every_row = len(array) == len(features.labels)
        indices = rows if has_every_row else np.searchsorted(features.view_rows, rows)
        unit, changed = _unit_rows(array[indices], lambda row: f"features of {ids[row]!r}")
        views[kind] = unit.astype(dtype)  # (n, V, D)
        normalised += changed
    drawn = views["weak"].shape[1] + views["strong"].shape[1]
    shard = Shard(
        split=split,
        ids=ids,
        labels=features.labels[rows],
        plain=plain.astype(dtype)[:, None],  # (n, 1, D)
        weak=views["weak"],
        strong=views["strong"],
        # It is unknown how these views were drawn.
        scale=np.zeros((len(rows), drawn), np.float32),
        flip=np.zeros((len(rows), drawn), np.uint8),
        view_seed=manifest.views["seed"],
    )
    return shard, normalised


def _unit_rows(features: NDArray[Any], what: Callable[[int], str]) -> tuple[NDArray[Any], int]:
    """Rows (n, ..., D) of length 1, and how many were not; those that were stay to the last bit.

    Raises:
        InputError: a row that is not finite, or all zeros.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.sqrt(np.square(features, dtype=np.float32).sum(axis=-1))  # (n, ...)
    bad = ~np.isfinite(features).all(axis=-1) | ~np.isfinite(lengths) | (lengths == 0)
    if bad.any():
        row = int(np.argwhere(bad)[0][0])
        raise InputError(f"the {what(row)} are not finite, or all zeros; fix or remove the row and import again")
    off = np.abs(lengths - 1) > _TOLERANCE
    if not off.any():
        return features, 0
    unit = np.array(features, dtype=np.float32)
    unit[off] /= lengths[off][:, None]
    return unit, int(off.sum())
