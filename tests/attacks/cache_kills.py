"""Kill extract, append, merge and import at every write, go on with the same command, and compare all bytes.

    python -m tests.attacks.cache_kills FOLDER STEP

A child of this process ends at its n-th operation (see `tests.attacks.kills`), with n = 1, 1 + STEP, ... What it leaves
is the whole cache, the cache as it was before, or one that is refused; the same command then gives the bytes of a
command that was not killed. Prints one JSON object.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.attacks.kills import KILLED, die_at, in_child
from tests.cache.samples import write_images, write_tiny_model
from ulfine_fast import FeatureCache, InputError
from ulfine_fast.cache.interop.import_features import import_features, open_features
from ulfine_fast.cache.models.encoder import load_encoder
from ulfine_fast.cache.pipeline.append import append
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.pipeline.merge import merge
from ulfine_fast.cache.sources import open_source

OPTIONS: dict[str, Any] = {"batch_size": 2, "shard_size": 3, "workers": 0, "prompts": ["a {}.", "{}"]}
EMU = {"train/emu": 4}


def world(folder: Path) -> tuple[dict[str, Callable[[Path], Any]], dict[str, Path | None]]:
    """What is killed, by name, and the cache that it begins with."""
    torch.set_num_threads(1)
    counts = {"train/cat": 3, "train/dog": 2, "unlabeled": 3, "test/cat": 1, "test/dog": 1}
    images = open_source(write_images(folder / "images", counts))
    grown = open_source(write_images(folder / "grown", counts | EMU))
    others = open_source(write_images(folder / "others", EMU, seed=1))
    (folder / "model").mkdir()
    encoder = load_encoder(write_tiny_model(folder / "model"), device="cpu")
    extract(images, encoder, folder / "one", progress=False, **OPTIONS)
    extract(others, encoder, folder / "two", progress=False, **OPTIONS)
    features = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    texts = np.eye(2, 4, dtype=np.float32)
    np.savez(folder / "f.npz", features=features, labels=np.arange(8) % 2, class_names=["a", "b"], text_features=texts)
    actions: dict[str, Callable[[Path], Any]] = {
        "extract": lambda out: extract(images, encoder, out, progress=False, **OPTIONS),
        "overwrite": lambda out: extract(grown, encoder, out, progress=False, mode="overwrite", **OPTIONS),
        "append": lambda out: append(grown, encoder, out, workers=0, progress=False),
        "merge": lambda out: merge([folder / "one", folder / "two"], out, prefix=True, progress=False),
        "import": lambda out: import_features(open_features(folder / "f.npz"), out, shard_size=3, progress=False),
    }
    begins = {name: folder / "one" if name in ("overwrite", "append") else None for name in actions}
    return actions, begins


def tree(folder: Path) -> dict[str, Any]:
    """The files of a cache, its records without the seconds that they took."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != ".lock":
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
            if path.parent.name == "shards" and path.suffix == ".json":
                record = json.loads(path.read_bytes())
                found[path.relative_to(folder).as_posix()] = {**record, "seconds": None, "digest": None}
    return found


def content(folder: Path) -> Any:
    """All that is read of a cache; None where it is refused."""
    try:
        cache = FeatureCache.open(folder)
        return cache.ids, cache.class_names, cache.labels.tolist(), cache.plain.tobytes(), cache.verify()
    except InputError:
        return None


def begin(out: Path, first: Path | None) -> None:
    shutil.rmtree(out, ignore_errors=True)
    if first is not None:
        shutil.copytree(first, out)


def main(folder: Path, step: int) -> dict[str, Any]:
    actions, begins = world(folder)
    result: dict[str, Any] = {}
    out = folder / "out"
    for name, action in actions.items():
        begin(out, begins[name])
        before = content(out)
        code = in_child(lambda action=action: action(out))  # type: ignore[misc]
        if code:
            raise RuntimeError(f"{name} ended with {code}")
        wanted, whole = tree(out), content(out)
        number, kills, wrong = 1, 0, []
        while True:
            begin(out, begins[name])

            def killed(point: int = number, action: Callable[[Path], Any] = action) -> None:
                die_at(point, out)
                action(out)

            code = in_child(killed)
            if code == 0:
                break
            if code != KILLED:
                raise RuntimeError(f"{name} ended with {code} at point {number}")
            kills += 1
            left = content(out)
            # what was begun anew has no earlier content
            if left not in (None, whole, before):
                wrong.append(f"content after point {number}")
            if in_child(lambda action=action: action(out)) or tree(out) != wanted:  # type: ignore[misc]
                wrong.append(f"bytes after point {number}")
            number += step
        result[name] = {"points": number - 1, "kills": kills, "wrong": wrong}
    return result


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]).resolve(), int(sys.argv[2]))))
