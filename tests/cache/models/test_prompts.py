from __future__ import annotations

from pathlib import Path

import pytest

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.models.prompts import (
    DEFAULT_PROMPTS,
    fill_prompts,
    match_class_names,
    read_prompts,
    readable,
)


def write(folder: Path, text: str, name: str = "file.txt") -> Path:
    (folder / name).write_bytes(text.encode())
    return folder / name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ankle_boot", "ankle boot"),
        ("t-shirt", "t-shirt"),
        ("T-shirt/top", "T-shirt/top"),
        ("__a__b_", "a b"),
        ("größe", "größe"),
    ],
)
def test_readable(name: str, expected: str):
    assert readable(name) == expected


def test_default_prompts_begin_with_the_plain_one():
    assert DEFAULT_PROMPTS[0] == "a photo of a {}."
    assert len(set(DEFAULT_PROMPTS)) == len(DEFAULT_PROMPTS)
    assert all(prompt.count("{}") == 1 for prompt in DEFAULT_PROMPTS)


def test_filling_leaves_other_braces_alone():
    assert fill_prompts(["ankle_boot", "b"], ["a {}.", "{0} {x} {} {}"]) == [
        ["a ankle boot.", "{0} {x} ankle boot ankle boot"],
        ["a b.", "{0} {x} b b"],
    ]
    assert fill_prompts(["a{}b"], ["{}!"]) == [["a{}b!"]]


def test_prompts_file(tmp_path: Path):
    text = "\ufeff# for shoes\r\n\r\n  a photo of a {}.  \r\nein Bild: {} äöü\r\n"
    assert read_prompts(write(tmp_path, text)) == ["a photo of a {}.", "ein Bild: {} äöü"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "holds no prompt; write one a line"),
        ("# only\n\n", "holds no prompt"),
        ("a {}.\n\na photo\n", r"line 3: 'a photo' has no \{\}"),
    ],
)
def test_bad_prompts(text: str, sentence: str, tmp_path: Path):
    with pytest.raises(InputError, match=sentence):
        read_prompts(write(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(InputError, match=r"the prompts file .*gone.txt cannot be read: No such file"):
        read_prompts(tmp_path / "gone.txt")
    (tmp_path / "latin.txt").write_bytes("gro\xdfe {}".encode("latin-1"))
    with pytest.raises(InputError, match="it is not UTF-8 text"):
        read_prompts(tmp_path / "latin.txt")
    with pytest.raises(InputError, match="the class names file"):
        match_class_names(tmp_path, ["a"])


def test_names_by_line(tmp_path: Path):
    file = write(tmp_path, "tench\n\ngold fish\n")
    assert match_class_names(file, ["n01", "n02"]).names == ["tench", "gold fish"]


def test_names_by_folder(tmp_path: Path):
    file = write(tmp_path, 'name,folder\n"shark, white",n03\ntench,n01\n', "names.csv")
    assert match_class_names(file, ["n01", "n02", "n03"]).names == ["tench", "n02", "shark, white"]


@pytest.mark.parametrize(
    ("text", "name", "sentence"),
    [
        ("one\n", "n.txt", "has 1 names, the source has 6 classes: a, b, c, d, e, ..."),
        ("x\nx\ny\nz\nu\nv\n", "n.txt", "holds the name 'x' twice"),
        ("class,name\na,x\n", "n.csv", "must have the columns folder and name, got class, name"),
        ("", "n.csv", "must have the columns folder and name, got none"),
        ("folder,name\nq,x\n", "n.csv", "names 'q', which is not a class of the source: a, b"),
        ("folder,name\na,b\n", "n.csv", "gives the name 'b' to 2 classes"),
    ],
)
def test_bad_names(text: str, name: str, sentence: str, tmp_path: Path):
    with pytest.raises(InputError) as caught:
        match_class_names(write(tmp_path, text, name), list("abcdef"))
    assert sentence in str(caught.value)


def test_a_name_left_empty_stays(tmp_path: Path):
    assert match_class_names(write(tmp_path, "folder,name\na,\nb,x\n", "n.csv"), ["a", "b"]).names == ["a", "x"]
