"""Temperatures and confidences of many trials beside those of one, which SciPy fits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ulfine_fast.metrics import calibration as alone
from ulfine_fast.metrics.classification import softmax
from ulfine_fast.ops import calibration


@pytest.fixture(params=[1, 100, 1 << 18], ids="{} values a block".format)
def block(request, monkeypatch):
    monkeypatch.setattr(calibration, "_VALUES", request.param)


def world(scales, rows=90, classes=5):
    """Logits (T, n, K) of trials with optimal temperatures near `scales`, labels and presence (T, n)."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(len(scales), rows, classes))
    drawn = np.array([[random.choice(classes, p=row) for row in softmax(trial)] for trial in logits])
    logits *= np.asarray(scales)[:, None, None]
    present = np.arange(rows) < np.linspace(rows, rows // 2, len(scales)).astype(int)[:, None]
    return torch.from_numpy(logits).float(), torch.from_numpy(drawn), torch.from_numpy(present)


@pytest.mark.usefixtures("block")
def test_temperatures_are_those_of_scipy():
    # the first is sharper than the range allows, the last two are blunter
    logits, labels, present = world([40.0, 3.0, 1.0, 0.5, 0.21, 0.01])
    wanted = [
        alone.fit_temperature(z[kept].numpy(), y[kept].numpy())
        for z, y, kept in zip(logits, labels, present, strict=True)
    ]
    calibration.shift_to_largest_(logits)
    fitted = calibration.fit_temperatures(logits, labels, present)
    assert fitted.dtype == torch.float64
    np.testing.assert_allclose(fitted, wanted, rtol=1e-4)
    assert fitted[0] == 5.0
    assert fitted[-1] == 0.2


def test_few_rows_leave_the_temperature_at_one_and_no_neighbour_notices():
    logits, labels, present = world([3.0, 3.0])
    calibration.shift_to_largest_(logits)
    both = calibration.fit_temperatures(logits, labels, present)
    present[0, 19:] = False
    fitted = calibration.fit_temperatures(logits, labels, present)
    assert fitted[0] == 1.0
    assert fitted[1] == both[1] > 2


def test_equal_logits_and_certain_ones_give_a_temperature_in_the_range():
    flat = torch.zeros(1, 30, 4)
    certain = calibration.shift_to_largest_(sure := 50 * torch.eye(4).repeat(8, 1)[None])
    every = torch.ones(1, 32, dtype=torch.bool)
    assert 0.2 <= calibration.fit_temperatures(flat, torch.zeros(1, 30, dtype=torch.int64), every[:, :30]) <= 5
    assert calibration.fit_temperatures(sure, certain, every) == 0.2
    assert calibration.fit_temperatures(sure, (certain + 1) % 4, every) == 5.0


@pytest.mark.usefixtures("block")
def test_confidences_and_predictions_are_those_of_a_softmax():
    logits, *_ = world([8.0, 1.0])
    logits[0, 0] = 0.0  # equal classes: the first is predicted
    temperature = torch.tensor([0.5, 2.0], dtype=torch.float64)
    wanted = [softmax(z.numpy() / float(t)).max(1) for z, t in zip(logits, temperature, strict=True)]
    classes = logits.numpy().argmax(2)
    predicted = calibration.shift_to_largest_(logits)
    np.testing.assert_array_equal(predicted, classes)
    assert not logits.amax(2).any()
    np.testing.assert_allclose(calibration.confidences(logits, temperature), wanted, rtol=1e-5)
