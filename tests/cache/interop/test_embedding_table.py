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
    with pytest.raises(InputError, match=r"no \.parquet table; leave out the column 'v'"):
        open_features(tmp_path / "features.npy", column="v")
