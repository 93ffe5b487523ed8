"""Classes that arrive task by task: sequential fine-tuning, a slow learner, the same realigned, and all data together.

    python -m benchmarks.studies.class_incremental --json incremental.json

SLCA's own setting (arXiv 2303.05118) over stored features. An adapter and a cosine head are trained on one task's
images alone, by cross-entropy over that task's classes as released; the slow learner gives the adapter a smaller
learning rate. Of each class its mean and one shared covariance are kept, no image; the realigned head is used for
predictions only, and the next task goes on from the other one. Ten classes are too few for ten tasks, so two data sets
are joined, with as many images of every class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from benchmarks.data import open_features
from benchmarks.options import JsonOption, SeedsOption, parse_seeds, split_names
from benchmarks.results import Row, gap_text, mean_text, print_table, where, write_rows
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.core.heads import apply_adapter, cosine_logits, new_adapter
from ulfine_fast.data.splits import Rows
from ulfine_fast.ops.philox import Purpose, integers
from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.ops.sgd import cosine_rate, sgd_step
from ulfine_fast.related.head_realignment.gaussians import Sampling, align, class_gaussians

ARMS = ("sequential", "slow", "slow, realigned", "sequential, realigned", "joint")
_SCALE = 25.0
_ADAPTER_SCALE = 0.1
_RANK = 16
_BATCH = 32
_TEST_IMAGES = 100  # of a class at most


@dataclass(frozen=True)
class World:
    """Images of K classes as unit features.

    Attributes:
        train: training images (N, D).
        train_labels: their classes (N,).
        test: test images (E, D).
        test_labels: their classes (E,).
        text: of the classes (K, D).
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    text: Tensor

    @classmethod
    def join(cls, names: Sequence[str], train_images: int) -> World:
        """All classes of several data sets, the first `train_images` training and 100 test images of each.

        Raises:
            InputError: data without texts, or a class of too few training images.
        """
        parts: dict[str, list[Tensor]] = {"train": [], "train_labels": [], "test": [], "test_labels": [], "text": []}
        offset = 0
        for name in names:
            cache = open_features(name)
            if cache.prototypes is None:
                raise InputError(f"{name} has no texts, which the heads of new classes start from; name other data")
            for split, most in (("train", train_images), ("test", _TEST_IMAGES)):
                rows = _first_of_each_class(cache, split, most)
                parts[split].append(normalize(torch.from_numpy(cache.plain[rows].astype(np.float32))))
                parts[f"{split}_labels"].append(torch.from_numpy(cache.labels[rows] + offset))
            parts["text"].append(normalize(torch.from_numpy(np.asarray(cache.prototypes, dtype=np.float32))))
            offset += len(cache.class_names)
        return cls(**{name: torch.cat(tensors) for name, tensors in parts.items()})


@dataclass(frozen=True)
class Pace:
    """How fast a task is learned.

    Attributes:
        head: learning rate of the head.
        adapter: learning rate of the adapter.
        steps: in a task.
    """

    head: float
    adapter: float
    steps: int


def _first_of_each_class(cache: FeatureCache, split: str, most: int) -> Rows:
    """The first images of each class in a split."""
    of_class = [np.flatnonzero((cache.splits == split) & (cache.labels == k)) for k in range(len(cache.class_names))]
    fewest = min(len(rows) for rows in of_class)
    if split == "train" and fewest < most:
        raise InputError(f"a class has {fewest} training images, fewer than the {most} asked for; lower --each")
    return np.concatenate([rows[:most] for rows in of_class]).astype(np.int64)


class Learner:
    """T trials that meet tasks one after the other.

    Args:
        world: the images.
        orders: classes in the order in which they arrive (T, K).
        seeds: of the trials (T,).
    """

    def __init__(self, world: World, orders: Tensor, seeds: Tensor) -> None:
        self.world = world
        self.orders = orders
        self.seeds = seeds
        self.adapter = new_adapter(seeds, world.text.shape[1], torch.full((len(seeds),), _RANK))
        self.head = world.text.expand(len(seeds), -1, -1).clone()
        self.means = torch.zeros(*self.head.shape, dtype=torch.float64)
        self.covariances: list[Tensor] = []

    def train(self, first: int, last: int, pace: Pace, task: int) -> None:
        """Train on the images of the classes at positions [first, last) of each order, over those classes' logits."""
        rows = self._rows(first, last)  # (T, n)
        classes = self.orders[:, first:last]  # (T, C)
        head = {"head": self.head}
        velocity = {name: torch.zeros_like(tensor) for name, tensor in {**self.adapter, **head}.items()}
        for tensor in (*self.adapter.values(), self.head):
            tensor.requires_grad_(True)
        for step in range(pace.steps):
            # tasks count on in one stream of draws
            number = torch.tensor([task * 100_000 + step])
            below = torch.full_like(self.seeds, rows.shape[1])
            chosen = rows.gather(1, integers(self.seeds, number, Purpose.LABELED, _BATCH, below)[0])  # (T, B)
            self._loss(chosen, classes).sum().backward()
            factor = cosine_rate(step, pace.steps)
            momentum = torch.full((len(rows),), 0.9)
            weight_decay = torch.zeros(len(rows))
            for parameters, rate in ((self.adapter, pace.adapter), (head, pace.head)):
                sgd_step(parameters, velocity, torch.full((len(rows),), rate * factor), momentum, weight_decay)
        for tensor in (*self.adapter.values(), self.head):
            tensor.requires_grad_(False)

    def remember(self, first: int, last: int) -> None:
        """Keep mean and covariance of the classes at these positions, of features after the adapter as it is now."""
        rows = self._rows(first, last)
        features = self._adapted(self.world.train[rows])  # (T, n, D)
        covariances = []
        for t in range(len(rows)):
            gaussians = class_gaussians(features[t], self.world.train_labels[rows[t]], len(self.world.text))
            classes = self.orders[t, first:last]
            self.means[t, classes] = gaussians.means[classes]
            covariances.append(gaussians.covariance)
        self.covariances.append(torch.stack(covariances))

    def realigned(self, seen: int, sampling: Sampling) -> Tensor:
        """Heads (T, K, D) trained on samples of the first classes of each order; those of later classes stay."""
        classes = self.orders[:, :seen]
        index = classes.unsqueeze(-1).expand(-1, -1, self.head.shape[-1])
        heads = self.head.gather(1, index)
        means = self.means.gather(1, index).float()
        # every task has as many images
        covariance = torch.stack(self.covariances).mean(0)
        # the heads after the last step
        for _, heads_after_step in align(heads.unsqueeze(1), means.unsqueeze(1), covariance, self.seeds, sampling):
            aligned = heads_after_step[:, 0]
        return self.head.scatter(1, index, aligned)

    @torch.no_grad()
    def accuracy(self, seen: int, head: Tensor) -> Tensor:
        """Accuracy (T,) on the test images of the first classes, among those classes."""
        features = self._adapted(self.world.test.expand(len(head), -1, -1))
        logits = features @ normalize(head).transpose(1, 2)  # (T, n, K)
        is_known = torch.zeros(len(head), len(self.world.text), dtype=torch.bool)
        is_known.scatter_(1, self.orders[:, :seen], value=True)
        of_known = is_known[:, self.world.test_labels]  # (T, n)
        predicted = logits.masked_fill(~is_known.unsqueeze(1), -torch.inf).argmax(-1)
        return ((predicted == self.world.test_labels) & of_known).sum(1) / of_known.sum(1)

    def _loss(self, rows: Tensor, classes: Tensor) -> Tensor:
        features = self._adapted(self.world.train[rows])
        head = self.head.gather(1, classes.unsqueeze(-1).expand(-1, -1, self.head.shape[-1]))
        logits = cosine_logits(features, head, torch.full((len(rows),), _SCALE))  # (T, B, C)
        # labels as positions among the task's classes
        labels = (self.world.train_labels[rows].unsqueeze(-1) == classes.unsqueeze(1)).long().argmax(-1)
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)

    def _adapted(self, features: Tensor) -> Tensor:
        return apply_adapter(self.adapter, features, torch.full((len(features),), _ADAPTER_SCALE))

    def _rows(self, first: int, last: int) -> Tensor:
        """Training rows (T, n) of the classes at these positions."""
        labels = self.world.train_labels
        return torch.stack(
            [torch.isin(labels, classes).nonzero().squeeze(1) for classes in self.orders[:, first:last].unbind(0)]
        )


def arrive(world: World, seeds: Sequence[int], tasks: int, pace: Pace, slowness: float) -> list[Row]:
    """One row for each arm and seed: accuracy after every task."""
    classes = len(world.text)
    orders = torch.stack(
        [torch.from_numpy(np.random.default_rng([seed, 0x5C1]).permutation(classes)) for seed in seeds]
    )
    keys = torch.tensor(list(seeds))
    positions = _task_positions(classes, tasks)
    accuracies: dict[str, list[Tensor]] = {arm: [] for arm in ARMS}

    # task by task, at two paces
    for arm, rate in (("sequential", pace.adapter), ("slow", pace.adapter * slowness)):
        learner = Learner(world, orders, keys)
        for task, (first, last) in enumerate(positions):
            learner.train(first, last, replace(pace, adapter=rate), task)
            learner.remember(first, last)
            accuracies[arm].append(learner.accuracy(last, learner.head))
            realigned = learner.realigned(last, Sampling())
            accuracies[f"{arm}, realigned"].append(learner.accuracy(last, realigned))

    # all tasks so far together
    for task, (_, last) in enumerate(positions):
        learner = Learner(world, orders, keys)
        learner.train(0, last, replace(pace, steps=pace.steps * (task + 1)), task)
        accuracies["joint"].append(learner.accuracy(last, learner.head))

    rows = []
    for arm in ARMS:
        for seed, stages in zip(seeds, torch.stack(accuracies[arm], 1).tolist(), strict=True):
            rows.append(
                {"arm": arm, "seed": seed, "stages": stages, "average": float(np.mean(stages)), "last": stages[-1]}
            )
    return rows


def _task_positions(classes: int, tasks: int) -> list[tuple[int, int]]:
    """First and last position of each task's classes, the last not included."""
    if classes % tasks or classes // tasks < 2:
        raise InputError(
            f"{classes} classes do not make {tasks} tasks of the same two classes or more; name other tasks"
        )
    size = classes // tasks
    return [(start, start + size) for start in range(0, classes, size)]


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each arm: average and last accuracy, and how far above sequential fine-tuning, paired."""
    sequential = where(rows, arm="sequential")
    lines = []
    for arm in ARMS:
        own = where(rows, arm=arm)
        cells = [
            cell
            for name in ("average", "last")
            for cell in (mean_text(own, name, half=True), gap_text(own, sequential, name))
        ]
        lines.append([arm, *cells])
    return lines


def class_incremental(
    data: Annotated[str, typer.Option(help="Data sets whose classes are joined.")] = "fashion_mnist,mnist",
    seeds: SeedsOption = "0-4",
    tasks: Annotated[int, typer.Option(help="Tasks of as many classes each.", min=1)] = 10,
    each: Annotated[int, typer.Option(help="Training images of a class.", min=2)] = 200,
    steps: Annotated[int, typer.Option(help="Mini-batches in a task.", min=1)] = 100,
    lr: Annotated[float, typer.Option(help="Learning rate of head and adapter.", min=0.0)] = 0.03,
    slowness: Annotated[
        float, typer.Option(help="The slow learner's adapter rate, as a fraction of --lr.", min=0.0)
    ] = 0.1,
    as_json: JsonOption = None,
) -> None:
    """Train over arriving classes in each way; print average and last accuracy on test images of all classes seen.

    A seed draws the order of the classes too.
    """
    world = World.join(split_names(data), each)
    rows = arrive(world, parse_seeds(seeds), tasks, Pace(lr, lr, steps), slowness)
    write_rows(as_json, rows)
    print_table(["way", "average", "over sequential", "last", "over sequential"], table(rows))


if __name__ == "__main__":
    typer.run(guarded(class_incremental))
