"""Classes of new images: the run's own encoder, then its head."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.cache.io.errors import CacheMismatch, InputError
from ulfine_fast.cache.io.progress import progress_bar, working
from ulfine_fast.cache.manifest import is_cache
from ulfine_fast.cache.models.encoder import Encoder, load_encoder
from ulfine_fast.cache.pipeline.encode import encoded
from ulfine_fast.cache.pipeline.five_crops import NUM_CROPS, cropped
from ulfine_fast.cache.pipeline.plan import batches_of
from ulfine_fast.cache.pipeline.read import ImageReader
from ulfine_fast.cache.pipeline.views import ViewRecipe
from ulfine_fast.cache.sources import ImageFolder, ImageTable
from ulfine_fast.cache.sources.table import SUFFIXES
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.metrics import classification as metrics
from ulfine_fast.runs.calibration import Calibration, ClassSets, Rejected, class_sets, mean_calibration, reject
from ulfine_fast.runs.evaluate import inputs_of, refuse_other_encoder

if TYPE_CHECKING:
    import pyarrow as pa

    from ulfine_fast.cache.sources import ListedSource
    from ulfine_fast.runs.run import Run

TOP = 5


@dataclass(frozen=True)
class Predictions:
    """Predicted classes of new images.

    Attributes:
        ids: image ids (n,).
        probabilities: calibrated (n, K).
        class_names: (K,).
        skipped: id and reason of each image that could not be read.
        scores: how much each image looks like one of a known class (n,); None where that is not asked.
        rejected: which images are none of the classes; None likewise.
        sets: the classes of each image that cannot be excluded; None likewise.
    """

    ids: list[str]
    probabilities: NDArray[np.float32]
    class_names: list[str]
    skipped: list[tuple[str, str]]
    scores: NDArray[np.float32] | None = None
    rejected: Rejected | None = None
    sets: ClassSets | None = None

    def to_arrow(self) -> pa.Table:
        """The table that `write_predictions` writes; `.to_pandas()` and `polars.from_arrow` make data frames of it."""
        import pyarrow as pa

        return pa.table(self.columns())

    def columns(self) -> dict[str, list[Any]]:
        """The table's columns by name: id, class, probability, the next likeliest classes, what was asked of more."""
        order = np.argsort(-self.probabilities, axis=1, kind="stable")  # (n, K)
        columns: dict[str, list[Any]] = {"id": self.ids}
        for rank in range(min(TOP, order.shape[1])):
            ending = "" if rank == 0 else f"_{rank + 1}"
            classes = order[:, rank]
            probabilities = self.probabilities[np.arange(len(classes)), classes]
            columns[f"class{ending}"] = [self.class_names[k] for k in classes]
            columns[f"probability{ending}"] = [round(float(p), 6) for p in probabilities]
        if self.scores is not None:
            columns["score"] = [round(float(score), 6) for score in self.scores]
        if self.rejected is not None:
            columns["rejected"] = self.rejected.rejected.tolist()
        if self.sets is not None:
            columns["set"] = [[self.class_names[k] for k in np.flatnonzero(row)] for row in self.sets.sets]
        return columns

    def summary(self) -> dict[str, Any]:
        """JSON values: how many images, and what rejection and sets are calibrated on, where they were asked for."""
        about: dict[str, Any] = {"images": len(self.ids), "skipped": self.skipped}
        if self.rejected is not None:
            about["reject"] = self.rejected.summary()
        if self.sets is not None:
            about["sets"] = self.sets.summary(self.class_names)
        return about

    def lines(self) -> list[str]:
        """What a person should know of rejection and sets; none where they were not asked for."""
        rejected = [] if self.rejected is None else self.rejected.lines()
        return rejected + ([] if self.sets is None else self.sets.lines(self.class_names))


@dataclass(frozen=True)
class Scorer:
    """What makes predictions of features: a run, or an exported one.

    Attributes:
        probabilities: features (n, ...) to calibrated probabilities (n, K).
        scores: features to how much each image looks like one of a known class (n,).
        class_names: (K,).
        calibration: what rejection and sets are calibrated on, asked for where they are.
    """

    probabilities: Callable[[NDArray[Any]], NDArray[np.float32]]
    scores: Callable[[NDArray[Any]], NDArray[np.floating[Any]]]
    class_names: list[str]
    calibration: Callable[[], Calibration]

    @classmethod
    def of(cls, run: Run) -> Scorer:
        """The run's own predictions."""
        return cls(run.predict_proba, run.scores, run.class_names, run.calibrated)

    def check(self, rate: float | None, coverage: float | None, five_crops: bool = False) -> None:
        """Refuse a rate or coverage before any image is encoded.

        Raises:
            InputError: one outside 0..1, nothing to calibrate on, or five crops, which nothing is calibrated for.
        """
        if rate is None and coverage is None:
            return
        if five_crops:
            raise InputError("rejection and sets are calibrated on whole images; leave out five crops")
        calibration = self.calibration()
        if rate is not None:
            calibration.rejection_threshold(rate)
        if coverage is not None:
            calibration.set_thresholds(len(self.class_names), coverage)


class EncodedImages(NamedTuple):
    """Features of image files.

    Attributes:
        ids: ids of the readable images (n,).
        features: their plain features (n, D), or tokens (n, S, W).
        skipped: id and reason of each image that could not be read.
    """

    ids: list[str]
    features: NDArray[np.float32]
    skipped: list[tuple[str, str]]


def predict_images(
    run: Run,
    images: str | Path | Any,
    *,
    device: str = "auto",
    batch_size: int = 32,
    five_crops: bool = False,
    encoder: Encoder | None = None,
    scorer: Scorer | None = None,
    rate: float | None = None,
    coverage: float | None = None,
) -> Predictions:
    """Encode images with the encoder named in the run and predict their classes.

    Args:
        run: a fitted run.
        images: an image, a folder of images at any depth, or a table with a column `path`; or a data
            frame of pandas or Polars with that column; or what :func:`inputs_at` made of one of these.
        device: where to encode.
        batch_size: images encoded together, at least 1.
        five_crops: average the logits of four corners and the middle of each image (LIFT's test-time ensembling,
            arXiv 2309.10019), for five times the work.
        encoder: the run's encoder where it is loaded already, of two the first; None loads it.
        scorer: what makes predictions of the features, instead of the run itself.
        rate: fraction of the known classes' images that may be rejected as none of them; None rejects none.
        coverage: fraction of images whose set of classes holds their own; None makes no sets.

    Raises:
        InputError: no images there, none readable, or a run without an encoder; a rate or coverage outside 0..1, with
            five crops, or of a run without held-out labels.
        CacheMismatch: the model's weights are no longer those that the run was fitted with.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if isinstance(images, FeatureCache) and five_crops:
        raise InputError("five crops are of images, and a cache holds one feature of each; leave them out")
    if isinstance(images, FeatureCache):
        return predict_cache(run, images, scorer=scorer, rate=rate, coverage=coverage)
    scorer = scorer or Scorer.of(run)
    scorer.check(rate, coverage, five_crops)
    source = images_at(images)
    if encoder is None:
        with working("load model"):
            encoder = encoder_of_run(run, device)
    second = None
    if run.second is not None:
        with working("load the second model"):
            second = recorded_encoder(run.second.encoder, (run.input_shape[-1],), device)
    probabilities = []
    for crop in range(NUM_CROPS) if five_crops else (None,):
        ids, features, skipped = encode_images(source, encoder, batch_size, crop)
        if second is not None and ids:
            features = _both(features, encode_images(source, second, batch_size, crop).features)
        if not ids:
            where = source.describe()["path"]
            raise InputError(f"none of the {len(skipped)} images at {where} can be read; the first: {skipped[0][1]}")
        probabilities.append(scorer.probabilities(features))
    scores = None if rate is None else scorer.scores(features)
    return judged(ids, mean_of_logits(probabilities), scores, skipped, scorer, rate, coverage)


def predict_cache(
    run: Run,
    cache: FeatureCache,
    *,
    scorer: Scorer | None = None,
    rate: float | None = None,
    coverage: float | None = None,
) -> Predictions:
    """Predict the classes of all images of a cache; no encoder is loaded.

    Args:
        run: a fitted run.
        cache: features of the run's encoder, or of the same other program.
        scorer: see :func:`predict_images`.
        rate: likewise.
        coverage: likewise.

    Raises:
        InputError: a rate or coverage outside 0..1, or of a run without held-out labels.
        CacheMismatch: the features come from another encoder.
    """
    scorer = scorer or Scorer.of(run)
    scorer.check(rate, coverage)
    refuse_other_encoder(run, cache)
    inputs = inputs_of(run, cache)
    scores = None if rate is None else scorer.scores(inputs)
    return judged(list(cache.ids), scorer.probabilities(inputs), scores, [], scorer, rate, coverage)


def judged(
    ids: list[str],
    probabilities: NDArray[np.float32],
    scores: NDArray[np.floating[Any]] | None,
    skipped: list[tuple[str, str]],
    scorer: Scorer,
    rate: float | None,
    coverage: float | None,
) -> Predictions:
    """Predictions with what is rejected, where scores (n,) and a rate are given, and sets, where a coverage is."""
    return Predictions(
        ids,
        probabilities,
        scorer.class_names,
        skipped,
        None if scores is None else scores.astype(np.float32),
        None if rate is None or scores is None else reject(scorer.calibration(), scores, rate),
        None if coverage is None else class_sets(scorer.calibration(), probabilities, coverage),
    )


def images_at(where: str | Path | Any) -> ListedSource:
    """The rows of a table or data frame, a single image, or every image below a folder; what is that already stays."""
    if isinstance(where, (ImageTable, ImageFolder)):
        return where
    if not isinstance(where, (str, Path)):
        return ImageTable(where)
    path = Path(where)
    return ImageTable(path) if path.suffix.lower() in SUFFIXES else ImageFolder(path)


def inputs_at(where: Path) -> ListedSource | FeatureCache:
    """The features of a cache, or else images, see :func:`images_at`."""
    return FeatureCache.open(where) if is_cache(where) else images_at(where)


def mean_of_seeds(runs: Sequence[Run]) -> Scorer:
    """A scorer for :func:`predict_images`: mean probabilities (n, K) and scores (n,) of the seeds of one fit."""
    return Scorer(
        lambda features: np.mean([run.predict_proba(features) for run in runs], axis=0, dtype=np.float32),
        lambda features: np.mean([run.scores(features) for run in runs], axis=0, dtype=np.float32),
        runs[0].class_names,
        lambda: mean_calibration([run.calibrated() for run in runs]),
    )


def mean_of_logits(probabilities: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Probabilities (n, K) of the mean logits of several predictions (n, K); a single one stays as it is."""
    if len(probabilities) == 1:
        return probabilities[0]
    # log probabilities are logits but for a shift of each row, which the softmax removes
    logits = [np.log(np.maximum(values, np.finfo(np.float32).tiny)) for values in probabilities]
    return metrics.softmax(np.mean(logits, axis=0)).astype(np.float32)


def encoder_of_run(run: Run, device: str) -> Encoder:
    """Load the encoder a run was fitted with, see :func:`recorded_encoder`; of two, the first."""
    shape = run.input_shape
    if run.second is not None and run.config.reads_tokens:
        # one token or two, whose second encoder's feature follows
        shape = (2 if "backbone.projection" in run.tensors else 1, shape[-1])
    return recorded_encoder(run.encoder, shape, device)


def recorded_encoder(record: dict[str, Any] | None, input_shape: Sequence[int], device: str) -> Encoder:
    """Load the encoder that a run's record names, and refuse other weights under the same name.

    Args:
        record: :attr:`ulfine_fast.Run.encoder`.
        input_shape: what the run reads of one image: (D,), or (S, W) for tokens.
        device: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        InputError: the run was fitted on plain arrays.
        CacheMismatch: the weights differ.
    """
    if record is None:
        raise InputError("this run was fitted on arrays, not on images; give features to Run.predict instead")
    if not record["sha256"]:
        raise InputError(
            "the features that this run was fitted on were imported without --model, so that images cannot be encoded; "
            "predict a cache of features instead: ulfine-fast predict RUN CACHE"
        )
    *tokens, _ = input_shape
    encoder = load_encoder(
        record["name"],
        record["pretrained"],
        device=device,
        features={(): "projected", (1,): "pre-projection", (2,): "last-block"}[tuple(tokens)],
        # where the record does not say, images were read exactly
        exact=record.get("exact", True),
    )
    if encoder.spec.sha256 != record["sha256"]:
        raise CacheMismatch(
            "model.sha256",
            record["sha256"],
            encoder.spec.sha256,
            fix="use the weights the run was fitted with",
        )
    return encoder


def encode_images(source: ListedSource, encoder: Encoder, batch_size: int, crop: int | None = None) -> EncodedImages:
    """Encode the images of a source.

    Args:
        source: of images.
        encoder: the model.
        batch_size: images encoded together.
        crop: one of five crops, 0 to 4 (`ulfine_fast.cache.pipeline.five_crops`); None for the whole image.
    """
    ids: list[str] = []
    skipped: list[tuple[str, str]] = []
    blocks = [np.zeros((0, encoder.columns), dtype=np.float32)]
    reader = ImageReader.for_encoder(source, encoder, ViewRecipe(weak=0, strong=0))
    if crop is not None:
        reader = cropped(reader, crop)
    rows = batches_of(source.rows, batch_size)
    # starting reader processes pays only where there is enough to read
    workers = None if len(rows) > 2 else 0
    with progress_bar() as bar, closing(encoded(reader, encoder, rows, workers=workers)) as stream:
        task = bar.add_task("predict", total=len(source.rows), unit="images", note="")
        for batch in stream:
            skipped += [(row.id, reason) for row, reason in batch.skipped]
            ids += [row.id for row in batch.kept]
            if batch.kept:
                blocks.append(batch.features[:, 0])  # (B, D + S W)
            bar.advance(task, len(batch.kept) + len(batch.skipped))
    features = np.concatenate(blocks)
    if encoder.token_kinds:
        features = features[:, encoder.spec.dim :].reshape(len(features), -1, encoder.token_width)
    return EncodedImages(ids, features, skipped)


def _both(features: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a run of two encoders reads, of features (n, D) or tokens (n, S, W) and features (n, E) of the same images.

    Both encoders read the same files, so that both have skipped the same ones.
    """
    if features.ndim == 2:
        return np.concatenate([features, second], axis=1)
    return np.concatenate([features.reshape(len(features), 1, -1), second[:, None]], axis=2)


def refuse_output(out: Path) -> None:
    """Refuse a file that :func:`write_predictions` cannot write, before any image is encoded.

    Raises:
        InputError: another suffix, a folder of that name, or a folder that cannot be written.
    """
    if out.suffix not in (".csv", ".parquet"):
        raise InputError(f"out must end in .csv or .parquet, got {out.name!r}")
    if out.is_dir():
        raise InputError(f"{out} is a folder; name a file")
    if out.exists() and not out.is_file():  # a pipe would be waited for
        raise InputError(f"{out} is a pipe or a device; name a file")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"cannot write {out}: {above} is no folder that can be written; name another file")


def write_predictions(predictions: Predictions, out: Path) -> None:
    """Write id, class, probability, the next likeliest classes, and what was asked of more, as .csv or .parquet.

    Raises:
        InputError: another suffix, or a path that cannot be written.
    """
    refuse_output(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".parquet":
            import pyarrow.parquet as pq

            pq.write_table(predictions.to_arrow(), out)
            return
        columns = predictions.columns()
        with out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            # a set of names as a JSON list, since names may hold any sign
            cells = [
                [json.dumps(cell, ensure_ascii=False) if isinstance(cell, list) else cell for cell in column]
                for column in columns.values()
            ]
            writer.writerows(zip(*cells, strict=True))
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error
