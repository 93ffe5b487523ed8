"""docs/cache-format.md is enough: a cache is read and written here with json, h5py and hashlib alone."""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from blake3 import blake3

from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.sources import open_source
from ulfine_fast.cache.store import FeatureCache

PAGE = Path(__file__).parents[2] / "docs/cache-format.md"
VIEWED = {"train", "unlabeled"}


@pytest.fixture
def folder(images, tiny_encoder, tmp_path):
    (images / "train/cat/001.png").write_bytes(b"cut")
    options = {"batch_size": 2, "shard_size": 3, "workers": 0, "prompts": ["a {}.", "{}"], "max_skipped": 0.1}
    extract(open_source(images), tiny_encoder, tmp_path / "cache", **options)
    return tmp_path / "cache"


def checksum(dataset) -> str:
    if h5py.check_string_dtype(dataset.dtype):
        return hashlib.sha256("\n".join(dataset.asstr()[()].reshape(-1)).encode()).hexdigest()
    return hashlib.sha256(dataset[()].astype(dataset.dtype.newbyteorder("<")).tobytes("C")).hexdigest()


def tables() -> dict[str, list[str]]:
    """The names in the first column of each table of the page, by heading."""
    columns: dict[str, list[str]] = {}
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("|")][2:]
        columns[section.splitlines()[0]] = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    return columns


def test_the_page_names_exactly_what_is_there(folder):
    named = tables()
    assert sorted(named["manifest.json"]) == sorted(json.loads((folder / "manifest.json").read_text()))
    assert sorted(named["shards/00000.json"]) == sorted(json.loads((folder / "shards/00000.json").read_text()))
    with h5py.File(folder / "shards/00000.h5") as file:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        assert sorted(named["shards/00000.h5"]) == sorted(names)
    with h5py.File(folder / "text.h5") as file:  # of a ViT, so everything that may be there is
        assert sorted(named["text.h5"]) == sorted(file)


def test_shards_read_by_the_page_alone(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("ulfine-fast-cache", 3)
    dim, weak, strong = manifest["model"]["dim"], manifest["views"]["weak"], manifest["views"]["strong"]
    reached, ids, order = 0, [], []
    for number, path in enumerate(sorted((folder / "shards").glob("*.json"))):
        record = json.loads(path.read_text())
        data = path.with_suffix(".h5").read_bytes()
        assert (record["blake3"], record["bytes"]) == (blake3(data).hexdigest(), len(data))
        assert (record["shard"], record["first_row"]) == (number, reached)
        assert record["rows"] + len(record["skipped"]) == record["rows_read"]
        reached += record["rows_read"]
        with h5py.File(io.BytesIO(data)) as file:
            n = record["rows"]
            shapes = {"id": (n,), "label": (n,), "split": (n,), "plain": (n, 1, dim)}
            if record["split"] in VIEWED:
                shapes |= {"weak": (n, weak, dim), "strong": (n, strong, dim)}
                assert sorted(file["view"]) == ["flip", "kind", "scale", "seed"]
            assert {name: file[name].shape for name in file if name != "view"} == shapes
            assert {file["split"].attrs["names"][code] for code in file["split"]} <= {record["split"]}
            assert all(file[name].dtype == manifest["dtype"] for name in shapes if len(shapes[name]) == 3)
            length = np.linalg.norm(file["plain"][:, 0].astype(np.float32), axis=1)
            assert np.allclose(length, 1, atol=2e-3)
            file.visititems(lambda _, item: check_dataset(item))
            ids += file["id"].asstr()[()].tolist()
        order.append(record["split"])
    assert reached == manifest["source"]["rows"] == 11
    assert order == ["train", "train", "unlabeled", "val", "test"]
    assert ids == FeatureCache.open(folder).ids


def test_bytes_and_tokens_read_by_the_page_alone(images, tiny_model, tmp_path):
    """The same images as float32 and as int8 with tokens: the page says how one comes from the other."""
    from ulfine_fast.cache.models.encoder import load_encoder

    encoder = load_encoder(tiny_model, device="cpu", features="last-block")
    for dtype in ("float32", "int8"):
        extract(open_source(images), encoder, tmp_path / dtype, dtype=dtype, workers=0, shard_size=4)
    manifest = json.loads((tmp_path / "int8/manifest.json").read_text())
    assert (manifest["version"], manifest["dtype"], manifest["tokens"]) == (3, "int8", ["pre", "post"])
    with h5py.File(tmp_path / "int8/text.h5") as text:
        head = {name: text[name][()] for name in ("ln_post_weight", "ln_post_bias", "ln_post_eps", "projection")}
    read = []
    for path in sorted((tmp_path / "int8/shards").glob("*.h5")):
        with h5py.File(path) as file, h5py.File(tmp_path / "float32/shards" / path.name) as exact:
            file.visititems(lambda _, item: check_dataset(item))
            codes, scales = file["plain"][:].astype(np.float64), file["plain_scale"][:]
            assert np.abs(codes).max() == 127
            assert np.allclose(scales, np.abs(exact["plain"][:]).max(-1) / 127, rtol=1e-3)
            assert np.abs(codes * scales[..., None] - exact["plain"][:]).max() < 0.51 * scales.max()
            views = 1 + sum(file[name].shape[1] for name in ("weak", "strong") if name in file)
            assert file["tokens"].shape == (len(codes), views, 2, manifest["token_width"])
            assert (file["tokens"].dtype, exact["tokens"].dtype) == (np.float16, np.float32)
            post = exact["tokens"][:, 0, 1]  # (n, W)
            centred = post - post.mean(-1, keepdims=True)
            normed = centred / np.sqrt(post.var(-1, keepdims=True) + head["ln_post_eps"])
            feature = (normed * head["ln_post_weight"] + head["ln_post_bias"]) @ head["projection"]
            feature /= np.linalg.norm(feature, axis=-1, keepdims=True)
            assert np.allclose(feature, exact["plain"][:, 0], atol=1e-4)
            read.append(codes[:, 0] * scales)
    assert np.allclose(np.concatenate(read), FeatureCache.open(tmp_path / "int8").plain, atol=1e-3)


def test_the_page_names_what_bytes_and_tokens_add():
    named = tables()
    assert {"plain_scale", "weak_scale", "strong_scale"} <= set(named["One byte a number"])
    assert "tokens" in named["Tokens"]


def check_dataset(item):
    if isinstance(item, h5py.Dataset):
        assert item.attrs["sha256"] == checksum(item), item.name
        assert (item.chunks, item.compression, item.is_virtual, item.external) == (None, None, False, None)


def test_text_read_by_the_page_alone(folder):
    with h5py.File(folder / "text.h5") as file:
        file.visititems(lambda _, item: check_dataset(item))
        assert file["prompts"].asstr()[()].tolist() == [["a cat.", "cat"], ["a dog.", "dog"]]
        features, prototypes = file["features"][()], file["prototypes"][()]
        mean = features.mean(axis=1)
        assert np.allclose(prototypes, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-6)
        assert file["projection"].shape == (file["ln_post_weight"].shape[0], features.shape[2])
        assert isinstance(file.attrs["logit_scale"], float)


def test_the_view_seed_is_as_the_page_says():
    from ulfine_fast.cache.pipeline.views import view_seed

    digest = hashlib.sha256(b"7/strong/1/train/cat/a.png").digest()
    assert view_seed(7, "train/cat/a.png", "strong", 1) == int.from_bytes(digest[:8], "big")


def test_the_fingerprint_is_as_the_page_says(images, tiny_encoder, folder):
    rows = open_source(images).rows
    text = "".join(f"{row.id}\0{row.label}\0{row.split}\0{row.bytes}\n" for row in rows)
    fingerprint = json.loads((folder / "manifest.json").read_text())["source"]["fingerprint"]
    assert fingerprint == hashlib.sha256(text.encode()).hexdigest()


def test_the_pages_example_runs(folder, monkeypatch):
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code
    monkeypatch.chdir(folder.parent)
    folder.rename(folder.parent / "CACHE")
    names: dict = {}
    exec(code.group(1), names)
    assert names["plain"].shape == (2, 8)
    assert names["ids"].tolist() == ["test/cat/000.png", "test/dog/000.png"]


def test_a_cache_of_another_program_opens(tmp_path):
    """Written by the page, without a line of this package: without chunks, with its own order of datasets."""
    manifest = {
        "format": "ulfine-fast-cache",
        "version": 1,
        "model": {"name": "m", "pretrained": None, "sha256": "", "image_size": 8, "dim": 2, "logit_scale": 10.0},
        "preprocessing": "none",
        "mean": [0, 0, 0],
        "std": [1, 1, 1],
        "views": {"weak": 1, "strong": 0, "seed": 3},
        "dtype": "float32",
        "precision": "fp32",
        "batch_size": 1,
        "shard_size": 9,
        "class_names": ["a"],
        "prompts": ["{}"],
        "source": {"kind": "folder", "path": "/gone", "rows": 2, "fingerprint": ""},
        "a later key": 1,
    }
    (tmp_path / "shards").mkdir()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    eye = np.eye(2, dtype=np.float32)[:, None]  # (2, 1, 2)
    put(tmp_path / "text.h5", {"features": eye[:1], "prompts": [["a"]], "prototypes": eye[0]}, logit_scale=10.0)
    content = {"weak": eye, "plain": eye, "label": np.array([0, -1], np.int32), "split": np.zeros(2, np.uint8)}
    content |= {"id": ["x", "y"], "view/kind": ["weak"], "view/seed": np.array([3])}
    content |= {"view/scale": np.ones((2, 1), np.float32), "view/flip": np.zeros((2, 1), np.uint8)}
    put(tmp_path / "shards/00000.h5", content)
    data = (tmp_path / "shards/00000.h5").read_bytes()
    record = {"shard": 0, "split": "train", "first_row": 0, "rows_read": 2, "rows": 2}
    record |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "seconds": {}, "skipped": []}
    (tmp_path / "shards/00000.json").write_text(json.dumps(record))
    cache = FeatureCache.open(tmp_path)
    assert (cache.ids, cache.labels.tolist(), cache.logit_scale) == (["x", "y"], [0, -1], 10.0)
    assert np.array_equal(cache.views("weak"), eye)
    assert cache.verify() == []


def put(path, datasets, **attributes):
    with h5py.File(path, "w") as file:
        file.attrs.update(attributes)
        for name, content in datasets.items():
            text = isinstance(content, list)
            made = file.create_dataset(name, data=content, dtype=h5py.string_dtype() if text else None)
            made.attrs["sha256"] = checksum(made)


def digest(values: dict) -> str:
    kept = {name: value for name, value in values.items() if name != "digest"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def identity(manifest: dict) -> str:
    left_out = ("version", "digest", "max_skipped", "libraries", "created_by")
    values = {name: value for name, value in manifest.items() if name not in left_out}
    return digest({**values, "source": {name: value for name, value in values["source"].items() if name != "path"}})


def test_digests_are_as_the_page_says(folder, images, tiny_encoder, tmp_path):
    from tests.cache.samples import write_images
    from ulfine_fast.cache.pipeline.append import append

    before = json.loads((folder / "manifest.json").read_text())
    write_images(images, {"train/emu": 2}, seed=3)
    append(open_source(images), tiny_encoder, folder, workers=0)
    after = json.loads((folder / "manifest.json").read_text())
    records = [json.loads(path.read_text()) for path in sorted((folder / "shards").glob("*.json"))]
    assert all(values["digest"] == digest(values) for values in (before, after, *records))
    wanted = [identity(before)] * 5 + [identity(after)]
    assert [record["manifest"] for record in records] == wanted
    assert wanted[0] != wanted[-1]
    data = (folder / "text.h5").read_bytes()
    header = json.loads(data[:512].rstrip(b"\0"))
    content = hashlib.sha256(data[512:]).hexdigest()
    assert header == {"manifest": identity(before), "sha256": content, "bytes": len(data)}
    # the manifest of the earlier version, from the later one
    source = {**after["source"], "rows": after["source"]["rows"] - after["source"]["appended"][0]["rows"]}
    del source["appended"]
    assert identity({**after, "source": source, "class_names": after["class_names"][:2]}) == identity(before)
