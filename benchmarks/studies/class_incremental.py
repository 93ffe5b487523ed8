"""Classes that arrive task by task: sequential fine-tuning, a slow learner, the same realigned, and all data at once.

    python -m benchmarks.studies.class_incremental --json incremental.json

SLCA's own setting (arXiv 2303.05118) over stored features. An adapter and a cosine head are trained on one task's
images alone, by cross-entropy over that task's classes as released; the slow learner gives the adapter a smaller
learning rate. Of each class its mean and one shared covariance are kept, no image; the realigned head is used for
predictions only, and the next task goes on from the other one. Ten classes are too few for ten tasks, so two data sets
are joined, with as many images of every class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from benchmarks.comparison.parts import write_json
from benchmarks.options import parse_seeds
from benchmarks.studies.storage import opened
from benchmarks.tables import print_table
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.core.heads import apply_adapter, cosine_logits, new_adapter
from ulfine_fast.data.splits import Rows
from ulfine_fast.metrics.intervals import mean_interval
from ulfine_fast.ops.philox import Purpose, integers
from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.ops.sgd import cosine_rate, sgd_step
from ulfine_fast.related.head_realignment.gaussians import Sampling, align, class_gaussians

Row = dict[str, Any]
ARMS = ("sequential", "slow", "slow, realigned", "sequential, realigned", "joint")
_SCALE, _ADAPTER_SCALE, _RANK, _BATCH = 25.0, 0.1, 16, 32
_TEST = 100  # test images of a class at most


@dataclass(frozen=True)
class World:
    """Images of K classes as unit features, with the texts of the classes (K, D)."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    text: Tensor

    @classmethod
    def of(cls, names: Sequence[str], each: int) -> World:
        """Join data sets: all their classes, the first `each` training and 100 test images of every one."""
        parts: dict[str, list[Tensor]] = {"train": [], "train_labels": [], "test": [], "test_labels": [], "text": []}
        for name in names:
            cache, offset = opened(name), sum(len(text) for text in parts["text"])
            if cache.prototypes is None:
                raise InputError(f"{name} has no texts, which the heads of new classes start from; name other data")
            rows = {split: _first(cache, split, most) for split, most in (("train", each), ("test", _TEST))}
            for split, chosen in rows.items():
                parts[split].append(normalize(torch.from_numpy(cache.plain[chosen].astype(np.float32))))
                parts[f"{split}_labels"].append(torch.from_numpy(cache.labels[chosen] + offset))
            parts["text"].append(normalize(torch.from_numpy(np.asarray(cache.prototypes, dtype=np.float32))))
        return cls(**{name: torch.cat(found) for name, found in parts.items()})


@dataclass(frozen=True)
class Pace:
    """Learning rates of the head and of the adapter, and steps in a task."""

    head: float
    adapter: float
    steps: int


def _first(cache: FeatureCache, split: str, most: int) -> Rows:
    """The first images of each class in a split."""
    inside = [np.flatnonzero((cache.splits == split) & (cache.labels == k)) for k in range(len(cache.class_names))]
    fewest = min(len(rows) for rows in inside)
    if split == "train" and fewest < most:
        raise InputError(f"a class has {fewest} training images, fewer than the {most} asked for; lower --each")
    return np.concatenate([rows[:most] for rows in inside]).astype(np.int64)


class Learner:
    """T trials that meet tasks one after the other.

    Args:
        world: the images.
        orders: classes in the order of their coming (T, K).
        seeds: (T,).
    """

    def __init__(self, world: World, orders: Tensor, seeds: Tensor) -> None:
        self.world, self.orders, self.seeds = world, orders, seeds
        ranks = torch.full((len(seeds),), _RANK)
        self.adapter = new_adapter(seeds, world.text.shape[1], ranks)
        self.head = world.text.expand(len(seeds), -1, -1).clone()
        self.means = torch.zeros(*self.head.shape, dtype=torch.float64)
        self.covariances: list[Tensor] = []

    def train(self, first: int, last: int, pace: Pace, task: int) -> None:
        """Train on the images of the classes at places [first, last) of each order, over those classes' logits."""
        rows, classes = self._rows(first, last), self.orders[:, first:last]  # (T, n), (T, C)
        slow, fast = self.adapter, {"head": self.head}
        velocity = {name: torch.zeros_like(tensor) for name, tensor in {**slow, **fast}.items()}
        for tensor in (*slow.values(), *fast.values()):
            tensor.requires_grad_(True)
        for step in range(pace.steps):
            # tasks count on in one stream of draws
            number = torch.tensor([task * 100_000 + step])
            below = torch.full_like(self.seeds, rows.shape[1])
            chosen = rows.gather(1, integers(self.seeds, number, Purpose.LABELED, _BATCH, below)[0])  # (T, B)
            self._loss(chosen, classes).sum().backward()
            factor = cosine_rate(step, pace.steps)
            for group, rate in ((slow, pace.adapter), (fast, pace.head)):
                sgd_step(group, velocity, *(torch.full((len(rows),), v) for v in (rate * factor, 0.9, 0.0)))
        for tensor in (*slow.values(), *fast.values()):
            tensor.requires_grad_(False)

    def remember(self, first: int, last: int) -> None:
        """Keep mean and covariance of the classes at these places, as the adapter shows them now."""
        rows, found = self._rows(first, last), []
        seen = self._adapted(self.world.train[rows])  # (T, n, D)
        for t in range(len(rows)):
            own = class_gaussians(seen[t], self.world.train_labels[rows[t]], len(self.world.text))
            classes = self.orders[t, first:last]
            self.means[t, classes] = own.means[classes]
            found.append(own.covariance)
        self.covariances.append(torch.stack(found))

    def realigned(self, seen: int, sampling: Sampling) -> Tensor:
        """Heads (T, K, D) trained on samples of the first classes of each order; classes to come keep theirs."""
        classes = self.orders[:, :seen]
        index = classes.unsqueeze(-1).expand(-1, -1, self.head.shape[-1])
        heads, means = self.head.gather(1, index), self.means.gather(1, index).float()
        # every task has as many images
        covariance = torch.stack(self.covariances).mean(0)
        for _, found in align(heads.unsqueeze(1), means.unsqueeze(1), covariance, self.seeds, sampling):
            aligned = found[:, 0]
        return self.head.scatter(1, index, aligned)

    @torch.no_grad()
    def accuracy(self, seen: int, head: Tensor) -> Tensor:
        """Accuracy (T,) on the test images of the first classes, among those classes."""
        features = self._adapted(self.world.test.expand(len(head), -1, -1))
        logits = features @ normalize(head).transpose(1, 2)  # (T, n, K)
        known = torch.zeros(len(head), len(self.world.text), dtype=torch.bool)
        known.scatter_(1, self.orders[:, :seen], value=True)
        asked = known[:, self.world.test_labels]  # (T, n)
        guess = logits.masked_fill(~known.unsqueeze(1), -torch.inf).argmax(-1)
        return ((guess == self.world.test_labels) & asked).sum(1) / asked.sum(1)

    def _loss(self, rows: Tensor, classes: Tensor) -> Tensor:
        features = self._adapted(self.world.train[rows])
        own = self.head.gather(1, classes.unsqueeze(-1).expand(-1, -1, self.head.shape[-1]))
        logits = cosine_logits(features, own, torch.full((len(rows),), _SCALE))  # (T, B, C)
        places = (self.world.train_labels[rows].unsqueeze(-1) == classes.unsqueeze(1)).long().argmax(-1)
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), places, reduction="none").mean(1)

    def _adapted(self, features: Tensor) -> Tensor:
        return apply_adapter(self.adapter, features, torch.full((len(features),), _ADAPTER_SCALE))

    def _rows(self, first: int, last: int) -> Tensor:
        """Training rows (T, n) of the classes at these places."""
        labels = self.world.train_labels
        return torch.stack(
            [torch.isin(labels, own).nonzero().squeeze(1) for own in self.orders[:, first:last].unbind(0)]
        )


def arrive(world: World, seeds: Sequence[int], tasks: int, pace: Pace, slowness: float) -> list[Row]:
    """One row for each arm and seed: accuracy after every task."""
    orders = torch.stack(
        [torch.from_numpy(np.random.default_rng([s, 0x5C1]).permutation(len(world.text))) for s in seeds]
    )
    keys = torch.tensor(list(seeds))
    found: dict[str, list[Tensor]] = {arm: [] for arm in ARMS}
    for arm, rate in (("sequential", pace.adapter), ("slow", pace.adapter * slowness)):
        learner = Learner(world, orders, keys)
        for task, (first, last) in enumerate(_tasks(len(world.text), tasks)):
            learner.train(first, last, Pace(pace.head, rate, pace.steps), task)
            learner.remember(first, last)
            found[arm].append(learner.accuracy(last, learner.head))
            found[f"{arm}, realigned"].append(learner.accuracy(last, learner.realigned(last, Sampling())))
    for task, (_, last) in enumerate(_tasks(len(world.text), tasks)):
        joint = Learner(world, orders, keys)
        joint.train(0, last, Pace(pace.head, pace.adapter, pace.steps * (task + 1)), task)
        found["joint"].append(joint.accuracy(last, joint.head))
    stages = {arm: torch.stack(values, 1).tolist() for arm, values in found.items()}
    return [
        {"arm": arm, "seed": seed, "stages": own, "average": float(np.mean(own)), "last": own[-1]}
        for arm in ARMS
        for seed, own in zip(seeds, stages[arm], strict=True)
    ]


def _tasks(classes: int, tasks: int) -> list[tuple[int, int]]:
    """First and last place of each task's classes."""
    if classes % tasks or classes // tasks < 2:
        raise InputError(
            f"{classes} classes do not make {tasks} tasks of the same two classes or more; name other tasks"
        )
    size = classes // tasks
    return [(start, start + size) for start in range(0, classes, size)]


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each arm: average and last accuracy, and how far above sequential fine-tuning, paired."""
    lines = []
    for arm in ARMS:
        own, base = ([row for row in rows if row["arm"] == name] for name in (arm, "sequential"))
        cells = []
        for figure in ("average", "last"):
            mean = mean_interval(row[figure] for row in own)
            gap = mean_interval(a[figure] - b[figure] for a, b in zip(own, base, strict=True))
            assert mean is not None
            assert gap is not None
            cells += [f"{100 * mean.mean:.1f} ±{100 * mean.half:.1f}", f"{100 * gap.mean:+.1f} ±{100 * gap.half:.1f}"]
        lines.append([arm, *cells])
    return lines


def class_incremental(
    data: Annotated[str, typer.Option(help="Data sets whose classes are joined.")] = "fashion_mnist,mnist",
    seeds: Annotated[str, typer.Option(help="Such as 0-4; a seed draws the order of classes too.")] = "0-4",
    tasks: Annotated[int, typer.Option(help="Tasks of as many classes each.", min=1)] = 10,
    each: Annotated[int, typer.Option(help="Training images of a class.", min=2)] = 200,
    steps: Annotated[int, typer.Option(help="Mini-batches in a task.", min=1)] = 100,
    lr: Annotated[float, typer.Option(help="Learning rate of head and adapter.", min=0.0)] = 0.03,
    slowness: Annotated[float, typer.Option(help="The slow learner's adapter rate, as a share.", min=0.0)] = 0.1,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write all rows to this file.")] = None,
) -> None:
    """Train over arriving classes in each way; print average and last accuracy on test images of all classes seen."""
    world = World.of([name.strip() for name in data.split(",")], each)
    rows = arrive(world, parse_seeds(seeds), tasks, Pace(lr, lr, steps), slowness)
    if as_json is not None:
        write_json(as_json, rows)
    print_table(["way", "average", "over sequential", "last", "over sequential"], table(rows))


if __name__ == "__main__":
    typer.run(guarded(class_incremental))
