"""Whole fits: a sweep of many trials with its metrics timed apart, and `ulfine_plus` at the size of ImageNet."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.gpu.checks import TINY
from benchmarks.gpu.parts import Report, Settings
from benchmarks.speed import ulfine_plus
from benchmarks.speed.floor import SHAPES, Shape, seconds_of
from benchmarks.speed.trial_steps import TrainingSet, config_of, new_cache
from benchmarks.speed.ulfine_plus import Size
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.config import FitConfig
from ulfine_fast.data.splits import draw_split
from ulfine_fast.engine.fit import fit_many
from ulfine_fast.engine.memory import free_memory
from ulfine_fast.engine.steps import make_stepper
from ulfine_fast.methods.registry import method_of

_VALIDATIONS = 10
IMAGENET = Size(1_280_000, 1000, 512)
_SMALL = Size(40_000, 1000, 512)


# -- a sweep


def run_sweep(settings: Settings, report: Report) -> None:
    """Time 256 trials of 1,000 steps: steps alone, with validations, and with the final metrics."""
    device = torch.device(settings.device)
    shape = TINY if settings.tiny else SHAPES["S1"]
    trials, steps, images = (4, 20, 100) if settings.tiny else (256, 1000, 300)
    cache = new_cache(shape, images_per_class=images)
    configs = sweep_configs(shape, cache, trials, steps)
    training_set = TrainingSet(
        shape, cache, draw_split(cache.labels, cache.splits, cache.class_names, configs[0]), device
    )

    # the first fit of a process pays for kernels and buffers that others find ready
    short = [dataclasses.replace(config, steps=2, eval_every=2) for config in configs[:2]]
    fit_many(cache, short, split=training_set.split, device=str(device), progress=False)

    alone = _seconds_of_steps(training_set, configs)
    started = time.perf_counter()
    runs = fit_many(cache, configs, split=training_set.split, device=str(device), progress=False)
    whole = time.perf_counter() - started
    # the seconds of a run are its part of the training of its trial batch, validations included
    trained = sum(float(run.metrics["seconds"]) for run in runs)
    per_step = 1e6 / trials / steps
    accuracies = [float(run.metrics["balanced_accuracy"]) for run in runs if run.status == "done"]
    report(
        f"{trials} trials x {steps} steps, {len(training_set.split.val):,} validation and "
        f"{len(training_set.split.test):,} test images: {whole:.2f} s, {whole * per_step:.2f} us a trial-step; "
        f"steps alone {alone:.2f} s, {_VALIDATIONS} validations {trained - alone:.2f} s, "
        f"start and final metrics {whole - trained:.2f} s",
        trials=trials,
        steps=steps,
        validations=_VALIDATIONS,
        validation_images=len(training_set.split.val),
        test_images=len(training_set.split.test),
        seconds=whole,
        steps_seconds=alone,
        validation_seconds=trained - alone,
        start_and_metrics_seconds=whole - trained,
        microseconds_per_trial_step=whole * per_step,
        steps_microseconds_per_trial_step=alone * per_step,
        done=len(accuracies),
        median_balanced_accuracy=float(np.median(accuracies)) if accuracies else None,
    )


def sweep_configs(shape: Shape, cache: FeatureCache, trials: int, steps: int) -> list[FitConfig]:
    """Random trials over the options that matter most; a third of the images are for tests."""
    random = np.random.default_rng(0)
    values = {
        "n1": len(cache.labels) // shape.classes // 3,
        "steps": steps,
        "eval_every": steps // _VALIDATIONS,
        "val_fraction": 0.5,
        "test_fraction": 1 / 3,
    }
    configs = []
    for seed in range(trials):
        searched = {
            "lr": float(10 ** random.uniform(-3, -1)),
            "mu": float(10 ** random.uniform(-3, -1)),
            "threshold": float(random.uniform(0.3, 0.95)),
            "lambda_o": float(10 ** random.uniform(-2, 0)),
        }
        configs.append(FitConfig.from_dict({**config_of(shape, cache, seed).to_dict(), **values, **searched}))
    return configs


def _seconds_of_steps(training_set: TrainingSet, configs: Sequence[FitConfig]) -> float:
    """Of all optimiser steps of all trials together, without validations."""
    inputs, method = training_set.inputs(configs), method_of(configs[0])
    state = method.start(inputs.trials)
    velocity = {name: torch.zeros_like(tensor) for name, tensor in state.parameters.items()}
    steps = configs[0].steps
    stepper = make_stepper(method, inputs.trials, state, velocity, inputs.batches(pairs=True), steps, "fused")

    def train() -> None:
        for first in range(0, steps, 50):
            for _ in stepper.run(first, min(first + 50, steps)):
                pass

    return seconds_of(train, training_set.device)


# -- ulfine_plus


def run_ulfine_plus(settings: Settings, report: Report) -> None:
    """Time `ulfine_plus` on made-up features, a small size first; the large one shrinks to what fits."""
    device = torch.device(settings.device)
    sizes = [Size(200, 4, 16)] if settings.tiny else [_SMALL, IMAGENET]
    ulfine_plus.measure(Size(200, 4, 16), device)  # the first fit of a process pays for kernels and buffers
    seconds, work = 0.0, 1
    for wanted in sizes:
        size = wanted
        while size.images > _SMALL.images and (
            reason := _too_large(size, device, report.seconds_left, seconds * _work(size) / work)
        ):
            report(f"{size.images:,} images are too many: {reason}; half as many are tried", left_out=reason)
            size = size._replace(images=size.images // 2)
        with report.attempt(f"ulfine_plus, {size.images:,} images", images=size.images):
            row = ulfine_plus.measure(size, device)
            seconds, work = row["seconds"], _work(size)
            memory = row["megabytes"]
            report(
                f"{size.images:,} images, {size.classes} classes, D {size.dim}: {row['seconds']:.1f} s, "
                f"{row['ratio']:.1f} times the floor" + ("" if memory is None else f", {memory:,.0f} MiB"),
                **row,
                wanted_images=wanted.images,
            )


def _work(size: Size) -> int:
    """Multiply-adds, where four candidates survive."""
    return ulfine_plus.multiply_adds(size, 10 * size.classes, 4)


def _too_large(size: Size, device: torch.device, seconds_left: float, seconds: float) -> str:
    """Why a size is not tried; an empty text where it is."""
    # plain and two views in float16; the world is made in main memory and copied to the device
    features = 3 * 2 * size.images * size.dim
    if seconds > seconds_left:
        return f"about {seconds:.0f} s are needed and {seconds_left:.0f} s are left"
    free = free_memory()
    if 2 * features > free:
        return f"{2 * features / 1e9:.0f} GB of memory are needed and {free / 1e9:.0f} GB are free"
    if device.type == "cuda" and 3 * features > (free := torch.cuda.mem_get_info(device)[0]):
        return f"{3 * features / 1e9:.0f} GB of the GPU's memory are needed and {free / 1e9:.0f} GB are free"
    return ""
