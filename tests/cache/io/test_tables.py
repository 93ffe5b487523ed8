from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.tables import (
    Table,
    cell_text,
    find_column,
    label_text,
    read_frame,
    read_table,
    whole_number,
)


def write(folder: Path, text: str, name: str = "t.csv") -> Path:
    (folder / name).write_bytes(text.encode())
    return folder / name


def rows(table: Table) -> list[tuple]:
    return list(zip(*(table.cells(name) for name in table.names), strict=True))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "id,label\na,x\nb,\n"),
        ("T.CSV", "id,label\r\na,x\r\nb,\r\n"),
        ("t.csv", "\ufeffid , label\na,x\nb,\n\n"),
        ("t.csv", '\n"id","label"\n\na,x\n  \nb,""\n,\n'),
        ("t.csv", "label,id\nx,a\n,b"),
        ("t.csv", "id,label,\na,x,\nb,,\n"),
        ("t.csv", "id,label\na,x,\nb,,,\n"),
        ("t.tsv", "id\tlabel\na\tx\nb\t\n"),
        ("t.tsv", "\ufeff id\tlabel \na\tx\nb\t\n\t\n"),
        ("labels.txt", "id,label\na,x\nb,\n"),
        ("t.csv", "id,label\ra,x\rb,\r"),
    ],
)
def test_one_table_in_many_spellings(tmp_path, name, text):
    table = read_table(write(tmp_path, text, name), ["id", "label"])
    assert (table.texts("id"), table.texts("label"), len(table)) == (["a", "b"], ["x", ""], 2)


def test_positions_are_lines_of_the_file(tmp_path):
    path = write(tmp_path, 'id,label\n\na,x\n"b\nc",y\nd,z\n')
    table = read_table(path, ["id"])
    # a cell over two lines is named by its last
    assert [table.where(row) for row in range(3)] == [f"line {number} of {path}" for number in (3, 5, 6)]
    parquet.write_table(pa.table({"id": [1, 2]}), tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet", ["id"]).where(1) == f"row 2 of {tmp_path / 't.parquet'}"


def test_cells_are_values_in_parquet_and_texts_elsewhere(tmp_path):
    columns = {"id": [7, 8], " x ": [1.0, None], "v": [[0.5, 1.5], [2.0, 3.0]], "big": [b"a", b"b"]}
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    table = read_table(tmp_path / "t.parquet", ["id", "x"], ["v", "absent"])
    assert table.names == ["id", "x", "v"]
    assert rows(table) == [(7, 1.0, [0.5, 1.5]), (8, None, [2.0, 3.0])]
    assert (table.texts("id"), table.texts("x"), table.texts("absent")) == (["7", "8"], ["1", ""], ["", ""])
    assert rows(read_table(write(tmp_path, "id,x\n7, 1\n"), ["id", "x"])) == [("7", " 1")]
    assert read_table(tmp_path / "t.parquet", ["id"], others="keep").names == ["id", "x", "v", "big"]


def test_blanks_around_ids_stay_on_request(tmp_path):
    table = read_table(write(tmp_path, "id\n a \n"), ["id"])
    assert (table.texts("id"), table.texts("id", strip=False)) == (["a"], [" a "])


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        (["0.0", "1.0", "", "10.0"], ["0", "1", "", "10"]),
        (["0", "1.", "2.00", " 3 "], ["0", "1", "2", "3"]),
        (["-1", "-1.0", "1", ""], ["", "", "1", ""]),
        (["000", "001", "-1"], ["000", "001", ""]),
        (["cat", "-1", "", " dog "], ["cat", "", "", "dog"]),
        (["1.0", "1.5"], ["1.0", "1.5"]),  # versions of something: not all are whole numbers
        (["1.0", "cat"], ["1.0", "cat"]),
        (["1e3", "-", "½"], ["1e3", "-", "½"]),
    ],
)
def test_labels_of_a_column(tmp_path, cells, labels):
    lines = "".join(f"{row},{cell}\n" for row, cell in enumerate(cells))
    assert read_table(write(tmp_path, "id,label\n" + lines), ["label"]).labels("label") == labels


def test_labels_of_a_parquet_column_are_those_of_a_csv(tmp_path):
    for values, labels in (([0.0, None, 2.0, -1.0], ["0", "", "2", ""]), ([0, 2, -1, None], ["0", "2", "", ""])):
        parquet.write_table(pa.table({"label": pa.array(values)}), tmp_path / "t.parquet")
        assert read_table(tmp_path / "t.parquet", ["label"]).labels("label") == labels


def test_single_texts():
    assert [cell_text(value) for value in (None, float("nan"), 3.0, 2.5, 7, "x ", b"\xc3\xa4")] == [
        "",
        "",
        "3",
        "2.5",
        "7",
        "x ",
        "ä",
    ]
    assert [whole_number(text) for text in ("3", " 3.0", "003", "-1.", "3.5", "", "x", "٣")] == [
        3,
        3,
        3,
        -1,
        None,
        None,
        None,
        None,
    ]
    assert [label_text(text) for text in ("1.0", "-1", " cat ", "01")] == ["1", "", "cat", "1"]


# -- what is refused


@pytest.mark.parametrize("column", ["Label", "LABEL", "lable", "labels", " Labels ", "labell"])
def test_a_column_that_looks_like_a_known_one_is_named(tmp_path, column):
    for path in (write(tmp_path, f"id,{column}\na,x\n"), tmp_path / "t.parquet"):
        if path.suffix == ".parquet":
            parquet.write_table(pa.table({"id": ["a"], column: ["x"]}), path)
        with pytest.raises(InputError, match=f"has a column '{column.strip()}', which looks like label but is not"):
            read_table(path, ["id"], ["label"])


def test_only_a_known_column_that_is_missing_is_looked_for(tmp_path):
    path = write(tmp_path, "id,label,Label,labels,note,name\na,x,1,2,3,4\n")
    assert read_table(path, ["id"], ["label"]).names == ["id", "label"]
    assert read_table(write(tmp_path, "id,table,ids\na,x,y\n"), ["id"], ["label"]).names == ["id"]
    assert find_column("t", ["cls", "label"], ["label", "cls"]) == "label"
    assert find_column("t", ["note"], ["label", "cls"]) is None


@pytest.mark.parametrize(
    ("text", "others", "sentence"),
    [
        ("", "ignore", r"t\.csv must have the columns id and label \(and split where there are any\), got none"),
        ("\n\n", "ignore", "got none"),
        ("a,b\n1,2\n", "ignore", "got a, b"),
        ("id,label,split,note\n", "refuse", "got id, label, split, note"),
        ("id,label,id\na,x,b\n", "ignore", "has 2 columns named id; keep one"),
        ("id,label\na,x\n\nb\n", "ignore", r"line 4 of .*t\.csv has 1 cells instead of 2; fix or remove it"),
        ("id,label\na,x,y\n", "ignore", r"line 2 of .*t\.csv has 3 cells instead of 2"),
        ('id,label\na,x\n"b,y\nc,z\n', "ignore", r"line 4 of .*t\.csv cannot be read: unexpected end of data"),
        ('id,label\n"a"b,x\n', "ignore", r"line 2 of .*t\.csv cannot be read"),
    ],
)
def test_a_wrong_table_is_one_sentence(tmp_path, text, others, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        read_table(write(tmp_path, text), ["id", "label"], ["split"], others=others)
    assert "\n" not in str(caught.value)


def test_cells_left_out_at_the_end_are_empty_on_request(tmp_path):
    table = read_table(write(tmp_path, "id,label,split\na\nb,x\n"), ["id"], ["label", "split"], fill=True)
    assert rows(table) == [("a", "", ""), ("b", "x", "")]


def test_files_that_are_no_tables(tmp_path):
    with pytest.raises(InputError, match=r"no such table: .*gone\.csv; name a .* file with the column id"):
        read_table(tmp_path / "gone.csv", ["id"])
    with pytest.raises(InputError, match=r"no such table: .*gone\.parquet"):
        read_table(tmp_path / "gone.parquet", ["id"])
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InputError, match=r"cannot read .*folder\.csv \(Is a directory\)"):
        read_table(tmp_path / "folder.csv", ["id"])
    (tmp_path / "latin.csv").write_bytes("id\na\nä\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"line 3 of .*latin\.csv is not UTF-8 text; save the file as UTF-8"):
        read_table(tmp_path / "latin.csv", ["id"])
    for content in (b"", b"no parquet", b"PAR1 cut PAR1"):
        (tmp_path / "t.parquet").write_bytes(content)
        with pytest.raises(InputError, match=r"t\.parquet is not a parquet file") as caught:
            read_table(tmp_path / "t.parquet", ["id"])
        assert "\n" not in str(caught.value)


def test_data_frames(tmp_path):
    table = read_frame(pa.table({" id": [1, 2], "note": ["x", "y"]}), ["id"])
    assert (table.names, table.texts("id"), table.where(1)) == (["id"], ["1", "2"], "row 2 of the data frame")
    with pytest.raises(InputError, match="the data frame has a column 'ID', which looks like id"):
        read_frame(pa.table({"ID": [1]}), ["id"])
    with pytest.raises(InputError, match="expected a path or a data frame with the column id, got <class 'int'>"):
        read_frame(3, ["id"])
