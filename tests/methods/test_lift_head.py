from __future__ import annotations

import dataclasses

import pytest
import torch

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.config import FitConfig
from ulfine_fast.methods.lift_head import lift_head_settings, text_start
from ulfine_fast.methods.registry import method_of
from ulfine_fast.ops.losses import adjusted_cross_entropy


def test_of_projected_features_it_is_the_linear_probe(world):
    trials, method, state, batch = world(method="lift_head")
    assert torch.equal(state.parameters["linear"], trials.prototypes)
    assert (set(state.tensors), method.uses_unlabeled) == ({"linear"}, False)
    losses = method.losses(trials, state, batch)
    logits = 8.0 * batch.labeled @ trials.prototypes.transpose(1, 2)
    wanted = adjusted_cross_entropy(logits, batch.labels, trials.log_prior, torch.ones(2)).mean(-1)
    torch.testing.assert_close(losses.labeled, wanted, rtol=1e-4, atol=1e-5)


def test_a_residual_adapter_is_not_trained(world):
    _, _, state, _ = world(method="lift_head", adapter="residual")
    assert set(state.parameters) == {"linear"}


@pytest.fixture
def encoder_end():
    """The frozen end of an encoder whose norm is not the identity: W = 6 to D = 5."""
    made = torch.Generator().manual_seed(3)
    sizes = {"ln_post_weight": (6,), "ln_post_bias": (6,), "projection": (6, 5)}
    return {name: torch.randn(*size, generator=made) for name, size in sizes.items()}


def before(world, head, **values):
    """Two trials that read tokens, their method and its state."""
    trials, *_ = world(method="lift_head")
    config = dataclasses.replace(trials.config, **{"feature": "pre-projection", **values})
    trials = dataclasses.replace(trials, config=config, head=head)
    method = method_of(config)
    return trials, method, method.start(trials)


def slow_feature(post, head):
    """ln_post of one class token, at length 1."""
    centred = post - post.mean()
    normed = centred / (centred.pow(2).mean() + 1e-5).sqrt() * head["ln_post_weight"] + head["ln_post_bias"]
    return normed / normed.norm()


def test_logits_before_the_projection(world, encoder_end):
    trials, method, state = before(world, encoder_end)
    tokens = torch.randn(2, 4, 12)
    state.parameters["linear"] = torch.randn(2, 3, 6)
    logits = method.logits(trials, state.tensors, tokens)
    for t in range(2):
        for b in range(4):
            feature = slow_feature(tokens[t, b, 6:], encoder_end)
            for k, weight in enumerate(state.parameters["linear"][t]):
                assert logits[t, b, k].item() == pytest.approx(8 * float(feature @ weight / weight.norm()), abs=1e-4)


def test_it_starts_from_the_texts_through_the_projection(world, encoder_end):
    trials, _, state = before(world, encoder_end)
    for text, result in zip(trials.prototypes[0], state.parameters["linear"][0], strict=True):
        wanted = torch.stack([encoder_end["projection"][w] @ text for w in range(6)])
        torch.testing.assert_close(result, wanted / wanted.norm())


def test_the_start_does_not_see_how_long_texts_are(encoder_end):
    texts = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(1))
    projection = encoder_end["projection"]
    torch.testing.assert_close(text_start(7 * texts, projection), text_start(texts, projection))


def test_an_orthonormal_projection_keeps_the_zero_shot_logits():
    made = torch.Generator().manual_seed(0)
    projection = torch.linalg.qr(torch.randn(6, 5, generator=made))[0]
    texts = torch.nn.functional.normalize(torch.randn(3, 5, generator=made), dim=-1)
    feature = torch.randn(6, generator=made)
    torch.testing.assert_close(text_start(texts, projection) @ feature, texts @ (feature @ projection))


def test_the_last_blocks_adapter_is_trained_where_it_is_asked(world, encoder_end):
    trials, method, state = before(world, encoder_end, adapter="adaptformer")
    assert {"linear", "adapter.down", "adapter.up"} <= set(state.parameters)
    trials.values["adapter_scale"] = torch.tensor([0.0, 1.0])
    tokens = torch.randn(1, 4, 12).expand(2, -1, -1)
    plain = method.logits(trials, state.tensors, tokens)
    # it starts as the frozen encoder, then only a factor above 0 lets it through
    torch.testing.assert_close(plain[0], plain[1])
    # what is the same for all entries the norm takes away again
    state.parameters["adapter.up"] = torch.arange(6.0).expand(2, 16, 6)
    moved = method.logits(trials, state.tensors, tokens)
    torch.testing.assert_close(moved[0], plain[0])
    assert (moved[1] - plain[1]).abs().max() > 1e-2


@pytest.mark.parametrize(("labeled", "epochs", "steps"), [(1, 5, 5), (129, 5, 10), (10_847, 5, 425), (129, 15, 30)])
def test_epochs_in_steps(labeled, epochs, steps):
    settings = lift_head_settings(labeled, 10, epochs=epochs)
    assert (settings["steps"], settings["crop_epochs"], settings["lr"]) == (steps, epochs, 0.02)


def test_the_settings_are_a_legal_config():
    config = FitConfig(method="lift_head", **lift_head_settings(300, 100, layers=12))
    assert (config.scale, config.tau, config.batch_labeled, config.adapter) == (25, 1, 128, "none")
    assert (config.rank, config.momentum, config.weight_decay) == (4, 0.9, 5e-4)


def test_settings_of_nothing_are_refused():
    with pytest.raises(InputError, match="epochs must be at least 1, got 0"):
        lift_head_settings(10, 10, epochs=0)
    with pytest.raises(InputError, match="at least 1"):
        lift_head_settings(0, 10)
