"""Images and models that the benchmarks of extraction read: made once from what is installed, under `cache_home()`."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

from benchmarks.data import TUX_PAINT, demo_source
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.home import cache_home
from ulfine_fast.cache.models.lite0_minilm import NAME as LITE0
from ulfine_fast.cache.pipeline.plan import is_listed
from ulfine_fast.cache.pipeline.threads import cores
from ulfine_fast.cache.sources import ListedSource, open_source

VIT = "ViT-B-32"
TINY = "tiny"
_SEED = 0
_MOST_PHOTOGRAPHS = 48
_TINY_CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def small_png(count: int) -> Path:
    """A folder of `count` images of 28 pixels: the demo's, over and over, as PNG files."""
    source = demo_source()
    rows = source.rows[:1000]

    def make(number: int, path: Path) -> None:
        source.read(rows[number % len(rows)]).convert("L").save(path)

    return _folder("png28", count, ".png", make)


def large_jpeg(count: int) -> Path:
    """A folder of `count` images of 500 pixels: crops of scikit-learn's two photographs, as JPEG of quality 90."""
    originals = [Image.fromarray(pixels) for pixels in load_sample_images().images]  # 640 x 427

    def make(number: int, path: Path) -> None:
        random = np.random.default_rng((_SEED, number))
        image = originals[number % 2]
        side = int(random.integers(250, 427))
        crop = _random_crop(image, side, side, random)
        image.resize((500, 500), Image.Resampling.BICUBIC, box=crop).save(path, quality=90)

    return _folder("jpeg500", count, ".jpg", make)


def photographs(count: int) -> Path:
    """A folder of `count` images of 12 megapixels, as a telephone makes them: enlarged crops of the same two."""
    originals = [Image.fromarray(pixels) for pixels in load_sample_images().images]  # 640 x 427

    def make(number: int, path: Path) -> None:
        random = np.random.default_rng((_SEED, 2, number))
        image = originals[number % 2]
        width = int(random.integers(320, 569))
        crop = _random_crop(image, width, width * 3 // 4, random)
        large = image.resize((4000, 3000), Image.Resampling.BICUBIC, box=crop)
        # a sensor's noise, without which enlarged images would be decoded faster than photographs are
        noise = random.normal(0, 4, (3000, 4000, 1)).astype(np.int16)
        Image.fromarray(np.clip(np.asarray(large) + noise, 0, 255).astype(np.uint8)).save(path, quality=90)

    return _folder("photograph", count, ".jpg", make)


SHAPES: dict[str, Callable[[int], Path]] = {"png28": small_png, "jpeg500": large_jpeg, "photograph": photographs}


def repeated(folder: Path, count: int) -> Path:
    """A folder of `count` images beside another one, whose files it has over and over as hard links."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    root = folder.with_name(f"{folder.name}-repeated-{count}")
    for number in range(count):
        file = files[number % len(files)]
        link = root / file.parent.name / f"{number:06d}{file.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.hardlink_to(file)
    return root


def image_source(data: str, count: int) -> ListedSource:
    """The demo's images, Tux Paint's stamps, one of `SHAPES`, or any folder; at most `count`, evenly chosen.

    All are training images, since views are drawn of those alone.

    Raises:
        InputError: a source that is not listed.
    """
    if data == "demo":
        source = demo_source()
    else:
        if data in SHAPES:
            folder = SHAPES[data](min(count, _MOST_PHOTOGRAPHS) if data == "photograph" else count)
        else:
            folder = TUX_PAINT if data == "tux_paint" else Path(data)
        opened = open_source(folder)
        if not is_listed(opened):
            raise InputError(f"{data} is a stream; give a folder of images")
        source = opened
    rows = source.rows[:: max(1, len(source.rows) // count)][:count]
    source.rows = [replace(row, split="train") for row in rows]
    return source


def model_name(model: str) -> str:
    """What `load_encoder` and open_clip take: lite0-minilm as it is, others built of random weights once.

    No weights of ViT-B-32 need be downloaded: how fast it is does not depend on their values.
    """
    if model == LITE0:
        return model
    folder = cache_home() / "benchmarks" / f"random-{model}"
    if not (folder / "open_clip_config.json").is_file():
        _write_random_model(folder, model)
    return f"local-dir:{folder}"


def _write_random_model(folder: Path, model: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = _TINY_CONFIG if model == TINY else open_clip.get_model_config(model)
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        weights = open_clip.CLIP(**config).state_dict()
    save_file(weights, folder / "open_clip_model.safetensors")
    # last, since it says that the model is complete
    description = {"model_cfg": config, "preprocess_cfg": {"interpolation": "bicubic"}}
    (folder / "open_clip_config.json").write_text(json.dumps(description), encoding="utf-8")


def _random_crop(
    image: Image.Image, width: int, height: int, random: np.random.Generator
) -> tuple[float, float, float, float]:
    """Corners of a crop at a random position: left, top, right, bottom."""
    left = int(random.integers(0, image.width - width + 1))
    top = int(random.integers(0, image.height - height + 1))
    return left, top, left + width, top + height


def _folder(name: str, count: int, suffix: str, make: Callable[[int, Path], None]) -> Path:
    """Ten class folders below a folder of that name and count; only what is missing is made, on all cores."""
    root = cache_home() / "benchmarks" / f"{name}-{count}"
    paths = [root / f"class{number % 10}" / f"{number:06d}{suffix}" for number in range(count)]
    missing = [(number, path) for number, path in enumerate(paths) if not path.exists()]
    for folder in {path.parent for _, path in missing}:
        folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(cores()) as pool:
        # a list, so that an error of a thread is raised here
        list(pool.map(make, *zip(*missing, strict=True)) if missing else [])
    return root
