"""Fitting: trials are grouped into passes, every pass goes through the loop, runs come back in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ulfine_fast.cache.io.device import pick_device
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.progress import progress_bar
from ulfine_fast.config import FitConfig, split_key
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.data.splits import Split, draw_split, told_labels
from ulfine_fast.engine.checkpoint import Begun, Checkpoint
from ulfine_fast.engine.scheduling import cut
from ulfine_fast.engine.steps import ENGINES
from ulfine_fast.engine.trial_batch import Pass, Watch
from ulfine_fast.methods.registry import method_of
from ulfine_fast.related.label_proportions.bags import draw_bags
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
    given = [config or FitConfig()]
    return fit_many(cache, given, split=split, device=device, progress=progress, engine=engine, checkpoint=checkpoint)[
        0
    ]


def fit_many(
    cache: FeatureCache,
    configs: Sequence[FitConfig],
    *,
    split: Split | Sequence[Split] | None = None,
    device: str = "auto",
    progress: bool | None = None,
    engine: str = "auto",
    read_test: bool = True,
    checkpoint: str | Path | None = None,
    watch: Watch | None = None,
) -> list[Run]:
    """Fit many trials, those of the same structure together in batched passes, as many at once as memory holds.

    A trial whose loss or weights are no longer finite at an evaluation leaves its pass and comes back with the status
    "failed"; its neighbours do not notice.

    Args:
        cache: features of K classes, D wide.
        configs: T trials; hyper-parameters, seeds, adapter ranks and splits may differ in each.
        split: use this split for all trials, or one for each, instead of drawing one from each config.
        device: "auto", "cpu", "cuda" or "cuda:N".
        progress: draw a progress bar; None draws it where stderr is a terminal.
        engine: "fused" for steps written out by hand, of the methods that have them; "specification" for steps
            through autograd, of every method; "auto" takes the fused steps where there are any.
        read_test: whether test figures and predictions are made; a search has no business with them.
        checkpoint: folder that every pass is saved in after each evaluation. A later call with the same configs,
            splits and cache goes on from there, repeating no finished pass; at the end the folder is removed.
        watch: called after each evaluation with the step and, for every trial still in the pass, its history row by
            its place in `configs`; returns the places to drop, which come back with the status "pruned", the test
            split unread. After an interruption it may be asked about the same evaluation again.

    Returns:
        Fitted runs in the order of `configs`. A trial's mini-batches and results do not depend on its neighbours.

    Raises:
        InputError: an unknown engine, a split the data cannot give, a given split that trains on held-out images,
            a cache without the views or tokens a method trains on, or a checkpoint of something else.
    """
    if engine not in ENGINES:
        raise InputError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    place = pick_device(device)
    _refuse_adapters(cache, configs)
    _refuse_unknown_crops(cache, configs)
    splits = _with_bags(cache, configs, _splits(cache, configs, split))
    saved = None if checkpoint is None else Checkpoint(Path(checkpoint), cache, configs, splits, engine)
    begun = [] if saved is None else saved.load()
    read = {tokens: DeviceFeatures.load(cache, place, tokens=tokens) for tokens in {c.reads_tokens for c in configs}}
    fresh = _fresh(cache, read, configs, splits, begun, engine)
    runs: dict[int, Run] = {}
    with progress_bar(progress) as bar:
        for stand in [*begun, *(Begun(trials, {}, {}) for trials in fresh)]:
            trials = stand.trials
            own = [configs[i] for i in trials]
            one_pass = Pass(cache, read[own[0].reads_tokens], own, [splits[i] for i in trials], engine)
            if stand.notes:
                one_pass.restore(stand.tensors, stand.notes)
            note = f"{len(trials)} trials"
            task = bar.add_task(f"fit {one_pass.label}", total=one_pass.steps, unit="steps", note=note)
            for step in one_pass.train(_watch_of(trials, watch), _save_of(trials, saved)):
                bar.update(task, completed=step)
            runs.update(zip(trials, one_pass.finish(read_test=read_test), strict=True))
    if saved is not None:
        saved.remove()
    return [runs[i] for i in range(len(configs))]


def _fresh(
    cache: FeatureCache,
    read: dict[bool, DeviceFeatures],
    configs: Sequence[FitConfig],
    splits: Sequence[Split],
    begun: Sequence[Begun],
    engine: str,
) -> list[list[int]]:
    """The passes of the trials that no checkpoint holds; `read` is what trials with and without tokens are given."""
    rest = sorted(set(range(len(configs))).difference(*(one.trials for one in begun)))
    passes = []
    for tokens, features in sorted(read.items()):
        theirs = [i for i in rest if configs[i].reads_tokens == tokens]
        # trials of one pass read the same memory
        passes += cut(cache, features, configs, splits, theirs, engine)
    return passes


def _refuse_adapters(cache: FeatureCache, configs: Sequence[FitConfig]) -> None:
    """Refuse adapters in the encoder's last block, and heads behind it, where something is missing for them."""
    inside = [config for config in configs if config.reads_tokens]
    for config in inside:
        if config.feature == "pre-projection" and not method_of(config).before_projection:
            raise InputError(f"method {config.method} takes no feature pre-projection; use lift_head")
        _refuse_missing_tokens(cache, config)
    for config in inside:
        if not method_of(config).takes_tokens:
            raise InputError(
                f"method {config.method} takes no adapter adaptformer; use ulfine, lightweight or fixmatch"
            )
        if config.pseudo_loss != "cross-entropy":
            raise InputError(
                f"pseudo_loss {config.pseudo_loss} asks texts about features, and {config.reads_tokens_for} trains on "
                "tokens; set it to cross-entropy"
            )
        if config.feature_noise > 0:
            raise InputError(
                f"feature_noise is for features, and {config.reads_tokens_for} trains on tokens; set it to 0"
            )


def _refuse_missing_tokens(cache: FeatureCache, config: FitConfig) -> None:
    """Refuse a cache that lacks the tokens, or what the encoder does to them."""
    there = cache.token_kinds if "projection" in cache.head and cache.prototypes is not None else []
    if config.adapter == "adaptformer" and there != ["pre", "post"]:
        raise InputError(
            "adapter adaptformer trains on the tokens of the encoder's last block, which this cache does not hold; "
            "extract again with --features last-block, or take adapter residual"
        )
    if not there:
        raise InputError(
            "feature pre-projection trains on what the encoder has before its projection, which this cache does not "
            "hold; extract again with --features last-block or pre-projection, or take feature projected"
        )


def _refuse_unknown_crops(cache: FeatureCache, configs: Sequence[FitConfig]) -> None:
    """Refuse a schedule of crops where there are none, or nobody noted what they show."""
    asked = max((config.crop_epochs for config in configs), default=0)
    if not asked or cache.view_areas("weak").any():
        return
    there = cache.views("weak").shape[1]
    lacking = "does not say how much of an image its views show" if there else "holds no weak views"
    raise InputError(
        f"crop_epochs is {asked} and this cache {lacking}; extract the images again with --weak 4 --smallest-crop "
        "0.08, or set crop_epochs to 0"
    )


def _watch_of(trials: Sequence[int], watch: Watch | None) -> Watch | None:
    """The watch of a pass, which knows its trials by their places in it alone."""
    if watch is None:
        return None

    def ask(step: int, rows: dict[int, dict[str, Any]]) -> list[int]:
        dropped = set(watch(step, {trials[place]: row for place, row in rows.items()}))
        return [place for place in rows if trials[place] in dropped]

    return ask


def _save_of(trials: Sequence[int], saved: Checkpoint | None) -> Callable[[Pass], None] | None:
    """How the pass of these trials is saved."""
    if saved is None:
        return None
    return lambda one_pass: saved.save(trials, *one_pass.saved())


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


def _with_bags(cache: FeatureCache, configs: Sequence[FitConfig], splits: Sequence[Split]) -> list[Split]:
    """The splits, those of methods that learn from bags with bags: their own, or drawn from the labelled images."""
    found: dict[tuple[Any, ...], Split] = {}
    keys: list[tuple[Any, ...]] = []
    for config, split in zip(configs, splits, strict=True):
        _refuse_bags(cache, config, split)
        drawn = method_of(config).uses_bags and split.bags is None
        keys.append((id(split), *((config.bag_size, config.data_seed, config.label_noise) if drawn else ())))
        if keys[-1] not in found:
            found[keys[-1]] = _drawn_bags(cache, config, split) if drawn else split
    return [found[key] for key in keys]


def _drawn_bags(cache: FeatureCache, config: FitConfig, split: Split) -> Split:
    """The split with its labelled images in bags."""
    classes = len(cache.class_names)
    told = told_labels(cache.labels, split, classes, config)
    return replace(split, bags=draw_bags(split.labeled, told, config.bag_size, classes, config.data_seed))


def _refuse_bags(cache: FeatureCache, config: FitConfig, split: Split) -> None:
    """Refuse a method without what it learns from: bags and texts, or labelled images."""
    name, given = config.method, split.bags
    if not method_of(config).uses_bags:
        if not len(split.labeled) and name != "zero_shot":
            raise InputError(f"method {name} learns from labelled images and this split has none; use proportions")
        return
    if cache.prototypes is None:
        raise InputError(
            f"method {name} starts from texts of the classes, which this cache does not hold; make it with extract, "
            "or give from_arrays text_features"
        )
    if given is None and not config.bag_size:
        raise InputError(
            f"method {name} learns from bags and has none; give --bags and --proportions, or set bag_size to draw bags "
            "from labelled images"
        )
    # labels are drawn at evaluations alone
    begins = -(-config.stage_one * config.steps // config.eval_every) * config.eval_every
    if config.stage_one < 1 and begins >= config.steps:
        raise InputError(
            f"stage two begins at an evaluation and none of every {config.eval_every} steps comes between "
            f"stage_one {config.stage_one:g} and step {config.steps}; lower eval_every, or set stage_one to 1"
        )
    if given is not None and config.bag_size not in (0, given.width):
        raise InputError(f"bag_size is {config.bag_size} and the split has bags of its own; set it to 0")


def _refuse_held_out(cache: FeatureCache, split: Split) -> None:
    """Refuse to train on images that this cache holds for validation or testing: they have no views."""
    trained = np.concatenate([split.labeled, split.unlabeled])
    held_out = trained[np.isin(cache.splits[trained], ("val", "test"))]
    if len(held_out):
        name, where = cache.ids[held_out[0]], cache.splits[held_out[0]]
        raise InputError(f"the split trains on {name!r}, a {where} image of this cache; use the cache it was made on")
    if (cache.labels[split.labeled] < 0).any():
        name = cache.ids[split.labeled[cache.labels[split.labeled] < 0][0]]
        raise InputError(f"the split takes {name!r} as labelled, and this cache knows no label for it")
