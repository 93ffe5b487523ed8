from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ulfine_fast.config import FitConfig
from ulfine_fast.core.selection import SHARED, select_trials
from ulfine_fast.core.types import Inputs, State, Trials


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None


@dataclass(frozen=True)
class Outer:
    pair: Pair
    named: dict[str, Tensor]
    note: str = field(metadata=SHARED)
    table: Tensor = field(metadata=SHARED)


def outer():
    rows = torch.arange(12.0).view(4, 3)
    return Outer(Pair(rows, None), {"twice": 2 * rows}, "shared by all", torch.arange(5))


@pytest.mark.parametrize("index", [torch.tensor([2, 0]), slice(1, 3), torch.tensor([], dtype=torch.int64)])
def test_every_tensor_of_a_nested_value_is_selected_and_shared_ones_stay(index):
    value = outer()
    part = select_trials(value, index)
    assert torch.equal(part.pair.first, value.pair.first[index])
    assert part.pair.second is None
    assert torch.equal(part.named["twice"], value.named["twice"][index])
    assert part.note == value.note
    assert part.table is value.table
    assert type(part.pair) is Pair


def test_a_slice_shares_memory_and_positions_copy():
    value = outer()
    select_trials(value, slice(1, 3)).pair.first.zero_()
    assert value.pair.first[1:3].abs().sum() == 0
    select_trials(value, torch.tensor([0])).pair.first.zero_()
    assert value.pair.first[0].abs().sum() > 0


def test_trials_and_states_are_selected_as_a_whole():
    trials = Trials(
        config=FitConfig(),
        values={"lr": torch.tensor([0.1, 0.2, 0.3])},
        seeds=torch.arange(3),
        prototypes=torch.randn(3, 4, 5),
        log_prior=torch.randn(3, 4),
        head={"projection": torch.randn(7, 5)},
        inputs=Inputs(per_trial={"bags": Pair(torch.arange(3), None)}, shared={"texts": torch.randn(2, 4, 5)}),
    )
    part = trials.part(1, 3)
    assert part.config is trials.config
    assert part.values["lr"].tolist() == pytest.approx([0.2, 0.3])
    assert part.seeds.tolist() == part.inputs.per_trial["bags"].first.tolist() == [1, 2]
    assert part.head["projection"] is trials.head["projection"]
    assert part.inputs.shared["texts"] is trials.inputs.shared["texts"]
    state = State({"linear": torch.randn(3, 4, 5)}, {"prior": torch.randn(3, 4)}, {"step": torch.arange(3)})
    chosen = select_trials(state, torch.tensor([2]))
    assert torch.equal(chosen.parameters["linear"], state.parameters["linear"][2:])
    assert chosen.scratch["step"].tolist() == [2]


@pytest.mark.parametrize("value", [3, "text", [torch.zeros(2)], {"name": 1.5}, (torch.zeros(2), torch.zeros(2))])
def test_what_has_no_trials_axis_is_refused(value: Any):
    with pytest.raises(TypeError, match="has no trials axis"):
        select_trials(value, slice(0, 1))
