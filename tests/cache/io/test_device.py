from __future__ import annotations

import pytest
import torch

from ulfine_fast.cache.io.device import pick_device
from ulfine_fast.cache.io.errors import InputError


def test_auto_and_cpu_are_always_there():
    assert pick_device("cpu") == torch.device("cpu")
    wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert pick_device("auto").type == wanted


@pytest.mark.parametrize("name", ["tpu", "", "cuda:99", "cuda:x", "cpu:-1x"])
def test_a_missing_device_is_named_with_the_fix(name):
    with pytest.raises(InputError, match=r"is not available here .*; use auto or cpu") as error:
        pick_device(name)
    assert repr(name) in str(error.value)
