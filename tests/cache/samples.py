"""Small real things: a model of random weights, images, shards, and a cache that no model made."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ulfine_fast.cache.manifest import Manifest, is_cache
from ulfine_fast.cache.shard import Layout, Shard, ShardRecord, shard_path, write_shard
from ulfine_fast.cache.text import TextFeatures, average, write_text

TINY = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def write_tiny_model(folder: Path, seed: int = 0, **vision: Any) -> str:
    """A complete open_clip model of random weights, as `local-dir:`; loads in a moment and needs no network.

    `vision` changes the image tower, such as `layers=2`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**TINY, "vision_cfg": {**TINY["vision_cfg"], **vision}}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.CLIP(**settings)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic"}
    config = {"model_cfg": settings, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    return f"local-dir:{folder}"


def write_model_with_norm(folder: Path) -> str:
    """A tiny model of two layers whose last norm is not the identity."""
    name = write_tiny_model(folder, layers=2)
    weights, generator = load_file(folder / "open_clip_model.safetensors"), torch.Generator().manual_seed(0)
    for part, mean in (("weight", 1.0), ("bias", 0.0)):
        weights[f"visual.ln_post.{part}"] = mean + 0.5 * torch.randn(16, generator=generator)
    save_file(weights, folder / "open_clip_model.safetensors")
    return name


def png(seed: int = 0) -> bytes:
    """A noise image as a file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_idx(path: Path, values: np.ndarray) -> None:
    """A file as those of MNIST."""
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}i", *values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


def write_images(root: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """Noise images, `counts` of them for each folder below `root` ("train/cat": 3)."""
    rng = np.random.default_rng(seed)
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{number:03d}.png")
    return root


LAYOUT = Layout(dim=4, dtype="float16", weak=1, strong=2)


def make_shard(n: int = 3, layout: Layout = LAYOUT, split: str = "train", seed: int = 0) -> Shard:
    rng = np.random.default_rng(seed)

    def views(count: int) -> np.ndarray:
        return rng.standard_normal((n, count, layout.dim)).astype(layout.dtype)

    return Shard(
        split=split,
        ids=[f"train/катя/{row}.png" for row in range(n)],
        labels=np.arange(n, dtype=np.int32) - 1,
        plain=views(1),
        weak=views(layout.weak),
        strong=views(layout.strong),
        scale=rng.random((n, layout.weak + layout.strong), dtype=np.float32),
        flip=rng.integers(0, 2, (n, layout.weak + layout.strong), dtype=np.uint8),
        view_seed=7,
    )


def make_manifest(**changes) -> Manifest:
    values = {
        "model": {
            "name": "ViT-B-16",
            "pretrained": "openai",
            "sha256": "ab" * 32,
            "image_size": 224,
            "dim": 4,
            "logit_scale": 100.0,
            "normalized": True,
        },
        "preprocessing": "Compose(Resize(224))",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "views": {"weak": 1, "strong": 2, "seed": 0, "weak_scale": (0.5, 1.0), "strong_ops": 2, "strong_magnitude": 10},
        "dtype": "float16",
        "precision": "fp32",
        "batch_size": 64,
        "shard_size": 1024,
        "class_names": ["cat", "dog"],
        "prompts": ["a photo of a {}."],
        "source": {"kind": "folder", "path": "/data/pets", "rows": 11, "fingerprint": "cd" * 32},
        "max_skipped": 0.01,
        "libraries": {"torch": "2.6.0"},
        "created_by": "ulfine-fast 0.1.0",
    }
    return Manifest(**(values | changes))


def make_text(manifest: Manifest) -> TextFeatures:
    rng = np.random.default_rng(0)
    classes, prompts = len(manifest.class_names), len(manifest.prompts)
    features = rng.standard_normal((classes, prompts, manifest.dim)).astype(np.float32)
    features /= np.linalg.norm(features, axis=2, keepdims=True)
    texts = [[prompt.replace("{}", name) for prompt in manifest.prompts] for name in manifest.class_names]
    return TextFeatures(texts, features, average(features), manifest.model["logit_scale"])


# Rows of each shard: a second train shard, and one of each other split.
PARTS = [("train", 3), ("train", 1), ("unlabeled", 2), ("val", 2), ("test", 3)]


def write_cache(folder: Path, parts: list[tuple[str, int]] = PARTS, skipped: int = 1) -> list[Shard]:
    """A cache written part by part, without a model; `skipped` images are missing from every shard."""
    (folder / "shards").mkdir(parents=True)
    rows = sum(n + skipped for _, n in parts)
    manifest = make_manifest(source={**make_manifest().source, "rows": rows})
    manifest.write(folder)
    write_text(folder, make_text(manifest), manifest)
    first, written = 0, []
    for number, (split, n) in enumerate(parts):
        shard = dataclasses.replace(
            make_shard(n, manifest.layout(split), split, seed=number),
            ids=[f"{split}/{number}/{row}" for row in range(n)],
            labels=np.full(n, -1 if split == "unlabeled" else number % 2, dtype=np.int32),
        )
        put_shard(folder, shard, number, first, skipped)
        first += n + skipped
        written.append(shard)
    return written


def put_shard(folder: Path, shard: Shard, number: int = 0, first: int = 0, skipped: int = 0) -> None:
    """One finished shard of a cache folder."""
    lost = [{"id": f"{shard.split}/{number}/lost{k}", "reason": "cut"} for k in range(skipped)]
    n = len(shard.ids)
    identity = Manifest.read(folder).identity_of(number) if is_cache(folder) else None
    checksum, size = write_shard(shard_path(folder, number), shard, identity)
    record = ShardRecord(number, shard.split, first, n + skipped, n, checksum, size, {}, lost, identity)
    record.write(shard_path(folder, number).with_suffix(".json"))
