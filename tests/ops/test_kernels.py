"""Triton kernels against the plain functions that specify them.

Triton decides at import whether it interprets, so the cases run in a process of their own: without a GPU under the
interpreter, with one for real too.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ulfine_fast.ops import kernels

CASES = Path(__file__).with_name("kernel_cases.py")
pytest.importorskip("triton", reason="Triton is not installed here")


def run_cases(device, **environment):
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(
        command, env={**os.environ, "KERNEL_DEVICE": device, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert re.search(r"\b\d\d passed", done.stdout), done.stdout[-3000:]


def test_under_the_interpreter():
    run_cases("cpu", TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    run_cases("cuda")


def test_a_processor_takes_plain_pytorch_and_says_why():
    assert not kernels.usable(torch.zeros(1))
    assert kernels.why_not(torch.device("cpu")) == (
        "Triton needs a CUDA device, this one is cpu; the same steps run in plain PyTorch"
    )


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr(kernels, "triton", None)
    assert kernels.why_not(torch.device("cuda")) == (
        "Triton is not installed here; the same steps run in plain PyTorch"
    )


@pytest.fixture
def forgetful():
    """What is known of devices is forgotten, before and after."""
    caches = (kernels.runs_on, kernels._why_not_built, kernels._interpreted)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("forgetful")
def test_where_no_kernel_can_be_built_it_says_so_and_goes_on_without(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that a processor could take them

    def fail(*_):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")

    monkeypatch.setattr(kernels, "decay_velocity_", fail)
    with pytest.warns(UserWarning, match="cannot build kernels here") as warned:
        assert not kernels.usable(torch.zeros(1))
    assert kernels.why_not(torch.device("cpu")) == (
        "Triton cannot build kernels here (Failed to find C compiler. Please specify via CC environment variable.); "
        "the same steps run in plain PyTorch"
    )
    assert len(warned) == 1  # and the failure is asked for once


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_without_a_compiler_a_fit_runs_in_plain_pytorch(tmp_path):
    program = (
        "import torch; from ulfine_fast.ops import kernels; "
        "print(kernels.why_not(torch.device('cuda'))); print(kernels.usable(torch.zeros(1, device='cuda')))"
    )
    environment = {**os.environ, "CC": "/bin/false", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[0].startswith("Triton cannot build kernels here")
    assert done.stdout.splitlines()[1] == "False"
