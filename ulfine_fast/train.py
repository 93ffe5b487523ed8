"""The training loop: T trials at once over a cache, one pass for all configs of the same structure."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ulfine_fast import metrics
from ulfine_fast.batches import BatchSource, PaddedRows
from ulfine_fast.cache.device import pick_device
from ulfine_fast.cache.errors import InputError
from ulfine_fast.cache.progress import progress_bar
from ulfine_fast.calibration import fit_temperature
from ulfine_fast.config import FitConfig, per_trial_fields, split_key, structural_key
from ulfine_fast.features import DeviceFeatures
from ulfine_fast.heads import Tensors
from ulfine_fast.methods import Batch, Pool, State, Trials, method_of
from ulfine_fast.ops.prototypes import class_means, normalize
from ulfine_fast.ops.sgd import cosine_rate, sgd_step
from ulfine_fast.run import Run
from ulfine_fast.splits import Split, draw_split, labeled_counts

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache

Logits = NDArray[np.float32]

_EVAL_ROWS = 4096
_CPU_BUDGET = 2 << 30


def fit(
    cache: FeatureCache,
    config: FitConfig | None = None,
    *,
    split: Split | None = None,
    device: str = "auto",
    progress: bool | None = None,
) -> Run:
    """Fit one trial; :func:`fit_many` with T = 1."""
    return fit_many(cache, [config or FitConfig()], split=split, device=device, progress=progress)[0]


def fit_many(
    cache: FeatureCache,
    configs: Sequence[FitConfig],
    *,
    split: Split | Sequence[Split] | None = None,
    device: str = "auto",
    progress: bool | None = None,
) -> list[Run]:
    """Fit many trials, those of the same structure together in one batched pass.

    Args:
        cache: features of K classes, D wide.
        configs: T trials; hyper-parameters, seeds and splits may differ in each.
        split: use this split for all trials, or one for each, instead of drawing one from each config.
        device: "auto", "cpu", "cuda" or "cuda:N".
        progress: draw a progress bar; None draws it where stderr is a terminal.

    Returns:
        Fitted runs in the order of `configs`. A trial's mini-batches and results do not depend on its neighbours.

    Raises:
        InputError: a split the data cannot give, a given split that trains on held-out pictures, or a cache without
            the views a method trains on.
    """
    place = pick_device(device)
    splits = _splits(cache, configs, split)
    features = DeviceFeatures.load(cache, place)
    runs: dict[int, Run] = {}
    with progress_bar(progress) as bar:
        for members in _passes(configs, splits, features, len(cache.class_names)):
            one_pass = _Pass(cache, features, [configs[i] for i in members], [splits[i] for i in members])
            note = f"{len(members)} trials"
            task = bar.add_task(f"fit {one_pass.label}", total=one_pass.steps, unit="steps", note=note)
            for _ in one_pass.train():
                bar.advance(task)
            runs.update(zip(members, one_pass.finish(), strict=True))
    return [runs[i] for i in range(len(configs))]


def _splits(cache: FeatureCache, configs: Sequence[FitConfig], given: Split | Sequence[Split] | None) -> list[Split]:
    """The split of each config: drawn once for all configs that draw the same, or as given."""
    if given is None:
        # a search asks for one split many times, and drawing one takes longer than some trials
        drawn: dict[tuple[Any, ...], Split] = {}
        for config in configs:
            if split_key(config) not in drawn:
                drawn[split_key(config)] = draw_split(cache.labels, cache.splits, cache.class_names, config)
        return [drawn[split_key(config)] for config in configs]
    splits = [given] * len(configs) if isinstance(given, Split) else list(given)
    if len(splits) != len(configs):
        raise InputError(f"{len(configs)} configs need as many splits, got {len(splits)}")
    for one in {id(split): split for split in splits}.values():
        _refuse_held_out(cache, one)
    return splits


def _refuse_held_out(cache: FeatureCache, split: Split) -> None:
    """Refuse to train on pictures that this cache holds for validation or testing: they have no views."""
    trained = np.concatenate([split.labeled, split.unlabeled])
    held_out = trained[np.isin(cache.splits[trained], ("val", "test"))]
    if len(held_out):
        name, where = cache.ids[held_out[0]], cache.splits[held_out[0]]
        raise InputError(f"the split trains on {name!r}, a {where} picture of this cache; use the cache it was made on")
    if (cache.labels[split.labeled] < 0).any():
        name = cache.ids[split.labeled[cache.labels[split.labeled] < 0][0]]
        raise InputError(f"the split takes {name!r} as labelled, and this cache knows no label for it")


def _passes(
    configs: Sequence[FitConfig], splits: Sequence[Split], features: DeviceFeatures, classes: int
) -> list[list[int]]:
    """Indices of configs grouped by structure, each group cut so that a pass fits in memory."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, (config, split) in enumerate(zip(configs, splits, strict=True)):
        # a trial without unlabelled pictures must not be handed a neighbour's padding to learn from
        groups.setdefault((*structural_key(config), len(split.unlabeled) > 0), []).append(i)
    passes = []
    for members in groups.values():
        size = _trials_that_fit(configs[members[0]], [splits[i] for i in members], features, classes)
        passes += [members[start : start + size] for start in range(0, len(members), size)]
    return passes


def _trials_that_fit(config: FitConfig, splits: Sequence[Split], features: DeviceFeatures, classes: int) -> int:
    """Trials whose activations and evaluation blocks stay within a budget: 2 GiB, or half of the GPU's free memory."""
    dim = features.plain.shape[1]
    budget = _CPU_BUDGET
    if features.plain.is_cuda:
        budget = torch.cuda.mem_get_info(features.plain.device)[0] // 2
    rows = config.batch_labeled + 2 * config.batch_unlabeled
    # about a dozen float32 copies of the batch live in the autograd graph; evaluation takes a few of its block
    activations = (12 * rows + 4 * _EVAL_ROWS) * (dim + classes)
    # both heads, each with gradient, velocity, best copy and temporaries of the update
    heads = 2 * 8 * classes * dim
    per_trial = 4 * (activations + heads + _pool_values(config, splits, features, classes))  # bytes
    return max(1, budget // per_trial)


def _pool_values(config: FitConfig, splits: Sequence[Split], features: DeviceFeatures, classes: int) -> int:
    """Values that a method holds of all training pictures at once; none for methods of mini-batches alone."""
    if not method_of(config).uses_pool:
        return 0
    pictures = max(len(split.labeled) + len(split.unlabeled) for split in splits)
    views = features.easy.shape[1] + features.strong.shape[1]
    # two copies of the views and a few of the plain rows; some eight arrays of logits for every start and fold
    candidates = 5 * (1 + config.folds)
    return pictures * ((2 * views + 6) * features.plain.shape[1] + 8 * candidates * classes)


class _Pass:
    """T trials of one structure: what they are given, what they have learned, what was seen on the way."""

    def __init__(
        self, cache: FeatureCache, features: DeviceFeatures, configs: list[FitConfig], splits: list[Split]
    ) -> None:
        self.cache, self.features, self.configs, self.splits = cache, features, configs, splits
        self.config, self.method = configs[0], method_of(configs[0])
        self.label = self.config.method.replace("_", " ")
        self.steps = self.config.steps if self.method.trains else 0
        self.device = features.plain.device
        self.labels = torch.from_numpy(cache.labels).to(self.device)
        self.labeled, self.unlabeled, self.val, self.test = (
            PaddedRows.of([getattr(split, role) for split in splits], self.device)
            for role in ("labeled", "unlabeled", "val", "test")
        )
        self.counts = [labeled_counts(cache.labels, split, len(cache.class_names)) for split in splits]
        self.pairs = self.method.uses_unlabeled and int(self.unlabeled.count.max()) > 0
        self._refuse_missing_views()
        self.trials = self._trials()
        self.state = self.method.start(self.trials)
        self.history: list[list[dict[str, Any]]] = [[] for _ in configs]
        self.started = time.perf_counter()
        # without validation pictures there is nothing to select by, and the last heads are kept
        selects = [
            config.select == "best" and len(split.val) > 0 for config, split in zip(configs, splits, strict=True)
        ]
        self.selects = torch.tensor(selects, device=self.device)
        self.best_score = torch.full((len(configs),), -1.0, device=self.device)
        self.best: Tensors = {}

    # -- what the trials are given

    def _refuse_missing_views(self) -> None:
        if not self.pairs:
            return
        noisy = min(config.feature_noise for config in self.configs) > 0
        if not self.features.strong.shape[1] and not noisy:
            raise InputError(
                f"method {self.config.method} trains on strong views and this cache has views.strong = 0; "
                "extract again with --strong 1, or set feature_noise above 0"
            )

    def _trials(self) -> Trials:
        values = {
            name: torch.tensor([float(getattr(config, name)) for config in self.configs], device=self.device)
            for name in per_trial_fields()
        }
        seeds = torch.tensor([config.seed for config in self.configs], device=self.device)
        counts = np.stack(self.counts)  # (T, K)
        frequency = torch.from_numpy(counts / counts.sum(1, keepdims=True)).float().to(self.device)
        return Trials(self.config, values, seeds, self._prototypes(), torch.log(frequency.clamp(min=1e-8)))

    def _prototypes(self) -> Tensor:
        """The text's prototypes (T, K, D), or each trial's class means where the cache has no text."""
        text = self.cache.prototypes
        if text is not None:
            return normalize(torch.from_numpy(np.asarray(text)).float().to(self.device)).repeat(len(self.configs), 1, 1)
        means = []
        for split in self.splits:
            rows = torch.from_numpy(split.labeled).to(self.device)
            features, labels = self.features.rows(rows)[None], self.labels[rows][None]  # (1, L, D), (1, L)
            means.append(class_means(features, labels, len(self.cache.class_names))[0][0])
        return normalize(torch.stack(means))

    # -- training

    def _batches(self) -> BatchSource:
        return BatchSource(
            self.features, self.labels, self.labeled, self.unlabeled, self.trials, self.config, self.pairs
        )

    def _pool(self) -> Pool:
        """All training pictures of the pass."""
        labeled, unlabeled = self.labeled, self.unlabeled
        labels = torch.where(labeled.present, self.labels[labeled.index], -torch.ones_like(labeled.index))
        return Pool(self.features, labeled.index, labels, unlabeled.index, unlabeled.present)

    def _refresh(self, step: int) -> None:
        """Let the method look at all training pictures, where it asks for that."""
        if self.method.uses_pool:
            with torch.no_grad():
                self.method.refresh(self.trials, self.state, self._pool(), step)

    def train(self) -> Iterator[int]:
        """Run the steps, yielding after each; evaluates every `eval_every` steps and at the end."""
        self._refresh(0)
        velocity = {name: torch.zeros_like(tensor) for name, tensor in self.state.parameters.items()}
        for tensor in self.state.parameters.values():
            tensor.requires_grad_(True)
        batches = self._batches()
        for start in range(0, self.steps, self.config.eval_every):
            stop = min(start + self.config.eval_every, self.steps)
            sums = torch.zeros(3, len(self.configs), device=self.device)
            for step, batch in batches.draw(start, stop):
                sums += self._step(step, batch, velocity)
                yield step
            self._refresh(stop)
            self._evaluate(stop, (sums / (stop - start)).cpu().numpy())

    def _step(self, step: int, batch: Batch, velocity: dict[str, Tensor]) -> Tensor:
        """One optimiser step; the three losses (3, T)."""
        values = self.trials.values
        with self._autocast():
            losses = self.method.losses(self.trials, self.state, batch)
        ramp = (((step + 1) / self.steps) / values["warmup"].clamp(min=1e-9)).clamp(max=1.0)
        (losses.labeled + ramp * losses.unlabeled + losses.regularizer).sum().backward()
        rate = values["lr"] * cosine_rate(step, self.steps)
        sgd_step(self.state.parameters, velocity, rate, values["momentum"], values["weight_decay"])
        self.method.after_step(self.trials, self.state, batch, losses)
        return torch.stack([losses.labeled, losses.unlabeled, losses.regularizer]).detach().float()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision == "amp":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    # -- evaluation

    @torch.no_grad()
    def _logits(self, rows: PaddedRows, *, pseudo: bool) -> list[Logits]:
        """Logits of each trial's rows, a list of (n_t, K) arrays, computed in blocks of rows."""
        forward = self.method.pseudo_logits if pseudo else self.method.logits
        blocks = []
        for start in range(0, rows.index.shape[1], _EVAL_ROWS):
            features = self.features.rows(rows.index[:, start : start + _EVAL_ROWS])  # (T, n, D)
            blocks.append(forward(self.trials, self.state.tensors, features).float().cpu())
        logits = torch.cat(blocks, dim=1).numpy()
        return [logits[t, :count] for t, count in enumerate(rows.count.tolist())]

    def _evaluate(self, step: int, losses: NDArray[Any]) -> None:
        """Note validation accuracy and pseudo-label health, and keep the best heads for trials that select them."""
        val = self._logits(self.val, pseudo=False)
        health = self.pseudo_health()
        scores = []
        for t, split in enumerate(self.splits):
            labels = self.cache.labels[split.val]
            figures = metrics.classification(val[t], labels, self.counts[t])
            scores.append(figures.get("balanced_accuracy", 0.0))
            row: dict[str, Any] = {"step": step, "loss": float(losses[:, t].sum()), "loss_labeled": float(losses[0, t])}
            row |= {"loss_unlabeled": float(losses[1, t]), "val_accuracy": figures.get("accuracy")}
            row |= {"val_balanced_accuracy": figures.get("balanced_accuracy"), **health[t]}
            self.history[t].append(row)
        self._keep_best(torch.tensor(scores, device=self.device))

    def pseudo_health(self) -> list[dict[str, Any]]:
        """Pseudo-label figures of each trial over all its unlabelled rows, from their plain view."""
        found: list[dict[str, Any]] = []
        # methods that draw no pseudo-labels, or draw soft ones, are judged on all their guesses
        judged = self.method.uses_unlabeled and self.method.thresholds
        for t, probabilities in enumerate(self._pseudo_probabilities()):
            config, labels = self.configs[t], self.cache.labels[self.splits[t].unlabeled]
            threshold = config.threshold if judged else 0.0
            figures = metrics.pseudo_label_health(probabilities, labels, threshold, probabilities.shape[1])
            found.append(figures if len(labels) else {})
        return found

    def _pseudo_probabilities(self) -> list[NDArray[Any]]:
        """Pseudo-label probabilities (n_t, K) of each trial's unlabelled pictures."""
        drawn = self.method.drawn(self.trials, self.state)
        if drawn is None:
            logits = self._logits(self.unlabeled, pseudo=True)
            return [metrics.softmax(z / config.sharpen) for z, config in zip(logits, self.configs, strict=True)]
        counts = self.unlabeled.count.tolist()
        return [drawn[t, :count].float().cpu().numpy() for t, count in enumerate(counts)]

    def _keep_best(self, scores: Tensor) -> None:
        if not any(config.select == "best" for config in self.configs):
            return
        better = (scores > self.best_score) | ~self.selects
        self.best_score = torch.where(better, scores.to(self.best_score.dtype), self.best_score)
        for name, tensor in self.state.tensors.items():
            chosen = better.view((-1,) + (1,) * (tensor.dim() - 1))
            # the first evaluation is better than none, so that nothing is read before it is there
            self.best[name] = torch.where(chosen, tensor.detach(), self.best.get(name, tensor.detach()))

    # -- the end

    def finish(self) -> list[Run]:
        """Read the test split, once, with the kept heads, and hand the runs out."""
        kept = self.best or {name: tensor.detach() for name, tensor in self.state.tensors.items()}
        self.state = State({}, kept, self.state.scratch)
        seconds = time.perf_counter() - self.started
        health = self.pseudo_health()
        val = self._logits(self.val, pseudo=False)
        test = self._logits(self.test, pseudo=False)
        return [self._run(t, val[t], test[t], health[t], seconds) for t in range(len(self.configs))]

    def _run(self, t: int, val: Logits, test: Logits, health: dict[str, Any], seconds: float) -> Run:
        """The run of trial t."""
        config, split, counts = self.configs[t], self.splits[t], self.counts[t]
        val_labels, test_labels = self.cache.labels[split.val], self.cache.labels[split.test]
        temperature = fit_temperature(val, val_labels)
        figures = {"method": config.method, "seed": config.seed, "steps": self.steps}
        figures |= {"seconds": seconds / len(self.configs), "temperature": temperature, "test_rows": len(test_labels)}
        figures |= metrics.classification(test, test_labels, counts, temperature)
        figures |= {**health, "class_counts": counts.tolist()}
        figures["val"] = metrics.classification(val, val_labels, counts, temperature)
        return Run(
            config=config,
            class_names=list(self.cache.class_names),
            tensors={name: tensor[t].cpu() for name, tensor in self.state.tensors.items()},
            split=split.to_dict(self.cache.ids),
            metrics=figures,
            history=self.history[t],
            test_ids=[self.cache.ids[row] for row in split.test],
            test_labels=test_labels,
            test_probabilities=metrics.softmax(test / temperature).astype(np.float32),
            encoder=encoder_of(self.cache),
            cache_path=None if self.cache.path is None else Path(self.cache.path).resolve(),
        )


def encoder_of(cache: FeatureCache) -> dict[str, Any] | None:
    """What a run must know of the model its features came from; None for a cache in memory."""
    if cache.manifest is None:
        return None
    manifest = cache.manifest.to_dict()
    return {**manifest["model"], **{name: manifest[name] for name in ("preprocessing", "mean", "std")}}
