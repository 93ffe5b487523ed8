"""What a fused step of ULFine launches and moves on a GPU, counted on any machine; nothing is timed.

    python -m benchmarks.speed.step_counts --json counts.json

A step runs on the CPU in the form that it has on a GPU: all strong views, and a launch for each kernel, which does
nothing here. Each operation of PyTorch counts as one launch that reads its arguments and writes its results once; a
broadcast value counts once. Caches are not modelled, nor what a library splits one product into.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.options import JsonOption, parse_names
from benchmarks.results import Row, print_table, write_rows
from benchmarks.speed.floor import SHAPES, Shape
from benchmarks.speed.trial_steps import TrainingSet
from ulfine_fast.cli.main import guarded
from ulfine_fast.core.fused import step as fused_step
from ulfine_fast.core.fused.blocks import FusedSteps
from ulfine_fast.engine.steps import make_stepper
from ulfine_fast.methods.registry import method_of
from ulfine_fast.ops import kernels

_PRODUCTS = ("bmm", "baddbmm", "mm", "addmm")
# these only write what they change
_OVERWRITES = ("copy_", "fill_", "zero_")
# bytes and float32 multiply-adds per second of an H100 SXM, by its data sheet
_BANDWIDTH, _MULTIPLY_ADDS = 3.35e12, 33.5e12


@dataclass
class Counts:
    """Of one step of T trials.

    Attributes:
        launches: by kind: "product", "kernel" or "other".
        bytes: read and written, likewise.
        multiply_adds: of the products.
    """

    launches: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    multiply_adds: int = 0

    def add(self, kind: str, moved: int) -> None:
        """Count a launch."""
        self.launches[kind] = self.launches.get(kind, 0) + 1
        self.bytes[kind] = self.bytes.get(kind, 0) + moved


class _Counter(TorchDispatchMode):
    """Counts the operations that a GPU would launch."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        # a view launches nothing, nor does memory that is not filled
        if func.is_view or name.startswith(("empty", "detach", "_unsafe_view", "lift", "_to_copy")):
            return result
        read = args[1:] if name in _OVERWRITES else (*args, *(kwargs[key] for key in kwargs if key != "out"))
        moved = sum(map(_bytes, tree_leaves((read, result))))
        if name.rstrip("_") in _PRODUCTS:
            left, right = [tensor for tensor in args if isinstance(tensor, Tensor)][-2:]
            self.counts.multiply_adds += left.numel() * right.shape[-1]
            self.counts.add("product", moved)
        else:
            self.counts.add("other", moved)
        return result


def _bytes(value: Any) -> int:
    """Bytes of a tensor's distinct values."""
    if not isinstance(value, Tensor):
        return 0
    distinct = [size for size, stride in zip(value.shape, value.stride(), strict=True) if stride]
    return torch.Size(distinct).numel() * value.element_size()


@contextmanager
def _counted_kernels(counts: Counts) -> Iterator[None]:
    """Kernels that count themselves and do nothing."""

    def gather_rows(store: Tensor, slots: Tensor, out: Tensor) -> None:
        read = slots.numel() * store.shape[-1] * store.element_size()
        counts.add("kernel", read + _bytes(slots) + _bytes(out))

    def cross_entropy_gradient_(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        result = torch.empty(logits.shape[:3])
        counts.add("kernel", 2 * _bytes(logits) + _bytes(labels) + _bytes(weights) + _bytes(result))
        return result

    def pseudo_labels(linear: Tensor, similarity: Tensor, *options: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        trials, rows, classes = linear.shape
        labels = torch.zeros(trials, rows, dtype=torch.int64)
        mask, mean = torch.empty(trials, rows), torch.empty(trials, classes)
        parts = _bytes(mean) * -(-rows // 8)
        counts.add("kernel", _bytes(linear) + _bytes(similarity) + _bytes(labels) + _bytes(mask) + parts)
        counts.add("kernel", parts + _bytes(mean))
        return labels, mask, mean

    def decay_velocity_(velocity: Tensor, parameters: Tensor, *options: Tensor) -> None:
        counts.add("kernel", 2 * _bytes(velocity) + _bytes(parameters))

    def move_prototypes_(visual: Tensor, textual: Tensor, rows: Tensor, **others: Tensor) -> None:
        # every class seen is fitted; classes in the batch, at most one a row, move
        classes = min(visual.shape[1], rows.shape[1])
        moved = _bytes(visual) * classes // visual.shape[1]
        counts.add("kernel", _bytes(visual) + moved + 2 * _bytes(textual) + _bytes(rows))

    def orthogonality_gradient_(gram: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
        counts.add("kernel", 2 * _bytes(gram) + 2 * _bytes(inverse))
        return weight.clone()

    stand_ins: tuple[Any, ...] = (
        gather_rows,
        cross_entropy_gradient_,
        pseudo_labels,
        decay_velocity_,
        orthogonality_gradient_,
        move_prototypes_,
    )
    by_name: dict[str, Any] = {stand_in.__name__: stand_in for stand_in in stand_ins}
    with (
        mock.patch.object(kernels, "usable", return_value=True),
        mock.patch.object(fused_step, "_WORTH_SKIPPING", float("inf")),
        mock.patch.multiple(kernels, **by_name),
    ):
        yield


def count(shape: Shape, trials: int = 1) -> Counts:
    """Counts of one step of so many trials; launches do not depend on their number."""
    training_set = TrainingSet.of_shape(shape, torch.device("cpu"))
    inputs = training_set.inputs(training_set.configs(trials))
    method = method_of(inputs.trials.config)
    state = method.start(inputs.trials)
    velocity = {name: torch.zeros_like(tensor) for name, tensor in state.parameters.items()}
    batches = inputs.batches(pairs=True)
    counts = Counts()
    with _counted_kernels(counts):
        stepper = make_stepper(method, inputs.trials, state, velocity, batches, 10, "fused", threads=False)
        assert isinstance(stepper, FusedSteps)
        [(_, block)] = stepper.queues[0]
        [(step, draws)] = batches.draws(0, 1)
        rate, ramp = inputs.trials.values["lr"], torch.ones(trials, 1)
        counts.launches.clear()
        counts.bytes.clear()
        with _Counter(counts):
            block.run(step, draws, rate, ramp)
    return counts


def rows_of(shape: Shape, trials: int = 1) -> list[Row]:
    """A row for each kind of launch and one for all, bytes and multiply-adds a trial-step."""
    counts = count(shape, trials)
    rows: list[Row] = []
    for kind in ("product", "kernel", "other", "all"):
        chosen = counts.launches if kind == "all" else [kind]
        moved = sum(counts.bytes[name] for name in chosen) / trials
        multiply_adds = counts.multiply_adds / trials if kind in ("product", "all") else 0.0
        rows.append(
            {
                "shape": shape.name,
                "kind": kind,
                "launches": sum(counts.launches[name] for name in chosen),
                "bytes": moved,
                "multiply_adds": multiply_adds,
                "memory_microseconds": moved / _BANDWIDTH * 1e6,
                "arithmetic_microseconds": multiply_adds / _MULTIPLY_ADDS * 1e6,
                "least_bytes": shape.bytes if kind == "all" else None,
            }
        )
    return rows


def main(
    shapes: Annotated[str, typer.Option(help="Comma-separated.")] = "S1,S2,S3", as_json: JsonOption = None
) -> None:
    """Count launches, bytes and multiply-adds of a fused step."""
    rows = [row for name in parse_names(shapes, SHAPES, "shapes") for row in rows_of(SHAPES[name])]
    write_rows(as_json, rows)
    lines = [
        [
            row["shape"],
            row["kind"],
            f"{row['launches']}",
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['multiply_adds'] / 1e6:.1f}",
            f"{row['memory_microseconds']:.2f}",
            f"{row['arithmetic_microseconds']:.2f}",
        ]
        for row in rows
    ]
    print_table(
        ["shape", "kind", "launches", "MB", "M multiply-adds", "us at 3.35 TB/s", "us at 33.5 T/s"], lines, texts=2
    )


if __name__ == "__main__":
    typer.run(guarded(main))
