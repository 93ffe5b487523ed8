"""One pass: T trials of one structure through the training loop, from their start to their runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.config import FitConfig
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.core.heads import Tensors, cropped
from ulfine_fast.core.types import State
from ulfine_fast.data.splits import Split, labeled_counts
from ulfine_fast.engine.history import History, plain
from ulfine_fast.engine.inputs import Given
from ulfine_fast.engine.steps import Steps, make_stepper
from ulfine_fast.engine.validation import Figures, Readers, finite
from ulfine_fast.methods.registry import method_of
from ulfine_fast.metrics import classification as metrics
from ulfine_fast.metrics.calibration import fit_temperature
from ulfine_fast.runs.run import Run, describe_encoder

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache

Watch = Callable[[int, dict[int, dict[str, Any]]], Collection[int]]
"""Gets a step and each trial's history row, returns the trials to drop."""

# mini-batches drawn at once, and logits held at once when runs are made
_STRETCH, _LOGITS = 50, 1 << 24


class Pass:
    """T trials: what they are given, what they have learned, what was seen on the way.

    Trials leave the tensors when they are done, stopped, dropped or failed; the rest goes on without them.

    Attributes:
        step: steps made. steps: length of the schedule.
        members: which of the T trials each place of the tensors belongs to.
        status: of each trial: "done", also while it trains, "stopped", "pruned" or "failed".
        left: after which step each trial left.
        gone: kept heads of the trials that left, in main memory.
    """

    def __init__(
        self,
        cache: FeatureCache,
        features: DeviceFeatures,
        configs: Sequence[FitConfig],
        splits: Sequence[Split],
        engine: str = "auto",
    ) -> None:
        self.cache, self.configs, self.splits, self.engine = cache, configs, splits, engine
        self.config, self.method = configs[0], method_of(configs[0])
        self.label = self.config.method.replace("_", " ")
        self.given = self.whole = Given.of(cache, features, configs, splits)
        self.pairs = self.method.uses_unlabeled and int(self.given.unlabeled.count.max()) > 0
        self._refuse_missing_views()
        self.step, self.steps = 0, self.config.steps if self.method.trains else 0
        self.members = list(range(len(configs)))
        self.status, self.left = ["done"] * len(configs), [0] * len(configs)
        self.state = self.method.start(self.given.trials)
        self.velocity: Tensors = {}
        self.best: Tensors = {}
        self.best_score = torch.full((len(configs),), -1.0, device=features.plain.device)
        self.waited = torch.zeros_like(self.given.patience)
        self.gone: dict[int, Tensors] = {}
        self.health: Figures = {}
        self.history = History([len(split.unlabeled) > 0 for split in splits])
        self.seconds = 0.0

    def _refuse_missing_views(self) -> None:
        noisy = min(config.feature_noise for config in self.configs) > 0
        if self.pairs and not self.given.features.strong and not noisy:
            raise InputError(
                f"method {self.config.method} trains on strong views and this cache has views.strong = 0; "
                "extract again with --strong 1, or set feature_noise above 0"
            )

    # -- training

    def train(self, watch: Watch | None = None, save: Callable[[Pass], None] | None = None) -> Iterator[int]:
        """Go on from where the pass stands to its end, yielding the number of steps made.

        Args:
            watch: called after each evaluation with (step, {trial: history row}); returns trials to drop.
            save: called with the pass after each evaluation, and once it has ended.
        """
        clock = time.perf_counter()
        stepper = None
        if self.step == 0 and self.members:
            self._refresh()
        while self.members and self.step < self.steps:
            stepper = stepper or self._stepper()
            losses = yield from self._advance(stepper)
            trained = len(self.members)
            self._evaluate(losses, watch)
            # other trials, or other tensors of the method's own, take other steps
            if self.method.uses_pool or len(self.members) < trained:
                stepper = None
            clock = self._end_of_round(clock, save)
        if self.members:
            self._keep_health(self._readers().health(self.given.unlabeled), self.members)
            self._end_of_round(clock, save)

    def _end_of_round(self, clock: float, save: Callable[[Pass], None] | None) -> float:
        """Let the trials go after the last step, note the time since `clock`, and save; returns the time now."""
        if self.step == self.steps:
            self._leave(dict.fromkeys(range(len(self.members)), "done"))
        now = time.perf_counter()
        self.seconds += now - clock
        if save is not None:
            save(self)
        return now

    def rehearse(self) -> None:
        """All that training does, once each and for a single step, to see what memory it takes."""
        self._refresh()
        if self.steps:
            stretch = min(_STRETCH, self.config.eval_every, self.steps)
            # held until the end, as training holds it
            # memory is counted in this thread alone
            stepper = self._stepper(threads=False)
            losses = next(iter(stepper.run(0, stretch)))
            self._refresh()
            self._evaluate(losses, None)
        self._leave(dict.fromkeys(range(len(self.members)), "done"))

    def _stepper(self, *, threads: bool = True) -> Steps:
        told = self.given.trials, self.state, self.velocity, self.given.batches(pairs=self.pairs), self.steps
        return make_stepper(self.method, *told, self.engine, threads=threads)

    def _refresh(self) -> None:
        """Let the method look at all training images, where it asks for that."""
        if self.method.uses_pool:
            with torch.no_grad():
                self.method.refresh(self.given.trials, self.state, self.given.pool(), self.step)
        for name, tensor in self.state.parameters.items():
            # some parameters start from the pool, so they are there only now
            if name not in self.velocity:
                self.velocity[name] = torch.zeros_like(tensor)

    def _advance(self, stepper: Steps) -> Generator[int, None, Tensor]:
        """Train up to the next evaluation, yielding the steps made; returns mean losses (3, t)."""
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

    # -- evaluation

    def _readers(self) -> Readers:
        return Readers(self.method, self.given.trials, self.state, self.given.features, self.given.labels)

    def _evaluate(self, losses: Tensor, watch: Watch | None) -> None:
        """Drop diverged trials, note figures of the others, keep the best heads, drop who stops or is dropped."""
        healthy = finite(losses.T, *self.state.parameters.values())
        self._leave({place: "failed" for place, fine in enumerate(healthy.tolist()) if not fine})
        if not self.members:
            return
        figures = self._figures(losses[:, healthy])
        self.history.add(self.step, self.members, figures)
        self._keep_best(figures)
        stops = ((self.given.patience > 0) & (self.waited >= self.given.patience)).tolist()
        leaving = {place: "stopped" for place, stop in enumerate(stops) if stop and self.step < self.steps}
        if watch is not None:
            staying = {trial: place for place, trial in enumerate(self.members) if place not in leaving}
            rows = {trial: self.history.row(trial, -1) for trial in staying}
            dropped = watch(self.step, rows) if rows else ()
            leaving |= {staying[trial]: "pruned" for trial in dropped if trial in staying}
        self._leave(leaving)

    def _figures(self, losses: Tensor) -> Figures:
        """A history row's figures, each (t, ...)."""
        readers, parts = self._readers(), losses.cpu().double().numpy()
        val = {f"val_{name}": values for name, values in readers.accuracy(self.given.val).items()}
        found = {"loss": parts.sum(0), "loss_labeled": parts[0], "loss_unlabeled": parts[1]}
        return {**found, **val, **readers.health(self.given.unlabeled)}

    def _keep_best(self, figures: Figures) -> None:
        scores = torch.from_numpy(np.nan_to_num(figures["val_balanced_accuracy"])).to(self.best_score)
        better = scores > self.best_score
        self.best_score = torch.where(better, scores, self.best_score)
        self.waited = torch.where(better, 0, self.waited + 1)
        kept = better | ~self.given.selects
        places = kept.cpu().numpy()
        health = {name: values[places] for name, values in figures.items() if "pseudo" in name or "false" in name}
        self._keep_health(health, np.asarray(self.members)[places].tolist())
        if not bool(self.whole.selects.any()):
            return
        for name, tensor in self.state.tensors.items():
            chosen = kept.view((-1,) + (1,) * (tensor.dim() - 1))
            # the first evaluation is better than none, so that nothing is read before it is there
            self.best[name] = torch.where(chosen, tensor.detach(), self.best.get(name, tensor.detach()))

    def _keep_health(self, health: Figures, members: Sequence[int]) -> None:
        """Note the pseudo-label figures that go with the kept heads of some trials."""
        for name, values in health.items():
            kept = self.health.setdefault(name, np.full((len(self.configs), *values.shape[1:]), np.nan))
            kept[list(members)] = values

    # -- leaving

    def _leave(self, leaving: dict[int, str]) -> None:
        """Take the trials at these places out of the tensors; the kept heads of those that did not fail stay."""
        if not leaving:
            return
        kept = self.best or self.state.tensors
        for place, status in leaving.items():
            trial = self.members[place]
            self.status[trial], self.left[trial] = status, self.step
            if status != "failed":
                self.gone[trial] = {name: tensor[place].detach().cpu().clone() for name, tensor in kept.items()}
        self._stay([place for place in range(len(self.members)) if place not in leaving])

    def _stay(self, places: list[int]) -> None:
        """Go on with the trials at these places alone."""
        index = torch.tensor(places, dtype=torch.int64, device=self.best_score.device)
        self.members = [self.members[place] for place in places]
        self.given = self.given.at(index)
        groups = (self.state.parameters, self.state.memory, self.state.scratch, self.velocity, self.best)
        chosen = [{name: tensor.detach()[index] for name, tensor in group.items()} for group in groups]
        self.state, self.velocity, self.best = State(*chosen[:3]), chosen[3], chosen[4]
        self.best_score, self.waited = self.best_score[index], self.waited[index]

    # -- the end

    def finish(self, *, read_test: bool = True) -> list[Run]:
        """Hand the runs out, in order; the test split is read once, with the kept heads, where `read_test`."""
        splits = {id(split): split.to_dict(self.cache.ids) for split in self.splits}
        runs = {}
        for t, (config, split) in enumerate(zip(self.configs, self.splits, strict=True)):
            runs[t] = Run(
                config=config,
                class_names=list(self.cache.class_names),
                tensors={},
                split=splits[id(split)],
                metrics={"method": config.method, "seed": config.seed},
                history=self.history.rows_of(t),
                encoder=describe_encoder(self.cache),
                cache_path=None if self.cache.path is None else self.cache.path.resolve(),
                status=self.status[t],
                relabeled=self.cache.relabeled,
            )
            if self.status[t] != "done":
                runs[t].metrics |= {"status": self.status[t], f"{self.status[t]}_at": self.left[t]}
        self._judge(runs, read_test)
        return list(runs.values())

    def _judge(self, runs: dict[int, Run], read_test: bool) -> None:
        """Fill in the heads and figures of the trials that have any, as many together as their logits allow."""
        rows = self.whole.val.index.shape[1] + read_test * self.whole.test.index.shape[1]
        together = max(1, _LOGITS // (rows * len(self.cache.class_names)))
        order = sorted(self.gone)
        for start in range(0, len(order), together):
            chosen = order[start : start + together]
            device = self.best_score.device
            kept = {name: torch.stack([self.gone[t][name] for t in chosen]).to(device) for name in self.gone[chosen[0]]}
            given = self.whole.at(torch.tensor(chosen, device=device))
            readers = Readers(self.method, given.trials, State({}, kept), given.features, given.labels)
            val = readers.logits(given.val).numpy()
            test = readers.logits(given.test).numpy() if read_test else None
            for i, t in enumerate(chosen):
                runs[t].tensors = cropped(self.gone[t], self.configs[t].rank)
                # what a sweep drops must not have been seen on the test split
                self._figure(runs[t], t, val[i], None if test is None or self.status[t] == "pruned" else test[i])

    def _figure(self, run: Run, t: int, val: Any, test: Any | None) -> None:
        """Metrics and predictions of trial t from its logits of validation and test (n, K), padding included."""
        split, labels = self.splits[t], self.cache.labels
        counts = labeled_counts(labels, split, len(run.class_names))
        val = val[: len(split.val)]
        temperature = fit_temperature(val, labels[split.val])
        figures: dict[str, Any] = {
            "steps": self.left[t],
            "seconds": self.seconds / len(self.configs),
            "temperature": temperature,
        }
        if test is not None:
            test = test[: len(split.test)]
            figures |= {"test_rows": len(test), **metrics.classification(test, labels[split.test], counts, temperature)}
            run.test_ids, run.test_labels = [self.cache.ids[row] for row in split.test], labels[split.test]
            run.test_probabilities = metrics.softmax(test / temperature).astype(np.float32)
        if len(split.unlabeled):
            figures |= {name: plain(values[t]) for name, values in self.health.items()}
        figures["class_counts"] = counts.tolist()
        figures["val"] = metrics.classification(val, labels[split.val], counts, temperature)
        run.metrics |= figures

    # -- interrupted

    def saved(self) -> tuple[Tensors, dict[str, Any]]:
        """Everything that :meth:`restore` needs: tensors in main memory, and JSON values."""
        state = self.state
        groups = {"parameters": state.parameters, "memory": state.memory, "scratch": state.scratch}
        groups |= {"velocity": self.velocity, "best": self.best}
        if self.gone:
            order = sorted(self.gone)
            groups["gone"] = {name: torch.stack([self.gone[t][name] for t in order]) for name in self.gone[order[0]]}
        groups["health"] = {name: torch.from_numpy(values) for name, values in self.health.items()}
        groups["history"] = {name: torch.from_numpy(values) for name, values in self.history.arrays().items()}
        groups["score"] = {"best": self.best_score, "waited": self.waited}
        # copies: views of one buffer cannot be told apart in a file
        tensors = {
            f"{group}/{name}": tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for group, named in groups.items()
            for name, tensor in named.items()
        }
        names = ("step", "members", "status", "left", "seconds")
        notes = {name: getattr(self, name) for name in names}
        return tensors, {**notes, "evaluations": self.history.steps, "rows": self.history.rows.tolist()}

    def restore(self, tensors: Tensors, notes: dict[str, Any]) -> None:
        """Stand where the pass stood that gave these."""
        self._stay(notes["members"])
        self.step, self.status, self.left, self.seconds = (
            notes[name] for name in ("step", "status", "left", "seconds")
        )
        groups: dict[str, Tensors] = {}
        for name, tensor in tensors.items():
            group, _, own = name.partition("/")
            groups.setdefault(group, {})[own] = tensor
        device = self.best_score.device
        there = {name: {own: t.to(device) for own, t in named.items()} for name, named in groups.items()}
        self.state = State(*(there.get(name, {}) for name in ("parameters", "memory", "scratch")))
        self.velocity, self.best = there.get("velocity", {}), there.get("best", {})
        self.best_score, self.waited = there["score"]["best"], there["score"]["waited"]
        order = [t for t in range(len(self.configs)) if t not in self.members and self.status[t] != "failed"]
        self.gone = {t: {name: stack[i] for name, stack in groups["gone"].items()} for i, t in enumerate(order)}
        self.health = {name: tensor.numpy() for name, tensor in groups.get("health", {}).items()}
        history = {name: tensor.numpy() for name, tensor in groups.get("history", {}).items()}
        self.history.restore(notes["evaluations"], notes["rows"], history)
