"""One trial batch: T trials of one structure through the training loop, from their start to their runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.config import FitConfig
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.core.fused.cuda_graph import CALLS_UNTIL_RECORDED
from ulfine_fast.core.heads import Tensors, unpadded
from ulfine_fast.core.selection import select_trials
from ulfine_fast.core.types import Report, State, unheard
from ulfine_fast.data.splits import Split, labeled_counts
from ulfine_fast.engine.history import History, plain
from ulfine_fast.engine.inputs import trial_inputs
from ulfine_fast.engine.steps import Steps, make_stepper
from ulfine_fast.engine.validation import Metrics, Validation, finite
from ulfine_fast.methods.base import Method
from ulfine_fast.methods.registry import method_of
from ulfine_fast.metrics import classification as metrics
from ulfine_fast.ops.calibration import confidences, fit_temperatures, shift_to_largest_
from ulfine_fast.runs.calibration import Calibration
from ulfine_fast.runs.run import Run, describe_encoder, describe_second

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache

Watch = Callable[[int, dict[int, dict[str, Any]]], Collection[int]]
"""Gets a step and each trial's history row, returns the trials to drop."""

# steps whose mini-batches are drawn together
_STRETCH = 50
# unlabelled images that pseudo-label metrics read while training: more would take longer than the training
_HEALTH_ROWS = 8192
# logits in memory together when runs are made
_LOGITS = 1 << 24


class TrialBatch:
    """T trials: what they train on, what they have learned, and their history.

    Trials leave the tensors when they are done, stopped, dropped or failed; the others go on without them.

    Attributes:
        step: steps made.
        steps: length of the schedule.
        members: which of the T trials each position of the tensors belongs to.
        status: of each trial: "done", also while it trains, "stopped", "pruned" or "failed".
        left: after which step each trial left.
        finished: kept heads of the trials that left, in main memory.
        held_out: labelled images as fits without them see them, see `Method.held_out`; of methods without steps alone,
            in main memory.
        report: called with the fraction of the work done, where the method trains no steps.
    """

    def __init__(
        self,
        cache: FeatureCache,
        features: DeviceFeatures,
        configs: Sequence[FitConfig],
        splits: Sequence[Split],
        engine: str = "auto",
    ) -> None:
        count, device = len(configs), features.plain.device
        self.cache = cache
        self.configs = configs
        self.splits = splits
        self.engine = engine
        self.config = configs[0]
        self.method = method_of(self.config)
        self.label = self.config.method.replace("_", " ")

        # all trials as they began, and those that still train
        self.all_inputs = trial_inputs(cache, features, configs, splits)
        self.inputs = self.all_inputs
        self.pairs = self.method.uses_unlabeled and int(self.inputs.unlabeled.count.max()) > 0
        noisy = min(config.feature_noise for config in configs) > 0
        if self.pairs and not features.strong and not noisy:
            raise InputError(
                f"method {self.config.method} trains on strong views and this cache has views.strong = 0; "
                "extract again with --strong 1, or set feature_noise above 0"
            )

        # training
        self.step = 0
        self.steps = self.config.steps if self.method.trains else 0
        self.members = list(range(count))
        self.status = ["done"] * count
        self.left = [0] * count
        self.state = self.method.start(self.inputs.trials)
        self.velocity: Tensors = {}
        self.seconds = 0.0

        # the best heads so far, and the heads of trials that left
        self.best: Tensors = {}
        self.best_score = torch.full((count,), -1.0, device=device)
        self.waited = torch.zeros_like(self.inputs.patience)
        self.finished: dict[int, Tensors] = {}
        self.health: Metrics = {}
        # a method that has the probabilities of all images at hand has them in the order of all images
        has_all = type(self.method).pool_probabilities is not Method.pool_probabilities
        self.health_rows = None if has_all else _HEALTH_ROWS
        self.held_out: Tensors = {}
        self.report: Report = unheard
        self.history = History([len(split.unlabeled) > 0 for split in splits])

    # -- training

    def train(self, watch: Watch | None = None, save: Callable[[TrialBatch], None] | None = None) -> Iterator[int]:
        """Go on from the current step to the end, yielding the number of steps made.

        Args:
            watch: called after each validation with (step, {trial: history row}); returns trials to drop.
            save: called with the trial batch after each validation, and once it has ended.
        """
        clock = time.perf_counter()
        stepper = None
        if self.step == 0 and self.members:
            self._refresh()
        while self.members and self.step < self.steps:
            stepper = stepper or self._stepper()
            losses = yield from self._advance(stepper)
            trained = len(self.members)
            self._validate(losses, watch)
            # fewer trials, or tensors that the method has replaced, need a new stepper
            if self.method.uses_pool or len(self.members) < trained:
                stepper = None
            clock = self._end_of_round(clock, save)
        if self.members:
            evidence = self.method.evidence(self.inputs.trials, self.state)
            self._keep_health(
                self._validation().health(self.inputs.unlabeled, self.health_rows)
                | {name: values.double().cpu().numpy() for name, values in evidence.items()},
                self.members,
            )
            held_out = self.method.held_out(self.inputs.trials, self.state)
            self.held_out = {name: values.cpu() for name, values in held_out.items()}
            self._end_of_round(clock, save)

    def _end_of_round(self, clock: float, save: Callable[[TrialBatch], None] | None) -> float:
        """Release the trials after the last step, count the time since `clock`, and save; returns the time now."""
        if self.step == self.steps:
            self._leave(dict.fromkeys(range(len(self.members)), "done"))
        now = time.perf_counter()
        self.seconds += now - clock
        if save is not None:
            save(self)
        return now

    def rehearse(self) -> None:
        """Do everything that training does once, with a single step, to measure its memory.

        On a GPU it makes as many steps as a recording takes, whose graph has temporaries of its own.
        """
        self._refresh()
        if self.steps:
            stretch = min(_STRETCH, self.config.eval_every, self.steps)
            # kept alive until the end, as in training; memory is counted in this thread alone
            stepper = self._stepper(threads=False)
            steps = CALLS_UNTIL_RECORDED if self.best_score.is_cuda else 1
            *_, losses = islice(stepper.run(0, stretch), steps)
            self._refresh()
            self._validate(losses, None)
        self._leave(dict.fromkeys(range(len(self.members)), "done"))

    def _stepper(self, *, threads: bool = True) -> Steps:
        return make_stepper(
            self.method,
            self.inputs.trials,
            self.state,
            self.velocity,
            self.method.batches(self.inputs.batches(pairs=self.pairs)),
            self.steps,
            self.engine,
            threads=threads,
        )

    def _refresh(self) -> None:
        """Let the method read all training images, where it does, and add what it has made parameters."""
        if self.method.uses_pool:
            with torch.no_grad():
                self.method.refresh(self.inputs.trials, self.state, self.inputs.pool(self.report), self.step)
        for name, tensor in self.state.parameters.items():
            # some parameters exist only after the first refresh
            if name not in self.velocity:
                self.velocity[name] = torch.zeros_like(tensor)

    def _advance(self, stepper: Steps) -> Generator[int, None, Tensor]:
        """Train up to the next validation, yielding the steps made; returns mean losses (3, t)."""
        start, every = self.step, self.config.eval_every
        stop = min((start // every + 1) * every, self.steps)
        sums = torch.zeros(3, len(self.members), device=self.best_score.device)
        for first in range(start, stop, _STRETCH):
            last = min(first + _STRETCH, stop)
            for i, losses in enumerate(stepper.run(first, last), start=1):
                sums += losses
                yield first + i // stepper.parts
        self.step = stop
        self._refresh()
        return sums / (stop - start)

    # -- validation

    def _validation(self) -> Validation:
        return Validation(self.method, self.inputs.trials, self.state, self.inputs.features, self.inputs.labels)

    def _validate(self, losses: Tensor, watch: Watch | None) -> None:
        """Drop diverged trials, record metrics of the others, keep the best heads, and let trials leave."""
        # trials that diverged
        healthy = finite(losses.T, *self.state.parameters.values())
        self._leave({position: "failed" for position, fine in enumerate(healthy.tolist()) if not fine})
        if not self.members:
            return

        # metrics of the others, each (t, ...)
        validation = self._validation()
        parts = losses[:, healthy].cpu().double().numpy()
        metrics_now = {"loss": parts.sum(0), "loss_labeled": parts[0], "loss_unlabeled": parts[1]}
        for name, values in validation.accuracy(self.inputs.val).items():
            metrics_now[f"val_{name}"] = values
        metrics_now |= validation.health(self.inputs.unlabeled, self.health_rows)
        self.history.add(self.step, self.members, metrics_now)
        self._keep_best(metrics_now)

        # trials that stop, and those that the caller drops
        stops = ((self.inputs.patience > 0) & (self.waited >= self.inputs.patience)).tolist()
        leaving = {position: "stopped" for position, stop in enumerate(stops) if stop and self.step < self.steps}
        if watch is not None:
            staying = {trial: position for position, trial in enumerate(self.members) if position not in leaving}
            rows = {trial: self.history.row(trial, -1) for trial in staying}
            dropped = watch(self.step, rows) if rows else ()
            leaving |= {staying[trial]: "pruned" for trial in dropped if trial in staying}
        self._leave(leaving)

    def _keep_best(self, metrics_now: Metrics) -> None:
        scores = torch.from_numpy(np.nan_to_num(metrics_now["val_balanced_accuracy"])).to(self.best_score)
        better = scores > self.best_score
        self.best_score = torch.where(better, scores, self.best_score)
        self.waited = torch.where(better, 0, self.waited + 1)
        kept = better | ~self.inputs.selects
        positions = kept.cpu().numpy()
        names = [name for name in metrics_now if "pseudo" in name or "false" in name]
        health = {name: metrics_now[name][positions] for name in names}
        self._keep_health(health, np.asarray(self.members)[positions].tolist())
        if not bool(self.all_inputs.selects.any()):
            return
        for name, tensor in self.state.tensors.items():
            chosen = kept.view((-1,) + (1,) * (tensor.dim() - 1))
            # the first validation sets all trials, so that no value is read before it exists
            self.best[name] = torch.where(chosen, tensor.detach(), self.best.get(name, tensor.detach()))

    def _keep_health(self, health: Metrics, members: Sequence[int]) -> None:
        """Record the pseudo-label metrics that go with the kept heads of some trials."""
        for name, values in health.items():
            kept = self.health.setdefault(name, np.full((len(self.configs), *values.shape[1:]), np.nan))
            kept[list(members)] = values

    # -- leaving

    def _leave(self, leaving: dict[int, str]) -> None:
        """Take the trials at these positions out of the tensors; the kept heads of those that did not fail stay."""
        if not leaving:
            return
        kept = self.best or self.state.tensors
        for position, status in leaving.items():
            trial = self.members[position]
            self.status[trial] = status
            self.left[trial] = self.step
            if status != "failed":
                self.finished[trial] = {name: tensor[position].detach().cpu().clone() for name, tensor in kept.items()}
        self._stay([position for position in range(len(self.members)) if position not in leaving])

    def _stay(self, positions: list[int]) -> None:
        """Go on with the trials at these positions alone."""
        index = torch.tensor(positions, dtype=torch.int64, device=self.best_score.device)
        self.members = [self.members[position] for position in positions]
        self.inputs = select_trials(self.inputs, index)
        detached = {name: tensor.detach() for name, tensor in self.state.parameters.items()}
        self.state = select_trials(replace(self.state, parameters=detached), index)
        self.velocity = select_trials(self.velocity, index)
        self.best = select_trials(self.best, index)
        self.best_score = self.best_score[index]
        self.waited = self.waited[index]

    # -- the end

    def finish(self, *, read_test: bool = True) -> list[Run]:
        """The runs, in order; the test split is read once, with the kept heads, where `read_test`."""
        different = {id(split): split for split in self.splits}
        split_dicts = {key: split.to_dict(self.cache.ids) for key, split in different.items()}
        test_ids = {key: [self.cache.ids[row] for row in split.test] for key, split in different.items()}
        runs = []
        for t, (config, split) in enumerate(zip(self.configs, self.splits, strict=True)):
            run = Run(
                config=config,
                class_names=list(self.cache.class_names),
                tensors={},
                split=split_dicts[id(split)],
                metrics={"method": config.method, "seed": config.seed},
                history=self.history.rows_of(t),
                encoder=describe_encoder(self.cache),
                cache_path=None if self.cache.path is None else self.cache.path.resolve(),
                status=self.status[t],
                relabeled=self.cache.relabeled,
                second=describe_second(self.cache),
            )
            if self.status[t] != "done":
                run.metrics |= {"status": self.status[t], f"{self.status[t]}_at": self.left[t]}
            runs.append(run)

        # logits of as many trials together as memory allows, and what the metrics read of them
        device = self.best_score.device
        rows = self.all_inputs.val.index.shape[1] + read_test * self.all_inputs.test.index.shape[1]
        together = max(1, _LOGITS // (rows * len(self.cache.class_names)))
        order = sorted(self.finished)
        for start in range(0, len(order), together):
            chosen = order[start : start + together]
            names = self.finished[chosen[0]]
            kept = {name: torch.stack([self.finished[t][name] for t in chosen]).to(device) for name in names}
            inputs = select_trials(self.all_inputs, torch.tensor(chosen, device=device))
            validation = Validation(self.method, inputs.trials, State({}, kept), inputs.features, inputs.labels)
            val = validation.logits(inputs.val)  # (t, n, K)
            scores = validation.scores(inputs.val, val).numpy()
            val_classes = shift_to_largest_(val)
            temperatures = torch.ones(len(chosen), dtype=torch.float64, device=device)
            if not self.method.calibrates:
                val_labels = inputs.labels[inputs.val.index].clamp(min=0)
                temperatures = fit_temperatures(val, val_labels, inputs.val.present)
            scaled_val = (val / temperatures.view(-1, 1, 1)).float().cpu().numpy()
            on_val = _predictions(val, val_classes, temperatures)
            if read_test:
                test = validation.logits(inputs.test)
                on_test = _predictions(test, shift_to_largest_(test), temperatures)
            # those of the kept heads are over all images
            if self.health_rows is not None and inputs.unlabeled.index.shape[1] > self.health_rows:
                self._keep_health(validation.health(inputs.unlabeled), chosen)
            for i, (t, temperature) in enumerate(zip(chosen, temperatures.tolist(), strict=True)):
                run, split, labels = runs[t], self.splits[t], self.cache.labels
                counts = labeled_counts(labels, split, len(run.class_names))
                run.tensors = unpadded(self.finished[t], self.configs[t].rank)
                run.metrics |= {
                    "steps": self.left[t],
                    "seconds": self.seconds / len(self.configs),
                    "temperature": temperature,
                }
                # what a sweep drops must not have been seen on the test split
                if read_test and self.status[t] != "pruned":
                    run.metrics["test_rows"] = len(split.test)
                    run.metrics |= metrics.of_predictions(on_test[i].first(len(split.test)), labels[split.test], counts)
                    run.test_ids = test_ids[id(split)].copy()
                    run.test_labels = labels[split.test]
                    scaled = test[i, : len(split.test)] / temperature
                    run.test_probabilities = torch.softmax(scaled, dim=-1).cpu().numpy()
                for name, values in self.health.items():
                    of_unlabeled = "pseudo" in name or "false" in name or self.method.uses_unlabeled_pool
                    if len(split.unlabeled) or not of_unlabeled:
                        run.metrics[name] = plain(values[t])
                run.metrics["class_counts"] = counts.tolist()
                run.metrics["val"] = metrics.of_predictions(on_val[i].first(len(split.val)), labels[split.val], counts)
                run.calibration = self._calibration(run, t, scaled_val[i], scores[i])
        return runs

    def _calibration(self, run: Run, t: int, val: Any, scores: Any) -> Calibration:
        """Validation images of trial t, from calibrated logits (n, K) and scores (n,), padded, and those of folds."""
        split, rows = self.splits[t], len(self.splits[t].val)
        ids = [self.cache.ids[row] for row in split.val]
        validated = Calibration.held_out(ids, self.cache.labels[split.val], val[:rows], scores[:rows], in_fold=False)
        if not self.held_out:
            return validated
        probabilities, fold_scores = (
            self.held_out[name][t, : len(split.labeled)].numpy() for name in ("probabilities", "scores")
        )
        in_fold = np.flatnonzero(np.isfinite(fold_scores))
        labels = self.all_inputs.training_labels[t, : len(split.labeled)].cpu().numpy()
        folds = Calibration(
            [self.cache.ids[row] for row in split.labeled[in_fold]],
            labels[in_fold],
            np.ones(len(in_fold), np.bool_),
            probabilities[in_fold],
            fold_scores[in_fold],
        )
        return validated.joined(folds)

    # -- interrupted

    def saved(self) -> tuple[Tensors, dict[str, Any]]:
        """Everything that :meth:`restore` needs: tensors in main memory, and JSON values."""
        groups = {
            "parameters": self.state.parameters,
            "memory": self.state.memory,
            "scratch": self.state.scratch,
            "velocity": self.velocity,
            "best": self.best,
            "health": {name: torch.from_numpy(values) for name, values in self.health.items()},
            "history": {name: torch.from_numpy(values) for name, values in self.history.arrays().items()},
            "score": {"best": self.best_score, "waited": self.waited},
            "held_out": self.held_out,
        }
        if self.finished:
            order = sorted(self.finished)
            names = self.finished[order[0]]
            groups["finished"] = {name: torch.stack([self.finished[t][name] for t in order]) for name in names}
        # copies, as a file must not hold views of one buffer
        tensors = {
            f"{group}/{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for group, named in groups.items()
            for name, tensor in named.items()
        }
        notes = {name: getattr(self, name) for name in ("step", "members", "status", "left", "seconds")}
        return tensors, {**notes, "evaluations": self.history.steps, "rows": self.history.rows.tolist()}

    def restore(self, tensors: Tensors, notes: dict[str, Any]) -> None:
        """Restore the state returned by :meth:`saved`."""
        self._stay(notes["members"])
        self.step = notes["step"]
        self.status = notes["status"]
        self.left = notes["left"]
        self.seconds = notes["seconds"]

        # tensors by group, on the device those that train
        groups: dict[str, Tensors] = {}
        for full_name, tensor in tensors.items():
            group, _, name = full_name.partition("/")
            groups.setdefault(group, {})[name] = tensor
        device = self.best_score.device
        on_device = {
            group: {name: tensor.to(device) for name, tensor in groups.get(group, {}).items()}
            for group in ("parameters", "memory", "scratch", "velocity", "best", "score")
        }
        self.state = State(on_device["parameters"], on_device["memory"], on_device["scratch"])
        self.velocity = on_device["velocity"]
        self.best = on_device["best"]
        self.best_score = on_device["score"]["best"]
        self.waited = on_device["score"]["waited"]

        # trials that left, metrics and history
        order = [t for t in range(len(self.configs)) if t not in self.members and self.status[t] != "failed"]
        stacked = groups.get("finished", {})
        self.finished = {t: {name: stack[i] for name, stack in stacked.items()} for i, t in enumerate(order)}
        self.health = {name: tensor.numpy() for name, tensor in groups.get("health", {}).items()}
        self.held_out = groups.get("held_out", {})
        history = {name: tensor.numpy() for name, tensor in groups.get("history", {}).items()}
        self.history.restore(notes["evaluations"], notes["rows"], history)


def _predictions(shifted: Tensor, classes: Tensor, temperatures: Tensor) -> list[metrics.Predictions]:
    """Predictions of each trial from logits (T, n, K) whose largest is 0, and its classes (T, n)."""
    parts = (classes, confidences(shifted, torch.ones_like(temperatures)), confidences(shifted, temperatures))
    return [metrics.Predictions(*rows) for rows in zip(*(part.cpu().numpy() for part in parts), strict=True)]
