"""Whether the fused steps are right on a device: against float64, against the processor, and through a CUDA graph.

Errors are ||result - reference|| / ||reference||. Each check is a row with what was measured and whether it passed.
"""

from __future__ import annotations

import dataclasses
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.parts import Report, Settings
from benchmarks.speed.floor import Shape, bandwidth, product_rate
from benchmarks.speed.trial_steps import TrainingSet
from ulfine_fast.config import FitConfig
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.core.fused.loss import cross_entropy_gradient_
from ulfine_fast.core.heads import Tensors
from ulfine_fast.core.types import State
from ulfine_fast.engine.fit import fit_many
from ulfine_fast.engine.steps import Steps, make_stepper
from ulfine_fast.methods.registry import method_of
from ulfine_fast.ops import kernels
from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.ops.sgd import decay_velocity_

# one class, few, and as many as ImageNet has; the widths of usual features
_SHAPES = (
    Shape("K1", dim=384, classes=1, rank=16, labeled=33, unlabeled=31),
    Shape("K10", dim=512, classes=10, rank=16, labeled=32, unlabeled=32),
    Shape("K100", dim=1280, classes=100, rank=64, labeled=64, unlabeled=64),
    Shape("K1000", dim=768, classes=1000, rank=64, labeled=64, unlabeled=64),
)
TINY = Shape("tiny", dim=24, classes=7, rank=4, labeled=9, unlabeled=6)
_TRIALS = 3
_STEPS = 8  # of which a GPU replays the last
_GRAPH_STEPS = 60
# float32 steps drift apart by rounding; a wrong kernel is off by far more
_STEPS_ERROR = 1e-3
_OPERATION_ERROR = 1e-5
_PREDICTION_ERROR = 5e-3
_UNIT = Shape("card", dim=512, classes=100, rank=64, labeled=64, unlabeled=64)


def run_checks(settings: Settings, report: Report) -> None:
    """All checks."""
    device = torch.device(settings.device)
    shapes = (TINY,) if settings.tiny else _SHAPES
    if device.type == "cuda":
        with report.attempt("card"):
            _card(device, report)
    with report.attempt("kernels in use"):
        reason = kernels.why_not(device)
        passed = (reason is None) == (device.type == "cuda")
        report(f"kernels: {reason or 'in use'}", check="kernels in use", passed=passed, reason=reason)

    # parts of a step, and whole steps, against float64
    for shape in shapes:
        for name, function in _OPERATIONS.items():
            with report.attempt(f"{name}, {shape.name}", check=name, shape=shape.name, passed=False):
                error = function(device, shape)
                _judge(report, name, shape, error, _OPERATION_ERROR)
    for shape in shapes:
        with report.attempt(f"steps, {shape.name}", check="steps against float64", shape=shape.name, passed=False):
            for name, error in steps_errors(device, shape).items():
                _judge(report, f"{name} of {_STEPS} steps against float64", shape, error, _STEPS_ERROR)

    # mini-batches and whole fits against the processor's
    shape = TINY if settings.tiny else _SHAPES[2]
    with report.attempt("mini-batches", check="mini-batches", passed=False):
        same = same_batches(device, shape)
        report(f"mini-batches equal the processor's: {same}", check="mini-batches", passed=same)
    with report.attempt("predictions", check="predictions", passed=False):
        error = predictions_error(device, shape)
        _judge(report, "predictions of a fit against the processor's", shape, error, _PREDICTION_ERROR)

    # the graph
    if device.type == "cuda":
        for trials in (1, 16):
            with report.attempt("CUDA graph", check="CUDA graph", passed=False):
                _check_graph(device, shape, trials, report)
        with report.attempt("waits", check="waits for the device", passed=False):
            _check_waits(device, shape, report)


def _judge(report: Report, name: str, shape: Shape, error: float, limit: float) -> None:
    passed = error <= limit  # False for NaN
    text = (
        f"{'ok    ' if passed else 'WRONG '} {name}, {shape.name} (K {shape.classes}, D {shape.dim}): error {error:.1e}"
    )
    report(text, check=name, shape=shape.name, classes=shape.classes, dim=shape.dim, error=error, passed=passed)


def _card(device: torch.device, report: Report) -> None:
    """What the card is, and the rates that floors are made of."""
    card = torch.cuda.get_device_properties(device)
    copies, products = bandwidth(device), product_rate(_UNIT, device)
    side = 8192
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = _seconds(lambda: left @ right, device)
    report(
        f"{card.name}: copies {copies / 1e12:.2f} TB/s, float32 products {2 * products / 1e12:.1f} TFLOP/s, "
        f"bfloat16 {2 * side**3 / seconds / 1e12:.0f} TFLOP/s",
        card=card.name,
        capability=list(torch.cuda.get_device_capability(device)),
        memory_bytes=card.total_memory,
        multiprocessors=card.multi_processor_count,
        copy_bytes_per_second=copies,
        float32_multiply_adds_per_second=products,
        bfloat16_flops_per_second=2 * side**3 / seconds,
        tf32_products=torch.backends.cuda.matmul.allow_tf32,
        tf32_convolutions=torch.backends.cudnn.allow_tf32,
    )


def _seconds(work: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Mean seconds of a call, by the device's own clock."""
    for _ in range(3):
        work()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(repeats):
        work()
    last.record()
    torch.cuda.synchronize(device)
    return float(first.elapsed_time(last)) / 1000 / repeats


# -- parts of a step: float32 on the device against float64 on the processor


def relative_error(result: Tensor, reference: Tensor) -> float:
    """||result - reference|| / ||reference||."""
    reference = reference.double().cpu()
    distance = torch.linalg.vector_norm(result.double().cpu() - reference)
    return float(distance / torch.linalg.vector_norm(reference).clamp(min=1e-30))


def gather_error(device: torch.device, shape: Shape) -> float:
    """Of gathered unit rows, from float16."""
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(200, 3, shape.dim, generator=generator).half()
    slots = torch.randint(600, (_TRIALS, shape.labeled), generator=generator)
    features = DeviceFeatures(
        plain=stored[:, 0].to(device), views=stored.to(device), easy=2, position=torch.arange(200, device=device)
    )
    out = torch.full((_TRIALS, shape.labeled, shape.dim), float("nan"), device=device)
    features.at_into(slots.to(device), out)
    return relative_error(out, normalize(stored.flatten(0, 1)[slots].double()))


def loss_error(device: torch.device, shape: Shape) -> float:
    """Of the gradient of the cross-entropies and of their values, the larger."""
    generator = torch.Generator().manual_seed(1)
    logits = 5 * torch.randn(_TRIALS, shape.labeled, 2, shape.classes, generator=generator)
    labels = torch.randint(shape.classes, (_TRIALS, shape.labeled), generator=generator)
    weights = torch.rand(_TRIALS, shape.labeled, generator=generator)
    exact = logits.double()
    log_probabilities = cross_entropy_gradient_(exact, labels, weights.double())
    ours = logits.to(device)
    own = cross_entropy_gradient_(ours, labels.to(device), weights.to(device))
    # with a single class both are zero
    scale = max(float(exact.norm()), 1e-3)
    gradient = float((ours.double().cpu() - exact).norm()) / scale
    return max(gradient, float((own.double().cpu() - log_probabilities).abs().max()))


def decay_error(device: torch.device, shape: Shape) -> float:
    """Of momentum and weight decay."""
    generator = torch.Generator().manual_seed(2)
    velocity, parameters = (torch.randn(_TRIALS, shape.classes * shape.dim, generator=generator) for _ in range(2))
    momentum, decay = torch.rand(_TRIALS, generator=generator), torch.rand(_TRIALS, generator=generator)
    exact, ours = velocity.double(), velocity.to(device)
    decay_velocity_(exact, parameters.double(), momentum.double(), decay.double())
    decay_velocity_(ours, parameters.to(device), momentum.to(device), decay.to(device))
    return relative_error(ours, exact)


_OPERATIONS: dict[str, Callable[[torch.device, Shape], float]] = {
    "gather": gather_error,
    "loss and gradient": loss_error,
    "momentum and decay": decay_error,
}


# -- whole steps


def steps_errors(device: torch.device, shape: Shape) -> dict[str, float]:
    """Of parameters, memory and losses after a few fused steps, against the specification in float64."""
    here = TrainingSet.of_shape(shape, torch.device("cpu"))
    there = TrainingSet(shape, here.cache, here.split, device)
    exact, exact_losses = _specified(here)
    state, stepper = _stepper(there, _configs(there, _TRIALS), "fused")
    losses = _run(stepper, 0, _STEPS)
    errors = {name: relative_error(state.tensors[name], tensor) for name, tensor in exact.tensors.items()}
    by_part = {"parameters": max(errors[name] for name in exact.parameters)}
    by_part["memory"] = max(errors[name] for name in exact.memory)
    by_part["losses"] = relative_error(losses, exact_losses)
    return by_part


def _configs(training_set: TrainingSet, trials: int, steps: int = 100) -> list[FitConfig]:
    """Trials that differ in their seed and in what a step reads; a schedule in which everything moves."""
    moving = {"steps": steps, "eval_every": steps, "mu": 0.2, "threshold": 0.2, "warmup": 0.1}
    configs = training_set.configs(trials)
    return [
        FitConfig.from_dict({**config.to_dict(), **moving, "lr": 0.02 * (1 + i)}) for i, config in enumerate(configs)
    ]


def _stepper(training_set: TrainingSet, configs: list[FitConfig], engine: str) -> tuple[State, Steps]:
    """The state before the first step, and the steps that move it."""
    inputs = training_set.inputs(configs)
    method = method_of(configs[0])
    state = method.start(inputs.trials)
    velocity = _zeros_like(state.parameters)
    batches = inputs.batches(pairs=True)
    return state, make_stepper(method, inputs.trials, state, velocity, batches, configs[0].steps, engine)


def _run(stepper: Steps, start: int, stop: int) -> Tensor:
    """Make steps; the sum of their losses (3, T)."""
    return torch.stack(list(stepper.run(start, stop))).sum(0)


def _specified(training_set: TrainingSet) -> tuple[State, Tensor]:
    """The state after a few steps of the specification in float64 on the processor, and the summed losses (3, T)."""
    configs = _configs(training_set, _TRIALS)
    inputs, method = training_set.inputs(configs), method_of(configs[0])
    trials = dataclasses.replace(
        inputs.trials,
        values=_double(inputs.trials.values),
        prototypes=normalize(inputs.trials.prototypes.double()),
        log_prior=inputs.trials.log_prior.double(),
    )
    features = dataclasses.replace(inputs.features, views=normalize(inputs.features.views.double()))
    batches = dataclasses.replace(inputs.batches(pairs=True), trials=trials, features=features)
    started = method.start(inputs.trials)
    state = State(_double(started.parameters), _double(started.memory))
    velocity = _zeros_like(state.parameters)
    stepper = make_stepper(method, trials, state, velocity, batches, configs[0].steps, "specification")
    losses = _run(stepper, 0, _STEPS)
    return State({name: tensor.detach() for name, tensor in state.parameters.items()}, state.memory), losses


def _double(tensors: Tensors) -> Tensors:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _zeros_like(tensors: Tensors) -> Tensors:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


# -- against the processor


def same_batches(device: torch.device, shape: Shape, steps: int = 20) -> bool:
    """Whether both draw the same rows and views."""
    here = TrainingSet.of_shape(shape, torch.device("cpu"))
    there = TrainingSet(shape, here.cache, here.split, device)
    drawn = [one.inputs(one.configs(_TRIALS)).batches(pairs=True).draws(0, steps) for one in (here, there)]
    return all(
        torch.equal(own, other.cpu())
        for (_, draws), (_, others) in zip(*drawn, strict=True)
        for own, other in zip(draws, others, strict=True)
    )


def predictions_error(device: torch.device, shape: Shape) -> float:
    """Largest difference of a test probability after a whole fit."""
    training_set = TrainingSet.of_shape(shape, device)
    configs = _configs(training_set, _TRIALS, steps=60)
    here, there = (fit_many(training_set.cache, configs, device=name, progress=False) for name in ("cpu", str(device)))
    return max(
        float(np.abs(one.test_probabilities - other.test_probabilities).max())
        for one, other in zip(here, there, strict=True)
    )


# -- the graph


@contextmanager
def counted_replays() -> Iterator[list[int]]:
    """How many CUDA graphs are replayed inside the context: the only item of the list."""
    count = [0]
    replay = torch.cuda.CUDAGraph.replay

    def counting(graph: Any) -> None:
        count[0] += 1
        replay(graph)

    with mock.patch.object(torch.cuda.CUDAGraph, "replay", counting):
        yield count


def _check_graph(device: torch.device, shape: Shape, trials: int, report: Report) -> None:
    """Steps are recorded, replays are right, and a stepper that is dropped gives its memory back."""
    training_set = TrainingSet.of_shape(shape, device)
    configs = _configs(training_set, trials)
    state, stepper = _stepper(training_set, configs, "specification")
    _run(stepper, 0, _GRAPH_STEPS)
    wanted = {name: tensor.detach().clone() for name, tensor in state.parameters.items()}
    del state, stepper

    # twice, since libraries keep workspaces of the first recording; a cycle would wait for the collector
    gc.collect()
    gc.disable()
    after: list[int] = []
    held = 0
    try:
        for _ in range(2):
            with counted_replays() as replays, warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                state, stepper = _stepper(training_set, configs, "fused")
                _run(stepper, 0, _GRAPH_STEPS)
            error = max(relative_error(state.parameters[name], tensor) for name, tensor in wanted.items())
            held = torch.cuda.memory_allocated(device)
            del state, stepper
            after.append(torch.cuda.memory_allocated(device))
    finally:
        gc.enable()
    held -= after[1]
    kept = after[1] - after[0]
    passed = replays[0] >= _GRAPH_STEPS // 2 and error <= 20 * _STEPS_ERROR and held > 0 and kept <= held // 20
    report(
        f"{'ok    ' if passed else 'WRONG '} CUDA graph, T {trials}: {replays[0]} of {_GRAPH_STEPS} steps replayed, "
        f"error {error:.1e}, {held / 1e6:.0f} MB held, {kept / 1e6:.0f} MB more kept after each stepper",
        check="CUDA graph",
        trials=trials,
        replays=replays[0],
        steps=_GRAPH_STEPS,
        error=error,
        held_bytes=held,
        kept_bytes=kept,
        passed=passed,
        warnings=[str(warning.message) for warning in caught],
    )


def _check_waits(device: torch.device, shape: Shape, report: Report) -> None:
    """No step waits for the device once it is recorded."""
    training_set = TrainingSet.of_shape(shape, device)
    _, stepper = _stepper(training_set, _configs(training_set, 4, steps=1000), "fused")
    _run(stepper, 0, 50)
    torch.cuda.set_sync_debug_mode("error")
    reason = None
    try:
        _run(stepper, 50, 100)
    except RuntimeError as error:
        reason = str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    text = "no step waits for the device" if reason is None else f"WRONG  a step waits for the device: {reason[:200]}"
    report(text, check="waits for the device", passed=reason is None, reason=reason)
