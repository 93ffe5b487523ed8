"""The adapter in the encoder's last block: equal to the encoder with that adapter inside, features and gradients."""

from __future__ import annotations

import dataclasses

import numpy as np
import open_clip
import pytest
import torch
from torch.nn.functional import cross_entropy, layer_norm, normalize

from tests.cache.samples import write_images, write_tiny_model
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.models.encoder import load_encoder
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.sources import open_source
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.config import FitConfig
from ulfine_fast.core.features import DeviceFeatures
from ulfine_fast.core.heads import apply_adapter, cosine_logits, frozen_end, new_adapter
from ulfine_fast.engine.fit import fit, fit_many
from ulfine_fast.methods import registry
from ulfine_fast.methods.registry import method_of
from ulfine_fast.runs.evaluate import evaluate
from ulfine_fast.runs.predict import predict_images
from ulfine_fast.runs.run import Run

COUNTS = {"train/cat": 10, "train/dog": 8, "unlabeled": 9, "test/cat": 3, "test/dog": 4}
QUICK = FitConfig(
    method="lightweight", adapter="adaptformer", steps=6, eval_every=3, batch_labeled=4, batch_unlabeled=4
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images, a ViT of two layers, and a cache of float32 features and tokens."""
    root = tmp_path_factory.mktemp("world")
    model = write_tiny_model(root / "model", layers=2, ls_init_value=0.5)
    images = write_images(root / "images", COUNTS)
    encoder = load_encoder(model, device="cpu", features="last-block")
    extract(open_source(images), encoder, root / "cache", dtype="float32", workers=0, progress=False)
    return images, encoder, FeatureCache.open(root / "cache")


def with_adapter_inside(visual, pixels, adapter, strength):
    """A whole forward pass of the tower, an AdaptFormer beside the MLP of its last block; rows of length 1."""
    x = visual._embeds(pixels)
    blocks = list(visual.transformer.resblocks)
    for block in blocks[:-1]:
        x = block(x)
    last = blocks[-1]
    x = x + last.ls_1(last.attention(last.ln_1(x)))
    standard = layer_norm(x, x.shape[-1:]) * adapter["adapter.scale"] + adapter["adapter.shift"]
    beside = torch.relu(standard @ adapter["adapter.down"]) @ adapter["adapter.up"]
    x = x + last.ls_2(last.mlp(last.ln_2(x))) + strength * beside
    return normalize(visual._pool(x)[0] @ visual.proj, dim=-1)


def tokens_of(visual, pixels):
    """The class token before and after the MLP of the last block, side by side (B, 2 W)."""
    x = visual._embeds(pixels)
    for block in visual.transformer.resblocks:
        before = x + block.ls_1(block.attention(block.ln_1(x)))
        x = before + block.ls_2(block.mlp(block.ln_2(before)))
    return torch.cat([before[:, 0], x[:, 0]], dim=1)


def head_of(visual):
    norm = visual.ln_post
    named = {"ln_post_weight": norm.weight, "ln_post_bias": norm.bias, "projection": visual.proj}
    return {name: value.detach() for name, value in named.items()} | {"ln_post_eps": norm.weight.new_tensor([norm.eps])}


@pytest.fixture(scope="module")
def tower():
    """A tower in float64 whose norms are not the identity."""
    vision = {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "ls_init_value": 0.7}
    text = {"context_length": 16, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        visual = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text).visual.double().eval()
        torch.nn.init.normal_(visual.ln_post.weight, 1.0, 0.3)
        torch.nn.init.normal_(visual.ln_post.bias, 0.0, 0.3)
    return visual.requires_grad_(False)


def random_adapters(trials, width, rank, seed=0):
    made = torch.Generator().manual_seed(seed)
    shapes = {"scale": (width,), "shift": (width,), "down": (width, rank), "up": (rank, width)}
    return {
        f"adapter.{name}": torch.randn(trials, *shape, generator=made, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def test_features_and_gradients_are_those_of_the_patched_encoder(tower):
    made = torch.Generator().manual_seed(1)
    pixels = torch.randn(5, 3, 16, 16, generator=made, dtype=torch.float64)
    labels, weights = torch.tensor([0, 1, 2, 0, 1]), torch.randn(2, 3, 8, generator=made, dtype=torch.float64)
    strength = torch.tensor([0.1, 1.5], dtype=torch.float64)
    adapters = {name: tensor.requires_grad_(True) for name, tensor in random_adapters(2, 16, 4).items()}
    tokens = tokens_of(tower, pixels).expand(2, -1, -1)  # (T, B, 2 W)
    result = apply_adapter({**adapters, **frozen_end(head_of(tower), 2)}, tokens, strength)
    logits = cosine_logits(result, weights, torch.full((2,), 7.0, dtype=torch.float64))
    ours = torch.autograd.grad(cross_entropy(logits.flatten(0, 1), labels.repeat(2)), list(adapters.values()))
    losses = []
    for t in range(2):
        own = {name: tensor[t] for name, tensor in adapters.items()}
        features = with_adapter_inside(tower, pixels, own, strength[t])
        torch.testing.assert_close(result[t], features, atol=1e-9, rtol=0)
        losses.append(cross_entropy(7.0 * features @ normalize(weights[t], dim=-1).T, labels))
    theirs = torch.autograd.grad(sum(losses) / 2, list(adapters.values()))
    assert all(gradient.abs().max() > 1e-4 for gradient in theirs)
    for gradient, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-9, rtol=1e-7)


def test_it_starts_as_the_frozen_encoder(tower):
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    fresh = {name: t.double() for name, t in new_adapter(torch.tensor([5]), 16, torch.tensor([4])).items()}
    strength = torch.ones(1, dtype=torch.float64)
    result = apply_adapter({**fresh, **frozen_end(head_of(tower), 1)}, tokens_of(tower, pixels)[None], strength)
    torch.testing.assert_close(result[0], normalize(tower(pixels), dim=-1), atol=1e-9, rtol=0)


def test_a_cache_without_its_own_epsilon_takes_the_usual_one(tower):
    head = {name: value for name, value in head_of(tower).items() if name != "ln_post_eps"}
    assert float(frozen_end(head, 3)["backbone.eps"][2, 0]) == pytest.approx(1e-5)


def patched_logits(run, encoder, images):
    """Logits of test images through the encoder with the run's adapter inside."""
    source = open_source(images)
    rows = [row for row in source.rows if row.split == "test"]
    pixels = torch.stack([encoder.transform(source.read(row)) for row in rows])
    with torch.no_grad():
        features = with_adapter_inside(encoder.model.visual, pixels, run.tensors, run.config.adapter_scale)
    return [row.id for row in rows], run.config.scale * features @ normalize(run.tensors["linear"], dim=-1).T


def test_a_fitted_run_is_the_patched_encoder(world, tmp_path):
    images, encoder, cache = world
    run = fit(cache, dataclasses.replace(QUICK, lr=0.5, adapter_scale=1.0), device="cpu", progress=False)
    assert run.tensors["adapter.up"].abs().max() > 1e-3
    ids, logits = patched_logits(run, encoder, images)
    assert run.test_ids == ids
    rows = np.flatnonzero(cache.splits == "test")
    result = run.logits(cache.tokens("plain")[rows])
    np.testing.assert_allclose(result, logits.numpy(), atol=1e-3)
    np.testing.assert_allclose(run.predict_proba(cache.tokens("plain")[rows]), run.test_probabilities, atol=1e-4)
    # the frozen end is the cache's, untouched by training
    np.testing.assert_array_equal(run.tensors["backbone.projection"], cache.head["projection"])
    again = Run.load(run.save(tmp_path / "run"))
    np.testing.assert_array_equal(again.logits(cache.tokens("plain")), run.logits(cache.tokens("plain")))
    assert evaluate(again)["balanced_accuracy"] == pytest.approx(run.metrics["balanced_accuracy"])
    predicted = predict_images(again, images / "test", device="cpu")
    order = [run.test_ids.index(f"test/{name}") for name in predicted.ids]
    np.testing.assert_allclose(predicted.probabilities, run.test_probabilities[order], atol=1e-3)


def test_trials_do_not_depend_on_their_neighbours(world):
    *_, cache = world
    configs = [QUICK.with_method("ulfine", seed=seed, rank=rank) for seed, rank in ((0, 2), (1, 5))]
    configs.append(dataclasses.replace(configs[0], adapter="residual"))
    together = fit_many(cache, configs, device="cpu", progress=False)
    for config, run in zip(configs, together, strict=True):
        alone = fit(cache, config, device="cpu", progress=False)
        assert run.tensors.keys() == alone.tensors.keys()
        for name, tensor in run.tensors.items():
            torch.testing.assert_close(tensor, alone.tensors[name], atol=1e-5, rtol=1e-4)
    assert together[1].tensors["adapter.down"].shape == (16, 5)
    assert "backbone.projection" not in together[2].tensors


def test_rows_on_the_device_are_the_tokens(world):
    *_, cache = world
    loaded = DeviceFeatures.load(cache, torch.device("cpu"), tokens=True)
    rows = torch.tensor([[3, 0], [1, 1]])
    np.testing.assert_array_equal(loaded.rows(rows), cache.tokens("plain")[rows.numpy()].reshape(2, 2, 32))
    seen = loaded.all_views(rows)  # (T, B, V, 2 W)
    assert (loaded.easy, loaded.strong, seen.shape) == (2, 1, (2, 2, 3, 32))
    np.testing.assert_array_equal(seen[0, 0, 1], cache.tokens("weak")[3, 0].reshape(32))
    np.testing.assert_array_equal(seen[0, 1, 2], cache.tokens("strong")[0, 0].reshape(32))


def test_training_moves_the_loss(world):
    *_, cache = world
    run = fit(cache, dataclasses.replace(QUICK, steps=60, eval_every=20, lr=0.1), device="cpu", progress=False)
    losses = [row["loss_labeled"] for row in run.history]
    assert losses[-1] < losses[0]


def test_it_goes_on_after_an_interruption(world, tmp_path):
    *_, cache = world
    configs = [QUICK, dataclasses.replace(QUICK, seed=1, select="best")]

    def stop(step, rows):
        raise KeyboardInterrupt

    common = {"device": "cpu", "progress": False, "checkpoint": tmp_path / "part"}
    with pytest.raises(KeyboardInterrupt):
        fit_many(cache, configs, watch=lambda step, rows: stop(step, rows) if step == 6 else (), **common)
    for run, wanted in zip(fit_many(cache, configs, **common), fit_many(cache, configs, device="cpu"), strict=True):
        for name, tensor in wanted.tensors.items():
            torch.testing.assert_close(run.tensors[name], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", registry.names())
def test_every_method_takes_it_or_says_so(world, method):
    *_, cache = world
    config = QUICK.with_method(method, steps=2, eval_every=2)
    if not (method_of(config).takes_tokens and method_of(config).trains):
        with pytest.raises(InputError, match=f"method {method} takes no adapter adaptformer; use one of abc, "):
            fit(cache, config, device="cpu", progress=False)
        return
    run = fit(cache, config, device="cpu", progress=False)
    assert run.tensors["backbone.projection"].shape == (16, 8)
    assert np.isfinite(run.logits(cache.tokens("plain"))).all()


def test_what_it_cannot_do_is_said(world, clusters):
    *_, cache = world
    with pytest.raises(InputError, match="which this cache does not hold; extract again with --features last-block"):
        fit(clusters, QUICK, device="cpu", progress=False)
    with pytest.raises(InputError, match="feature_noise is for features"):
        fit(cache, dataclasses.replace(QUICK, feature_noise=0.1), device="cpu", progress=False)
    with pytest.raises(InputError, match="method preference_fixmatch takes no adapter adaptformer; use one of abc, "):
        fit(cache, QUICK.with_method("preference_fixmatch"), device="cpu", progress=False)
    with pytest.raises(InputError, match=r"lightweight with adapter adaptformer .* has no fused step"):
        fit(cache, QUICK, device="cpu", progress=False, engine="fused")
    run = fit(cache, QUICK, device="cpu", progress=False)
    with pytest.raises(InputError, match=r"features must have shape \(n, 2, 16\), got \(2, 8\)"):
        run.logits(cache.plain[:2])
