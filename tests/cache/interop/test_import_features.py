from __future__ import annotations

import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.cache.caches import write_named_cache
from tests.cache.samples import make_manifest
from ulfine_fast import FitConfig, fit
from ulfine_fast.cache.interop.export import export
from ulfine_fast.cache.interop.import_features import import_features, open_features
from ulfine_fast.cache.io.errors import CacheMismatch, InputError
from ulfine_fast.cache.pipeline.merge import merge
from ulfine_fast.cache.store import FeatureCache

D, K = 8, 3
NAMES = ["cat", "dog", "emu"]


def rows(n: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    """(n, D) of length 1."""
    raw = np.random.default_rng(seed).standard_normal((n, D))
    return (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(dtype)


TEXT = rows(K, seed=99)


def write_arrays(folder: Path, **changes) -> Path:
    """A folder of .npy files as another program may leave it; None leaves one out."""
    arrays = {
        "features": rows(10),
        "labels": np.array([0, 1, 2, 0, -1, -1, 1, 2, 0, 1]),
        "splits": np.array(["test", "train", "train", "train", "", "unlabeled", "val", "train", "test", ""]),
        "class_names": np.array(NAMES),
        "text_features": TEXT,
    }
    folder.mkdir()
    for name, array in (arrays | changes).items():
        if array is not None:
            np.save(folder / f"{name}.npy", array)
    return folder


def write_clip_retrieval(folder: Path, sizes: list[int], **columns) -> Path:
    """clip-retrieval's folders; a column is a function of the rows' numbers."""
    first = 0
    for number, n in enumerate(sizes):
        for name in ("img_emb", "metadata"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        np.save(folder / f"img_emb/img_emb_{number}.npy", rows(n, number, "float16"))
        numbers = range(first, first + n)
        table = {"image_path": [f"/data/{k}.jpg" for k in numbers], "caption": ["an image"] * n}
        table |= {name: column(numbers) for name, column in columns.items()}
        parquet.write_table(pa.table(table), folder / f"metadata/metadata_{number}.parquet")
        first += n
    return folder


def opened(folder: Path) -> FeatureCache:
    cache = FeatureCache.open(folder)
    assert cache.verify() == []
    return cache


def same(one: FeatureCache, other: FeatureCache, *, views: bool) -> None:
    assert (one.ids, one.class_names) == (other.ids, other.class_names)
    assert one.labels.tolist() == other.labels.tolist()
    assert one.splits.tolist() == other.splits.tolist()
    assert np.array_equal(one.plain, other.plain)
    assert np.array_equal(one.text_features, other.text_features)
    assert np.array_equal(one.prototypes, other.prototypes)
    assert one.logit_scale == other.logit_scale
    if views:
        for kind in ("weak", "strong"):
            assert np.array_equal(one.views(kind), other.views(kind))


# -- back from an export


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("to", ["clip-retrieval", "npy", "parquet"])
def test_an_exported_cache_comes_back_bit_by_bit(tmp_path, to, dtype):
    write_named_cache(tmp_path / "pets", NAMES, dtype=dtype, model={**make_manifest().model, "dim": 12})
    export(tmp_path / "pets", tmp_path / "out", to=to, rows_per_file=5)
    done = import_features(open_features(tmp_path / "out"), tmp_path / "back", shard_size=2)
    assert (done.images, done.classes, done.shards, done.normalised) == (12, 3, 7, 0)
    before, after = opened(tmp_path / "pets"), opened(tmp_path / "back")
    same(before, after, views=to == "npy")
    assert after.manifest is not None
    assert after.manifest.model == before.manifest.model
    assert after.manifest.preprocessing == before.manifest.preprocessing
    assert after.manifest.source["kind"] == "import"


def test_what_came_back_can_be_merged_with_another_part(tmp_path):
    write_named_cache(tmp_path / "pets", NAMES)
    write_named_cache(tmp_path / "zoo", ["emu", "yak"])
    export(tmp_path / "pets", tmp_path / "out", to="npy")
    import_features(open_features(tmp_path / "out"), tmp_path / "back")
    assert merge([tmp_path / "back", tmp_path / "zoo"], tmp_path / "all").classes == 4


# -- arrays of another program


def test_rows_are_sorted_by_split_and_keep_their_order_inside(tmp_path):
    import_features(open_features(write_arrays(tmp_path / "in")), tmp_path / "cache", shard_size=3)
    cache = opened(tmp_path / "cache")
    order = [1, 2, 3, 7, 9, 4, 5, 6, 0, 8]
    assert cache.ids == [f"{row:09d}" for row in order]
    assert np.array_equal(cache.plain, rows(10)[order])
    assert cache.labels.tolist() == [1, 2, 0, 2, 1, -1, -1, 1, 0, 0]
    assert cache.splits.tolist() == ["train"] * 5 + ["unlabeled"] * 2 + ["val"] + ["test"] * 2
    assert [record.rows for record in cache.records] == [3, 2, 2, 1, 2]
    assert (cache.class_names, cache.logit_scale) == (NAMES, 100.0)
    assert np.array_equal(cache.prototypes, TEXT / np.sqrt((TEXT**2).sum(1, keepdims=True) + 1e-12))


@pytest.mark.parametrize("every_row", [True, False])
def test_views_of_all_rows_or_of_those_that_are_trained_on(tmp_path, every_row):
    views = np.stack([rows(10, seed) for seed in (1, 2)], axis=1)  # (n, 2, D)
    viewed = [1, 2, 3, 4, 5, 7, 9]
    folder = write_arrays(tmp_path / "in", weak=views if every_row else views[viewed])
    import_features(open_features(folder), tmp_path / "cache", shard_size=2)
    cache = opened(tmp_path / "cache")
    assert np.array_equal(cache.views("weak"), views[[1, 2, 3, 7, 9, 4, 5]])
    assert cache.views("strong").shape == (7, 0, D)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_file(tmp_path, save):
    folder = write_arrays(tmp_path / "in", ids=np.array([f"image {k}" for k in range(10)]))
    save(tmp_path / "all.npz", **{path.stem: np.load(path) for path in folder.glob("*.npy")})
    features = open_features(tmp_path / "all.npz")
    assert isinstance(features.blocks[0].features, np.memmap) == (save is np.savez)
    import_features(features, tmp_path / "a")
    import_features(open_features(folder), tmp_path / "b")
    same(opened(tmp_path / "a"), opened(tmp_path / "b"), views=True)


def test_a_single_npy_file_is_unlabelled(tmp_path):
    np.save(tmp_path / "only.npy", np.asfortranarray(rows(4, dtype="float64")))
    features = open_features(tmp_path / "only.npy", class_names=NAMES)
    import_features(features, tmp_path / "cache", text_features=TEXT)
    cache = opened(tmp_path / "cache")
    assert (set(cache.splits), set(cache.labels.tolist())) == ({"unlabeled"}, {-1})
    assert np.allclose(cache.plain, rows(4, dtype="float64"), atol=1e-7)


def test_labels_may_be_texts_and_ids_numbers(tmp_path):
    labels = np.array(["dog", "cat", "", "dog"])
    folder = write_arrays(
        tmp_path / "in", features=rows(4), labels=labels, ids=np.array([7, 5, 3, 1]), splits=None, class_names=None,
        text_features=TEXT[:2],
    )  # fmt: skip
    import_features(open_features(folder), tmp_path / "cache")
    cache = opened(tmp_path / "cache")
    assert (cache.class_names, cache.labels.tolist(), cache.ids) == (
        ["cat", "dog"],
        [1, 0, 1, -1],
        ["7", "5", "1", "3"],
    )


def test_a_split_for_rows_that_have_none(tmp_path):
    folder = write_arrays(tmp_path / "in", splits=None)
    features = open_features(folder, split="test")
    import_features(features, tmp_path / "cache")
    assert set(opened(tmp_path / "cache").splits) == {"test"}
    with pytest.raises(InputError, match="split must be one of train, unlabeled, val, test, got 'dev'"):
        open_features(folder, split="dev")


def test_what_was_imported_can_be_fitted(tmp_path):
    labels = np.arange(60) % K
    features = TEXT[labels] + 0.1 * rows(60, seed=3)
    folder = write_arrays(tmp_path / "in", features=features, labels=labels, splits=np.repeat(["train", "test"], 30))
    import_features(open_features(folder), tmp_path / "cache")
    run = fit(FeatureCache.open(tmp_path / "cache"), FitConfig(method="zero_shot", n1=5, m1=5))
    assert run.metrics["balanced_accuracy"] == 1.0


# -- lengths


def test_other_lengths_become_1_and_are_counted(tmp_path):
    features = rows(10)
    features[2:5] *= 7
    done = import_features(open_features(write_arrays(tmp_path / "in", features=features)), tmp_path / "cache")
    cache = opened(tmp_path / "cache")
    assert done.normalised == 3
    assert np.allclose(np.linalg.norm(cache.plain, axis=1), 1, atol=1e-6)
    kept = [row for row, name in enumerate(cache.ids) if int(name) not in (2, 3, 4)]
    assert np.array_equal(cache.plain[kept], features[[int(cache.ids[row]) for row in kept]])


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 1e30])
@pytest.mark.parametrize("name", ["features", "weak"])
def test_rows_without_a_direction_are_named(tmp_path, name, value):
    array = rows(10) if name == "features" else rows(10)[:, None]
    array[3] = value
    features = open_features(write_arrays(tmp_path / "in", **{name: array}))
    with pytest.raises(InputError, match="features of '000000003' are not finite, or all zeros"):
        import_features(features, tmp_path / "cache")


# -- clip-retrieval's own output


def test_clip_retrieval_without_labels(tmp_path, tiny_encoder):
    features = open_features(write_clip_retrieval(tmp_path / "in", [3] * 11), class_names=["cat", "dog"])
    done = import_features(features, tmp_path / "cache", encoder=tiny_encoder, prompts=["a {}."], shard_size=8)
    cache = opened(tmp_path / "cache")
    # img_emb_10 comes last, not after img_emb_1
    assert cache.ids == [f"/data/{k}.jpg" for k in range(33)]
    assert np.array_equal(cache.plain, np.concatenate([rows(3, number, "float16") for number in range(11)]))
    assert (done.shards, set(cache.splits)) == (5, {"unlabeled"})
    wanted = tiny_encoder.encode_texts(["a cat.", "a dog."]).numpy()
    assert np.allclose(cache.text_features[:, 0], wanted, atol=1e-6)
    manifest = cache.manifest
    assert manifest is not None
    assert manifest.model["sha256"] == tiny_encoder.spec.sha256
    assert (manifest.preprocessing, manifest.dtype, manifest.prompts) == (
        tiny_encoder.preprocessing,
        "float16",
        ["a {}."],
    )


def test_labels_and_splits_from_metadata(tmp_path):
    folder = write_clip_retrieval(
        tmp_path / "in",
        [4, 3],
        kind=lambda numbers: [["dog", "cat", None][k % 3] for k in numbers],
        split=lambda numbers: ["test" if k == 6 else None for k in numbers],
        key=lambda numbers: [f"k{k}" for k in numbers],
    )
    features = open_features(folder, label_column="kind", id_column="key")
    import_features(features, tmp_path / "cache", text_features=TEXT[:2, None])
    cache = opened(tmp_path / "cache")
    assert cache.class_names == ["cat", "dog"]
    assert cache.ids == ["k0", "k1", "k3", "k4", "k2", "k5", "k6"]
    assert cache.labels.tolist() == [1, 0, 1, 0, -1, -1, 1]
    assert cache.splits.tolist() == ["train"] * 4 + ["unlabeled"] * 2 + ["test"]


def test_numbers_with_gaps_are_floats_in_metadata(tmp_path):
    folder = write_clip_retrieval(tmp_path / "in", [3], label=lambda numbers: [2.0, float("nan"), None])
    features = open_features(folder, class_names=NAMES)
    assert features.labels.tolist() == [2, -1, -1]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (lambda numbers: [2**60, 0], "has the label 2147483647"),
        (lambda numbers: [True, False], "column 'label' is bool, labels are whole numbers or texts"),
        (lambda numbers: [[1], [2]], "column 'label' is list"),
        (lambda numbers: pa.array(["cat", "cow"]).dictionary_encode(), "has the label 'cow'"),
    ],
)
def test_labels_of_other_kinds_in_metadata(tmp_path, column, message):
    folder = write_clip_retrieval(tmp_path / "in", [2], label=column)
    with pytest.raises(InputError, match=message):
        open_features(folder, class_names=NAMES)


def test_without_metadata_rows_are_numbered(tmp_path):
    folder = write_clip_retrieval(tmp_path / "in", [2, 2])
    for path in (folder / "metadata").iterdir():
        path.unlink()
    features = open_features(folder, class_names=NAMES)
    assert features.ids(np.arange(4)) == ["0/000000000", "0/000000001", "1/000000000", "1/000000001"]


# -- texts of the classes


def test_what_is_not_known_of_the_model_is_said(tmp_path):
    features = open_features(write_arrays(tmp_path / "in", text_features=None))
    import_features(
        features, tmp_path / "a", text_features=np.stack([TEXT, TEXT], 1), model="my-clip", logit_scale=50.0
    )
    manifest = opened(tmp_path / "a").manifest
    assert manifest is not None
    assert (manifest.model["name"], manifest.model["sha256"], manifest.model["logit_scale"]) == ("my-clip", "", 50.0)
    assert manifest.prompts == ["{} (text 1 of 2)", "{} (text 2 of 2)"]
    import_features(features, tmp_path / "b", text_features=TEXT)
    assert opened(tmp_path / "b").manifest.model["name"] == "unknown"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"give --model, which encodes their names, or --text-features FILE\.npy"),
        ({"text_features": TEXT[:2]}, r"must be \(K, P, D\) = \(3, P, 8\) or \(3, 8\), got \(2, 8\)"),
        ({"text_features": TEXT.astype(int)}, "text features must be floats"),
        ({"text_features": TEXT * np.array([[1], [np.nan], [1]])}, "text features of class 1 are not finite"),
        ({"text_features": TEXT, "prompts": ["{}", "a {}"]}, "1 text features a class and 2 prompts"),
        ({"text_features": TEXT, "dtype": "int8"}, "dtype must be one of float16, float32, got 'int8'"),
        ({"text_features": TEXT, "shard_size": 0}, "shard size must be at least 1, got 0"),
        ({"text_features": TEXT, "logit_scale": -1.0}, r"logit scale must be above 0, got -1\.0"),
    ],
)
def test_texts_and_values_that_do_not_fit(tmp_path, options, message):
    features = open_features(write_arrays(tmp_path / "in", text_features=None))
    with pytest.raises(InputError, match=message):
        import_features(features, tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


def test_a_model_of_another_length_is_refused(tmp_path, tiny_encoder):
    features = open_features(write_arrays(tmp_path / "in", features=np.ones((10, 5)), text_features=None))
    with pytest.raises(InputError, match=r"gives features of length 8, those of .* have 5"):
        import_features(features, tmp_path / "cache", encoder=tiny_encoder)


# -- files that cannot be imported


class Trap:
    def __reduce__(self):
        return os.abort, ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": rows(10)[0]}, r"floats \(n, D\) .*, got \(8,\) of float32"),
        ({"features": np.ones((10, 8), int)}, r"floats \(n, D\).*int64"),
        ({"features": np.ones((0, 8))}, r"above 0, got \(0, 8\)"),
        ({"features": None}, "has no features"),
        ({"labels": np.zeros(9, int)}, r"labels of .* must be 10 whole numbers or texts, got \(9,\)"),
        ({"labels": np.zeros(10)}, "must be 10 whole numbers or texts, got .* of float64"),
        ({"labels": np.zeros(10, bool)}, "whole numbers"),
        ({"labels": np.full(10, 3)}, r"has the label 3, labels are -1 or an index into the 3 class names"),
        ({"labels": np.full(10, -7)}, "has the label -2"),
        ({"labels": np.full(10, 2**40)}, "has the label 2147483647"),
        ({"labels": np.array(["cow"] * 10)}, "has the label 'cow', which is none of the 3 class names"),
        ({"splits": np.array(["dev"] * 10)}, "unknown split 'dev'"),
        ({"splits": np.zeros(10)}, "splits of .* must be 10 texts"),
        ({"ids": np.array(["a"] * 9)}, "ids of .* must be 10 texts or whole numbers"),
        ({"weak": rows(10)}, r"weak of .* must be floats \(m, V, D\) with the m = 7 rows"),
        ({"strong": rows(10)[:4, None]}, r"strong of .*, got \(4, 1, 8\)"),
        ({"class_names": None}, "names the classes; give --class-names FILE"),
        ({"class_names": np.array(["cat", "dog", "cat"])}, "must be different texts, got 'cat' 2 times"),
        ({"class_names": np.array(3)}, "class_names of .* must be 0 texts"),
        ({"label": np.zeros(10)}, "an array 'label' of unknown meaning; did you mean labels"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        open_features(write_arrays(tmp_path / "in", **changes))


@pytest.mark.parametrize("name", ["features", "labels", "ids"])
@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_objects_are_never_unpickled(tmp_path, name, kind):
    folder = write_arrays(tmp_path / "in", splits=None)
    trap = np.empty(10, object)
    trap[:] = [Trap() for _ in range(10)]
    np.save(folder / f"{name}.npy", trap)
    where = folder
    if kind == "npz":
        where = tmp_path / "in.npz"
        np.savez(where, **{name: trap})
    with pytest.raises(
        InputError, match=r"is not an .* of plain numbers or texts \(.*(allow_pickle=False|Python objects)"
    ):
        open_features(where)


@pytest.mark.parametrize("content", [b"", b"PK\3\4", pickle.dumps([1]), b"\x93NUMPY\1\0", b"hello"])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_other_files_are_named(tmp_path, content, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.np. is not an"):
        open_features(path)


def test_a_cut_array_is_named(tmp_path):
    folder = write_arrays(tmp_path / "in")
    (folder / "features.npy").write_bytes((folder / "features.npy").read_bytes()[:-20])
    with pytest.raises(InputError, match=r"features\.npy is not an array"):
        open_features(folder)


def test_ids_that_occur_twice(tmp_path):
    features = open_features(write_arrays(tmp_path / "in", ids=np.array(["a", "b"] * 5)))
    with pytest.raises(InputError, match="two rows have the id 'a'; give another --id-column"):
        import_features(features, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def break_metadata(folder: Path, what: str) -> None:
    second = folder / "metadata/metadata_1.parquet"
    table = parquet.read_table(second)
    if what == "short":
        parquet.write_table(table.slice(1), second)
    elif what == "gone":
        second.unlink()
    elif what == "cut":
        second.write_bytes(second.read_bytes()[:-9])
    elif what == "width":
        np.save(folder / "img_emb/img_emb_1.npy", np.ones((3, 5), np.float16))
    elif what == "kinds":
        parquet.write_table(table.set_column(2, "label", pa.array([0, 1, 0])), second)
    elif what == "empty":
        for path in (folder / "img_emb").iterdir():
            path.unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("short", r"metadata_1\.parquet has 2 rows, the features beside it 3"),
        ("gone", "number 1 is in only one of img_emb and metadata"),
        ("cut", r"metadata_1\.parquet is not a parquet file"),
        ("width", r"img_emb_1\.npy have length 5, those before it 8"),
        ("kinds", "labels are texts in some files and numbers in others"),
        ("empty", r"holds no file such as img_emb_0\.npy"),
    ],
)
def test_folders_that_do_not_fit_together(tmp_path, what, message):
    folder = write_clip_retrieval(tmp_path / "in", [3, 3], label=lambda numbers: ["cat"] * len(numbers))
    break_metadata(folder, what)
    with pytest.raises(InputError, match=message):
        open_features(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_column": "kind"}, "has no column 'kind'; it has image_path, caption, label"),
        ({"label_column": "caption", "id_column": "kind"}, "has no column kind to tell rows apart; give --id-column"),
        ({"label_column": "image_path"}, "has the label '/data/0.jpg', which is none of the 4"),
        ({"label_column": "label"}, r"column 'label' holds 0\.5, labels are whole numbers"),
    ],
)
def test_columns_that_cannot_be(tmp_path, options, message):
    folder = write_clip_retrieval(tmp_path / "in", [2], label=lambda numbers: [0.5, 1.0])
    with pytest.raises(InputError, match=message):
        open_features(folder, class_names=[*NAMES, "an image"], **options)


@pytest.mark.parametrize(
    ("name", "message"), [("nothing", "no such folder or file"), ("empty", "has neither img_emb nor features.npy")]
)
def test_nothing_there(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        open_features(tmp_path / name)


# -- stopped, continued, large


def test_a_stopped_import_goes_on_and_another_is_refused(tmp_path, monkeypatch):
    folder = write_arrays(tmp_path / "in")
    import_features(open_features(folder), tmp_path / "whole", shard_size=3)
    real = os.replace

    def stop(old, new):
        if Path(new).name == "00002.json":
            raise KeyboardInterrupt
        real(old, new)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt, match="2 of 5 shards are finished"):
        import_features(open_features(folder), tmp_path / "cache", shard_size=3)
    monkeypatch.undo()
    assert import_features(open_features(folder), tmp_path / "cache", shard_size=3).kept == 2
    same(opened(tmp_path / "cache"), opened(tmp_path / "whole"), views=True)
    np.save(folder / "features.npy", rows(10, seed=5))
    with pytest.raises(CacheMismatch, match=r"source\.fingerprint"):
        import_features(open_features(folder), tmp_path / "cache", shard_size=3)


def test_memory_is_that_of_one_shard(tmp_path):
    def peak(n: int) -> int:
        folder = tmp_path / str(n)
        folder.mkdir()
        features = np.ones((n, 512), np.float16) / 22.6
        np.save(folder / "features.npy", features.astype(np.float16))
        del features
        tracemalloc.start()
        features = open_features(folder, class_names=["cat"])
        import_features(
            features, tmp_path / f"cache{n}", text_features=np.eye(1, 512, dtype=np.float32), shard_size=500
        )
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    # what grows are 13 bytes a row of labels, splits and digests
    assert peak(4000) < 1.3 * peak(1000)
