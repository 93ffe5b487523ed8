"""Tokens that a model holds before its last layers: against a forward pass by hand, and through the cache."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import open_clip
import pytest
import torch
from torch.nn.functional import layer_norm, normalize

from tests.cache.samples import write_tiny_model
from ulfine_fast.cache import shard as shards
from ulfine_fast.cache.io.errors import CacheMismatch, InputError
from ulfine_fast.cache.models.encoder import Encoder, load_encoder
from ulfine_fast.cache.models.tokens import TokenHooks
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.pipeline.views import ViewRecipe
from ulfine_fast.cache.sources import open_source
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cache.text import read_text

RECIPE = ViewRecipe(weak=1, strong=2)


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory) -> str:
    """Two layers, each with a scale of its own behind the MLP."""
    return write_tiny_model(tmp_path_factory.mktemp("deep-model"), layers=2, ls_init_value=0.3)


@pytest.fixture(scope="module")
def encoder(deep_model) -> Encoder:
    return load_encoder(deep_model, device="cpu", features="last-block")


def pixels(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def by_hand(visual, batch):
    """Class token before and after the last MLP (B, 2, W)."""
    with torch.no_grad():
        x = visual._embeds(batch)
        for block in visual.transformer.resblocks:
            pre = x + block.ls_1(block.attention(block.ln_1(x)))
            x = pre + block.ls_2(block.mlp(block.ln_2(pre)))
    return torch.stack([pre[:, 0], x[:, 0]], dim=1)


def test_the_last_block_by_hand(encoder: Encoder):
    encoded = encoder.encode_views(pixels(3))
    assert (encoder.token_kinds, encoder.token_width, encoder.columns) == (("pre", "post"), 16, 8 + 2 * 16)
    assert (encoded.tokens.shape, encoded.tokens.dtype) == ((3, 2, 16), torch.float32)
    assert torch.allclose(encoded.tokens, by_hand(encoder.model.visual, pixels(3)), atol=1e-5)
    assert torch.equal(encoded.features, encoder.encode_images(pixels(3)))


def test_the_head_makes_the_feature_of_the_token(encoder: Encoder):
    encoded, head = encoder.encode_views(pixels(4)), encoder.vision_head()
    weights = [torch.from_numpy(head[name]) for name in ("ln_post_weight", "ln_post_bias", "projection")]
    token = layer_norm(encoded.tokens[:, 1], (16,), *weights[:2], eps=float(head["ln_post_eps"][0]))
    assert torch.allclose(normalize(token @ weights[2], dim=-1), encoded.features, atol=1e-5)


def test_pixels_carry_features_and_tokens(encoder: Encoder):
    bytes_of = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    rows = encoder.encode_pixels(bytes_of)
    encoded = encoder.encode_views(encoder.normalise(bytes_of))
    assert torch.equal(rows, torch.cat([encoded.features, encoded.tokens.flatten(1)], dim=1))


def test_every_thread_finds_its_own_tokens(encoder: Encoder):
    batches = [pixels(2, seed) for seed in range(24)]
    alone = [encoder.encode_views(batch).tokens for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda batch: encoder.encode_views(batch).tokens, batches))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(alone, together, strict=True))


def test_nothing_is_held_after_a_batch(encoder: Encoder):
    encoder.encode_views(pixels(2))
    assert vars(encoder._hooks._kept) == {}


def test_projected_features_have_no_tokens(tiny_encoder: Encoder):
    assert (tiny_encoder.token_kinds, tiny_encoder.token_width, tiny_encoder.columns) == ((), 0, 8)
    assert tiny_encoder.encode_views(pixels(2)).tokens is None


def test_before_the_projection_of_a_vit(deep_model):
    encoder = load_encoder(deep_model, device="cpu", features="pre-projection")
    encoded = encoder.encode_views(pixels(3))
    assert (encoder.token_kinds, encoded.tokens.shape) == (("ln_post",), (3, 1, 16))
    projection = torch.from_numpy(encoder.vision_head()["projection"])
    assert torch.allclose(normalize(encoded.tokens[:, 0] @ projection, dim=-1), encoded.features, atol=1e-5)


def with_preprocessing(model, size=32):
    open_clip.model.set_model_preprocess_cfg(model, {"size": size, "mean": (0.1,) * 3, "std": (0.2,) * 3})
    return model


def timm_model(**changes):
    vision = {"timm_model_name": "test_resnet", "timm_model_pretrained": False, "timm_proj": "linear", "image_size": 32}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vision_cfg = {**vision, "timm_pool": "", **changes}
        return with_preprocessing(open_clip.CLIP(embed_dim=8, vision_cfg=vision_cfg, text_cfg=text))


def test_before_the_projection_of_a_timm_trunk():
    encoder = Encoder(timm_model(), "timm", None, device=torch.device("cpu"), features="pre-projection")
    batch = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    encoded, visual = encoder.encode_views(batch), encoder.model.visual
    assert encoder.token_kinds == ("trunk",)
    with torch.no_grad():
        trunk = visual.trunk(batch)
        assert torch.allclose(encoded.tokens[:, 0], trunk, atol=1e-5)
        assert torch.allclose(encoded.features, normalize(visual.head(trunk), dim=-1), atol=1e-5)
    projection = torch.from_numpy(encoder.vision_head()["projection"])
    assert torch.allclose(normalize(encoded.tokens[:, 0] @ projection, dim=-1), encoded.features, atol=1e-5)


@pytest.mark.parametrize("more", [{"timm_proj": "mlp"}, {"timm_proj_bias": True}], ids=str)
def test_a_projection_that_is_more_than_a_matrix_is_not_told(more):
    encoder = Encoder(timm_model(**more), "timm", None, device=torch.device("cpu"), features="pre-projection")
    assert encoder.vision_head() == {}


def vit(**vision):
    settings = {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8, **vision}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    return with_preprocessing(open_clip.CLIP(embed_dim=8, vision_cfg=settings, text_cfg=text), 16)


@pytest.mark.parametrize(
    ("make", "features"),
    [
        (timm_model, "last-block"),
        (lambda: vit(pool_type="avg"), "last-block"),
        (lambda: vit(pool_type="avg"), "pre-projection"),
        (lambda: vit(attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=4), "last-block"),
    ],
)
def test_models_without_such_a_token_are_refused(make, features):
    with pytest.raises(InputError, match=f"odd has no class token .*--features {features} takes an open_clip ViT"):
        TokenHooks("odd", make().visual, features)


def test_unknown_features_are_refused(deep_model):
    with pytest.raises(InputError, match="features must be one of projected, pre-projection, last-block, got 'cls'"):
        load_encoder(deep_model, device="cpu", features="cls")


def make(images, encoder, out, **options):
    defaults = {"views": RECIPE, "batch_size": 4, "shard_size": 4, "workers": 0, "progress": False}
    extract(open_source(images), encoder, out, **(defaults | options))
    return FeatureCache.open(out)


def test_tokens_through_the_cache(images, encoder, deep_model, tmp_path):
    cache = make(images, encoder, tmp_path / "cache", dtype="float32")
    assert (cache.manifest.version, cache.token_kinds, cache.manifest.token_width) == (3, ["pre", "post"], 16)
    n, m = len(cache), len(cache.view_rows)
    shapes = {kind: cache.tokens(kind).shape for kind in ("plain", "weak", "strong")}
    assert shapes == {"plain": (n, 2, 16), "weak": (m, 1, 2, 16), "strong": (m, 2, 2, 16)}
    assert cache.tokens("plain").dtype == np.float32
    head = read_text(tmp_path / "cache", cache.manifest).head
    for tokens, features in (
        (cache.tokens("plain"), cache.plain),
        (cache.tokens("strong")[:, 1], cache.views("strong")[:, 1]),
        (cache.tokens("weak")[:, 0], cache.views("weak")[:, 0]),
    ):
        normed = layer_norm(torch.from_numpy(tokens[:, 1]), (16,)) * head["ln_post_weight"] + head["ln_post_bias"]
        assert np.allclose(normalize(normed @ head["projection"], dim=-1), features, atol=1e-4)
    assert cache.verify() == []
    # the features are those of a cache without tokens, to the bit
    bare = make(images, load_encoder(deep_model, device="cpu"), tmp_path / "bare", dtype="float32")
    assert np.array_equal(bare.plain, cache.plain)
    assert np.array_equal(bare.views("strong"), cache.views("strong"))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_tokens_stay_float16_beside_smaller_features(images, encoder, tmp_path, dtype):
    cache = make(images, encoder, tmp_path / "cache", dtype=dtype)
    with h5py.File(tmp_path / "cache/shards/00000.h5") as file:
        assert (file["plain"].dtype, file["tokens"].dtype) == (np.dtype(dtype), np.float16)
        assert file["tokens"].shape == (4, 4, 2, 16)
    assert cache.tokens("weak").dtype == np.float16


def test_a_cache_is_not_continued_with_other_features(images, encoder, deep_model, tmp_path):
    make(images, load_encoder(deep_model, device="cpu"), tmp_path / "cache")
    with pytest.raises(CacheMismatch, match="tokens"):
        make(images, encoder, tmp_path / "cache")


def test_a_token_that_is_not_finite_names_its_image(images, encoder, tmp_path):
    cache = make(images, encoder, tmp_path / "cache")
    path = shards.shard_path(tmp_path / "cache", 0)
    shard = shards.read_shard(path, cache.manifest.layout("train"), ids=False)
    shard = dataclasses.replace(shard, tokens=shard.tokens.copy())
    shard.tokens[2, 1, 0, 3] = np.nan
    with pytest.raises(InputError, match=f"the tokens of image '{cache.ids[2]}' are not finite"):
        shards._refuse_not_finite(path, path.read_bytes(), shard)


def test_what_a_cache_without_tokens_says(images, tiny_encoder, tmp_path):
    cache = make(images, tiny_encoder, tmp_path / "cache")
    assert json.loads((tmp_path / "cache/manifest.json").read_text())["tokens"] == []
    with pytest.raises(InputError, match="holds no tokens; extract again with --features last-block"):
        cache.tokens("plain")
    with pytest.raises(InputError, match="plain, weak or strong views, got 'mild'"):
        cache.tokens("mild")
