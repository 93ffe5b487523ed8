from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.sources import open_source, reopen_source
from ulfine_fast.cache.sources.huggingface import HuggingFaceSource
from ulfine_fast.cache.store import FeatureCache

datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8))


def encoded(seed: int) -> dict:
    buffer = io.BytesIO()
    image(seed).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def made(labels, first=0, label="label", names=("ant", "bee")):
    features = {"img": datasets.Image(), label: datasets.ClassLabel(names=list(names))}
    images = [encoded(first + number) for number in range(len(labels))]
    return datasets.Dataset.from_dict({"img": images, label: labels}, features=datasets.Features(features))


@pytest.fixture
def saved(tmp_path):
    whole = {"train": made([0, 1, 1, 0, 1]), "validation": made([1], first=5), "test": made([0, 1], first=6)}
    datasets.DatasetDict({**whole, "extra": made([0])}).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def rows_of(source, shard_size=2):
    return [row for part in source.plan(shard_size) for row in source.open(part)]


def test_splits_labels_and_images(saved):
    source = open_source(saved)
    assert isinstance(source, HuggingFaceSource)
    assert source.class_names == ["ant", "bee"]
    assert [(part.split, part.name) for part in source.plan(2)] == [
        ("train", "train#0-2"),
        ("train", "train#2-4"),
        ("train", "train#4-5"),
        ("val", "val#0-1"),
        ("test", "test#0-2"),
    ]
    rows = rows_of(source)
    assert [row.label for row in rows] == [0, 1, 1, 0, 1, 1, 0, 1]
    again = pickle.loads(pickle.dumps(source))
    for number, row in enumerate(rows):
        assert np.array_equal(np.asarray(again.read(row)), np.asarray(image(number)))


def test_one_split_alone_and_other_names(tmp_path):
    made([1, 0], label="fine_label").save_to_disk(tmp_path / "one")
    (tmp_path / "names.txt").write_text("an ant\na bee\n")
    source = open_source(f"hf:{tmp_path / 'one'}", class_names_file=tmp_path / "names.txt")
    assert source.class_names == ["an ant", "a bee"]
    assert [(row.id, row.label, row.split) for row in rows_of(source)] == [
        ("train/00000000", 1, "train"),
        ("train/00000001", 0, "train"),
    ]


def test_through_the_pipeline_and_open_again(saved, tiny_encoder, tmp_path):
    extract(open_source(saved), tiny_encoder, tmp_path / "cache", batch_size=2, shard_size=2, prompts=["{}"])
    cache = FeatureCache.open(tmp_path / "cache")
    assert (len(cache), cache.verify()) == (8, [])
    assert [row.id for row in rows_of(reopen_source(cache.manifest.source))] == cache.ids


def test_bad_sets_are_named(tmp_path):
    with pytest.raises(InputError, match=r"the data set .*absent cannot be opened"):
        open_source(f"hf:{tmp_path}/absent")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/dataset_info.json").write_text("{")
    with pytest.raises(InputError, match="cannot be opened"):
        open_source(tmp_path / "cut")
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(tmp_path / "texts")
    with pytest.raises(InputError, match="no column of images; found text, label"):
        open_source(tmp_path / "texts")
    datasets.DatasetDict({"extra": made([0])}).save_to_disk(tmp_path / "other")
    with pytest.raises(InputError, match="has no split called"):
        open_source(tmp_path / "other")


def test_an_address_of_files_on_the_hub_is_no_name_of_a_data_set():
    with pytest.raises(InputError, match="a tar file does not say its classes"):
        open_source("hf://datasets/ada/shoes/train.tar")
