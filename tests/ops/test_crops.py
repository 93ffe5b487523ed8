from __future__ import annotations

import math

import pytest
import torch

from ulfine_fast.ops.crops import choose_crops, smallest_crop


def slow_fraction(step, total, epochs):
    if epochs == 0:
        return 0.0
    time = (step * epochs // total) / max(epochs - 1, 1)
    return 0.08 + 0.92 * (1 - math.sqrt(1 - time**2))


def test_the_schedule_of_each_trial():
    epochs, total = torch.tensor([0.0, 1.0, 3.0, 5.0]), 20
    result = smallest_crop(torch.arange(total), total, epochs)
    wanted = [[slow_fraction(step, total, int(e)) for e in epochs.tolist()] for step in range(total)]
    torch.testing.assert_close(result, torch.tensor(wanted, dtype=torch.float64), atol=1e-12, rtol=0)


def test_it_goes_from_eight_percent_to_the_whole_image():
    result = smallest_crop(torch.tensor([0, 9]), 10, torch.tensor([5.0]))
    assert result[0, 0].item() == pytest.approx(0.08)
    # exactly, or a whole image would be too small
    assert result[1, 0].item() == 1.0


def test_only_large_enough_views_are_drawn_and_each_as_often():
    areas = torch.tensor([1.0, 0.3, 0.7, 0.5]).expand(30_000, 4)
    numbers = torch.randint(2**32, (30_000,), generator=torch.Generator().manual_seed(0))
    chosen = choose_crops(areas, torch.full((30_000,), 0.5), numbers)
    fractions = torch.bincount(chosen, minlength=4) / 30_000
    torch.testing.assert_close(fractions, torch.tensor([1.0, 0.0, 1.0, 1.0]) / 3, atol=0.02, rtol=0)


def test_where_none_is_large_enough_it_is_the_largest():
    areas = torch.tensor([[[0.2, 0.6, 0.4]]])
    assert choose_crops(areas, torch.tensor([[0.9]]), torch.tensor([[2**32 - 1]])).item() == 1
