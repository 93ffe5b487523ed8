from __future__ import annotations

import pytest
import torch

from ulfine_fast.core.heads import apply_adapter, cosine_logits, new_adapter
from ulfine_fast.ops.prototypes import normalize


def unit(*shape):
    torch.manual_seed(0)
    return normalize(torch.randn(*shape))


def test_a_new_adapter_is_the_identity():
    tensors = new_adapter(torch.tensor([3, 4]), dim=8, ranks=torch.tensor([2, 2]))
    features = unit(2, 5, 8)
    torch.testing.assert_close(apply_adapter(tensors, features, torch.tensor([0.1, 1.0])), features)


def test_weights_come_from_the_seed_alone():
    both, one = (new_adapter(torch.tensor(seeds), 8, torch.full((len(seeds),), 2)) for seeds in ([3, 4], [4]))
    torch.testing.assert_close(both["adapter.down"][1], one["adapter.down"][0], rtol=0, atol=0)
    assert not torch.equal(both["adapter.down"][0], both["adapter.down"][1])


def test_the_adapter_is_the_formula_written_with_torchs_own_layers():
    tensors = new_adapter(torch.tensor([0]), dim=6, ranks=torch.tensor([3]))
    torch.manual_seed(1)
    tensors["adapter.up"] = torch.randn(1, 3, 6)
    tensors["adapter.scale"], tensors["adapter.shift"] = torch.randn(1, 6), torch.randn(1, 6)
    features = unit(1, 4, 6)
    norm = torch.nn.functional.layer_norm(features[0], (6,), tensors["adapter.scale"][0], tensors["adapter.shift"][0])
    hidden = torch.relu(norm @ tensors["adapter.down"][0]) @ tensors["adapter.up"][0]
    wanted = torch.nn.functional.normalize(features[0] + 0.5 * hidden, dim=-1)
    torch.testing.assert_close(apply_adapter(tensors, features, torch.tensor([0.5]))[0], wanted)


def test_without_adapter_tensors_features_pass():
    features = unit(1, 2, 4)
    assert apply_adapter({}, features, torch.ones(1)) is features


@pytest.mark.parametrize("length", [0.1, 1.0, 30.0])
def test_logits_are_scaled_cosines_whatever_the_weights_length(length):
    features, weights = unit(2, 3, 5), unit(2, 4, 5)
    result = cosine_logits(features, length * weights, torch.tensor([25.0, 1.0]))
    for t, scale in enumerate([25.0, 1.0]):
        for b in range(3):
            for k in range(4):
                wanted = scale * torch.nn.functional.cosine_similarity(features[t, b], weights[t, k], dim=0)
                torch.testing.assert_close(result[t, b, k], wanted, rtol=1e-4, atol=1e-4)


def test_a_zero_weight_gives_zero_logits_and_finite_gradients():
    weights = torch.zeros(1, 2, 4, requires_grad=True)
    logits = cosine_logits(unit(1, 3, 4), weights, torch.ones(1))
    logits.sum().backward()
    assert logits.abs().max() == 0
    assert torch.isfinite(weights.grad).all()


def test_without_a_graph_the_adapter_is_the_same():
    torch.manual_seed(0)
    tensors = new_adapter(torch.tensor([0, 1]), dim=24, ranks=torch.tensor([5, 3]))
    tensors = {name: tensor + 0.3 * torch.randn_like(tensor) for name, tensor in tensors.items()}
    features, strength = unit(2, 7, 24), torch.tensor([0.5, 2.0])
    with torch.no_grad():
        folded = apply_adapter(tensors, features, strength)
    torch.testing.assert_close(folded, apply_adapter(tensors, features, strength), rtol=0, atol=1e-6)
