"""Extraction on Ray: two nodes started here, one of them killed with work under way."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from tests.cache.samples import write_images
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.ray_cluster import RayWorkers
from ulfine_fast.cache.models.options import ModelOptions
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.pipeline.ray_engine import ray_engine
from ulfine_fast.cache.sources import open_source
from ulfine_fast.cache.store import FeatureCache

SMALL = {"batch_size": 2, "shard_size": 3, "workers": 0, "prompts": ["{}"]}


def bytes_of(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(cache.rglob("*.h5"))}


def without_seconds(cache: Path) -> list[dict]:
    records = [json.loads(path.read_text()) for path in sorted((cache / "shards").glob("*.json"))]
    return [{name: value for name, value in record.items() if name not in ("seconds", "digest")} for record in records]


def test_shards_of_a_killed_node_are_made_by_the_other(cluster, tmp_path, tiny_model, tiny_encoder):
    nodes, second = cluster
    root = write_images(tmp_path / "images", {"train/cat": 60, "train/dog": 60, "test/dog": 3})
    (root / "train/cat/007.png").write_bytes(b"no image")
    source, ended = open_source(root), []
    extract(source, tiny_encoder, tmp_path / "here", **SMALL)

    def work():
        engine = ray_engine(ModelOptions(tiny_model), RayWorkers(nodes.address, cpus=1))
        ended.append(extract(source, tiny_encoder, tmp_path / "there", **SMALL, engine=engine))

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive() and len(list((tmp_path / "there/shards").glob("*.json"))) < 6:
        thread.join(0.01)
    assert thread.is_alive(), "the extraction ended before it was disturbed"
    nodes.remove_node(second, allow_graceful=False)
    thread.join()
    assert (ended[0].images, ended[0].shards, len(ended[0].skipped)) == (122, 41, 1)
    assert bytes_of(tmp_path / "there") == bytes_of(tmp_path / "here")
    assert without_seconds(tmp_path / "there") == without_seconds(tmp_path / "here")
    assert FeatureCache.open(tmp_path / "there").verify() == []
    refuses(nodes, root, tiny_model, tiny_encoder, tmp_path)


def refuses(nodes, root, tiny_model, tiny_encoder, tmp_path):
    """What a worker refuses is said here; on the same cluster, since starting one takes its time."""
    broken = Path(tiny_model.removeprefix("local-dir:")) / "absent"
    engine = ray_engine(ModelOptions(f"local-dir:{broken}"), RayWorkers(nodes.address, cpus=1))
    with pytest.raises(InputError, match="no open_clip model in"):
        extract(open_source(root), tiny_encoder, tmp_path / "other", **SMALL, engine=engine)


def test_without_ray_the_extra_is_named(monkeypatch, images, tiny_model, tiny_encoder, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    engine = ray_engine(ModelOptions(tiny_model), RayWorkers())
    with pytest.raises(InputError, match=r'pip install "ulfine-fast\[ray\]"'):
        extract(open_source(images), tiny_encoder, tmp_path / "cache", **SMALL, engine=engine)
