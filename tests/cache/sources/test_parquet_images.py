from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from tests.cache.samples import png
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.sources import TableSource, open_source, reopen_source
from ulfine_fast.cache.sources.image import UnreadableImage
from ulfine_fast.cache.sources.parquet_images import ParquetSource
from ulfine_fast.cache.store import FeatureCache


def write(path: Path, count: int = 5, *, pair: bool = False, group: int = 2, first: int = 0, **columns) -> Path:
    """`count` images in row groups of `group`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [png(number) for number in range(first, first + count)]
    image = [{"bytes": one, "path": None} for one in images] if pair else images
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if pair else pa.binary()
    table = pa.table({"image": pa.array(image, kind), **columns})
    parquet.write_table(table, path, row_group_size=group)
    return path


def rows_of(source, shard_size=4):
    return [row for part in source.plan(shard_size) for row in source.open(part)]


@pytest.mark.parametrize("pair", [False, True])
def test_images_and_labels_are_those_that_went_in(tmp_path, pair):
    path = write(tmp_path / "test.parquet", pair=pair, label=["dog", "cat", "dog", None, "cat"])
    source = pickle.loads(pickle.dumps(open_source(path)))
    assert isinstance(source, ParquetSource)
    assert source.class_names == ["cat", "dog"]
    rows = rows_of(source)
    assert [row.id for row in rows] == [f"test/{number:08d}" for number in range(5)]
    assert [row.label for row in rows] == [1, 0, 1, -1, 0]
    assert {row.split for row in rows} == {"test"}
    for number, row in enumerate(rows):
        wanted = np.asarray(Image.open(io.BytesIO(png(number))))
        assert np.array_equal(np.asarray(source.read(row)), wanted)


def test_row_groups_are_joined_up_to_the_shard_size(tmp_path):
    source = ParquetSource(str(write(tmp_path / "train.parquet", 9, label=[0] * 9)))
    assert [part.name for part in source.plan(4)] == ["train.parquet#0-1", "train.parquet#2-3", "train.parquet#4-4"]
    assert [part.name for part in source.plan(1)] == [f"train.parquet#{group}-{group}" for group in range(5)]
    assert [row.id for row in rows_of(source, 1)] == [row.id for row in rows_of(source, 100)]


def test_a_column_says_the_split(tmp_path):
    splits = ["test", "train", None, "validation", "train"]
    source = ParquetSource(str(write(tmp_path / "all.parquet", label=[0, 1, 1, 0, 0], split=splits)))
    parts = source.plan(100)
    assert [part.split for part in parts] == ["train", "val", "test"]
    assert [[row.id[-1] for row in source.open(part)] for part in parts] == [["1", "2", "4"], ["3"], ["0"]]
    path = write(tmp_path / "bad.parquet", label=[0] * 5, split=["trainn"] * 5)
    with pytest.raises(InputError, match=r"unknown split 'trainn'"):
        ParquetSource(str(path)).plan(4)


def test_a_folder_of_files(tmp_path):
    write(tmp_path / "d/train-00000.parquet", label=[0] * 5)
    write(tmp_path / "d/train-00001.parquet", label=[3] * 5)
    write(tmp_path / "d/validation-00000.parquet", label=[1] * 5)
    source = open_source(tmp_path / "d")
    assert source.class_names == ["0", "1", "2", "3"]
    assert [part.split for part in source.plan(100)] == ["train", "train", "val"]
    assert len({row.id for row in rows_of(source)}) == 15


def test_class_names_from_the_file_or_from_what_the_writer_says(tmp_path):
    path = write(tmp_path / "train.parquet", label=[0, 1, 1, 0, -1])
    table = parquet.read_table(path)
    metadata = {"info": {"features": {"label": {"names": ["ant", "bee"], "_type": "ClassLabel"}}}}
    parquet.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps(metadata)}), tmp_path / "metadata.parquet"
    )
    assert ParquetSource(str(tmp_path / "metadata.parquet")).class_names == ["ant", "bee"]
    (tmp_path / "names.txt").write_text("cow\ndoe\nelk\n")
    source = ParquetSource(str(path), class_names_file=tmp_path / "names.txt")
    assert source.class_names == ["cow", "doe", "elk"]
    assert [row.label for row in rows_of(source)] == [0, 1, 1, 0, -1]


def test_ids_from_a_column(tmp_path):
    source = ParquetSource(str(write(tmp_path / "train.parquet", 3, label=[0] * 3, id=["a", "b/c", "../d"])))
    rows = rows_of(source)
    assert [row.id for row in rows] == ["train/a", "train/b/c", "train/row-00000002"]
    with pytest.raises(UnreadableImage, match="its id leads elsewhere"):
        source.read(rows[2])


def test_from_a_url(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe("/set/train.parquet", write(tmp_path / "x.parquet", label=[0] * 5).read_bytes())
    source = open_source("memory://set/train.parquet")
    rows = rows_of(source)
    assert source.read(rows[4]).size == (24, 20)
    memory.rm("/set", recursive=True)


def test_through_the_pipeline_and_open_again(tmp_path, tiny_encoder):
    path = write(tmp_path / "train.parquet", 7, label=["cat", "dog"] * 3 + ["cat"])
    source = open_source(path)
    settings = {"batch_size": 2, "shard_size": 4, "prompts": ["{}"]}
    extract(source, tiny_encoder, tmp_path / "a", **settings, workers=0)
    extract(source, tiny_encoder, tmp_path / "b", **settings, workers=2)
    one, two = (FeatureCache.open(tmp_path / name) for name in "ab")
    assert len(one) == 7
    assert [record.rows for record in one.records] == [4, 3]
    assert np.array_equal(one.plain, two.plain)
    assert [row.id for row in rows_of(reopen_source(one.manifest.source))] == one.ids


# -- bad input


def test_a_table_of_paths_is_still_a_table(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    parquet.write_table(pa.table({"path": ["a.png"], "label": ["x"]}), tmp_path / "t.parquet")
    assert isinstance(open_source(tmp_path / "t.parquet"), TableSource)


def test_a_wrong_column_is_named_with_those_that_are_there(tmp_path):
    parquet.write_table(pa.table({"jpeg": ["a.png"], "label": ["x"]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"no column of encoded images .* found jpeg, label"):
        ParquetSource(str(tmp_path / "t.parquet"))
    with pytest.raises(InputError, match=r"must have the column path .* got jpeg, label"):
        open_source(tmp_path / "t.parquet")


def test_what_is_no_parquet_file(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(InputError, match="is not a parquet file"):
        ParquetSource(str(tmp_path / "t.parquet"))


def test_labels_that_name_no_class(tmp_path):
    path = write(tmp_path / "train.parquet", 2, label=["cat", "emu"])
    (tmp_path / "names.txt").write_text("cat\n")
    with pytest.raises(InputError, match="label 'emu' is no class"):
        rows_of(ParquetSource(str(path), class_names_file=tmp_path / "names.txt"))
    empty = write(tmp_path / "empty.parquet", 2, label=pa.array([None, None], pa.string()))
    with pytest.raises(InputError, match="no label in any row"):
        ParquetSource(str(empty))
    with pytest.raises(InputError, match="--class-names FILE"):
        ParquetSource(str(write(tmp_path / "none.parquet", 2)))


def test_an_empty_cell_is_a_image_that_cannot_be_read(tmp_path):
    table = pa.table({"image": pa.array([png(0), None, b"no image"], pa.binary()), "label": [0, 0, 0]})
    parquet.write_table(table, tmp_path / "train.parquet")
    source = ParquetSource(str(tmp_path / "train.parquet"))
    rows = rows_of(source)
    assert source.read(rows[0]).size == (24, 20)
    for row, reason in zip(rows[1:], ["empty", "not an image"], strict=True):
        with pytest.raises(UnreadableImage, match=reason):
            source.read(row)


def test_numbers_too_large_for_classes_are_named(tmp_path):
    with pytest.raises(InputError, match="123456789"):
        ParquetSource(str(write(tmp_path / "train.parquet", 2, label=[3, 123456789])))
