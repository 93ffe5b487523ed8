"""Images and models that the extraction benchmarks read: made once from what is installed, under `cache_home()`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

from benchmarks.data import demo
from ulfine_fast.cache.io.home import cache_home
from ulfine_fast.cache.models.lite0_minilm import NAME as LITE0
from ulfine_fast.cache.sources import reopen_source

VIT = "ViT-B-32"
TINY = "tiny"
_SEED = 0
_TINY_CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def small_png(count: int) -> Path:
    """A folder of `count` images of 28 pixels: the demo's, over and over, as PNG files."""
    source = reopen_source(demo().manifest.source)  # type: ignore[union-attr]
    rows = source.rows[:1000]  # type: ignore[union-attr]

    def make(number: int, path: Path) -> None:
        source.read(rows[number % len(rows)]).convert("L").save(path)

    return _folder("png28", count, ".png", make)


def large_jpeg(count: int) -> Path:
    """A folder of `count` images of 500 pixels: crops of scikit-learn's two photographs, as JPEG of quality 90."""
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]  # 640 x 427

    def make(number: int, path: Path) -> None:
        rng = np.random.default_rng((_SEED, number))
        image, side = photographs[number % 2], int(rng.integers(250, 427))
        left, top = (int(rng.integers(0, edge - side + 1)) for edge in image.size)
        corners = (left, top, left + side, top + side)
        image.resize((500, 500), Image.Resampling.BICUBIC, box=corners).save(path, quality=90)

    return _folder("jpeg500", count, ".jpg", make)


def photographs(count: int) -> Path:
    """A folder of `count` images of 12 megapixels, as a telephone makes them: the same two, cut and enlarged."""
    originals = [Image.fromarray(pixels) for pixels in load_sample_images().images]  # 640 x 427

    def make(number: int, path: Path) -> None:
        rng = np.random.default_rng((_SEED, 2, number))
        width = int(rng.integers(320, 569))
        size = (width, width * 3 // 4)
        image = originals[number % 2]
        left, top = (int(rng.integers(0, edge - side + 1)) for edge, side in zip(image.size, size, strict=True))
        corners = (left, top, left + size[0], top + size[1])
        large = image.resize((4000, 3000), Image.Resampling.BICUBIC, box=corners)
        # a sensor's noise, without which enlarged images would be decoded faster than photographs are
        noise = rng.normal(0, 4, (3000, 4000, 1)).astype(np.int16)
        Image.fromarray(np.clip(np.asarray(large) + noise, 0, 255).astype(np.uint8)).save(path, quality=90)

    return _folder("photograph", count, ".jpg", make)


SHAPES: dict[str, Callable[[int], Path]] = {"png28": small_png, "jpeg500": large_jpeg, "photograph": photographs}


def model_name(model: str) -> str:
    """What `load_encoder` and open_clip take: lite0-minilm as it is, others built of random weights once.

    No weights of ViT-B-32 need be downloaded: how fast it is does not depend on their values.
    """
    if model == LITE0:
        return model
    folder = cache_home() / "benchmarks" / f"random-{model}"
    if not (folder / "open_clip_config.json").is_file():
        _write_random(folder, model)
    return f"local-dir:{folder}"


def _write_random(folder: Path, model: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = _TINY_CONFIG if model == TINY else open_clip.get_model_config(model)
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        weights = open_clip.CLIP(**config).state_dict()
    save_file(weights, folder / "open_clip_model.safetensors")
    # last, since it says that the model is there
    told = {"model_cfg": config, "preprocess_cfg": {"interpolation": "bicubic"}}
    (folder / "open_clip_config.json").write_text(json.dumps(told), encoding="utf-8")


def _folder(name: str, count: int, suffix: str, make: Callable[[int, Path], None]) -> Path:
    """Ten class folders below a folder of that name and count; only what is missing is made."""
    root = cache_home() / "benchmarks" / f"{name}-{count}"
    for number in range(count):
        path = root / f"class{number % 10}" / f"{number:06d}{suffix}"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            make(number, path)
    return root
