"""Opening a cache of a million rows, beside reading the same files and doing nothing with them, and its peak memory.

    python -m benchmarks.speed.load --rows 1000000 --json load.json

Files are read cold (dropped from the system's memory before) and warm. Loading is `FeatureCache.open` with all checks,
until the whole arrays are in memory; with `--device` also on the device. Peak memory is that of a process that loads
the cache, without what it took before. The files have the real format, their values
are random.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from benchmarks.options import DeviceOption, JsonOption
from benchmarks.results import Row, print_table, write_rows
from ulfine_fast.cache.io.device import pick_device
from ulfine_fast.cache.manifest import Manifest
from ulfine_fast.cache.pipeline.threads import cores
from ulfine_fast.cache.shard import Shard, ShardRecord, shard_path, write_shard
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cache.text import TextFeatures, average, write_text
from ulfine_fast.cli.main import guarded

_CLASSES = 100


def write_cache(folder: Path, rows: int, dim: int, shard_size: int) -> None:
    """Write a cache of random unit rows without views, as `extract` would.

    Args:
        folder: an empty one.
        rows: how many, all in the split "train".
        dim: width of the features D.
        shard_size: rows of each shard.
    """
    (folder / "shards").mkdir(parents=True)
    names = [f"class {number}" for number in range(_CLASSES)]
    manifest = Manifest(
        model={
            "name": "random",
            "pretrained": None,
            "sha256": "",
            "image_size": 224,
            "dim": dim,
            "logit_scale": 100.0,
            "normalized": True,
        },
        preprocessing="",
        mean=[0.5] * 3,
        std=[0.5] * 3,
        views={"weak": 0, "strong": 0, "seed": 0},
        dtype="float16",
        precision="fp32",
        batch_size=shard_size,
        shard_size=shard_size,
        class_names=names,
        prompts=["{}"],
        source={"kind": "random", "rows": rows, "fingerprint": ""},
    )
    manifest.write(folder)
    rng = np.random.default_rng(0)
    text = _unit(rng, _CLASSES, dim).astype(np.float32)[:, None]  # (K, 1, D)
    write_text(folder, TextFeatures([[name] for name in names], text, average(text), 100.0), manifest)
    for number, first in enumerate(range(0, rows, shard_size)):
        features = _unit(rng, min(shard_size, rows - first), dim)
        _write_shard(folder, number, first, features, manifest.identity_of(number))


def _unit(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    values = rng.standard_normal((rows, dim), dtype=np.float32)
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


def _write_shard(folder: Path, number: int, first: int, features: np.ndarray, identity: str | None) -> None:
    n, dim = features.shape
    no_views = np.empty((n, 0, dim), np.float16)
    shard = Shard(
        split="train",
        ids=[f"class/{row:08d}.jpg" for row in range(first, first + n)],
        labels=(np.arange(n) % _CLASSES).astype(np.int32),
        plain=features[:, None],
        weak=no_views,
        strong=no_views,
        scale=np.empty((n, 0), np.float32),
        flip=np.empty((n, 0), np.uint8),
    )
    path = shard_path(folder, number)
    checksum, size = write_shard(path, shard, identity)
    record = ShardRecord(number, "train", first, n, n, checksum, size, manifest=identity)
    record.write(path.with_suffix(".json"))


def read_files(folder: Path) -> int:
    """Read every shard into a buffer that is used again, with as many threads as cores; returns the bytes."""
    paths = sorted((folder / "shards").glob("*.h5"))
    with ThreadPoolExecutor(cores()) as pool:
        return sum(pool.map(_read_into_one_buffer, [paths[start :: cores()] for start in range(cores())]))


def _read_into_one_buffer(paths: list[Path]) -> int:
    buffer = bytearray(max((path.stat().st_size for path in paths), default=0))
    total = 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            total += file.readinto(buffer) or 0
    return total


def forget(folder: Path) -> None:
    """Ask the system to drop its copies of the files."""
    for path in (folder / "shards").iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def load(folder: Path, device: torch.device) -> None:
    """Open a cache and bring its plain features to the device."""
    torch.from_numpy(FeatureCache.open(folder).plain).to(device)


def peak_memory(folder: Path) -> int:
    """Bytes that loading a cache takes at most, in a process of its own; its features are among them."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_load_and_measure, folder).result()


def _load_and_measure(folder: Path) -> int:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is taken, not that of the parent
    before = _peak()
    load(folder, torch.device("cpu"))
    return _peak() - before


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def measure(folder: Path, device: torch.device, rounds: int) -> list[Row]:
    """Both contenders, cold and warm.

    Args:
        folder: a cache.
        device: where the features go.
        rounds: runs of each, one contender after the other.
    """
    contenders: dict[str, Callable[[], object]] = {
        "files": lambda: read_files(folder),
        "cache": lambda: load(folder, device),
    }
    size = sum(path.stat().st_size for path in (folder / "shards").glob("*.h5"))
    rows: list[Row] = []
    for state in ("cold", "warm"):
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, work in contenders.items():
                if state == "cold":
                    forget(folder)
                started = time.perf_counter()
                work()
                seconds[name].append(time.perf_counter() - started)
        rates = {name: size / statistics.median(of_rounds) for name, of_rounds in seconds.items()}
        rows += [
            {"state": state, "contender": name, "bytes": size, "bytes_per_second": rate, "share": rate / rates["files"]}
            for name, rate in rates.items()
        ]
    return rows


def main(
    rows: Annotated[int, typer.Option(help="Rows of the cache.", min=1)] = 1_000_000,
    dim: Annotated[int, typer.Option(help="Length of a feature.", min=1)] = 512,
    shard_size: Annotated[int, typer.Option(help="Rows of a shard.", min=1)] = 8192,
    rounds: Annotated[int, typer.Option(help="Runs of each contender.", min=1)] = 3,
    device: DeviceOption = "auto",
    as_json: JsonOption = None,
) -> None:
    """Measure how fast a cache is loaded beside how fast its files are read."""
    torch_device = pick_device(device)
    root = Path(tempfile.mkdtemp(prefix="ulfine-fast-load-", dir=Path.cwd()))
    try:
        write_cache(root / "cache", rows, dim, shard_size)
        results = measure(root / "cache", torch_device, rounds)
        memory = peak_memory(root / "cache")
    finally:
        shutil.rmtree(root)
    size = int(results[0]["bytes"])
    results.append({"state": "loading", "contender": "memory", "bytes": memory, "share": memory / size})
    write_rows(as_json, results)
    lines = [
        [row["state"], row["contender"], f"{row['bytes_per_second'] / 1e9:.2f}", f"{row['share']:.2f}"]
        for row in results[:-1]
    ]
    print_table(["files are", "contender", "GB/s", "of reading"], lines, texts=2)
    typer.echo(f"peak memory of loading: {memory / 1e9:.2f} GB, {memory / size:.2f} of the files' {size / 1e9:.2f} GB")


if __name__ == "__main__":
    typer.run(guarded(main))
