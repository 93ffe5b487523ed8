"""Train sigmoid heads over a cache's features and a table of labels, T trials in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ulfine_fast.cache.io.device import pick_device
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.progress import progress_bar
from ulfine_fast.core.batches import PaddedRows
from ulfine_fast.ops.philox import Purpose, normals
from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.ops.sgd import cosine_rate, sgd_step
from ulfine_fast.related.multilabel.comic import (
    BALANCED,
    Memory,
    balance_loss,
    correction_loss,
    modified_focus,
    plain_focus,
    restorable,
    shifted,
)
from ulfine_fast.related.multilabel.heads import Heads, logits_of, normalised
from ulfine_fast.related.multilabel.labels import LabelSplit, LabelTable, placed, split_labels
from ulfine_fast.related.multilabel.losses import binary_cross_entropy, focal, targets_of
from ulfine_fast.related.multilabel.metrics import figures
from ulfine_fast.related.multilabel.run import MultiLabelRun, Restored
from ulfine_fast.related.multilabel.settings import MultiLabelConfig, per_trial_fields, structural_key
from ulfine_fast.runs.run import describe_encoder

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache

_DRAWN_TOGETHER = 64


@dataclass(frozen=True)
class Task:
    """What all trials share.

    Attributes:
        cache: where the features come from. table: the labels as given.
        features: unit rows (N, D) on the device. labels: 1, 0 or -1 of all rows (N, K), int8 on the device.
        texts: a unit vector for each class (K, D), None where the cache lacks one of them.
    """

    cache: FeatureCache
    table: LabelTable
    features: Tensor
    labels: Tensor
    texts: Tensor | None


@dataclass
class Trials:
    """T trials under way.

    Attributes:
        configs, splits: of each. values: real-valued settings (T,). seeds: (T,). ignore: bool (T,).
        rows: training rows. counts: training images labelled with each class (T, K).
        heads: what is trained. memory: of COMIC.
    """

    configs: Sequence[MultiLabelConfig]
    splits: Sequence[LabelSplit]
    values: dict[str, Tensor]
    seeds: Tensor
    ignore: Tensor
    rows: PaddedRows
    counts: Tensor
    heads: Heads
    memory: Memory


def fit_labels(
    cache: FeatureCache,
    table: LabelTable,
    configs: Sequence[MultiLabelConfig],
    *,
    device: str = "auto",
    progress: bool | None = None,
) -> list[MultiLabelRun]:
    """Fit trials on images of several classes; those that agree in structural settings share a pass.

    Args:
        cache: features; its own labels are not read.
        table: which classes its images show.
        configs: one for each trial.
        device: "auto", "cpu", "cuda" or "cuda:N".
        progress: whether to draw a bar; None draws it where stderr is a terminal.

    Returns:
        One run for each trial, in their order.

    Raises:
        InputError: labels that do not fit the cache, a class that is never present, or heads that diverge.
    """
    labels, rows = placed(table, cache)
    splits = [split_labels(cache, labels, rows, table.class_names, config) for config in configs]
    task = _task(cache, table, labels, pick_device(device))
    groups: dict[tuple[object, ...], list[int]] = {}
    for place, config in enumerate(configs):
        groups.setdefault(structural_key(config), []).append(place)
    found: dict[int, MultiLabelRun] = {}
    with progress_bar(progress) as bar:
        for places in groups.values():
            trials = _trials(task, [configs[i] for i in places], [splits[i] for i in places])
            steps = configs[places[0]].steps
            shown = bar.add_task(configs[places[0]].method, total=steps, unit="steps", note="")
            for step in range(steps):
                _advance(task, trials, step)
                bar.advance(shown)
            found |= zip(places, _runs(task, trials, labels), strict=True)
    return [found[place] for place in range(len(configs))]


def _task(cache: FeatureCache, table: LabelTable, labels: NDArray[np.int8], device: torch.device) -> Task:
    features = normalize(torch.from_numpy(np.asarray(cache.plain)).to(device).float())
    place = {name: k for k, name in enumerate(cache.class_names)}
    texts = None
    if cache.prototypes is not None and all(name in place for name in table.class_names):
        own = np.asarray(cache.prototypes)[[place[name] for name in table.class_names]]
        texts = normalize(torch.from_numpy(own).to(device).float())
    return Task(cache, table, features, torch.from_numpy(labels).to(device), texts)


def _trials(task: Task, configs: Sequence[MultiLabelConfig], splits: Sequence[LabelSplit]) -> Trials:
    device, classes = task.features.device, len(task.table.class_names)
    values = {
        name: torch.tensor([float(getattr(config, name)) for config in configs], device=device)
        for name in per_trial_fields()
    }
    seeds = torch.tensor([config.seed for config in configs], device=device)
    counts = torch.stack([(task.labels[torch.from_numpy(split.train).to(device)] > 0).sum(0) for split in splits])
    return Trials(
        configs,
        splits,
        values,
        seeds,
        torch.tensor([config.unknown == "ignore" for config in configs], device=device),
        PaddedRows.pad([split.train for split in splits], device),
        counts.float(),
        Heads.of(_start(task, configs, seeds), values["bias"], configs[0].heads),
        Memory.empty(len(configs), classes, task.features.shape[1], device),
    )


def _start(task: Task, configs: Sequence[MultiLabelConfig], seeds: Tensor) -> Tensor:
    """Class vectors of each trial (T, K, D): the texts, or drawn from its seed with a length of about one."""
    classes, dim = len(task.table.class_names), task.features.shape[1]
    found = []
    for config, seed in zip(configs, seeds, strict=True):
        if config.start == "text" and task.texts is None:
            missing = next((n for n in task.table.class_names if n not in task.cache.class_names), "any class")
            raise InputError(f"the cache has no text for {missing!r}; use --start random, or extract with that name")
        if config.start == "random" or task.texts is None:
            own = normals(seed.view(1), 0, Purpose.WEIGHTS, classes * dim).view(classes, dim) / dim**0.5
        else:
            own = task.texts
        found.append(own)
    return torch.stack(found)


def _advance(task: Task, trials: Trials, step: int) -> None:
    """One mini-batch and one step of SGD."""
    steps = torch.tensor([step], device=trials.seeds.device)
    rows = trials.rows.draw(trials.seeds, steps, Purpose.LABELED, trials.configs[0].batch)[0][0]  # (T, B)
    loss = _loss(trials, task.features[rows], task.labels[rows], step)
    loss.sum().backward()
    rate = trials.values["lr"] * cosine_rate(step, trials.configs[0].steps)
    heads = trials.heads
    sgd_step(heads.parameters, heads.velocity, rate, trials.values["momentum"], trials.values["weight_decay"])


def _loss(trials: Trials, features: Tensor, labels: Tensor, step: int) -> Tensor:
    """The method's loss (T,) on features (T, B, D) and labels (T, B, K)."""
    values, method, targets = trials.values, trials.configs[0].method, targets_of(labels, trials.ignore)
    logits = logits_of(trials.heads.parameters, features, values["scale"])  # (T, H, B, K)
    first = logits[:, BALANCED]
    if method == "bce":
        return binary_cross_entropy(first, targets)
    if method == "asymmetric":
        return focal(torch.nn.functional.logsigmoid(first), targets, plain_focus(values, labels.shape[-1]))
    focus = modified_focus(values, trials.counts)
    loss = focal(torch.nn.functional.logsigmoid(first), targets, focus)
    corrected = correction_loss(first, labels, targets, trials.memory, trials.counts, trials.rows.count, values)
    begun = step >= values["correct_after"] * trials.configs[0].steps
    loss = loss + torch.where(begun, values["correction"], torch.zeros_like(corrected)) * corrected
    if logits.shape[1] == 1:
        return loss
    trials.memory.see_features(features, values["feature_momentum"])
    weights = normalised(trials.heads.parameters["weights"])
    others = shifted(logits, weights, features, trials.memory.feature, values)
    return loss + balance_loss(first, others, targets, focus, values)


@torch.no_grad()
def _runs(task: Task, trials: Trials, labels: NDArray[np.int8]) -> list[MultiLabelRun]:
    found = []
    for t, config in enumerate(trials.configs):
        tensors = {name: tensor.detach()[t].cpu() for name, tensor in trials.heads.parameters.items()}
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            raise InputError(f"seed {config.seed} of {config.method} diverged; lower lr (now {config.lr:g})")
        run = MultiLabelRun(
            config,
            list(task.table.class_names),
            {name: tensor[BALANCED] for name, tensor in tensors.items()},
            encoder=describe_encoder(task.cache),
            cache_path=task.cache.path,
            labels_digest=task.table.digest,
        )
        found.append(_judged(run, task, trials, t, labels))
    return found


def _judged(run: MultiLabelRun, task: Task, trials: Trials, t: int, labels: NDArray[np.int8]) -> MultiLabelRun:
    """The run with its figures, predictions and restored labels."""
    split, counts = trials.splits[t], trials.counts[t].cpu().numpy().astype(np.int64)
    probabilities = run.probabilities(task.cache.plain)
    told = {
        "class_counts": counts.tolist(),
        "rows": {name: len(rows) for name, rows in asdict(split).items()},
        "unknown_share": float((labels[split.train] < 0).mean()),
        **figures(probabilities[split.test], labels[split.test], counts),
        "val": figures(probabilities[split.val], labels[split.val], counts) if len(split.val) else None,
    }
    restored = _restored(run, task, trials, t, probabilities)
    told["restored"] = len(restored)
    role = np.full(len(probabilities), "", dtype="<U5")
    for name, rows in asdict(split).items():
        role[rows] = name
    return replace(
        run, metrics=told, ids=list(task.cache.ids), roles=role.tolist(), predictions=probabilities, restored=restored
    )


def _restored(
    run: MultiLabelRun, task: Task, trials: Trials, t: int, probabilities: NDArray[np.float32]
) -> list[Restored]:
    """Unknown labels of training images that the trained heads put above the threshold; none of other methods."""
    if run.config.method != "comic" or not run.config.correction:
        return []
    rows = trials.splits[t].train
    found = restorable(
        torch.from_numpy(probabilities[rows])[None],
        task.labels.cpu()[torch.from_numpy(rows)][None],
        trials.memory.probability[t].cpu()[None],
        trials.values["threshold"][t].cpu()[None],
    )[0]
    return [
        Restored(task.cache.ids[rows[i]], run.class_names[k], round(float(probabilities[rows[i], k]), 6))
        for i, k in found.nonzero().tolist()
    ]
