from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from tests.cache.caches import PARTS, write_named_cache
from tests.cache.pipeline.test_extract import SMALL
from ulfine_fast.cache.interop.export import export
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.sources import open_source
from ulfine_fast.cache.store import FeatureCache


@pytest.fixture
def pets(tmp_path):
    write_named_cache(tmp_path / "pets", ["cat", "dog"], skipped=1)
    return FeatureCache.open(tmp_path / "pets")


# -- clip-retrieval


def test_clip_retrievals_folders(pets, tmp_path):
    done = export(pets.path, tmp_path / "out")
    assert (done.rows, done.files, done.kept) == (12, 5, 0)
    images = np.load(tmp_path / "out/img_emb/img_emb_0.npy", allow_pickle=False)
    assert images.dtype == np.float16
    assert np.array_equal(images, pets.plain)
    table = parquet.read_table(tmp_path / "out/metadata/metadata_0.parquet")
    assert table.column_names[:2] == ["image_path", "caption"]
    assert table["id"].to_pylist() == pets.ids
    assert table["label"].to_pylist() == pets.labels.tolist()
    assert table["split"].to_pylist() == pets.splits.tolist()
    names = [*pets.class_names, ""]
    assert table["class_name"].to_pylist() == table["caption"].to_pylist() == [names[k] for k in pets.labels]
    assert table["image_path"][0].as_py() == f"/data/pets/{pets.ids[0]}"


def test_texts_are_those_of_each_rows_class(pets, tmp_path):
    export(pets.path, tmp_path / "out")
    texts = np.load(tmp_path / "out/text_emb/text_emb_0.npy")
    known = pets.labels >= 0
    assert np.array_equal(texts[known], pets.prototypes[pets.labels[known]].astype(np.float16))
    assert not texts[~known].any()


def test_paths_of_a_table_are_beside_it_and_others_are_ids(tmp_path):
    for kind, first in (("table", "/data/a/train/0-0"), ("torchvision", "a/train/0-0")):
        folder = tmp_path / kind / "a"
        write_named_cache(folder, ["cat"], source={"kind": kind, "path": "/data/list.csv"})
        export(folder, tmp_path / f"{kind}-out")
        table = parquet.read_table(tmp_path / f"{kind}-out/metadata/metadata_0.parquet")
        assert table["image_path"][0].as_py() == first


def test_files_hold_whole_shards_and_numbers_have_the_digits_of_the_last(tmp_path):
    write_named_cache(tmp_path / "a", ["cat"], parts=[("train", 2)] * 11 + [("train", 0)], skipped=1)
    export(tmp_path / "a", tmp_path / "pairs", rows_per_file=5)
    names = sorted(path.name for path in (tmp_path / "pairs/img_emb").iterdir())
    assert names == [f"img_emb_{number}.npy" for number in range(6)]
    export(tmp_path / "a", tmp_path / "single", rows_per_file=1)
    names = sorted(path.name for path in (tmp_path / "single/metadata").iterdir())
    assert names == [f"metadata_{number:02d}.parquet" for number in range(11)]
    whole = np.concatenate([np.load(path) for path in sorted((tmp_path / "single/img_emb").iterdir())])
    assert np.array_equal(whole, FeatureCache.open(tmp_path / "a").plain)


# -- arrays


def test_one_array_each(pets, tmp_path):
    done = export(pets.path, tmp_path / "out", to="npy")
    arrays = {path.stem: np.load(path, allow_pickle=False) for path in (tmp_path / "out").glob("*.npy")}
    assert (done.files, len(arrays)) == (8, 8)
    assert np.array_equal(arrays["features"], pets.plain)
    assert arrays["ids"].tolist() == pets.ids
    assert arrays["labels"].tolist() == pets.labels.tolist()
    assert arrays["splits"].tolist() == pets.splits.tolist()
    assert np.array_equal(arrays["weak"], pets.views("weak"))
    assert np.array_equal(arrays["strong"], pets.views("strong"))
    assert np.array_equal(arrays["text_features"], pets.text_features)
    assert arrays["class_names"].tolist() == ["cat", "dog"]


def test_float32_stays_and_missing_views_have_no_file(tmp_path):
    views = {"weak": 0, "strong": 1, "seed": 0}
    write_named_cache(tmp_path / "a", ["cat"], dtype="float32", views=views)
    export(tmp_path / "a", tmp_path / "out", to="npy")
    assert np.load(tmp_path / "out/features.npy").dtype == np.float32
    assert not (tmp_path / "out/weak.npy").exists()


def test_whole_numbers_come_out_as_float16(tiny_encoder, images, tmp_path):
    extract(open_source(images), tiny_encoder, tmp_path / "cache", dtype="int8", **SMALL)
    cache = FeatureCache.open(tmp_path / "cache")
    for to, name in (("npy", "features"), ("clip-retrieval", "img_emb/img_emb_0")):
        export(tmp_path / "cache", tmp_path / to, to=to)
        array = np.load(tmp_path / to / f"{name}.npy")
        assert array.dtype == np.float16
        assert np.allclose(array, np.asarray(cache.plain, np.float32), atol=1e-3)


# -- again, and what is refused


@pytest.mark.parametrize("to", ["clip-retrieval", "npy"])
def test_an_interrupted_export_goes_on(pets, tmp_path, monkeypatch, to):
    export(pets.path, tmp_path / "whole", to=to, rows_per_file=6)
    real = os.replace

    def stop(old, new):
        if Path(new).name in ("img_emb_1.npy", "weak.npy"):
            raise KeyboardInterrupt
        real(old, new)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        export(pets.path, tmp_path / "out", to=to, rows_per_file=6)
    monkeypatch.undo()
    assert list((tmp_path / "out").rglob("*.tmp")) == []
    assert export(pets.path, tmp_path / "out", to=to, rows_per_file=6).kept == (3 if to == "clip-retrieval" else 0)
    made = {path.relative_to(tmp_path / "out"): path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    assert made == {p.relative_to(tmp_path / "whole"): p.read_bytes() for p in (tmp_path / "whole").rglob("*.*")}


def test_other_contents_are_not_written_over(pets, tmp_path):
    export(pets.path, tmp_path / "out")
    write_named_cache(tmp_path / "zoo", ["emu"])
    for cache, options in ((tmp_path / "zoo", {}), (pets.path, {"to": "npy"}), (pets.path, {"rows_per_file": 6})):
        with pytest.raises(InputError, match="out holds other files; choose a new or empty folder"):
            export(cache, tmp_path / "out", **options)
    with pytest.raises(InputError, match="is a file"):
        export(pets.path, tmp_path / "zoo/manifest.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "csv"}, "one of clip-retrieval, npy, parquet, lance, got 'csv'"),
        ({"rows_per_file": 0}, "at least 1, got 0"),
    ],
)
def test_values_out_of_range(pets, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        export(pets.path, tmp_path / "out", **options)


def test_a_damaged_shard_ends_the_export(pets, tmp_path):
    (pets.path / "shards/00001.h5").write_bytes(b"cut")
    for to in ("npy", "clip-retrieval"):
        with pytest.raises(InputError, match="shard 00001"):
            export(pets.path, tmp_path / to, to=to)
    assert not (tmp_path / "clip-retrieval/metadata/metadata_0.parquet").exists()


@pytest.mark.parametrize("to", ["clip-retrieval", "npy"])
def test_a_full_disk_names_the_file_and_leaves_no_beginnings(tmp_path, to):
    write_named_cache(tmp_path / "a", ["cat"], parts=[("train", 3000)])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, before[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*(img_emb_0|features|ids)\.npy \(File too large\)"):
            export(tmp_path / "a", tmp_path / "out", to=to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "out").rglob("*.tmp")) == []


def test_the_note_says_what_was_exported(pets, tmp_path):
    export(pets.path, tmp_path / "out")
    note = json.loads((tmp_path / "out/ulfine-fast.json").read_text())
    assert (note["format"], note["version"], note["layout"], note["rows"]) == (
        "ulfine-fast-export",
        1,
        "clip-retrieval",
        sum(n for _, n in PARTS),
    )
    assert note["manifest"]["model"]["sha256"] == "ab" * 32
