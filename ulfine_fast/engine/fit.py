"""Fitting: trials are grouped into trial batches and trained, and their runs are returned in order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import TaskID

from ulfine_fast.cache.io.device import current_device, pick_device
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.names import one_of
from ulfine_fast.cache.io.progress import progress_bar, working
from ulfine_fast.config import FitConfig, own_options, split_key
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.core.types import Report
from ulfine_fast.data.folds import Folds, draw_folds, is_cross_validated
from ulfine_fast.data.splits import Split, draw_split
from ulfine_fast.engine.checkpoint import Checkpoint, damaged
from ulfine_fast.engine.cross_validation import add_estimate
from ulfine_fast.engine.scheduling import schedule
from ulfine_fast.engine.steps import ENGINES
from ulfine_fast.engine.trial_batch import TrialBatch, Watch
from ulfine_fast.engine.validate import check_crops, check_held_out, check_labels, check_second, check_tokens
from ulfine_fast.methods.registry import method_of
from ulfine_fast.runs.run import Run

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache


def fit(
    cache: FeatureCache,
    config: FitConfig | None = None,
    *,
    split: Split | None = None,
    device: str = "auto",
    progress: bool | None = None,
    engine: str = "auto",
    checkpoint: str | Path | None = None,
) -> Run:
    """Fit one trial; :func:`fit_many` with T = 1."""
    runs = fit_many(
        cache,
        [config or FitConfig()],
        split=split,
        device=device,
        progress=progress,
        engine=engine,
        checkpoint=checkpoint,
    )
    return runs[0]


def fit_many(
    cache: FeatureCache,
    configs: Sequence[FitConfig],
    *,
    split: Split | Sequence[Split] | None = None,
    device: str = "auto",
    progress: bool | None = None,
    engine: str = "auto",
    read_test: bool = True,
    cross_validate: bool = True,
    checkpoint: str | Path | None = None,
    watch: Watch | None = None,
    report: Report | None = None,
) -> list[Run]:
    """Fit many trials, those of the same structure together in trial batches, as many together as memory holds.

    A trial whose loss or weights are no longer finite at a validation leaves its trial batch, and its run has the
    status "failed"; the other trials are not affected.

    Args:
        cache: features of K classes, D wide.
        configs: T trials; hyper-parameters, seeds, adapter ranks and splits may differ in each.
        split: use this split for all trials, or one for each, instead of drawing one from each config.
        device: "auto", "cpu", "cuda" or "cuda:N".
        progress: draw a progress bar; None draws it where stderr is a terminal.
        engine: "specification" for steps through autograd; "fused" for steps without it, which some methods have;
            "native" for those with passes that the machine's C compiler builds, on a processor; "auto" for "fused"
            where the method has it.
        read_test: whether test metrics and predictions are made; a search must not see them.
        cross_validate: whether a trial without a test split, drawn from a config that neither has `test_fraction` nor
            follows the protocol (`n1`), trains on every label and is judged by repeated stratified cross-validation,
            whose folds are further trials. False holds test and validation images out instead.
        checkpoint: folder that every trial batch is saved in after each validation. A later call with the same configs,
            splits and cache continues from there, without repeating finished trial batches; at the end the folder is
            removed.
        watch: called after each validation with the step and, for every trial that still trains, its history row by
            its position in `configs`; returns the positions to drop, whose runs have the status "pruned" and no test
            metrics. After an interruption it may be called for the same validation again.
        report: called with the fraction of all trials' work that is done, where they train no steps.

    Returns:
        Fitted runs in the order of `configs`. A trial's mini-batches and results do not depend on its neighbours.

    Raises:
        InputError: an unknown engine, a split the data cannot give, a split that trains on held-out images, a cache
            without the views or tokens a method trains on, or a checkpoint of something else.
    """
    if engine not in ENGINES:
        raise one_of("engine", engine, ENGINES)
    torch_device = pick_device(device)
    with current_device(torch_device):
        with working("prepare the fit", progress):
            check_tokens(cache, configs)
            check_second(cache, configs)
            judged: dict[int, Folds] = {}
            asked = list(configs)
            if split is None:
                cross_validate = cross_validate and read_test
                splits = draw_splits(cache, configs, hold_out=not cross_validate)
                if cross_validate:
                    judged = _folds(cache, configs, splits)
                # the trials of the folds come after those that were asked for
                configs = [*asked, *(asked[i] for i, folds in judged.items() for _ in folds.splits)]
                splits = [*splits, *(own for folds in judged.values() for own in folds.splits)]
            else:
                splits = _checked_splits(cache, configs, split)
            splits = _prepared(cache, configs, splits)
            check_crops(cache, configs)

            # features on the device: trials of one trial batch read the same memory
            features = {
                tokens: DeviceFeatures.load(cache, torch_device, tokens=tokens)
                for tokens in {config.reads_tokens for config in configs}
            }

            # trial batches: those of a checkpoint continue, the other trials are grouped anew
            saved = None if checkpoint is None else Checkpoint(Path(checkpoint), cache, configs, splits, engine)
            begun = {} if saved is None else {tuple(batch.trials): batch for batch in saved.load()}
            not_begun = sorted(set(range(len(configs))).difference(*begun))
            members = list(begun)
            for tokens, batch_features in sorted(features.items()):
                chosen = [i for i in not_begun if configs[i].reads_tokens == tokens]
                members += map(tuple, schedule(cache, batch_features, configs, splits, chosen, engine))

        runs: dict[int, Run] = {}
        with progress_bar(progress) as bar:
            for trials in members:
                method = configs[trials[0]].method.replace("_", " ")
                # methods without steps, and the start of others, may take long too
                task = bar.add_task(f"fit {method}", total=None, unit="steps", note="starts")
                batch = TrialBatch(
                    cache,
                    features[configs[trials[0]].reads_tokens],
                    [configs[i] for i in trials],
                    [splits[i] for i in trials],
                    engine,
                )
                if saved is not None and trials in begun:
                    try:
                        batch.restore(begun[trials].tensors, begun[trials].notes)
                    # written by another program: names, types and shapes may be anything
                    except Exception as error:
                        raise damaged(saved.folder, error) from error
                note = f"{len(trials)} trials"
                bar.update(task, total=batch.steps or None, unit="steps" if batch.steps else "%", note=note)

                def work(fraction: float, trials: Sequence[int] = trials, task: TaskID = task) -> None:
                    """Show the part of a fit without steps that is done."""
                    bar.update(task, total=100, completed=100 * fraction)
                    if report is not None:
                        report((len(runs) + fraction * len(trials)) / len(configs))

                if not batch.steps:
                    batch.report = work
                for step in batch.train(_watch_of_batch(trials, watch, len(asked)), _save_of_batch(trials, saved)):
                    bar.update(task, completed=step)
                if not batch.steps:
                    work(1.0)
                bar.update(task, note=f"{note}, metrics")
                runs.update(zip(trials, batch.finish(read_test=read_test), strict=True))
                total = batch.steps or 100
                bar.update(task, total=total, completed=total, note=note)
        if saved is not None:
            saved.remove()

        # what the folds say of their trials
        fold_runs = [runs[i] for i in range(len(asked), len(configs))]
        for i, folds in judged.items():
            add_estimate(runs[i], cache, splits[i], folds, fold_runs[: len(folds.splits)])
            fold_runs = fold_runs[len(folds.splits) :]
        return [runs[i] for i in range(len(asked))]


def draw_splits(cache: FeatureCache, configs: Sequence[FitConfig], *, hold_out: bool = True) -> list[Split]:
    """The split of each config, by its method or by the protocol, drawn once for all configs that draw the same.

    Args:
        cache: features.
        configs: of the trials.
        hold_out: False for trials that are to be cross-validated, where :func:`is_cross_validated` says so.
    """
    # a search draws one split many times, and drawing one takes longer than some trials
    drawn: dict[tuple[Any, ...], Split] = {}
    splits = []
    for config in configs:
        key = (*split_key(config), config.method, *_own_values(config))
        if key not in drawn:
            split = method_of(config).split(cache, config)
            if split is None:
                protocol_key = split_key(config)
                if protocol_key not in drawn:
                    held_out = hold_out or not is_cross_validated(cache.labels, cache.splits, config)
                    drawn[protocol_key] = draw_split(
                        cache.labels, cache.splits, cache.class_names, config, hold_out=held_out
                    )
                split = drawn[protocol_key]
            drawn[key] = split
        splits.append(drawn[key])
    return splits


def _folds(cache: FeatureCache, configs: Sequence[FitConfig], splits: Sequence[Split]) -> dict[int, Folds]:
    """The folds of the trials that are cross-validated, by their positions."""
    folds = {}
    for i, (config, split) in enumerate(zip(configs, splits, strict=True)):
        drawn = method_of(config).split(cache, config) is None
        if drawn and config.cv_folds and is_cross_validated(cache.labels, cache.splits, config):
            folds[i] = draw_folds(cache.labels, split, len(cache.class_names), config)
    return folds


def _checked_splits(cache: FeatureCache, configs: Sequence[FitConfig], split: Split | Sequence[Split]) -> list[Split]:
    """The caller's split for each config."""
    splits = [split] * len(configs) if isinstance(split, Split) else list(split)
    if len(splits) != len(configs):
        raise InputError(f"{len(configs)} configs need as many splits, got {len(splits)}")
    for different in {id(split): split for split in splits}.values():
        check_held_out(cache, different)
    for config in configs:
        if method_of(config).split(cache, config) is not None:
            raise InputError(
                f"a split is given and so are options of method {config.method} that name one; leave one of them out"
            )
    return splits


def _own_values(config: FitConfig) -> tuple[Any, ...]:
    """The values of the method's own options."""
    return tuple(getattr(config, name) for name in own_options(config.method))


def _prepared(cache: FeatureCache, configs: Sequence[FitConfig], splits: Sequence[Split]) -> list[Split]:
    """The splits with what their methods add to them, made once for all trials that add the same."""
    prepared: dict[tuple[Any, ...], Split] = {}
    result = []
    for config, split in zip(configs, splits, strict=True):
        method = method_of(config)
        check_labels(config, split)
        method.check(cache, config, split)
        key = (id(split), config.method, config.data_seed, config.label_noise, *_own_values(config))
        if key not in prepared:
            prepared[key] = method.prepare(cache, config, split)
        result.append(prepared[key])
    return result


def _watch_of_batch(trials: Sequence[int], watch: Watch | None, asked: int) -> Watch | None:
    """The watch of a trial batch, which numbers its trials by their positions in it; it sees the first `asked`."""
    if watch is None:
        return None

    def ask(step: int, rows: dict[int, dict[str, Any]]) -> Collection[int]:
        seen = {trials[position]: row for position, row in rows.items() if trials[position] < asked}
        dropped = set(watch(step, seen)) if seen else set()
        return [position for position in rows if trials[position] in dropped]

    return ask


def _save_of_batch(trials: Sequence[int], saved: Checkpoint | None) -> Callable[[TrialBatch], None] | None:
    """The function that saves the trial batch of these trials."""
    if saved is None:
        return None
    return lambda batch: saved.save(trials, *batch.saved())
