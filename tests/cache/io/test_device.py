from __future__ import annotations

import pytest
import torch

from ulfine_fast.cache.io.device import current_device, float32_products, pick_device
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


def test_the_current_device_is_that_of_the_work():
    # torch.cuda.device is lazy: it keeps the index, and on a machine without a GPU it is never entered
    assert current_device(torch.device("cuda:1")).idx == 1
    with current_device(torch.device("cpu")):
        assert torch.zeros(1).device.type == "cpu"


@pytest.mark.parametrize("tf32", [False, True])
def test_float32_products_are_as_asked_and_later_as_before(tf32):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (matmul.allow_tf32, cudnn.allow_tf32)

    def fail():
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (tf32, tf32)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), float32_products(torch.device("cuda"), tf32=tf32):
        fail()
    assert (matmul.allow_tf32, cudnn.allow_tf32) == before
    with float32_products(torch.device("cpu"), tf32=not before[0]):
        assert (matmul.allow_tf32, cudnn.allow_tf32) == before
