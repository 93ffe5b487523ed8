from __future__ import annotations

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.cache.samples import write_images, write_tiny_model
from ulfine_fast import FeatureCache, InputError
from ulfine_fast.cache.models.encoder import load_encoder
from ulfine_fast.cache.neighbors import (
    build_index,
    duplicates_summary,
    find_leaks,
    label_conflicts,
    leakage_warning,
    leaks,
    near_duplicates,
)
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.pipeline.views import ViewRecipe
from ulfine_fast.cache.sources import open_source
from ulfine_fast.cli.main import app

SPLITS = ["train"] * 6 + ["unlabeled"] * 2 + ["val"] + ["test"] * 3


def random_rows(n, dim=16, seed=0):
    rows = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def planted():
    """12 rows: 1 copies 0 (same label), 4 copies 2 (another), 7 copies 5, and 9 and 11 (test) copy 3 and 6."""
    rows, labels = random_rows(12), np.array([0, 0, 1, 2, 2, 0, -1, -1, 1, 2, 0, 1])
    for copy, of in [(1, 0), (4, 2), (7, 5), (9, 3), (11, 6)]:
        rows[copy] = rows[of] + 0.01 * random_rows(1, seed=copy)[0]
    return FeatureCache.from_arrays(rows, labels, splits=SPLITS)


def pairs_of(duplicates):
    return list(zip(duplicates.first.tolist(), duplicates.second.tolist(), strict=True))


def test_planted_copies_are_found_and_nothing_else():
    cache = planted()
    duplicates = near_duplicates(cache)
    assert pairs_of(duplicates) == [(0, 1), (2, 4), (3, 9), (5, 7), (6, 11)]
    assert (duplicates.exact, duplicates.recall) == (True, 1.0)
    assert (duplicates.cosine > 0.98).all()
    assert label_conflicts(cache, duplicates).tolist() == [1]
    assert duplicates.group.tolist() == [0, 0, 1, 2, 1, 3, 4, 3, -1, 2, -1, 4]


def test_leaks_are_held_out_images_that_training_has():
    cache = planted()
    for leaked in (leaks(cache, near_duplicates(cache)), find_leaks(cache)):
        assert sorted((leak.held_out, leak.trained, leak.same_label) for leak in leaked) == [
            (9, 3, True),
            (11, 6, False),
        ]
        assert leaked[0].cosine >= leaked[1].cosine
    assert "2 images of the 4 in val and test are nearly the same as one in train" in leakage_warning(cache)


def test_no_leak_is_no_word_and_a_large_cache_is_said():
    cache = FeatureCache.from_arrays(random_rows(12), np.zeros(12, int), splits=SPLITS)
    assert leakage_warning(cache) is None
    assert find_leaks(planted(), max_pairs=31) is None
    assert len(find_leaks(planted(), max_pairs=32)) == 2
    assert find_leaks(FeatureCache.from_arrays(random_rows(4), np.zeros(4, int))) == []


def test_a_chain_is_one_group_and_many_copies_too():
    angle = np.deg2rad(np.arange(10) * 8)  # neighbours have cosine 0.990, next but one 0.961
    rows = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    chain = near_duplicates(FeatureCache.from_arrays(rows, np.zeros(10, int)))
    assert pairs_of(chain) == [(i, i + 1) for i in range(9)]
    assert chain.group.tolist() == [0] * 10
    same = near_duplicates(FeatureCache.from_arrays(np.tile(rows[:1], (200, 1)), np.zeros(200, int)))
    assert same.group.tolist() == [0] * 200


def test_the_threshold_is_a_cosine():
    cache = planted()
    cosine = float((cache.plain[0] * cache.plain[1]).sum() / np.linalg.norm(cache.plain[1]))
    assert (0, 1) in pairs_of(near_duplicates(cache, threshold=cosine - 2e-5))
    assert (0, 1) not in pairs_of(near_duplicates(cache, threshold=cosine + 2e-5))
    for wrong in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(InputError, match="threshold must be above 0 and at most 1"):
            near_duplicates(cache, threshold=wrong)


def test_rows_of_zeros_are_like_nothing():
    rows = random_rows(5)
    rows[1] = rows[3] = 0
    duplicates = near_duplicates(FeatureCache.from_arrays(rows, np.zeros(5, int)))
    assert len(duplicates.first) == 0
    assert duplicates.group.tolist() == [-1] * 5


def test_tiny_and_empty_caches():
    one = FeatureCache.from_arrays(random_rows(1), [0])
    assert pairs_of(near_duplicates(one)) == []
    with pytest.raises(InputError, match="no images to compare"):
        build_index(np.empty((0, 4), np.float32))


def test_search_equals_brute_force():
    rows, queries = random_rows(300), random_rows(40, seed=1)
    cosines, rows_found = build_index(rows).search(queries, 5)
    wanted = np.argsort(-(queries @ rows.T), axis=1, kind="stable")[:, :5]
    assert np.array_equal(rows_found, wanted)
    np.testing.assert_allclose(cosines, np.take_along_axis(queries @ rows.T, wanted, 1), atol=1e-6)


def test_the_approximate_index_tells_its_recall_and_finds_copies():
    centres = random_rows(40, dim=32)
    rng = np.random.default_rng(2)
    rows = centres[rng.integers(0, 40, 6000)] + 0.15 * rng.standard_normal((6000, 32)).astype(np.float32)
    rows[5000:5010] = rows[:10]
    index = build_index(rows, exact_rows=1000)
    assert not index.exact
    assert index.recall > 0.9
    exact = build_index(rows)
    queries = exact.rows[:500]
    near, wanted = index.search(queries, 10)[1], exact.search(queries, 10)[1]
    hits = [len(np.intersect1d(one, other)) for one, other in zip(near, wanted, strict=True)]
    assert np.mean(hits) / 10 == pytest.approx(index.recall, abs=0.08)
    again = build_index(rows, exact_rows=1000)
    assert np.array_equal(near, again.search(queries, 10)[1])
    cache = FeatureCache.from_arrays(rows, np.zeros(6000, int))
    pairs = pairs_of(near_duplicates(cache, threshold=0.9999, index=index))
    assert pairs == [(i, 5000 + i) for i in range(10)]


# -- the commands, over real images


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Images with a copy across splits, a copy with another label, and a re-encoded one."""
    root = tmp_path_factory.mktemp("neighbors")
    images = write_images(root / "images", {"train/cat": 4, "train/dog": 4, "test/cat": 2, "test/dog": 2}, seed=3)
    # the tiny model sees every image as much the same, so these differ in colour
    for number, path in enumerate(sorted(images.rglob("*.png"))):
        Image.new("RGB", (24, 24), (17 * number % 256, 90 * number % 256, 200 - 15 * number)).save(path)
    (images / "test/cat/000.png").write_bytes((images / "train/cat/002.png").read_bytes())
    (images / "train/dog/003.png").write_bytes((images / "train/cat/001.png").read_bytes())
    buffer = io.BytesIO()
    Image.open(images / "train/dog/000.png").save(buffer, "JPEG", quality=95)
    (images / "test/dog/001.png").write_bytes(buffer.getvalue())
    encoder = load_encoder(write_tiny_model(root / "model"), device="cpu")
    views = ViewRecipe(weak=0, strong=0)
    extract(open_source(images), encoder, root / "cache", views=views, dtype="float32", prompts=["{}"], workers=0)
    return root / "cache"


def test_the_command_finds_what_was_planted(cache, tmp_path):
    done = CliRunner().invoke(app, ["neighbors", str(cache), "--threshold", "0.99999", "--json"])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.output)
    pairs = {(pair["first"], pair["second"]): pair for pair in summary["near_duplicates"]}
    assert pairs["train/cat/002.png", "test/cat/000.png"]["splits"] == ["train", "test"]
    assert pairs["train/cat/001.png", "train/dog/003.png"]["different_labels"]
    assert ("train/dog/000.png", "test/dog/001.png") in pairs
    assert (summary["leaks"], summary["different_labels"], summary["pairs"]) == (2, 1, 3)
    shown = CliRunner().invoke(app, ["neighbors", str(cache), "--threshold", "0.99999"]).output
    assert "3 near-duplicates in 3 groups among 12 images" in shown
    assert "different labels: one of the two is likely wrong" in " ".join(shown.split())


def test_the_nearest_of_each_image_go_to_a_table(cache, tmp_path):
    out = tmp_path / "near.parquet"
    done = CliRunner().invoke(app, ["neighbors", str(cache), "--k", "3", "--out", str(out)])
    assert done.exit_code == 0, done.output
    table = pq.read_table(out).to_pylist()
    assert len(table) == 36
    first = next(row for row in table if row["id"] == "test/cat/000.png")
    assert (first["neighbor"], first["rank"]) == ("train/cat/002.png", 1)
    assert all(row["id"] != row["neighbor"] for row in table)
    done = CliRunner().invoke(app, ["neighbors", str(cache), "--out", str(tmp_path / "near.csv")])
    assert (done.exit_code, "must end in .parquet" in done.output) == (2, True)


def test_inspect_warns_of_leakage_warning(cache):
    shown = CliRunner().invoke(app, ["inspect", str(cache)])
    assert "warning:" in shown.output
    assert "in val and test are nearly the same" in shown.output
    summary = json.loads(CliRunner().invoke(app, ["inspect", str(cache), "--json"]).output)
    assert "metrics on them are too good" in summary["leakage"]


def test_summary_counts_by_splits():
    summary = duplicates_summary(planted(), near_duplicates(planted()))
    assert summary["by_splits"] == {
        "test - train": 1,
        "test - unlabeled": 1,
        "train - train": 2,
        "train - unlabeled": 1,
    }
    assert summary["groups"] == 5
