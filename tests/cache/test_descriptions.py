"""Sentences about classes beside a finished cache: what files hold, what is written, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.cache.samples import write_images, write_tiny_model
from tests.cli.program import run
from ulfine_fast.cache.descriptions import NAME, describe, read_sentences
from ulfine_fast.cache.io.errors import CacheMismatch, InputError
from ulfine_fast.cache.models.encoder import load_encoder
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.sources import open_source
from ulfine_fast.cache.store import FeatureCache

COUNTS = {"train/cat": 2, "train/dog": 2, "test/dog": 1}
SENTENCES = {"cat": ["it has whiskers", "a small pet"], "dog": ["it barks"]}


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def cache(tiny_encoder, tmp_path):
    images = write_images(tmp_path / "images", COUNTS)
    extract(open_source(images), tiny_encoder, tmp_path / "cache", workers=0, progress=False)
    return tmp_path / "cache"


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_files_of_sentences(tmp_path, suffix):
    file = tmp_path / f"sentences{suffix}"
    if suffix == ".json":
        file.write_text(json.dumps({"dog": "it  barks", " cat": ["it has whiskers", "a small pet", "a small pet", ""]}))
    else:
        file.write_text("class,sentence\ndog,it barks\ncat,it has whiskers\ncat,a small pet\n")
    assert read_sentences(file, ["cat", "dog", "emu"]) == SENTENCES
    assert list(read_sentences(file, ["cat", "dog", "emu"])) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kat": "a pet"}', "describes 'kat', which is none of the 2 classes of the cache; did you mean 'cat'?"),
        ('{"zebra": "stripes"}', "describes 'zebra', which is none of the 2 classes of the cache: cat, dog"),
        ('{"cat": []}', "holds no sentence about a class of the cache"),
        ('{"cat": 3}', "write an object such as"),
        ("[", "cannot be read"),
    ],
)
def test_files_that_are_refused(tmp_path, text, message):
    file = tmp_path / "sentences.json"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        read_sentences(file, ["cat", "dog"])
    assert message in str(error.value)


def test_only_one_file_is_added_and_the_cache_stays_valid(cache, tiny_encoder):
    before = content(cache)
    assert FeatureCache.open(cache).descriptions is None
    describe(cache, tiny_encoder, SENTENCES)
    after = content(cache)
    assert {path: data for path, data in after.items() if path.name != NAME} == before
    opened = FeatureCache.open(cache)
    assert opened.verify() == []
    assert opened.descriptions is not None
    assert opened.descriptions.classes == ["cat", "cat", "dog"]
    assert opened.descriptions.labels(opened.class_names).tolist() == [0, 0, 1]
    wanted = tiny_encoder.encode_texts(["it has whiskers", "a small pet", "it barks"]).numpy()
    np.testing.assert_array_equal(opened.descriptions.features, wanted)


def test_another_extraction_into_the_folder_removes_them(cache, tiny_encoder):
    describe(cache, tiny_encoder, SENTENCES)
    extract(
        open_source(cache.parent / "images"), tiny_encoder, cache, mode="overwrite", dtype="float32", progress=False
    )
    assert FeatureCache.open(cache).descriptions is None


@pytest.mark.parametrize("position", [30, 700, -20])
def test_a_changed_byte_is_refused(cache, tiny_encoder, position):
    describe(cache, tiny_encoder, SENTENCES)
    data = bytearray((cache / NAME).read_bytes())
    data[position] ^= 1
    (cache / NAME).write_bytes(data)
    with pytest.raises(InputError, match="run cache describe again, or remove it"):
        FeatureCache.open(cache)


def test_another_model_is_refused(cache, tiny_encoder, tmp_path):
    other = load_encoder(write_tiny_model(tmp_path / "other", seed=1), device="cpu")
    with pytest.raises(CacheMismatch, match="describe the classes with the weights that the cache was made with"):
        describe(cache, other, SENTENCES)


def test_the_command_says_which_classes_have_none(cache, tmp_path):
    file = tmp_path / "sentences.csv"
    file.write_text("class,sentence\ncat,it has whiskers\n")
    result = run("cache", "describe", cache, "--descriptions", file)
    assert "1 sentences about 1 classes" in result.stdout
    assert "no sentence, so their prompts alone: dog" in result.stdout
