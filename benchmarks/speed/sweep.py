"""A random search of ULFine's own space: all trials together, and Optuna with the plain loop, a trial at a time.

    python -m benchmarks.speed.sweep --trials 256 --steps 1000 --json sweep.json

Both draw from the default space of `ulfine`, on the images of `ulfine-fast demo` and one split of them; both validate
every `--eval-every` steps and never read test images. The plain loop, that of `benchmarks.speed.eager`, is measured for
`--measured` trials, since one trial takes as long as the next, and its time for all is extrapolated.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import optuna
import torch
import torch.nn.functional as F
import typer

from benchmarks.data import demo
from benchmarks.options import DeviceOption, JsonOption, ThreadsOption
from benchmarks.results import Row, print_table, write_rows
from benchmarks.speed.eager import EagerTrial, first_weights, logits_of
from benchmarks.speed.trial_steps import images_of
from ulfine_fast.cache.io.device import pick_device
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.config import FitConfig
from ulfine_fast.data.splits import Split, draw_split, labeled_counts
from ulfine_fast.engine.fit import fit_many
from ulfine_fast.metrics import classification as metrics
from ulfine_fast.search.samplers import distributions, quiet_optuna
from ulfine_fast.search.space import Space, Value, default_space

# the split of `ulfine-fast demo`
_SPLIT: dict[str, Value] = {"n1": 100, "gamma_l": 50.0, "m1": 150, "gamma_u": 50.0, "split_seed": 0}


def space_of(steps: int, eval_every: int) -> Space:
    """ULFine's own space over the demo's split."""
    return default_space("ulfine", {**_SPLIT, "steps": steps, "eval_every": eval_every})


def engine(cache: FeatureCache, split: Split, space: Space, trials: int, device: str) -> Row:
    """Ask for all trials, train them together, and report their results to the study."""
    study = _study()
    optuna_space = distributions(space)
    started = time.perf_counter()
    asked = [study.ask(optuna_space) for _ in range(trials)]
    configs = [space.config(trial.params, seed) for seed, trial in enumerate(asked)]
    runs = fit_many(cache, configs, split=split, device=device, progress=False, read_test=False)
    for trial, run in zip(asked, runs, strict=True):
        if run.status == "failed":
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, run.metrics["val"]["balanced_accuracy"])
    return _row("engine", trials, trials, time.perf_counter() - started, study)


def plain(cache: FeatureCache, split: Split, space: Space, trials: int, measured: int, device: str) -> Row:
    """The plain loop inside Optuna, a trial at a time; the time of all trials is extrapolated from those measured."""
    study = _study()
    optuna_space = distributions(space)
    torch_device = pick_device(device)
    started = time.perf_counter()
    loop = PlainLoop(cache, split, torch_device)
    for seed in range(measured):
        trial = study.ask(optuna_space)
        study.tell(trial, loop.run(space.config(trial.params, seed)))
    return _row("Optuna, plain loop", trials, measured, time.perf_counter() - started, study)


class PlainLoop:
    """Trains a trial as a researcher's script does, with its data in memory."""

    def __init__(self, cache: FeatureCache, split: Split, device: torch.device) -> None:
        """Put features, validation rows and the text's prototypes on the device."""
        self.images = images_of(cache, split, device)
        self.val = F.normalize(torch.from_numpy(np.asarray(cache.plain[split.val])).to(device).float(), dim=-1)
        self.labels = cache.labels[split.val]
        self.counts = labeled_counts(cache.labels, split, len(cache.class_names))
        self.prototypes = F.normalize(torch.from_numpy(np.asarray(cache.prototypes)).to(device).float(), dim=-1)
        frequency = torch.from_numpy(self.counts / self.counts.sum()).float().to(device)
        self.log_prior = torch.log(frequency.clamp(min=1e-8))

    def run(self, config: FitConfig) -> float:
        """Train one trial; balanced accuracy on validation after the last step."""
        torch.manual_seed(config.seed)
        trial = EagerTrial(config, first_weights(self.prototypes, config.rank), self.log_prior)
        score = 0.0
        for step in range(1, config.steps + 1):
            trial.step(self.images.draw(config.batch_labeled, config.batch_unlabeled))
            if step % config.eval_every == 0 or step == config.steps:
                logits = logits_of(trial.parameters, self.val, config).cpu().numpy()
                score = metrics.classification(logits, self.labels, self.counts)["balanced_accuracy"]
        return float(score)


def _study() -> optuna.Study:
    return optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))


def _row(contender: str, trials: int, measured: int, seconds: float, study: optuna.Study) -> Row:
    """What is known of one contender; `seconds` are those of all trials, `measured_seconds` of the measured ones."""
    scores = [trial.value for trial in study.get_trials(deepcopy=False) if trial.value is not None]
    return {
        "contender": contender,
        "trials": trials,
        "measured_trials": measured,
        "measured_seconds": seconds,
        "extrapolated": measured < trials,
        "seconds": seconds * trials / measured,
        "finished": len(scores),
        "best_val_balanced_accuracy": max(scores, default=None),
        "median_val_balanced_accuracy": float(np.median(scores)) if scores else None,
        "threads": torch.get_num_threads(),
    }


def measure(cache: FeatureCache, trials: int, measured: int, space: Space, device: str) -> list[Row]:
    """Both contenders on one split of the cache.

    Args:
        cache: features with text.
        trials: how many the search has.
        measured: how many the plain loop trains, at most `trials`.
        space: what is searched, and all that is fixed.
        device: where both train.
    """
    config = space.config({}, 0)
    split = draw_split(cache.labels, cache.splits, cache.class_names, config)
    with quiet_optuna():
        # the first fit of a process pays for threads and buffers that others find ready
        warm_up = replace(config, steps=2, eval_every=2)
        fit_many(cache, [warm_up], split=split, device=device, progress=False, read_test=False)
        return [
            plain(cache, split, space, trials, min(measured, trials), device),
            engine(cache, split, space, trials, device),
        ]


def sweep(
    trials: Annotated[int, typer.Option(help="Trials of the search.", min=1)] = 256,
    steps: Annotated[int, typer.Option(help="Steps of each.", min=1)] = 1000,
    eval_every: Annotated[int, typer.Option(help="Steps between two validations.", min=1)] = 100,
    measured: Annotated[int, typer.Option(help="Trials that the plain loop is measured for.", min=1)] = 8,
    threads: ThreadsOption = 0,
    device: DeviceOption = "auto",
    cache: Annotated[Path | None, typer.Option(help="Another cache than the demo's.")] = None,
    as_json: JsonOption = None,
) -> None:
    """Time a random search of many trials, by the engine and by Optuna around a plain loop."""
    if threads:
        torch.set_num_threads(threads)
    features = demo() if cache is None else FeatureCache.open(cache)
    rows = [{"steps": steps, **row} for row in measure(features, trials, measured, space_of(steps, eval_every), device)]
    write_rows(as_json, rows)
    print_table(
        ["search", "trials x steps", "seconds", "ms per trial-step", "over plain", "best", "median", "note"],
        [_line(row, rows[0]["seconds"]) for row in rows],
    )


def _line(row: Row, plain_seconds: float) -> list[str]:
    """A line of the table; accuracies in percent, on validation."""
    scores = [row["best_val_balanced_accuracy"], row["median_val_balanced_accuracy"]]
    return [
        row["contender"],
        f"{row['trials']} x {row['steps']}",
        f"{row['seconds']:.1f}",
        f"{1000 * row['seconds'] / row['trials'] / row['steps']:.3f}",
        f"{plain_seconds / row['seconds']:.1f}",
        *("-" if score is None else f"{100 * score:.1f}" for score in scores),
        f"extrapolated from {row['measured_trials']} trials" if row["extrapolated"] else "",
    ]


if __name__ == "__main__":
    typer.run(guarded(sweep))
