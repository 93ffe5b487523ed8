"""Whole steps with compiled passes and with products of bfloat16, against plain float32."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

import ulfine_fast.core.features
import ulfine_fast.core.fused.arithmetic
import ulfine_fast.core.fused.step
from tests.conftest import make_clusters
from ulfine_fast import FitConfig, fit_many
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.core.fused.arithmetic import Arithmetic
from ulfine_fast.ops import native

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture(scope="module")
def cache():
    return make_clusters(classes=7, dim=24)


def configs_of(trials=3, **values):
    """Trials that differ in what passes read of a trial."""
    common = {"n1": 30, "gamma_l": 4, "gamma_u": 4, "steps": 20, "eval_every": 20, "rank": 3, "batch_labeled": 9}
    if values["method"] not in ("linear_probe", "cross_entropy"):
        common |= {"threshold": 0.4, "batch_unlabeled": 11}
    configs = []
    for seed in range(trials):
        different = {"momentum": 0.9 - seed / 10, "weight_decay": seed * 0.01, "adapter_scale": 0.1 * seed}
        configs.append(FitConfig(**{**common, **different, **values}, seed=seed))
    return configs


def assert_same(a, b):
    for one, other in zip(a, b, strict=True):
        for name, tensor in other.tensors.items():
            torch.testing.assert_close(one.tensors[name], tensor, rtol=1e-3, atol=1e-5)
        assert one.history[-1]["loss"] == pytest.approx(other.history[-1]["loss"], rel=1e-4)


@needs_compiler
@pytest.mark.parametrize(
    "values",
    [
        {"method": "ulfine"},
        {"method": "ulfine", "momentum": 0.9, "paf": False},
        {"method": "ulfine", "adapter": "none", "prior": "hard"},
        {"method": "ulfine", "align": "none", "lambda_o": 10.0},
        {"method": "lightweight", "feature_noise": 0.2},
        {"method": "fixmatch", "momentum": 0.5},
        {"method": "linear_probe"},
    ],
    ids=lambda values: ",".join(str(value) for value in values.values()),
)
def test_compiled_passes_train_the_same(cache, values):
    configs = configs_of(**values)
    assert_same(fit_many(cache, configs, device="cpu", engine="native"), fit_many(cache, configs, device="cpu"))


@needs_compiler
def test_compiled_passes_train_the_same_where_rows_are_left_out_and_features_are_not_widened(cache, monkeypatch):
    monkeypatch.setattr(ulfine_fast.core.fused.step, "_WORTH_SKIPPING", 0.0)
    monkeypatch.setattr(ulfine_fast.core.features, "_WIDENED_BYTES", 0)
    configs = configs_of(method="ulfine", threshold=0.8)
    assert_same(fit_many(cache, configs, device="cpu", engine="native"), fit_many(cache, configs, device="cpu"))


@needs_compiler
def test_a_trial_with_compiled_passes_does_not_depend_on_its_neighbours(cache):
    configs = configs_of(method="ulfine")
    together = fit_many(cache, configs, device="cpu", engine="native")
    assert_same(together[1:2], fit_many(cache, configs[1:2], device="cpu", engine="native"))


def test_engine_native_is_refused_where_it_cannot_run(cache, monkeypatch):
    monkeypatch.setattr(native, "why_not", lambda: "engine native needs a C compiler and none was found")
    with pytest.raises(InputError, match="needs a C compiler"):
        fit_many(cache, configs_of(1, method="ulfine"), device="cpu", engine="native")
    with pytest.raises(InputError, match="has no fused step"):
        fit_many(cache, configs_of(1, method="ulfine", precision="amp"), device="cpu", engine="native")


# -- products of bfloat16


@pytest.mark.parametrize("rounds", [True, False])
def test_inputs_of_products_are_rounded_and_sums_are_not(monkeypatch, rounds):
    module = ulfine_fast.core.fused.arithmetic
    if rounds and not module._rounds(torch.device("cpu")):
        pytest.skip("this processor has no products of bfloat16")
    monkeypatch.setattr(module, "_rounds", lambda device: rounds)
    torch.manual_seed(0)
    left, right = torch.randn(3, 64, 33)[:, 1:], torch.randn(3, 40, 33).transpose(1, 2)
    wanted = left.bfloat16().double() @ right.bfloat16().double()
    arithmetic, out = Arithmetic(bfloat16=True), torch.ones(3, 63, 40)
    with arithmetic.applied(torch.device("cpu")):
        arithmetic.multiply(left, right, out)
        torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
        arithmetic.add(left, right, out, kept=0.5)
    torch.testing.assert_close(out.double(), 1.5 * wanted, rtol=1e-5, atol=1e-5)
    assert (out.double() - 1.5 * (left.double() @ right.double())).abs().max() > 1e-3


@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize("method", ["ulfine", "lightweight", "linear_probe"])
def test_products_of_bfloat16_train_nearly_the_same(method, rounds, monkeypatch):
    module = ulfine_fast.core.fused.arithmetic
    rounds = rounds and module._rounds(torch.device("cpu"))
    monkeypatch.setattr(module, "_rounds", lambda device: rounds)
    # PyTorch leaves products of a few thousand multiply-adds in float32
    wide = make_clusters(classes=7, dim=96)
    exact = fit_many(wide, configs_of(method=method, batch_labeled=64), device="cpu")
    rounded = fit_many(wide, configs_of(method=method, batch_labeled=64, precision="bf16"), device="cpu")
    for a, b in zip(exact, rounded, strict=True):
        difference = np.abs(a.test_probabilities - b.test_probabilities).max()
        assert 0 < difference < 0.03
        assert b.history[-1]["loss"] == pytest.approx(a.history[-1]["loss"], rel=0.02)
        assert all(tensor.dtype != torch.bfloat16 for tensor in b.tensors.values())


def test_the_setting_of_the_process_is_restored_after_the_steps_also_where_they_are_not_finished(cache):
    before = torch.backends.mkldnn.matmul.fp32_precision
    arithmetic = Arithmetic(bfloat16=True)

    def steps():
        with arithmetic.applied(torch.device("cpu")):
            yield torch.backends.mkldnn.matmul.fp32_precision
            yield ""

    running = steps()
    assert next(running) == "bf16"
    running.close()
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    fit_many(cache, configs_of(1, method="ulfine", precision="bf16"), device="cpu")
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_methods_without_a_fused_step_refuse_bfloat16(cache):
    values = {"method": "ulfine", "pseudo_labels": "sinkhorn", "precision": "bf16"}
    with pytest.raises(InputError, match="precision bf16 needs a fused step"):
        fit_many(cache, configs_of(1, **values), device="cpu")
    with pytest.raises(InputError, match="at precision bf16 has no fused step"):
        fit_many(cache, configs_of(1, method="ulfine", precision="bf16"), device="cpu", engine="specification")
