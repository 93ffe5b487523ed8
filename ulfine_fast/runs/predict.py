"""Classes of new images: the run's own encoder, then its heads."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ulfine_fast.cache.io.errors import CacheMismatch, InputError
from ulfine_fast.cache.io.progress import progress_bar
from ulfine_fast.cache.models.encoder import Encoder, load_encoder
from ulfine_fast.cache.pipeline.encode import encoded
from ulfine_fast.cache.pipeline.five_crops import NUM_CROPS, cropped
from ulfine_fast.cache.pipeline.plan import batches_of
from ulfine_fast.cache.pipeline.read import ImageReader
from ulfine_fast.cache.pipeline.views import ViewRecipe
from ulfine_fast.cache.sources import ImageFolder, ImageTable
from ulfine_fast.cache.sources.table import SUFFIXES
from ulfine_fast.metrics import classification as metrics

if TYPE_CHECKING:
    import pyarrow as pa

    from ulfine_fast.cache.sources import ListedSource
    from ulfine_fast.runs.run import Run

TOP = 5


@dataclass(frozen=True)
class Predictions:
    """Predicted classes.

    Attributes:
        ids: image ids (n,). probabilities: calibrated (n, K). class_names: (K,).
        skipped: id and reason of each image that could not be read.
        scores: how much each image looks like one of a known class (n,), written where there are any.
    """

    ids: list[str]
    probabilities: NDArray[np.float32]
    class_names: list[str]
    skipped: list[tuple[str, str]]
    scores: NDArray[np.float32] | None = None

    def to_arrow(self) -> pa.Table:
        """What `write_predictions` writes: `.to_pandas()` and `polars.from_arrow` make data frames of it."""
        import pyarrow as pa

        return pa.table(_columns(self))


def predict_images(
    run: Run,
    images: Path | Any,
    *,
    device: str = "auto",
    batch_size: int = 32,
    scorer: Callable[[NDArray[Any]], NDArray[np.float32]] | None = None,
    five_crops: bool = False,
) -> Predictions:
    """Encode images with the encoder named in the run and predict their classes.

    Args:
        run: a fitted run.
        images: an image, a folder of images at any depth, or a table with a column `path`; or a data
            frame of pandas or Polars with that column.
        device: where to encode.
        batch_size: images encoded at once, at least 1.
        scorer: features to probabilities, in place of `run.predict_proba`.
        five_crops: average the logits of four corners and the middle of each image (LIFT's test-time ensembling,
            arXiv 2309.10019), for five times the work.

    Raises:
        InputError: no images there, none readable, or a run without an encoder.
        CacheMismatch: the model's weights are no longer those that the run was fitted with.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    source = _images(images)
    encoder = encoder_of_run(run, device)
    skipped: list[tuple[str, str]] = []
    ids, features = encode_images(source, encoder, batch_size, skipped, 0 if five_crops else None)
    if not ids:
        raise InputError(f"none of the {len(skipped)} images at {images} can be read; the first: {skipped[0][1]}")
    # what cannot be read was told by the first pass
    others = (encode_images(source, encoder, batch_size, [], place)[1] for place in range(1, NUM_CROPS) if five_crops)
    score = scorer or run.predict_proba
    return Predictions(ids, ensembled([score(rows) for rows in (features, *others)]), run.class_names, skipped)


def ensembled(probabilities: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Probabilities (n, K) of the mean logits of several predictions (n, K); of one, itself."""
    if len(probabilities) == 1:
        return probabilities[0]
    # logits are known up to a shift of each row, which the softmax takes out again
    logs = [np.log(np.maximum(one, np.finfo(np.float32).tiny)) for one in probabilities]
    return metrics.softmax(np.mean(logs, axis=0)).astype(np.float32)


def encoder_of_run(run: Run, device: str) -> Encoder:
    """Load the encoder a run was fitted with, and refuse other weights under the same name.

    Raises:
        InputError: the run was fitted on plain arrays.
        CacheMismatch: the weights differ.
    """
    if run.encoder is None:
        raise InputError("this run was fitted on arrays, not on images; give features to Run.predict instead")
    *tokens, _ = run.row_shape
    features = {(): "projected", (1,): "pre-projection", (2,): "last-block"}[tuple(tokens)]
    # of runs of old, which do not say it, images were read exactly
    exact = run.encoder.get("exact", True)
    encoder = load_encoder(
        run.encoder["name"], run.encoder["pretrained"], device=device, features=features, exact=exact
    )
    if encoder.spec.sha256 != run.encoder["sha256"]:
        raise CacheMismatch(
            "model.sha256",
            run.encoder["sha256"],
            encoder.spec.sha256,
            fix="use the weights the run was fitted with",
        )
    return encoder


def write_predictions(found: Predictions, out: Path) -> None:
    """Write id, class, probability, then the next likeliest classes, as .csv or .parquet.

    Raises:
        InputError: another suffix, or a path that cannot be written.
    """
    columns = _columns(found)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".parquet":
            import pyarrow.parquet as pq

            pq.write_table(found.to_arrow(), out)
            return
        if out.suffix != ".csv":
            raise InputError(f"out must end in .csv or .parquet, got {out.name!r}")
        with out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from error


def _columns(found: Predictions) -> dict[str, list[Any]]:
    """The table's columns by name."""
    order = np.argsort(-found.probabilities, axis=1, kind="stable")  # (n, K)
    columns: dict[str, list[Any]] = {"id": found.ids}
    for place in range(min(TOP, order.shape[1])):
        ending = "" if place == 0 else f"_{place + 1}"
        best = order[:, place]
        columns[f"class{ending}"] = [found.class_names[k] for k in best]
        columns[f"probability{ending}"] = [round(float(p), 6) for p in found.probabilities[np.arange(len(best)), best]]
    if found.scores is not None:
        columns["score"] = [round(float(score), 6) for score in found.scores]
    return columns


def encode_images(
    source: ListedSource,
    encoder: Encoder,
    batch_size: int,
    skipped: list[tuple[str, str]],
    place: int | None = None,
) -> tuple[list[str], NDArray[np.float32]]:
    """Ids and plain features (n, D), or tokens (n, S, W), of the readable images; the others go to `skipped`.

    Args:
        source: of images.
        encoder: what takes them.
        batch_size: images encoded at once.
        skipped: id and reason are added for each that cannot be read.
        place: take one of five crops, 0 to 4 (`ulfine_fast.cache.pipeline.five_crops`), in place of the whole image.
    """
    ids: list[str] = []
    blocks = [np.zeros((0, encoder.columns), dtype=np.float32)]
    whole = ImageReader.for_encoder(source, encoder, ViewRecipe(weak=0, strong=0))
    reader = whole if place is None else cropped(whole, place)
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
    found = np.concatenate(blocks)
    if not encoder.token_kinds:
        return ids, found
    return ids, found[:, encoder.spec.dim :].reshape(len(found), -1, encoder.token_width)


def _images(where: Path | Any) -> ListedSource:
    """A table's rows, a single image, or every image below a folder."""
    listed = not isinstance(where, Path) or where.suffix.lower() in SUFFIXES
    return ImageTable(where) if listed else ImageFolder(where)
