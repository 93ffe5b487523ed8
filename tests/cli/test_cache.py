from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.cache.caches import write_named_cache
from tests.cache.samples import write_images
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import app


@pytest.fixture
def two(tmp_path):
    write_named_cache(tmp_path / "pets", ["cat", "dog"])
    write_named_cache(tmp_path / "zoo", ["emu", "dog"])
    return tmp_path / "pets", tmp_path / "zoo"


def run(*arguments, code=0):
    """Runs a command; stdout where it must work, the sentence on stderr where it must not."""
    result = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


# -- merge


def test_merge_says_what_it_made(two, tmp_path):
    shown = run("cache", "merge", *two, "--out", tmp_path / "all")
    assert shown.strip() == f"{tmp_path / 'all'}: 24 images of 3 classes in 8 shards"
    summary = json.loads(run("cache", "merge", *two, "-o", tmp_path / "all", "--json"))
    assert (summary["images"], summary["kept"], summary["out"]) == (24, 8, str(tmp_path / "all"))
    assert "8 of them finished before and kept" in run("cache", "merge", *two, "-o", tmp_path / "all")


def test_merge_with_prefixes(two, tmp_path):
    run("cache", "merge", *two, "--out", tmp_path / "all", "--prefix")
    assert FeatureCache.open(tmp_path / "all").ids[0] == "pets/pets/train/0-0"


def test_merge_ends_in_one_sentence(two, tmp_path):
    assert "at least two caches" in run("cache", "merge", two[0], "--out", tmp_path / "all", code=2)
    message = run("cache", "merge", *two, tmp_path / "nowhere", "--out", tmp_path / "all", code=2)
    assert message.startswith("error: ")
    assert message.count("\n") == 1


# -- there and back


@pytest.mark.parametrize(("to", "files"), [("clip-retrieval", 5), ("npy", 8), ("parquet", 3)])
def test_out_and_back(two, tmp_path, to, files):
    assert f"12 rows, {files} files written" in run("cache", "export", two[0], "--out", tmp_path / "out", "--to", to)
    assert json.loads(run("cache", "export", two[0], "--out", tmp_path / "out", "--to", to, "--json"))["rows"] == 12
    shown = run("cache", "import", tmp_path / "out", "--out", tmp_path / "back", "--shard-size", 2)
    assert "12 images of 2 classes in 7 shards" in shown
    before, after = FeatureCache.open(two[0]), FeatureCache.open(tmp_path / "back")
    assert np.array_equal(before.plain, after.plain)
    assert before.labels.tolist() == after.labels.tolist()


def test_import_with_a_model_for_the_texts(tmp_path, model):
    np.save(tmp_path / "features.npy", np.random.default_rng(0).standard_normal((6, 8)))
    (tmp_path / "names.txt").write_text("cat\nbig dog\n")
    (tmp_path / "prompts.txt").write_text("a {}.\n{}\n")
    options = ["--model", model, "--device", "cpu", "--class-names", tmp_path / "names.txt", "--split", "test"]
    options += ["--prompts", tmp_path / "prompts.txt", "--dtype", "float16", "--logit-scale", 20]
    shown = run("cache", "import", tmp_path / "features.npy", "--out", tmp_path / "cache", *options)
    assert "6 rows had another length than 1 and got it" in shown
    cache = FeatureCache.open(tmp_path / "cache")
    assert (cache.class_names, set(cache.splits), cache.logit_scale) == (["cat", "big dog"], {"test"}, 20.0)
    assert cache.manifest is not None
    assert (cache.manifest.prompts, cache.manifest.dtype) == (["a {}.", "{}"], "float16")
    assert cache.manifest.model["name"] == model


def test_a_model_named_beside_text_features_is_not_loaded(tmp_path):
    np.savez(tmp_path / "all.npz", features=np.eye(4), labels=np.array([0, 1, 1, -1]), class_names=np.array(["a", "b"]))
    np.save(tmp_path / "text.npy", np.eye(2, 4))
    options = ["--text-features", tmp_path / "text.npy", "--model", "no such model", "--json"]
    summary = json.loads(run("cache", "import", tmp_path / "all.npz", "--out", tmp_path / "cache", *options))
    assert (summary["images"], summary["classes"], summary["normalised"]) == (4, 2, 0)
    manifest = FeatureCache.open(tmp_path / "cache").manifest
    assert manifest is not None
    assert (manifest.model["name"], manifest.model["sha256"]) == ("no such model", "")


def test_a_wrong_path_loads_no_model(tmp_path):
    message = run(
        "cache", "import", tmp_path / "x.npz", "--out", tmp_path / "cache", "--model", "no such model", code=2
    )
    assert "no such folder or file" in message
    message = run("cache", "import", tmp_path, "--out", tmp_path / "cache", "--id-column", "key", code=2)
    assert "leave out the names of columns" in message


# -- append


@pytest.fixture
def growing(tmp_path, model):
    """A cache of three images and a folder of five others, two of which have a known id."""
    images = write_images(tmp_path / "images", {"train/cat": 2, "train/dog": 1})
    settings = ["--model", model, "--weak", 2, "--strong", 0, "--batch-size", 2, "--shard-size", 2]
    run("extract", images, "--out", tmp_path / "cache", "--device", "cpu", "--workers", 0, *settings)
    return tmp_path / "cache", write_images(tmp_path / "more", {"train/emu": 2, "train/cat": 3})


def test_append_takes_everything_from_the_cache(growing):
    arguments = ["cache", "append", *growing, "--device", "cpu", "--workers", 0]
    shown = run(*arguments)
    assert "6 images in 4 shards" in shown
    assert "3 images encoded" in shown
    assert "2 images were there already and stay as they are\n1 new classes" in shown
    summary = json.loads(run(*arguments, "--json"))
    assert (summary["encoded"], summary["known"], summary["classes"]) == (0, 5, 0)
    cache = FeatureCache.open(growing[0])
    assert (cache.class_names, cache.views("weak").shape) == (["cat", "dog", "emu"], (6, 2, 8))


def test_the_old_name_of_append_warns_and_does_the_same(growing):
    cache, more = growing
    arguments = ["extract", more, "--out", cache, "--append", "--device", "cpu", "--workers", 0]
    done = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert done.stderr.count("\n") == 1
    assert f"`extract --append` is deprecated, use `ulfine-fast cache append {cache} {more}`" in done.stderr
    assert "2 images were there already and stay as they are\n1 new classes" in done.stdout
    assert len(FeatureCache.open(cache)) == 6


def test_the_old_name_of_append_leaves_settings_to_the_cache(two):
    message = run("extract", "images", "--out", two[0], "--append", "--batch-size", 8, code=2)
    assert "--append takes everything from the cache; leave out --batch-size" in message
    for arguments in (
        ["extract", "images", "--out", two[0] / "shards", "--append"],
        ["cache", "append", *two[:1], "no"],
    ):
        assert run(*arguments, code=2)
    message = run("cache", "append", two[0] / "shards", "images", code=2)
    assert "is not a feature cache" in message


def test_every_command_that_fills_a_cache_prints_the_same_keys(growing, two, tmp_path):
    np.savez(tmp_path / "all.npz", features=np.eye(4), labels=np.array([0, 1, 1, -1]), class_names=np.array(["a", "b"]))
    np.save(tmp_path / "text.npy", np.eye(2, 4))
    text = ["--text-features", tmp_path / "text.npy"]
    commands = [
        ["cache", "append", *growing, "--device", "cpu", "--workers", 0],
        ["cache", "merge", *two, "--out", tmp_path / "all"],
        ["cache", "import", tmp_path / "all.npz", "--out", tmp_path / "imported", *text],
    ]
    appended, merged, imported = (json.loads(run(*command, "--json")) for command in commands)
    assert set(appended) == set(merged) == set(imported)
    # rows that are copied are not encoded
    assert (appended["encoded"], merged["encoded"], imported["encoded"]) == (3, 0, 0)
