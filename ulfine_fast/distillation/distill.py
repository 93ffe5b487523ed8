"""A run to a student: soft labels, training, its own metrics, and an export folder."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save

from ulfine_fast.cache.io.device import pick_device
from ulfine_fast.cache.io.digests import file_digest
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import write_atomically
from ulfine_fast.cache.manifest import is_cache
from ulfine_fast.data.corrections import corrected, read_corrections
from ulfine_fast.distillation.teaching import Teaching, images_of_run, refuse_missing_images, teach
from ulfine_fast.distillation.train import Checkpoint, Schedule, student_logits, train_student, training_identity
from ulfine_fast.exports.card import student_card
from ulfine_fast.exports.config import CARD, CONFIG, FORMATS, student_config, write_config
from ulfine_fast.exports.images import image_reader
from ulfine_fast.exports.student import Student
from ulfine_fast.exports.write import refuse_without_onnx, write_onnx
from ulfine_fast.metrics import classification as metrics
from ulfine_fast.metrics.intervals import balanced_difference
from ulfine_fast.runs.calibration import Calibration
from ulfine_fast.runs.evaluate import open_cache
from ulfine_fast.runs.folder import CHECKPOINT, LOCK, locked

if TYPE_CHECKING:
    from ulfine_fast.cache.sources import ListedSource
    from ulfine_fast.cache.store import FeatureCache
    from ulfine_fast.runs.run import Run

# what an interrupted call leaves, beside a checkpoint
_UNFINISHED = {CHECKPOINT, CONFIG, LOCK, FORMATS["safetensors"], FORMATS["onnx"], CARD}


@dataclass(frozen=True)
class Distilled:
    """What a call of `distill` made.

    Attributes:
        folder: the export folder; `ulfine_fast.load` opens it.
        about: JSON values, those under "student" in its config.json.
    """

    folder: Path
    about: dict[str, Any]

    def lines(self) -> list[str]:
        """What a person should know of it."""
        about, own, teacher = self.about, self.about["metrics"], self.about["teacher_metrics"]
        agreement = "" if about["agreement"] is None else f"; it agrees with its teacher on {about['agreement']:.1%}"
        lines = [
            f"{about['timm']}, {about['parameters'] / 1e6:.2f} million parameters: {self.folder}",
            f"trained on {about['images']} images, {about['labels']} of them with their label; tested on "
            f"{about['held_out']}, {about['held_out_from']}{agreement}",
        ]
        if own:
            lines.append(
                f"balanced accuracy {100 * own['balanced_accuracy']:.1f}, that of its teacher "
                f"{100 * teacher['balanced_accuracy']:.1f} ({about['held_out_labels']} labels)"
            )
        return lines


def distill(
    runs: Run | Sequence[Run],
    images: str | Path | ListedSource | Any,
    out: str | Path,
    *,
    student: str,
    cache: FeatureCache | None = None,
    image_size: int | None = None,
    epochs: int = Schedule.epochs,
    batch_size: int = Schedule.batch_size,
    lr: float = Schedule.lr,
    label_weight: float = Schedule.label_weight,
    seed: int = Schedule.seed,
    pretrained: bool = False,
    weights: str | Path | None = None,
    onnx: bool = False,
    device: str = "auto",
    workers: int | None = None,
) -> Distilled:
    """Trains a small timm network on a run's soft labels, and writes it as a folder that `ulfine_fast.load` opens.

    Distillation of Hinton et al., arXiv 1503.02531, at temperature 1. Interrupted, the same call goes on after the last
    finished epoch.

    Args:
        runs: the teacher, or several seeds of one fit, whose probabilities are averaged.
        images: those of the run, as `images_of_run` takes them; further ones are used as unlabelled.
        out: a new or empty folder, or what an interrupted call left.
        student: name of a timm model, such as "mobilenetv3_small_050".
        cache: that the runs were fitted on, with the same labels: its features are taken instead of encoding images
            again. None encodes all images, and mixes no labels in.
        image_size: H and W of the student's input, in pixels; None for what timm's model was designed for.
        epochs: times that each image is seen, at least 1.
        batch_size: images of a step, at least 2.
        lr: largest learning rate, above 0.
        label_weight: part of a labelled image's target that is its label, 0..1.
        seed: of weights, order and views.
        pretrained: whether to start from timm's weights, which are downloaded.
        weights: a safetensors file with weights of the same network to start from.
        onnx: whether to write `model.onnx` too.
        device: "auto", "cpu", "cuda" or "cuda:N".
        workers: threads or processes that read images; by default one for each core.

    Raises:
        InputError: an unknown student, images that are not those of the run, a folder with something in it, a value out
            of range, weights that cannot be had, or a package that is missing.
        CacheMismatch: the cache has features of another encoder.
    """
    # what can be refused before minutes of work
    teachers = list(runs) if isinstance(runs, Sequence) else [runs]
    schedule = Schedule(epochs, batch_size, lr, label_weight, seed)
    folder = Path(out)
    refuse_used_folder(folder)
    if onnx:
        refuse_without_onnx()
    target = pick_device(device)
    if pretrained and weights is not None:
        raise InputError("weights come from timm (--pretrained) or from a file (--weights); give one of them")
    if label_weight and cache is not None and any(run.relabeled != cache.relabeled for run in teachers):
        raise InputError(
            "the run was fitted with other labels; name the table of its corrected labels with --labels, or mix none "
            "in with --label-weight 0"
        )
    source = images_of_run(images)
    refuse_missing_images(teachers, {row.id: row for row in source.rows})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Student(
            student,
            len(teachers[0].class_names),
            image_size,
            pretrained=pretrained,
            weights=None if weights is None else Path(weights),
        )

    with locked(folder):
        # training, from where an interrupted call stopped
        identity = training_identity(
            schedule,
            student=student,
            image_size=network.image_size,
            pretrained=pretrained,
            weights=None if weights is None else file_digest(Path(weights)),
            run=_digest(teachers),
            images=len(source.rows),
        )
        checkpoint = Checkpoint(folder / CHECKPOINT, identity)
        teaching = teach(teachers, source, cache=cache, device=device, batch_size=32, seed=seed)
        trained = np.flatnonzero(teaching.trains)
        if len(trained) < 2:
            raise InputError(
                f"{len(trained)} images are left to train a student beside those held out; name more images"
            )
        reader = image_reader(teaching.source, network.preprocessing, on_device=target.type != "cpu")
        targets = mixed_targets(teaching, schedule.label_weight)
        train_student(
            network,
            reader,
            [teaching.rows[row] for row in trained],
            targets[trained],
            schedule,
            target,
            checkpoint,
            workers=workers,
        )

        # what it does on images that it has not seen
        held_out = np.flatnonzero(~teaching.trains)
        logits = student_logits(
            network, reader, [teaching.rows[row] for row in held_out], target, batch_size, workers=workers
        )
        about = {
            "teacher": teachers[0].config.method,
            "seeds": len(teachers),
            "images": len(trained),
            "labels": int((teaching.labels[trained] >= 0).sum()) if schedule.label_weight else 0,
            "label_weight": schedule.label_weight,
            "epochs": epochs,
            "seed": seed,
            "onnx": onnx,
            **_results(teachers, teaching, held_out, logits),
        }
        calibration = _own_calibration(teachers, teaching, held_out, logits)

        # the files, config.json last: with it the folder is a model
        network.to("cpu")
        network.network.to(memory_format=torch.contiguous_format)
        config = student_config(teachers[0], network, calibration, about)
        tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
        write_atomically(folder / FORMATS["safetensors"], save(tensors))
        if onnx:
            random = torch.Generator().manual_seed(0)
            side = network.image_size
            example = torch.randint(0, 256, (3, side, side, 3), dtype=torch.uint8, generator=random)
            write_onnx(folder / FORMATS["onnx"], network, example, config)
        write_atomically(folder / CARD, student_card(config).encode("utf-8", "backslashreplace"))
        write_config(folder, config)
        shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
    return Distilled(folder, config["student"])


def cache_of_runs(runs: Sequence[Run], path: Path | None, labels: Path | None) -> FeatureCache | None:
    """The cache that runs were fitted on, under corrected labels where there are any; None where it is gone.

    Args:
        runs: of one fit.
        path: of the cache where it has moved; None for where it was.
        labels: table of corrected labels.

    Raises:
        InputError: no cache at `path`, or labels without a cache.
    """
    if path is None and labels is None and (runs[0].cache_path is None or not is_cache(runs[0].cache_path)):
        return None
    cache = open_cache(runs[0], path)
    return cache if labels is None else corrected(cache, read_corrections(labels))


def refuse_used_folder(folder: Path) -> None:
    """Refuse a folder with anything but what an interrupted call left there.

    Raises:
        InputError: it is a file or holds something else.
    """
    if not folder.exists():
        return
    if folder.is_dir():
        names = {path.name.removesuffix(".tmp") for path in folder.iterdir()}
        if names <= {LOCK} or (CHECKPOINT in names and names <= _UNFINISHED and not (folder / CONFIG).exists()):
            return
    raise InputError(f"{folder} exists and is not an empty folder; choose a new one")


def mixed_targets(teaching: Teaching, label_weight: float) -> NDArray[np.float32]:
    """Probabilities to learn (N, K): the teacher's, and of labelled images partly their label."""
    targets = teaching.probabilities.copy()
    rows = np.flatnonzero(teaching.labels >= 0)
    targets[rows] *= 1 - label_weight
    targets[rows, teaching.labels[rows]] += label_weight
    return targets


def _results(
    runs: Sequence[Run], teaching: Teaching, held_out: NDArray[np.int64], logits: NDArray[np.float32]
) -> dict[str, Any]:
    """Agreement with the teacher on the images that the student is tested on, and metrics of both by their labels."""
    tested = teaching.tests[held_out]
    rows, own = held_out[tested], logits[tested]
    teacher = np.log(np.maximum(teaching.probabilities[rows], np.finfo(np.float32).tiny))
    labels = teaching.labels[rows]
    labelled = labels >= 0
    counts = np.array(runs[0].metrics.get("class_counts") or [0] * len(runs[0].class_names), dtype=np.int64)
    right = [(values.argmax(axis=1) == labels)[labelled].astype(float) for values in (own, teacher)]
    difference = balanced_difference(right[0] - right[1], labels[labelled]) if labelled.any() else None
    return {
        "held_out": len(rows),
        "held_out_from": teaching.tests_from,
        "held_out_labels": int(labelled.sum()),
        "agreement": float((own.argmax(axis=1) == teacher.argmax(axis=1)).mean()) if len(rows) else None,
        "metrics": metrics.classification(own[labelled], labels[labelled], counts),
        "teacher_metrics": metrics.classification(teacher[labelled], labels[labelled], counts),
        "difference": None
        if difference is None
        else {
            "mean": difference.mean,
            "low": difference.mean - difference.half,
            "high": difference.mean + difference.half,
        },
    }


def _own_calibration(
    runs: Sequence[Run], teaching: Teaching, held_out: NDArray[np.int64], logits: NDArray[np.float32]
) -> Calibration:
    """The validation images of all runs as the student sees them; test images are for its results alone."""
    ids = set.intersection(*(set(run.split["val"]) for run in runs))
    chosen = [n for n, row in enumerate(held_out) if teaching.rows[row].id in ids and teaching.labels[row] >= 0]
    if not chosen:
        return _no_calibration()
    rows = held_out[chosen]
    scores = torch.logsumexp(torch.from_numpy(logits[chosen]), dim=-1).numpy()
    return Calibration.held_out(
        [teaching.rows[row].id for row in rows], teaching.labels[rows], logits[chosen], scores, in_fold=False
    )


def _no_calibration() -> Calibration:
    return Calibration.held_out([], np.zeros(0, np.int64), np.zeros((0, 1)), np.zeros(0), in_fold=False)


def _digest(runs: Sequence[Run]) -> str:
    """Hex digest of the heads, by which a checkpoint recognises its teacher."""
    digest = hashlib.sha256()
    for run in runs:
        for name, tensor in sorted(run.tensors.items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
