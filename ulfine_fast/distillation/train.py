"""Training of a student, with a checkpoint after each epoch."""

from __future__ import annotations

import json
import math
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from timm.optim import create_optimizer_v2
from torch import Tensor

from ulfine_fast.cache.io.digests import BLANK, is_sealed, safetensors_header_end, sealed
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import make_folder, opened_regular_file, write_atomically
from ulfine_fast.cache.io.progress import progress_bar
from ulfine_fast.cache.pipeline.encode import read_batches
from ulfine_fast.cache.pipeline.plan import batches_of
from ulfine_fast.cache.pipeline.read import ImageReader
from ulfine_fast.cache.pipeline.views import ViewRecipe
from ulfine_fast.cache.sources.rows import Row
from ulfine_fast.exports.student import Student

WARM_UP = 0.05
"""Fraction of the steps in which the learning rate rises."""

WEIGHT_DECAY = 0.05
SMALLEST_CROP = 0.35
"""Smallest fraction of an image's area in a view that trains."""

_CHECKPOINT = "student.safetensors"


@dataclass(frozen=True)
class Schedule:
    """How a student is trained.

    Attributes:
        epochs: times that each image is seen, at least 1.
        batch_size: images of a step, at least 2.
        lr: largest learning rate of AdamW, above 0; it falls to 0 along a cosine.
        label_weight: part of a labelled image's target that is its label, 0..1; the rest is the teacher's.
        seed: of the first weights, the order of images and their views.
    """

    epochs: int = 30
    batch_size: int = 64
    lr: float = 2e-3
    label_weight: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses values out of range with an InputError."""
        for name, least in (("epochs", 1), ("batch_size", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise InputError(f"lr must be above 0, got {self.lr:g}")
        if not 0 <= self.label_weight <= 1:
            raise InputError(f"label_weight must be 0 to 1, got {self.label_weight:g}")


class Checkpoint:
    """A student in training, saved after each epoch as one file that replaces the last.

    Args:
        folder: for the file.
        identity: JSON values on what is trained; those of a saved student must be the same.

    Raises:
        InputError: the file is of another training, or damaged.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.path = folder / _CHECKPOINT
        self._identity = json.loads(json.dumps(identity))
        self.epoch = 0
        self._data: bytes | None = None
        if not self.path.exists():
            return
        try:
            with opened_regular_file(self.path) as file:
                self._data = file.read()
            end = safetensors_header_end(self._data)
            if not is_sealed(self._data, end):
                raise ValueError("it has changed since it was written")
            notes = json.loads(json.loads(self._data[8:end])["__metadata__"]["notes"])
            saved, self.epoch = notes["identity"], int(notes["epoch"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path} is damaged ({error}); remove {folder} to start anew") from error
        for name, value in self._identity.items():
            if saved.get(name) != value:
                raise InputError(
                    f"{folder.parent} holds a student in training with {name} {saved.get(name)!r}, not {value!r}; "
                    "finish that one, or remove the folder"
                )

    def restore(self, student: Student, optimizer: torch.optim.Optimizer) -> None:
        """Puts the saved state into a student and its optimiser; does nothing where none is saved."""
        if self._data is None:
            return
        tensors = load(self._data)
        student.load_state_dict({name[2:]: value for name, value in tensors.items() if name.startswith("s.")})
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("o."):
                _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        self._data = None

    def save(self, student: Student, optimizer: torch.optim.Optimizer, epoch: int) -> None:
        """Saves the state after so many epochs."""
        tensors = {f"s.{name}": value for name, value in student.state_dict().items()}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"o.{index}.{key}": value for key, value in state.items()}
        notes = json.dumps({"identity": self._identity, "epoch": epoch})
        content = save(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
            {"notes": notes, "digest": BLANK},
        )
        make_folder(self.path.parent)
        write_atomically(self.path, sealed(content, safetensors_header_end(content)))


def train_student(
    student: Student,
    reader: ImageReader,
    rows: list[Row],
    targets: NDArray[np.float32],
    schedule: Schedule,
    device: torch.device,
    checkpoint: Checkpoint,
    *,
    workers: int | None = None,
) -> None:
    """Trains a student on soft labels, by the cross-entropy of random crops that may be mirrored.

    Mixed precision on a GPU. On a processor the result depends on the arguments alone, whether it was stopped or not.

    Args:
        student: trained in place, and left on the device.
        reader: makes images of its size.
        rows: the images (N,).
        targets: probabilities to learn (N, K), rows sum to 1.
        schedule: how.
        device: where.
        checkpoint: continues from it, and is kept up to date.
        workers: as of `read_batches`.

    Raises:
        InputError: the loss is no longer finite, or a disk refuses.
    """
    student.to(device)
    student.network.to(memory_format=torch.channels_last)
    # biases and the scales of norms are not decayed
    optimizer = create_optimizer_v2(student.network, opt="adamw", lr=schedule.lr, weight_decay=WEIGHT_DECAY)
    checkpoint.restore(student, optimizer)
    mixed = device.type == "cuda"
    half = torch.bfloat16 if mixed and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=mixed and half is torch.float16)
    index = {row.id: number for number, row in enumerate(rows)}
    # norms need several images, so the last few of an epoch wait for the next one
    batches_per_epoch = max(1, len(rows) // schedule.batch_size)
    steps = schedule.epochs * batches_per_epoch
    total = schedule.epochs * len(rows)
    with progress_bar() as bar:
        task = bar.add_task("distill", total=total, completed=checkpoint.epoch * len(rows), unit="images", note="")
        for epoch in range(checkpoint.epoch, schedule.epochs):
            student.train()
            order = np.random.default_rng([schedule.seed, epoch]).permutation(len(rows))
            batches = batches_of([rows[number] for number in order], schedule.batch_size)[:batches_per_epoch]
            # other views of each image in each epoch
            recipe = ViewRecipe(1, 0, schedule.seed * schedule.epochs + epoch, (SMALLEST_CROP, 1.0))
            drawn = replace(reader, recipe=recipe)
            losses = torch.zeros((), device=device)
            with closing(read_batches(drawn, batches, device, workers=workers)) as stream:
                for number, batch in enumerate(stream):
                    bar.advance(task, len(batch.kept) + len(batch.skipped))
                    if len(batch.kept) < 2:
                        continue
                    step = epoch * batches_per_epoch + number
                    for group in optimizer.param_groups:
                        group["lr"] = schedule.lr * learning_rate(step / steps)
                    images = drawn.pixels_on(device, batch).unflatten(0, (len(batch.kept), -1))[:, 1]  # (B, H, W, 3)
                    wanted = torch.from_numpy(targets[[index[row.id] for row in batch.kept]]).to(device)  # (B, K)
                    with torch.autocast(device.type, dtype=half, enabled=mixed):
                        logits = student.logits(images.to(device))
                    loss = torch.nn.functional.cross_entropy(logits.float(), wanted)
                    optimizer.zero_grad(set_to_none=True)
                    scaler.scale(loss).backward()
                    scaler.unscale_(optimizer)
                    torch.nn.utils.clip_grad_norm_(student.network.parameters(), 1.0)
                    scaler.step(optimizer)
                    scaler.update()
                    losses += loss.detach()
            mean = float(losses) / batches_per_epoch
            if not math.isfinite(mean):
                raise InputError(f"the loss is not finite in epoch {epoch + 1}; lower --lr (now {schedule.lr:g})")
            bar.update(task, completed=(epoch + 1) * len(rows), note=f"epoch {epoch + 1}, loss {mean:.3f}")
            checkpoint.save(student, optimizer, epoch + 1)
    student.eval()


def student_logits(
    student: Student,
    reader: ImageReader,
    rows: list[Row],
    device: torch.device,
    batch_size: int,
    *,
    workers: int | None = None,
) -> NDArray[np.float32]:
    """Logits (n, K) of whole images, which could be read before."""
    plain = replace(reader, recipe=ViewRecipe(weak=0, strong=0))
    blocks = []
    stream = read_batches(plain, batches_of(rows, batch_size), device, workers=workers)
    with progress_bar() as bar, closing(stream):
        task = bar.add_task("test", total=len(rows), unit="images", note="")
        for batch in stream:
            with torch.inference_mode():
                blocks.append(student.logits(plain.pixels_on(device, batch).to(device)).float().cpu().numpy())
            bar.advance(task, len(batch.kept))
    return np.concatenate(blocks)


def learning_rate(done: float) -> float:
    """The fraction of the largest learning rate after a fraction of the steps: a rise, then a cosine."""
    if done < WARM_UP:
        return (done + 1e-3) / (WARM_UP + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))


def training_identity(schedule: Schedule, **more: Any) -> dict[str, Any]:
    """What a checkpoint is recognised by."""
    return {**asdict(schedule), **more}
