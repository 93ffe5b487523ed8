"""What a student learns from: images, the teacher's probabilities, the labels that are known, and who is held out."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.progress import working
from ulfine_fast.cache.pipeline.plan import is_listed
from ulfine_fast.cache.sources import open_source
from ulfine_fast.cache.sources.huggingface import is_saved
from ulfine_fast.cache.sources.rows import UNKNOWN, Row
from ulfine_fast.data.splits import KEPT_BY_TRAINING, held_out_rows
from ulfine_fast.runs.evaluate import inputs_of, refuse_other_encoder
from ulfine_fast.runs.predict import encode_images, encoder_of_run, images_at, mean_of_seeds

if TYPE_CHECKING:
    from ulfine_fast.cache.sources import ListedSource
    from ulfine_fast.cache.store import FeatureCache
    from ulfine_fast.runs.run import Run

HELD_OUT_FRACTION = 0.1
"""Fraction of the run's images that a student is tested on where the run itself held none out."""


@dataclass(frozen=True)
class Teaching:
    """N images by the teacher, those that train the student and those that are held out.

    Attributes:
        source: of the images.
        rows: the images (N,); all in the split "unlabeled", so that views are drawn of each.
        probabilities: of the teacher, calibrated (N, K) float32.
        labels: classes of images whose label the student may see or is tested on (N,) int64; -1 for all others.
        trains: images that train the student (N,) bool.
        tests: images that it is tested on (N,) bool; none of them trains it.
        tests_from: where these come from, in words.
    """

    source: ListedSource
    rows: list[Row]
    probabilities: NDArray[np.float32]
    labels: NDArray[np.int64]
    trains: NDArray[np.bool_]
    tests: NDArray[np.bool_]
    tests_from: str


def images_of_run(where: str | Path | Any) -> ListedSource:
    """The images that a run's cache was extracted from: a folder, a table, a data frame, or a data set by name.

    Raises:
        InputError: none of these, or files of images that are streamed.
    """
    if not isinstance(where, (str, Path)) or (os.path.exists(where) and not is_saved(Path(where))):
        return images_at(where)
    source = open_source(where)
    if not is_listed(source):
        raise InputError(f"{where} is read as a stream, and training reads images in any order; unpack it to a folder")
    return source


def teach(
    runs: Sequence[Run],
    source: ListedSource,
    *,
    cache: FeatureCache | None,
    device: str,
    batch_size: int,
    seed: int,
) -> Teaching:
    """Soft labels of all images, by the mean of the runs; features come from the cache where it has them.

    Test and validation images of any run never train the student. It is tested on the test images of all runs, else on
    their validation images, else on a tenth of the images, drawn class by class, which then do not train it.

    Args:
        runs: one, or several seeds of one fit.
        source: of the images.
        cache: that the runs were fitted on; None encodes every image and knows the labels of held-out images alone.
        device: where to encode.
        batch_size: images encoded together.
        seed: of the tenth.

    Raises:
        InputError: the images of a run are not there, or none can be read.
        CacheMismatch: the cache has features of another encoder.
    """
    rows = {row.id: row for row in source.rows}
    refuse_missing_images(runs, rows)
    probabilities = _soft_labels(runs, source, cache, device, batch_size)  # of the readable ones
    ids = [id for id in rows if id in probabilities]

    # who is held out
    tests_of = [set(run.split["test"]) for run in runs]
    validation_of = [set(run.split["val"]) for run in runs]
    tests, never = set.intersection(*tests_of), set.union(*tests_of, *validation_of)
    tests_from = "the run's test split"
    if not tests:
        tests, tests_from = set.intersection(*validation_of), "the run's validation images"
    known = _known_labels(runs, cache, never)
    labels = np.array([known.get(id, UNKNOWN) for id in ids], dtype=np.int64)
    if not tests:
        pools = [np.flatnonzero(labels == k) for k in range(UNKNOWN, len(runs[0].class_names))]
        random = np.random.default_rng(seed)
        drawn, _ = held_out_rows([random.permutation(pool) for pool in pools], HELD_OUT_FRACTION, KEPT_BY_TRAINING)
        tests = {ids[row] for row in drawn}
        tests_from = f"{HELD_OUT_FRACTION:.0%} of them, as the run, which learned from their labels, held none out"
    is_test = np.array([id in tests for id in ids], dtype=np.bool_)
    trains = ~is_test & np.array([id not in never for id in ids], dtype=np.bool_)
    return Teaching(
        source,
        # rows of validation and test have no views
        [Row(id, UNKNOWN, "unlabeled", rows[id].location, rows[id].bytes) for id in ids],
        np.stack([probabilities[id] for id in ids]),
        labels,
        trains,
        is_test,
        tests_from,
    )


def refuse_missing_images(runs: Sequence[Run], rows: Mapping[str, Any]) -> None:
    """Refuse images among which those of a run are not.

    Raises:
        InputError: says how many are missing, and names the first one.
    """
    roles = ("labeled", "unlabeled", "val", "test")
    ids = list(dict.fromkeys(id for run in runs for role in roles for id in run.split[role]))
    missing = [id for id in ids if id not in rows]
    if missing:
        raise InputError(
            f"{len(missing)} of the run's {len(ids)} images are not there, such as {missing[0]}; name the folder or "
            "table that its cache was extracted from"
        )


def _soft_labels(
    runs: Sequence[Run], source: ListedSource, cache: FeatureCache | None, device: str, batch_size: int
) -> dict[str, NDArray[np.float32]]:
    """Probabilities (K,) of each readable image, by its id."""
    teacher = mean_of_seeds(runs)
    wanted = {row.id for row in source.rows}
    soft: dict[str, NDArray[np.float32]] = {}
    if cache is not None:
        refuse_other_encoder(runs[0], cache)
        kept = np.array([row for row, id in enumerate(cache.ids) if id in wanted], dtype=np.int64)
        inputs = inputs_of(runs[0], cache)[kept]
        soft = dict(zip([cache.ids[row] for row in kept], teacher.probabilities(inputs), strict=True))

    rest = copy.copy(source)
    rest.rows = [row for row in source.rows if row.id not in soft]
    if rest.rows:
        with working("load model"):
            encoder = encoder_of_run(runs[0], device)
        encoded = encode_images(rest, encoder, batch_size)
        if encoded.ids:
            soft.update(zip(encoded.ids, teacher.probabilities(encoded.features), strict=True))
    if not soft:
        raise InputError(f"none of the {len(source.rows)} images can be read")
    return soft


def _known_labels(runs: Sequence[Run], cache: FeatureCache | None, held_out: set[str]) -> dict[str, int]:
    """Class indices by image id: of the images that are labelled in each run, and of those that are held out."""
    known: dict[str, int] = {}
    if cache is not None:
        names = {name: k for k, name in enumerate(runs[0].class_names)}
        usable = set.intersection(*(set(run.split["labeled"]) for run in runs)) | held_out
        for id, label in zip(cache.ids, cache.labels, strict=True):
            if label >= 0 and id in usable:
                known[id] = names.get(cache.class_names[label], UNKNOWN)
    for run in runs:
        known.update(zip(run.test_ids, run.test_labels.tolist(), strict=True))
        if run.calibration is not None:
            validation = run.calibration.of_validation()
            known.update(zip(validation.ids, validation.labels.tolist(), strict=True))
    return known
