"""Caches with chosen classes and ids, written without a model: what merging, exporting and importing start from."""

from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path

import numpy as np

from tests.cache.samples import make_manifest, make_shard, put_shard
from ulfine_fast.cache.manifest import Manifest
from ulfine_fast.cache.shard import Shard
from ulfine_fast.cache.text import TextFeatures, average, write_text

# Rows of each shard: a second train shard, and one of each other split but val.
PARTS = [("train", 4), ("train", 2), ("unlabeled", 3), ("test", 3)]


def class_text(manifest: Manifest) -> TextFeatures:
    """Unit features that depend on the filled prompt alone, as those of a model do."""
    texts = [[prompt.replace("{}", name) for prompt in manifest.prompts] for name in manifest.class_names]
    seeds = [[zlib.crc32(text.encode()) for text in row] for row in texts]
    raw = [[np.random.default_rng(seed).standard_normal(manifest.dim) for seed in row] for row in seeds]
    features = np.asarray(raw, dtype=np.float32)  # (K, P, D)
    features /= np.linalg.norm(features, axis=2, keepdims=True)
    return TextFeatures(texts, features, average(features), manifest.model["logit_scale"])


def unit(shard: Shard) -> Shard:
    """The shard with rows of length 1, as a model gives them."""

    def normalised(views: np.ndarray) -> np.ndarray:
        wide = views.astype(np.float32)
        return (wide / np.linalg.norm(wide, axis=-1, keepdims=True)).astype(views.dtype)

    return dataclasses.replace(
        shard, plain=normalised(shard.plain), weak=normalised(shard.weak), strong=normalised(shard.strong)
    )


def write_named_cache(
    folder: Path,
    class_names: list[str],
    *,
    parts: list[tuple[str, int]] = PARTS,
    skipped: int = 0,
    name: str | None = None,
    **changes,
) -> list[Shard]:
    """A cache whose ids begin with `name` (the folder's by default) and whose labels go round the classes."""
    (folder / "shards").mkdir(parents=True)
    name = folder.name if name is None else name
    rows = sum(n + skipped for _, n in parts)
    template = make_manifest(class_names=class_names, **changes)
    manifest = dataclasses.replace(template, source={**template.source, "rows": rows, "fingerprint": name})
    manifest.write(folder)
    write_text(folder, class_text(manifest), manifest)
    first, written = 0, []
    for number, (split, n) in enumerate(parts):
        labels = np.arange(first, first + n, dtype=np.int32) % len(class_names)
        shard = dataclasses.replace(
            unit(make_shard(n, manifest.layout(split), split, seed=zlib.crc32(f"{name}{number}".encode()))),
            ids=[f"{name}/{split}/{number}-{row}" for row in range(n)],
            labels=np.full(n, -1, np.int32) if split == "unlabeled" else labels,
            view_seed=manifest.views["seed"],
        )
        put_shard(folder, shard, number, first, skipped)
        first += n + skipped
        written.append(shard)
    return written
