from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.sources import SPLITS, Row, fingerprint, open_source, reopen_source
from ulfine_fast.cache.sources.rows import sorted_rows


def row(id: str = "a", label: int = 0, split: str = "train", location: str = "x", bytes: int = 1) -> Row:
    return Row(id, label, split, location, bytes)


def test_order_is_by_split_then_id():
    rows = [row("b", split=split) for split in reversed(SPLITS)] + [row("a", split=split) for split in SPLITS]
    assert [(one.split, one.id) for one in sorted_rows(rows)] == [(split, id) for split in SPLITS for id in "ab"]


def test_fingerprint_is_of_what_was_promised():
    # sha256 of "a\0" "0\0" "train\0" "1\n", so that another program can compute it too
    assert fingerprint([row()]) == "62045d9f31c841498c0b38fbb75cf507f835bc6f9cb0f033e2b4656d9725cc86"
    assert fingerprint([]) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize("change", [{"id": "b"}, {"label": 1}, {"split": "val"}, {"bytes": 2}])
def test_fingerprint_changes_with_every_field(change: dict):
    assert fingerprint([row(**change)]) != fingerprint([row()])


def test_fingerprint_ignores_where_the_files_are_and_heeds_the_order():
    assert fingerprint([row(location="elsewhere")]) == fingerprint([row()])
    assert fingerprint([row("a"), row("b")]) != fingerprint([row("b"), row("a")])


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ("cifar-10", "no such folder or table: cifar-10; did you mean cifar10?"),
        ("images", "data sets by name are cifar10, cifar100, fashion_mnist, food101, stl10, svhn"),
        ("x" * 5000, "no such folder or table"),
        ("table.parquet", "no such table"),
    ],
)
def test_nothing_there(where: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        open_source(where)
    assert sentence in str(caught.value)


def test_a_folder_wins_over_a_data_set_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("cifar10").mkdir()
    with pytest.raises(InputError, match="no images in class folders"):
        open_source("cifar10")


def test_reopening_what_is_gone_or_unknown(tmp_path: Path):
    with pytest.raises(InputError, match="no such folder"):
        reopen_source({"kind": "folder", "path": str(tmp_path / "gone")})
    with pytest.raises(InputError, match="cannot reopen a source of kind 'arrays'"):
        reopen_source({"kind": "arrays"})


def test_folders_and_tables_do_not_import_torch():
    code = "import sys, ulfine_fast.cache.sources; print(any(name in sys.modules for name in ('torch', 'torchvision')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
