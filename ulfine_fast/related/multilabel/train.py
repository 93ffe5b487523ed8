"""Train sigmoid heads over a cache's features and a table of labels, T trials together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
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
    head_tail_logits,
    modified_focus,
    plain_focus,
    restorable,
)
from ulfine_fast.related.multilabel.heads import Heads, head_logits, normalised
from ulfine_fast.related.multilabel.labels import LabelSplit, LabelTable, labels_by_row, split_labels
from ulfine_fast.related.multilabel.losses import binary_cross_entropy, focal, make_targets
from ulfine_fast.related.multilabel.metrics import multilabel_metrics
from ulfine_fast.related.multilabel.run import MultiLabelRun, Restored
from ulfine_fast.related.multilabel.settings import MultiLabelConfig, per_trial_fields, structural_key
from ulfine_fast.runs.run import describe_encoder

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache


@dataclass(frozen=True)
class TrainingData:
    """What all trials share.

    Attributes:
        cache: of the features.
        table: the labels as the user gave them.
        features: unit rows (N, D) on the device.
        labels: 1, 0 or -1 of all rows (N, K), int8 on the device.
        texts: a unit vector for each class (K, D), None where the cache lacks one of them.
    """

    cache: FeatureCache
    table: LabelTable
    features: Tensor
    labels: Tensor
    texts: Tensor | None


@dataclass
class LabelTrials:
    """T trials that are trained together.

    Attributes:
        configs: of each trial.
        splits: of each trial.
        values: real-valued settings (T,).
        seeds: (T,).
        ignore: whether unknown labels are ignored, bool (T,).
        rows: training rows.
        counts: training images labelled with each class (T, K).
        heads: what is trained.
        memory: COMIC's running means.
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
    """Fit trials on images of several classes; those that agree in structural settings are trained together.

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
    # labels, and the features on the device
    labels, rows = labels_by_row(table, cache)
    splits = [split_labels(cache, labels, rows, table.class_names, config) for config in configs]
    on_device = pick_device(device)
    index = {name: k for k, name in enumerate(cache.class_names)}
    texts = None
    if cache.prototypes is not None and all(name in index for name in table.class_names):
        prototypes = np.asarray(cache.prototypes)[[index[name] for name in table.class_names]]
        texts = normalize(torch.from_numpy(prototypes).to(on_device).float())
    data = TrainingData(
        cache=cache,
        table=table,
        features=normalize(torch.from_numpy(np.asarray(cache.plain)).to(on_device).float()),
        labels=torch.from_numpy(labels).to(on_device),
        texts=texts,
    )

    # trials of one structure together
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, config in enumerate(configs):
        groups.setdefault(structural_key(config), []).append(i)
    runs: dict[int, MultiLabelRun] = {}
    with progress_bar(progress) as bar:
        for members in groups.values():
            trials = _start_trials(data, [configs[i] for i in members], [splits[i] for i in members])
            steps = trials.configs[0].steps
            task = bar.add_task(trials.configs[0].method, total=steps, unit="steps", note="")
            for step in range(steps):
                _train_step(data, trials, step)
                bar.advance(task)
            runs.update({i: _make_run(data, trials, t) for t, i in enumerate(members)})
    return [runs[i] for i in range(len(configs))]


def _start_trials(data: TrainingData, configs: Sequence[MultiLabelConfig], splits: Sequence[LabelSplit]) -> LabelTrials:
    """Trials before their first step."""
    device = data.features.device
    classes, dim = len(data.table.class_names), data.features.shape[1]
    values = {
        name: torch.tensor([float(getattr(config, name)) for config in configs], device=device)
        for name in per_trial_fields()
    }
    seeds = torch.tensor([config.seed for config in configs], device=device)
    counts = torch.stack([(data.labels[torch.from_numpy(split.train).to(device)] > 0).sum(0) for split in splits])

    # class vectors (K, D): the texts, or drawn from the trial's seed with a length of about one
    vectors = []
    for config, seed in zip(configs, seeds, strict=True):
        if config.start == "text" and data.texts is None:
            missing = next((n for n in data.table.class_names if n not in data.cache.class_names), "any class")
            raise InputError(f"the cache has no text for {missing!r}; use --start random, or extract with that name")
        if config.start == "random" or data.texts is None:
            drawn = normals(seed.view(1), 0, Purpose.WEIGHTS, classes * dim)
            vectors.append(drawn.view(classes, dim) / dim**0.5)
        else:
            vectors.append(data.texts)

    return LabelTrials(
        configs=configs,
        splits=splits,
        values=values,
        seeds=seeds,
        ignore=torch.tensor([config.unknown == "ignore" for config in configs], device=device),
        rows=PaddedRows.pad([split.train for split in splits], device),
        counts=counts.float(),
        heads=Heads.from_vectors(torch.stack(vectors), values["bias"], configs[0].heads),
        memory=Memory.empty(len(configs), classes, dim, device),
    )


def _train_step(data: TrainingData, trials: LabelTrials, step: int) -> None:
    """One mini-batch and one step of SGD."""
    config, values, heads = trials.configs[0], trials.values, trials.heads
    steps = torch.tensor([step], device=trials.seeds.device)
    rows = trials.rows.draw(trials.seeds, steps, Purpose.LABELED, config.batch)[0][0]  # (T, B)
    loss = _loss(trials, data.features[rows], data.labels[rows], step)
    loss.sum().backward()
    rate = values["lr"] * cosine_rate(step, config.steps)
    sgd_step(heads.parameters, heads.velocity, rate, values["momentum"], values["weight_decay"])


def _loss(trials: LabelTrials, features: Tensor, labels: Tensor, step: int) -> Tensor:
    """The method's loss (T,) on features (T, B, D) and labels (T, B, K)."""
    config, values = trials.configs[0], trials.values
    targets = make_targets(labels, trials.ignore)
    logits = head_logits(trials.heads.parameters, features, values["scale"])  # (T, H, B, K)
    balanced = logits[:, BALANCED]
    if config.method == "bce":
        return binary_cross_entropy(balanced, targets)
    if config.method == "asymmetric":
        return focal(F.logsigmoid(balanced), targets, plain_focus(values, labels.shape[-1]))

    # COMIC: modification, then correction from a step on
    focus = modified_focus(values, trials.counts)
    loss = focal(F.logsigmoid(balanced), targets, focus)
    corrected = correction_loss(balanced, labels, targets, trials.memory, trials.counts, trials.rows.count, values)
    begun = step >= values["correct_after"] * config.steps
    loss = loss + torch.where(begun, values["correction"], torch.zeros_like(corrected)) * corrected
    if logits.shape[1] == 1:
        return loss

    # balance of three classifiers
    trials.memory.add_features(features, values["feature_momentum"])
    weights = normalised(trials.heads.parameters["weights"])
    others = head_tail_logits(logits, weights, features, trials.memory.feature, values)
    return loss + balance_loss(balanced, others, targets, focus, values)


@torch.no_grad()
def _make_run(data: TrainingData, trials: LabelTrials, t: int) -> MultiLabelRun:
    """The run of trial t: its head, metrics, predictions and restored labels."""
    config, split = trials.configs[t], trials.splits[t]
    tensors = {name: tensor.detach()[t].cpu() for name, tensor in trials.heads.parameters.items()}
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise InputError(f"seed {config.seed} of {config.method} diverged; lower lr (now {config.lr:g})")
    run = MultiLabelRun(
        config=config,
        class_names=list(data.table.class_names),
        tensors={name: tensor[BALANCED] for name, tensor in tensors.items()},
        encoder=describe_encoder(data.cache),
        cache_path=data.cache.path,
        labels_digest=data.table.digest,
        ids=list(data.cache.ids),
    )

    # metrics and roles
    probabilities = run.probabilities(data.cache.plain)
    labels = data.labels.cpu().numpy()
    counts = trials.counts[t].cpu().numpy().astype(np.int64)
    restored = _restored_labels(data, trials, t, probabilities)
    metrics = {
        "class_counts": counts.tolist(),
        "rows": {name: len(rows) for name, rows in asdict(split).items()},
        "unknown_share": float((labels[split.train] < 0).mean()),
        **multilabel_metrics(probabilities[split.test], labels[split.test], counts),
        "val": multilabel_metrics(probabilities[split.val], labels[split.val], counts) if len(split.val) else None,
        "restored": len(restored),
    }
    roles = np.full(len(probabilities), "", dtype="<U5")
    for name, rows in asdict(split).items():
        roles[rows] = name
    return replace(run, metrics=metrics, roles=roles.tolist(), predictions=probabilities, restored=restored)


def _restored_labels(
    data: TrainingData, trials: LabelTrials, t: int, probabilities: NDArray[np.float32]
) -> list[Restored]:
    """Unknown labels of training images that COMIC's trained heads take for present; none for other methods."""
    if trials.configs[t].method != "comic" or not trials.configs[t].correction:
        return []
    rows = trials.splits[t].train
    above = restorable(
        torch.from_numpy(probabilities[rows])[None],
        data.labels.cpu()[torch.from_numpy(rows)][None],
        trials.memory.probability[t].cpu()[None],
        trials.values["threshold"][t].cpu()[None],
    )[0]
    return [
        Restored(data.cache.ids[rows[i]], data.table.class_names[k], round(float(probabilities[rows[i], k]), 6))
        for i, k in above.nonzero().tolist()
    ]
