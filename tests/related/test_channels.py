from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax

from ulfine_fast.ops.prototypes import normalize
from ulfine_fast.related.channel_ensemble.channels import channel_logits, draw_channels, low_bias, low_variance

T, B, M, K, D = 2, 4, 3, 5, 8


@pytest.fixture
def logits():
    return 3 * torch.randn(T, B, M, K, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels():
    return torch.randint(K, (T, B), generator=torch.Generator().manual_seed(1))


def errors(logits, labels):
    """Of each head, over all rows and classes, for one trial's logits (B, M, K)."""
    result = []
    for m in range(logits.shape[1]):
        rows = [softmax(logits[b, m]) - np.eye(logits.shape[2])[labels[b]] for b in range(len(labels))]
        result.append(np.concatenate(rows))
    return result


def test_each_head_is_a_cosine_over_its_channels_alone():
    torch.manual_seed(2)
    features, weights = normalize(torch.randn(T, B, D)), torch.randn(T, M, K, D)
    channels = draw_channels(torch.arange(T), M, D, torch.full((T,), 0.5))
    result = channel_logits(features, weights, channels, torch.tensor([2.0, 7.0]))
    for t, b, m, k in np.ndindex(T, B, M, K):
        seen = channels[t, m].numpy() > 0
        x, w = features[t, b].numpy()[seen], weights[t, m, k].numpy()[seen]
        wanted = (2.0, 7.0)[t] * (x @ w) / np.linalg.norm(x) / np.linalg.norm(w)
        assert result[t, b, m, k].item() == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_a_row_that_is_zero_on_a_heads_channels_has_finite_gradients():
    features = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    weights = torch.ones(1, 1, 2, 2, requires_grad=True)
    channel_logits(features, weights, torch.tensor([[[0.0, 1.0]]]), torch.ones(1)).sum().backward()
    assert torch.isfinite(features.grad).all()
    assert torch.isfinite(weights.grad).all()


def test_heads_see_different_channels_of_the_wanted_number():
    channels = draw_channels(torch.tensor([3, 3, 4]), 4, 20, torch.tensor([0.3, 0.001, 1.0]))
    assert channels.sum(-1).tolist() == [[6.0] * 4, [1.0] * 4, [20.0] * 4]
    assert len({tuple(head) for head in channels[0].tolist()}) == 4
    # every channel of a smaller fraction is among those of a larger one with the same seed
    assert (channels[1] <= channels[0]).all()


def test_channels_do_not_depend_on_other_trials():
    together = draw_channels(torch.tensor([5, 6]), M, D, torch.tensor([0.5, 0.9]))
    assert torch.equal(together[1:], draw_channels(torch.tensor([6]), M, D, torch.tensor([0.9])))


def test_low_bias_is_the_squared_correlation_of_pairs(logits, labels):
    result = low_bias(logits, labels)
    for t in range(T):
        apart = errors(logits[t].numpy(), labels[t].numpy())
        pairs = [np.corrcoef(apart[a], apart[b])[0, 1] ** 2 for a in range(M) for b in range(M) if a != b]
        assert result[t].item() == pytest.approx(np.mean(pairs), rel=1e-4)


def test_low_bias_is_one_for_identical_heads_and_nothing_for_one(logits, labels):
    same = logits[:, :, :1].repeat(1, 1, M, 1)
    torch.testing.assert_close(low_bias(same, labels), torch.ones(T))
    assert low_bias(logits[:, :, :1], labels).tolist() == [0.0, 0.0]


def test_low_variance_is_the_ensembles_squared_error(logits, labels):
    result = low_variance(logits, labels)
    for t in range(T):
        total = 0.0
        for b in range(B):
            mean = sum(softmax(logits[t, b, m].numpy()) for m in range(M)) / M
            total += ((mean - np.eye(K)[labels[t, b]]) ** 2).sum()
        assert result[t].item() == pytest.approx(total / B, rel=1e-4)
