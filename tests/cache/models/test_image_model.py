"""Encoders of images alone, by their timm name: features without texts, and caches without prompts."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.cache.samples import write_images
from ulfine_fast.cache.interop.export import export
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.models.encoder import load_encoder
from ulfine_fast.cache.pipeline.append import append
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.pipeline.merge import merge
from ulfine_fast.cache.sources import open_source
from ulfine_fast.cache.store import FeatureCache

NAME = "timm:test_efficientnet@32"
COUNTS = {"train/cat": 3, "train/dog": 2, "unlabeled": 2, "test/cat": 1}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of weights with a classifier, as timm saves them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("test_efficientnet", pretrained=False)
    file = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(model.state_dict(), file)
    return str(file), model.eval()


@pytest.fixture(scope="module")
def encoder(weights):
    return load_encoder(NAME, weights[0], device="cpu")


@pytest.fixture(scope="module")
def cache(encoder, tmp_path_factory):
    images = write_images(tmp_path_factory.mktemp("images"), COUNTS)
    out = tmp_path_factory.mktemp("cache") / "cache"
    extract(open_source(images), encoder, out, workers=0, progress=False)
    return out


def test_features_are_those_of_the_model_before_its_classifier(encoder, weights):
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model = weights[1]
    with torch.no_grad():
        wanted = model.forward_head(model.forward_features(pixels), pre_logits=True)
    wanted = torch.nn.functional.normalize(wanted, dim=-1)
    assert torch.allclose(encoder.encode_images(pixels), wanted, atol=1e-5)
    assert (encoder.spec.name, encoder.spec.image_size, encoder.spec.dim) == (NAME, 32, wanted.shape[1])
    assert not encoder.reads_texts


def test_it_encodes_no_texts(encoder):
    with pytest.raises(InputError, match="test_efficientnet@32 encodes images alone; name a model with a text tower"):
        encoder.encode_texts(["a cat"])


def test_a_cache_without_texts(cache):
    opened = FeatureCache.open(cache)
    assert opened.prototypes is None
    assert opened.text_features is None
    assert opened.manifest is not None
    assert opened.manifest.prompts == []
    assert opened.verify() == []
    assert np.asarray(opened.plain).shape == (8, opened.dim)


def test_such_caches_grow_merge_and_are_exported(cache, encoder, tmp_path):
    more = write_images(tmp_path / "more", {"train/cat": 1, "train/emu": 2}, seed=5)
    out = tmp_path / "other"
    extract(open_source(write_images(tmp_path / "images", COUNTS, seed=9)), encoder, out, workers=0, progress=False)
    append(open_source(more), encoder, out, workers=0, progress=False)
    grown = FeatureCache.open(out)
    assert grown.class_names == ["cat", "dog", "emu"]
    merge([cache, out], tmp_path / "both", prefix=True, progress=False)
    both = FeatureCache.open(tmp_path / "both")
    assert len(both) == 8 + len(grown)
    assert both.prototypes is None
    export(cache, tmp_path / "arrays", to="npy", progress=False)
    assert not (tmp_path / "arrays" / "text_features.npy").exists()
    with pytest.raises(InputError, match="has no texts of its classes, which clip-retrieval reads; use --to npy"):
        export(cache, tmp_path / "retrieval", to="clip-retrieval", progress=False)


def test_prompts_are_refused(encoder, tmp_path):
    images = write_images(tmp_path / "images", COUNTS)
    with pytest.raises(InputError, match="encodes images alone and reads no prompts; leave them out"):
        extract(open_source(images), encoder, tmp_path / "cache", prompts=["a {}"], workers=0, progress=False)


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("timm:test_eficientnet", None, "timm has no model 'test_eficientnet'; did you mean test_efficientnet"),
        ("test_efficientnet", None, "for images alone name timm:test_efficientnet"),
        ("timm:test_efficientnet@big", None, "must be a number of pixels, as in timm:test_efficientnet@224"),
        ("timm:test_efficientnet", "/nowhere.safetensors", "no file of weights at /nowhere.safetensors"),
    ],
)
def test_names_that_are_refused(name, pretrained, message):
    with pytest.raises(InputError) as error:
        load_encoder(name, pretrained, device="cpu")
    assert message in str(error.value)


def test_weights_of_another_model_are_refused(weights, tmp_path):
    file = tmp_path / "other.safetensors"
    save_file({"conv.weight": torch.zeros(3, 3)}, file)
    with pytest.raises(InputError, match=r"the weights in .*other.safetensors do not load"):
        load_encoder(NAME, str(file), device="cpu")
