from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from sklearn.decomposition import PCA

from tests.cache.caches import write_named_cache
from tests.cache.samples import make_manifest
from ulfine_fast.cache.interop.export import export
from ulfine_fast.cache.interop.import_features import import_features, open_features
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.store import FeatureCache

TEXT = np.eye(2, 4)


@pytest.fixture
def pets(tmp_path):
    write_named_cache(tmp_path / "pets", ["cat", "dog"])
    return FeatureCache.open(tmp_path / "pets")


def write(file, **columns):
    parquet.write_table(pa.table(columns), file)
    return file


def unit_rows(n):
    raw = np.random.default_rng(0).standard_normal((n, 4)).astype(np.float32)
    return raw / np.linalg.norm(raw, axis=1, keepdims=True)


def test_the_table_that_is_written(pets, tmp_path):
    export(pets.path, tmp_path / "out", to="parquet")
    table = parquet.read_table(tmp_path / "out/features.parquet")
    assert table.column_names == ["id", "image_uri", "label", "split", "vector", "x", "y"]
    assert table.schema.field("vector").type == pa.list_(pa.float16(), pets.dim)
    assert table.schema.metadata[b"model"].decode() == make_manifest().model["name"]
    assert table.schema.metadata[b"sha256"] == b"ab" * 32
    assert table["image_uri"][0].as_py() == f"/data/pets/{pets.ids[0]}"
    assert table["label"].to_pylist() == [None if k < 0 else pets.class_names[k] for k in pets.labels]
    vectors = np.array(table["vector"].to_pylist(), np.float16)
    assert np.array_equal(vectors.view(np.uint16), pets.plain.view(np.uint16))


def test_the_map_is_that_of_pca(pets, tmp_path):
    export(pets.path, tmp_path / "out", to="parquet")
    table = parquet.read_table(tmp_path / "out/features.parquet")
    unit = pets.plain.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    wanted = PCA(n_components=2, svd_solver="full").fit_transform(unit)
    made = np.stack([table["x"].to_numpy(), table["y"].to_numpy()], axis=1)
    np.testing.assert_allclose(np.abs(made), np.abs(wanted), atol=1e-5)


def test_an_id_that_is_no_path_has_no_uri(tmp_path):
    write_named_cache(tmp_path / "a", ["cat"], source={"kind": "torchvision", "path": "/data"})
    export(tmp_path / "a", tmp_path / "out", to="parquet")
    assert set(parquet.read_table(tmp_path / "out/features.parquet")["image_uri"].to_pylist()) == {None}


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 4)])
def test_any_column_of_lists_of_floats(tmp_path, kind):
    rows = unit_rows(3)
    file = write(
        tmp_path / "t.parquet",
        path=["a", "b", "c"],
        other=pa.array(rows[::-1].tolist(), kind),
        emb=pa.array(rows.tolist(), kind),
        cls=["dog", None, "cat"],
    )
    options = {"column": "emb", "label_column": "cls", "id_column": "path"}
    import_features(open_features(file, **options), tmp_path / "cache", text_features=TEXT)
    cache = FeatureCache.open(tmp_path / "cache")
    assert cache.verify() == []
    assert (cache.ids, cache.labels.tolist()) == (["a", "c", "b"], [1, 0, -1])
    assert np.array_equal(cache.plain, rows[[0, 2, 1]])
    with pytest.raises(InputError, match=r"has 2 columns that may be features; give --column \(.*other, emb\)"):
        open_features(file)


@pytest.mark.parametrize(
    ("vectors", "options", "message"),
    [
        ([[1.0, 0.0], [1.0]], {}, "row 2 of column 'v' has length 1, those before it 2"),
        ([[1.0, 0.0], None], {}, "row 2 of column 'v' is empty"),
        ([[1.0, 0.0], [1.0, None]], {}, "empty numbers inside its lists"),
        ([[1.0], [1.0]], {"column": "w"}, "no column 'w' of features; columns of lists of floats are v"),
        ([[1.0], [1.0]], {"id_column": "key"}, "no column 'key'; it has v, label"),
    ],
)
def test_what_cannot_be_features_is_refused(tmp_path, vectors, options, message):
    file = write(tmp_path / "t.parquet", v=vectors, label=["cat", "dog"])
    with pytest.raises(InputError, match=message):
        open_features(file, **options)


def test_a_file_that_is_no_table(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read as a parquet table"):
        open_features(tmp_path / "t.parquet")
    np.save(tmp_path / "features.npy", unit_rows(3))
    with pytest.raises(InputError, match=r"is no table; leave out the column 'v'"):
        open_features(tmp_path / "features.npy", column="v")


def unit_table(n=6):
    """Columns of a table with embeddings, every third row without a label."""
    return {
        "id": [f"img-{row}" for row in range(n)],
        "emb": unit_rows(n).tolist(),
        "label": [None if row % 3 == 2 else ("cat", "dog")[row % 2] for row in range(n)],
    }


def check(cache, n=6):
    assert cache.verify() == []
    columns = unit_table(n)
    rows = {name: row for row, name in enumerate(columns["id"])}
    order = [rows[name] for name in cache.ids]
    assert sorted(order) == list(range(n))
    np.testing.assert_allclose(cache.plain, np.array(columns["emb"])[order], atol=1e-6)
    names = [None if k < 0 else cache.class_names[k] for k in cache.labels]
    assert names == [columns["label"][row] for row in order]


def polars_frame(columns):
    """What Polars gives Arrow, without Polars: its C stream, with large lists and texts."""

    class Frame:
        def __arrow_c_stream__(self, requested_schema=None):
            types = {"id": pa.large_string(), "emb": pa.large_list(pa.float32()), "label": pa.large_string()}
            return pa.table(columns, schema=pa.schema(types)).__arrow_c_stream__(requested_schema)

    return Frame()


def pandas_frame(columns):
    import pandas as pd

    return pd.DataFrame({**columns, "emb": [np.array(row, np.float32) for row in columns["emb"]]})


@pytest.mark.parametrize("made_by", [pa.table, pandas_frame, polars_frame], ids=["arrow", "pandas", "polars"])
def test_a_data_frame(tmp_path, made_by):
    frame = made_by(unit_table())
    import_features(open_features(frame), tmp_path / "cache", text_features=TEXT)
    check(FeatureCache.open(tmp_path / "cache"))
    assert FeatureCache.open(tmp_path / "cache").manifest.source["path"] == "the data frame"
    # interrupted, the same frame goes on; another one is another cache
    import_features(open_features(frame), tmp_path / "cache", text_features=TEXT)
    other = made_by({**unit_table(), "label": ["cat"] * 5 + ["dog"]})
    with pytest.raises(InputError, match="holds another cache"):
        import_features(open_features(other), tmp_path / "cache", text_features=TEXT)


def test_a_data_frame_that_has_no_features():
    with pytest.raises(InputError, match="the data frame has 0 columns that may be features"):
        open_features(pa.table({"id": ["a"]}))
    with pytest.raises(InputError, match="expected a path or a data frame"):
        open_features(7)


def test_a_folder_of_parquet_files(tmp_path):
    table = pa.table(unit_table())
    for number, part in enumerate((table[:2], table[2:])):
        parquet.write_table(part, tmp_path / f"part-{number}.parquet")
    import_features(open_features(tmp_path), tmp_path / "cache", text_features=TEXT)
    check(FeatureCache.open(tmp_path / "cache"))


def test_a_saved_data_set_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (extra datasets)")
    columns = unit_table()
    made = datasets.Dataset.from_dict(columns)
    made.save_to_disk(tmp_path / "one", num_shards=2)
    import_features(open_features(tmp_path / "one"), tmp_path / "cache", text_features=TEXT)
    check(FeatureCache.open(tmp_path / "cache"))

    # splits by name, classes by ClassLabel, and rows that were chosen
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "emb": datasets.Sequence(datasets.Value("float32"), length=4),
            "label": datasets.ClassLabel(names=["dog", "cat"]),
        }
    )
    numbered = {**columns, "label": [-1 if name is None else ["dog", "cat"].index(name) for name in columns["label"]]}
    typed = datasets.Dataset.from_dict(numbered, features=features)
    parts = {"train": typed.select([5, 0, 1]), "validation": typed.select([3]), "test": typed.select([4])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "dict")
    import_features(open_features(tmp_path / "dict"), tmp_path / "cache-2", text_features=TEXT)
    cache = FeatureCache.open(tmp_path / "cache-2")
    assert cache.class_names == ["dog", "cat"]
    assert dict(zip(cache.ids, cache.splits.tolist(), strict=True)) == {
        **dict.fromkeys(["img-5", "img-0", "img-1"], "train"),
        "img-3": "val",
        "img-4": "test",
    }
    assert dict(zip(cache.ids, cache.labels.tolist(), strict=True))["img-0"] == 1

    datasets.DatasetDict({"extra": typed}).save_to_disk(tmp_path / "extra")
    with pytest.raises(InputError, match="has the split 'extra'"):
        open_features(tmp_path / "extra")


def test_lance_without_the_package_names_the_extra(pets, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lance", None)
    with pytest.raises(InputError, match=r"ulfine-fast\[lance\]"):
        export(pets.path, tmp_path / "out", to="lance")
    assert not (tmp_path / "out").exists()


def test_lance_there_and_back(pets, tmp_path):
    lance = pytest.importorskip("lance", reason="Lance is not installed (extra lance)")
    export(pets.path, tmp_path / "out", to="lance")
    data = lance.dataset(str(tmp_path / "out/features.lance"))
    assert data.schema.names == ["id", "image_uri", "label", "split", "vector", "x", "y"]
    assert data.schema.field("vector").type == pa.list_(pa.float16(), pets.dim)
    import_features(open_features(tmp_path / "out"), tmp_path / "back")
    back = FeatureCache.open(tmp_path / "back")
    assert (back.ids, back.labels.tolist(), back.splits.tolist()) == (
        pets.ids,
        pets.labels.tolist(),
        pets.splits.tolist(),
    )
    assert np.array_equal(back.plain.view(np.uint16), pets.plain.view(np.uint16))
    # the data set alone, and written again over what an interrupted export left
    alone = open_features(tmp_path / "out/features.lance")
    assert (alone.class_names, alone.dim) == (pets.class_names, pets.dim)
    export(pets.path, tmp_path / "out", to="lance")
    assert len(open_features(tmp_path / "out").labels) == len(pets)
