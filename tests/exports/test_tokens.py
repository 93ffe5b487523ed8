"""Runs whose adapter sits inside the encoder."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.core.test_adaptformer import QUICK, world  # noqa: F401
from ulfine_fast import InputError, fit, load
from ulfine_fast.exports import export
from ulfine_fast.runs.predict import encoder_of_run


def test_tokens_go_in_and_the_encoder_stays_out(world, tmp_path):  # noqa: F811
    *_, cache = world
    run = fit(cache, dataclasses.replace(QUICK, lr=0.5, adapter_scale=1.0), device="cpu", progress=False)
    tokens = cache.tokens("plain")
    for to in ("safetensors", "onnx"):
        again = load(export(run, tmp_path / to, to=to))
        np.testing.assert_allclose(again.predict_proba(tokens), run.predict_proba(tokens), atol=1e-4)
    with pytest.raises(InputError, match="leave out --with-encoder"):
        export(run, tmp_path / "whole", to="onnx", encoder=encoder_of_run(run, "cpu"))
    assert not (tmp_path / "whole").exists()
