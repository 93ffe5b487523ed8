"""The floor: multiply-adds counted by torch itself, and rates of this machine."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed import floor
from benchmarks.speed.eager import Views, first_weights, forward_pass, new_memory
from benchmarks.speed.floor import SHAPES, Shape, floor_rate, product_rate
from ulfine_fast.config import FitConfig

TINY = Shape("tiny", 24, 7, 4, 9, 6)


def counted(shape):
    """Multiply-adds of the plain loop's losses and their gradients, as torch counts them."""
    prototypes = F.normalize(torch.randn(shape.classes, shape.dim), dim=-1)
    parameters = {name: one.requires_grad_(True) for name, one in first_weights(prototypes, shape.rank).items()}
    labels = torch.randint(shape.classes, (shape.labeled,))
    rows = (F.normalize(torch.randn(n, shape.dim), dim=-1) for n in (shape.labeled, shape.unlabeled, shape.unlabeled))
    labeled, weak, strong = rows
    with FlopCounterMode(display=False) as counter:
        memory = new_memory(torch.zeros(shape.classes), shape.dim)
        forward_pass(
            parameters, memory, Views(labeled, labels, weak, strong), FitConfig(method="ulfine")
        ).losses.sum().backward()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("shape", [TINY, SHAPES["S1"], SHAPES["S2"]], ids=lambda shape: shape.name)
def test_the_formula_counts_the_plain_loops_products_but_those_it_could_do_without(shape):
    # autograd carries gradients to the normed rows, for scale and shift alone, and multiplies both sides of the Gram
    # matrix by the prototypes
    rows = (shape.labeled + shape.unlabeled) * shape.dim * shape.rank
    assert counted(shape) == shape.multiply_adds + rows + shape.dim * shape.classes**2


def test_more_classes_than_dimensions_take_the_smaller_gram_matrix():
    wide = Shape("wide", 8, 50, 2, 4, 4)
    rows = 4 * 3 * (2 * 16 + 800) + 8 * (1600 + 48)
    assert wide.multiply_adds == rows + 2 * 50 * 8 * 8


def test_bytes_are_those_of_weights_velocities_memory_and_rows():
    weights = 2 * 24 * 7 + 2 * 24 + 2 * 24 * 4
    assert TINY.bytes == 4 * (4 * weights + 2 * 24 * 7) + 2 * 24 * 21
    assert TINY.memory(8, graph=True) == 2 * TINY.memory(4, graph=True) > TINY.memory(8, graph=False)
    assert TINY.memory(1, graph=False) == pytest.approx(4 * 4 * weights, rel=0.2)


def test_shapes_are_those_of_the_docs():
    assert [tuple(vars(one).values())[1:] for one in SHAPES.values()] == [
        (512, 100, 64, 64, 64),
        (384, 10, 16, 32, 32),
        (768, 1000, 64, 128, 128),
    ]
    assert [shape.name for shape in SHAPES.values()] == list(SHAPES) == ["S1", "S2", "S3"]


def test_the_floor_is_the_rate_over_the_count(monkeypatch):
    rates = iter([3.0, 9.0, 5.0, 4.0] * 2)
    monkeypatch.setattr(floor, "_rate", lambda size, device: next(rates) * 1e6)
    cpu = torch.device("cpu")
    assert product_rate(TINY, cpu) == 9e6
    assert floor_rate(TINY, cpu) == pytest.approx(9e6 / TINY.multiply_adds)


def test_on_a_gpu_memory_may_be_what_limits(monkeypatch):
    monkeypatch.setattr(floor, "product_rate", lambda shape, device: 1e9)
    monkeypatch.setattr(floor, "bandwidth", lambda device: 1e6)
    cuda = torch.device("cuda")
    assert floor_rate(TINY, cuda) == pytest.approx(1e6 / TINY.bytes)
    monkeypatch.setattr(floor, "bandwidth", lambda device: 1e15)
    assert floor_rate(TINY, cuda) == pytest.approx(1e9 / TINY.multiply_adds)


def test_rates_are_measured():
    cpu = torch.device("cpu")
    assert floor._rate((2, 16, 8, 4), cpu) > 0
    assert floor.seconds_of(lambda: None, cpu) >= 0
