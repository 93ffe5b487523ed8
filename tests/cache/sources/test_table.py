from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.sources import open_source, reopen_source
from ulfine_fast.cache.sources.table import ImageTable, TableSource


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "p").mkdir()
    for number, name in enumerate("abcdef"):
        Image.new("RGB", (3 + number, 3)).save(tmp_path / f"p/{name}.png")
    return tmp_path


def write(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    (folder / "table.csv").write_text(text, encoding=encoding)
    return folder / "table.csv"


def table(source: TableSource) -> list[tuple[str, int, str]]:
    return [(row.id, row.label, row.split) for row in source.rows]


def test_csv_with_all_columns(images: Path):
    where = write(
        images,
        "split,path,other,label\n"
        "test,p/a.png,x,dog\n"
        "train,p/b.png,x,cat\n"
        ",p/d.png,x,dog\n"
        ",p/c.png,x,\n"
        "unlabeled,p/e.png,x,dog\n"
        "val,p/f.png,x,\n",
    )
    source = TableSource(where)
    assert source.class_names == ["cat", "dog"]
    assert table(source) == [
        ("p/b.png", 0, "train"),
        ("p/d.png", 1, "train"),
        ("p/c.png", -1, "unlabeled"),
        ("p/e.png", 1, "unlabeled"),  # kept to score pseudo-labels
        ("p/f.png", -1, "val"),
        ("p/a.png", 1, "test"),
    ]
    assert source.read(source.rows[0]).size == (4, 3)
    assert source.rows[0].bytes == (images / "p/b.png").stat().st_size


def test_without_a_split_column(images: Path):
    source = TableSource(write(images, "path,label\np/a.png,x\np/b.png,\n"))
    assert table(source) == [("p/a.png", 0, "train"), ("p/b.png", -1, "unlabeled")]


def test_absolute_paths_quotes_blanks_and_byte_order_mark(images: Path):
    (images / "p/a, b.png").write_bytes((images / "p/a.png").read_bytes())
    where = write(images, f'path,label\n{images}/p/a.png , x\n"p/a, b.png",x\n', encoding="utf-8-sig")
    source = TableSource(where)
    assert [row.id for row in source.rows] == [f"{images}/p/a.png", "p/a, b.png"]
    assert all(source.read(row).size == (3, 3) for row in source.rows)


def test_whole_numbers_are_in_numeric_order(images: Path):
    source = TableSource(write(images, "path,label\np/a.png,10\np/b.png,9\np/c.png,10\n"))
    assert source.class_names == ["9", "10"]
    assert [row.label for row in source.rows] == [1, 0, 1]


def test_numbers_are_places_in_a_list_of_names(images: Path):
    names = images / "names.txt"
    names.write_text("zero\none\ntwo\n")
    source = TableSource(write(images, "path,label\np/a.png,2\np/b.png,0\n"), class_names_file=names)
    assert source.class_names == ["zero", "one", "two"]
    assert [row.label for row in source.rows] == [2, 0]


def test_too_short_a_list_of_names(images: Path):
    names = images / "names.txt"
    names.write_text("zero\n")
    with pytest.raises(InputError, match=r"has 1 names, the source has 2 classes: 0, 7"):
        TableSource(write(images, "path,label\np/a.png,7\np/b.png,0\n"), class_names_file=names)


def test_names_by_folder_column(images: Path):
    names = images / "names.csv"
    names.write_text("folder,name\n7,seven things\n")
    source = TableSource(write(images, "path,label\np/a.png,7\np/b.png,0\n"), class_names_file=names)
    assert source.class_names == ["0", "seven things"]


@pytest.mark.parametrize("form", ["csv", "tsv", "parquet"])
def test_whole_numbers_with_a_missing_one(images: Path, form: str):
    """pandas writes 0.0, 1.0, ... where a label is missing."""
    (images / "names.txt").write_text("".join(f"class{k}\n" for k in range(11)))
    labels = [10.0, 2.0, None, 0.0, 9.0]
    paths = [f"p/{name}.png" for name in "abcde"]
    if form == "parquet":
        parquet.write_table(pa.table({"path": paths, "label": labels}), images / "t.parquet")
    else:
        mark = {"csv": ",", "tsv": "\t"}[form]
        lines = [f"{path}{mark}{'' if label is None else label}" for path, label in zip(paths, labels, strict=True)]
        (images / f"t.{form}").write_text("\n".join([f"path{mark}label", *lines, "", ""]))
    source = open_source(images / f"t.{form}", class_names_file=images / "names.txt")
    assert source.class_names == [f"class{k}" for k in range(11)]
    assert {row.id[2]: row.label for row in source.rows} == {"a": 10, "b": 2, "c": -1, "d": 0, "e": 9}
    alone = open_source(images / f"t.{form}")
    assert alone.class_names == ["0", "2", "9", "10"]
    assert {row.id[2]: row.label for row in alone.rows} == {"a": 3, "b": 1, "c": -1, "d": 0, "e": 2}


def test_padded_numbers_are_indices_of_names_and_texts_alone(images: Path):
    (images / "names.txt").write_text("x\ny\nz\n")
    where = write(images, "path,label\np/a.png,000\np/b.png,002\np/c.png,010\n")
    assert TableSource(where).class_names == ["000", "002", "010"]
    where = write(images, "path,label\np/a.png,000\np/b.png,002\np/c.png,001\n")
    source = TableSource(where, class_names_file=images / "names.txt")
    assert (source.class_names, [row.label for row in source.rows]) == (["x", "y", "z"], [0, 2, 1])
    where = write(images, "path,label\np/a.png,1\np/b.png,01\n")
    for names in (None, images / "names.txt"):
        with pytest.raises(InputError, match="writes one label in several ways, 01 and 1; use one of them"):
            TableSource(where, class_names_file=names)


@pytest.mark.parametrize("unknown", ["-1", "-1.0", " -1", ""])
def test_minus_one_is_unknown(images: Path, unknown: str):
    (images / "names.txt").write_text("x\ny\n")
    where = write(images, f"path,label\np/a.png,0\np/b.png,{unknown}\np/c.png,1\n")
    for names, wanted in ((None, ["0", "1"]), (images / "names.txt", ["x", "y"])):
        source = TableSource(where, class_names_file=names)
        assert source.class_names == wanted
        assert table(source) == [("p/a.png", 0, "train"), ("p/c.png", 1, "train"), ("p/b.png", -1, "unlabeled")]
    texts = TableSource(write(images, f"path,label\np/a.png,cat\np/b.png,{unknown}\n"))
    assert (texts.class_names, [row.label for row in texts.rows]) == (["cat"], [0, -1])


def test_blanks_around_the_names_of_columns(images: Path):
    where = write(images, "\ufeffpath,label , split\np/a.png,x,test\np/b.png,x,train\n\n,,\n")
    assert table(TableSource(where)) == [("p/b.png", 0, "train"), ("p/a.png", 0, "test")]


@pytest.mark.parametrize(("header", "wrong"), [("path,label,Split", "Split"), ("path,lable,split", "lable")])
def test_columns_that_only_look_right_are_named(images: Path, header: str, wrong: str):
    where = write(images, f"{header}\np/a.png,x,test\n")
    with pytest.raises(InputError, match=f"has a column '{wrong}', which looks like"):
        TableSource(where)
    assert [row.id for row in ImageTable(where).rows] == ["p/a.png"]


def test_a_tsv_of_images_to_predict(images: Path):
    (images / "t.tsv").write_text("note\tpath\nx\tp/a.png\n\n")
    assert [row.id for row in ImageTable(images / "t.tsv").rows] == ["p/a.png"]


def test_parquet_gives_the_same_as_csv(images: Path):
    paths, labels = ["p/a.png", "p/b.png", "p/c.png"], ["y", None, "x"]
    parquet.write_table(pa.table({"label": labels, "path": paths, "z": [1, 2, 3]}), images / "t.parquet")
    from_parquet = TableSource(images / "t.parquet")
    from_csv = TableSource(write(images, "path,label\np/a.png,y\np/b.png,\np/c.png,x\n"))
    assert (from_parquet.rows, from_parquet.class_names) == (from_csv.rows, from_csv.class_names)


def test_parquet_numbers_with_gaps(images: Path):
    # What a data frame makes of whole numbers with a missing one.
    labels = pa.array([3.0, float("nan"), 1.0, None])
    paths = pa.array([f"p/{name}.png" for name in "abcd"]).dictionary_encode()
    parquet.write_table(pa.table({"path": paths, "label": labels}), images / "t.parquet")
    source = TableSource(images / "t.parquet")
    assert source.class_names == ["1", "3"]
    assert [(row.id, row.label) for row in source.rows] == [
        ("p/a.png", 1),
        ("p/c.png", 0),
        ("p/b.png", -1),
        ("p/d.png", -1),
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "must have the column path .* got none"),
        (
            "file,class\np/a.png,x\n",
            r"must have the column path \(and label, split where there are any\), got file, class",
        ),
        ("path;label\np/a.png;x\n", "got path;label"),
        ("path,label\n", "has no rows"),
        ("path,label\n,x\n", r"line 2 of .*table\.csv: the path is empty"),
        ("path,label\np/a.png,\n", "has no label in any row"),
        ("path\np/a.png\n", "has no label in any row"),
        ("path,label,split\np/a.png,x,Train\n", "line 2 of .*: unknown split 'Train'; use train, unlabeled, val, test"),
        ("path,label,split\np/a.png,x,\np/b.png,,train\n", "line 3 of .*: a training row without a label"),
        ("path,label\np/a.png,x\np/b.png,x\np/a.png,y\n", r"lists p/a.png 2 times"),
        ("path,label\np/a.png,-2\np/b.png,0\n", "has the label -2; use numbers from 0, and -1 for unknown"),
        ("path,label\np/a, b.png,x\n", r"line 2 of .* has 3 cells instead of 2"),
        ("path,label\np/a.png,-1\n", "has no label in any row"),
        ("path,label\np/a.png,x\np/gone.png,x\nq.png,x\n", r"line 3 of .*: p/gone.png is not there \(2 of 3 paths"),
        ("path,label\np,x\n", r"line 2 of .*: p is not there"),
        (f"path,label\n{'x' * 5000}.png,x\n", "is not there"),
        ("path,label\np/\0a.png,x\n", r"is not"),
    ],
)
def test_bad_tables_end_with_one_sentence(text: str, sentence: str, images: Path):
    with pytest.raises(InputError, match=sentence) as caught:
        TableSource(write(images, text))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_tables(images: Path):
    with pytest.raises(InputError, match="no such table"):
        TableSource(images / "gone.csv")
    with pytest.raises(InputError, match=r"line 2 of .*table\.csv is not UTF-8 text"):
        TableSource(write(images, "path,label\np/ä.png,x\n", encoding="latin-1"))
    (images / "t.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(InputError, match="is not a parquet file") as caught:
        TableSource(images / "t.parquet")
    assert "\n" not in str(caught.value)
    parquet.write_table(pa.table({"file": ["a"]}), images / "t.parquet")
    with pytest.raises(InputError, match=r"must have the column path .* got file"):
        TableSource(images / "t.parquet")


def test_opened_by_name_and_reopened(images: Path):
    where = write(images, "path,label\np/a.png,x\n")
    source = open_source(str(where))
    assert source.describe() == {"kind": "table", "path": str(where)}
    assert reopen_source(source.describe()).rows == source.rows
    where.unlink()
    with pytest.raises(InputError, match="no such table"):
        reopen_source(source.describe())


# -- without labels


def test_images_to_predict_need_no_labels(images: Path):
    where = write(images, "path,note\np/b.png,x\np/a.png,\n")
    source = ImageTable(where)
    assert table(source) == [("p/a.png", -1, "test"), ("p/b.png", -1, "test")]
    assert source.class_names == []
    assert source.read(source.rows[1]).size == (4, 3)
    assert source.describe()["kind"] == "pictures"


@pytest.mark.parametrize("text", ["name\na", "path\n", "path\np/a.png\np/a.png", "path\np/gone.png"])
def test_a_table_of_images_that_cannot_be_read_is_named(images: Path, text: str):
    with pytest.raises(InputError, match=r"table|list"):
        ImageTable(write(images, text))


def test_a_data_frame_of_images(images: Path, monkeypatch):
    pandas = pytest.importorskip("pandas")
    monkeypatch.chdir(images)
    frame = pandas.DataFrame({"path": ["p/b.png", "p/a.png"], "other": [1, 2]})
    assert [row.id for row in ImageTable(frame).rows] == ["p/a.png", "p/b.png"]
    with pytest.raises(InputError, match="path"):
        ImageTable(pandas.DataFrame({"file": ["p/a.png"]}))
    with pytest.raises(InputError, match="data frame"):
        ImageTable(3)
