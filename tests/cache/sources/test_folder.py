from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.sources import ImageFolder, open_source, reopen_source
from ulfine_fast.cache.sources.folder import FolderSource


def put_images(root: Path, *names: str) -> Path:
    """Writes a small image under every name."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4 + number, 4), (number, 0, 0)).save(root / name, "PNG")
    return root


def table(source) -> list[tuple[str, int, str]]:
    return [(row.id, row.label, row.split) for row in source.rows]


def test_class_folders(tmp_path: Path):
    put_images(tmp_path, "dog/b.png", "dog/a.png", "cat/deep/er/c.PNG", "dog/.hidden.png", ".git/x.png")
    (tmp_path / "dog/notes.txt").write_text("no image")
    (tmp_path / "readme").mkdir()
    source = FolderSource(tmp_path)
    assert source.class_names == ["cat", "dog"]
    assert table(source) == [("cat/deep/er/c.PNG", 0, "train"), ("dog/a.png", 1, "train"), ("dog/b.png", 1, "train")]
    assert source.rows[1].bytes == (tmp_path / "dog/a.png").stat().st_size
    assert source.read(source.rows[1]).size == (5, 4)


def test_split_folders_come_in_their_fixed_order(tmp_path: Path):
    put_images(tmp_path, "test/a/1.png", "val/b/1.png", "unlabeled/x/y/1.png", "unlabeled/2.png", "train/b/1.png")
    source = FolderSource(tmp_path)
    assert source.class_names == ["a", "b"]  # the union: the class a has no training image
    assert table(source) == [
        ("train/b/1.png", 1, "train"),
        ("unlabeled/2.png", -1, "unlabeled"),
        ("unlabeled/x/y/1.png", -1, "unlabeled"),
        ("val/b/1.png", 1, "val"),
        ("test/a/1.png", 0, "test"),
    ]


def test_a_test_folder_alone_is_a_split(tmp_path: Path):
    assert table(FolderSource(put_images(tmp_path, "test/a/1.png"))) == [("test/a/1.png", 0, "test")]


def test_a_class_may_be_called_train(tmp_path: Path):
    source = FolderSource(put_images(tmp_path, "train/1.png", "boat/1.png"))
    assert source.class_names == ["boat", "train"]
    assert {row.split for row in source.rows} == {"train"}


@pytest.mark.parametrize("name", ["valid", "Validation", "testing", "unlabelled"])
def test_misnamed_splits_are_not_taken_for_classes(name: str, tmp_path: Path):
    put_images(tmp_path, "train/a/1.png", f"{name}/a/1.png")
    with pytest.raises(InputError, match=f"holds a folder {name} beside train; rename it to "):
        FolderSource(tmp_path)


def test_odd_names(tmp_path: Path):
    long = "x" * 250
    source = FolderSource(put_images(tmp_path, "größe/日本 語.png", f"größe/{long}.png", "größe/new\nline.png"))
    assert [row.id for row in source.rows] == ["größe/new\nline.png", f"größe/{long}.png", "größe/日本 語.png"]
    assert all(source.read(row).mode == "RGB" for row in source.rows)


def test_names_that_are_no_utf8_get_an_id_that_is(tmp_path: Path):
    put_images(tmp_path, "a/1.png")
    os.rename(tmp_path / "a/1.png", os.fsencode(tmp_path / "a") + b"/caf\xe9.png")
    source = FolderSource(tmp_path)
    assert source.rows[0].id == "a/caf\\xe9.png"
    assert source.rows[0].id.encode()
    assert source.read(source.rows[0]).size == (4, 4)


def test_links_are_followed_and_loops_end(tmp_path: Path):
    put_images(tmp_path, "real/cat/1.png", "root/dog/1.png")
    root = tmp_path / "root"
    (root / "cat").symlink_to(tmp_path / "real/cat")
    (root / "dog/loop").symlink_to(root)
    (root / "dog/self").symlink_to(root / "dog/self")
    (root / "dog/gone.png").symlink_to(tmp_path / "nothing.png")
    assert [row.id for row in FolderSource(root).rows] == ["cat/1.png", "dog/1.png"]


def test_order_does_not_depend_on_the_file_system(tmp_path: Path):
    names = [f"c{number % 3}/{number:02d}.png" for number in range(12)]
    one, two = put_images(tmp_path / "one", *names), tmp_path / "two"
    for row in reversed(FolderSource(one).rows):
        (two / row.id).parent.mkdir(parents=True, exist_ok=True)
        (two / row.id).write_bytes((one / row.id).read_bytes())
    assert table(FolderSource(one)) == table(FolderSource(two))


@pytest.mark.parametrize("inside", ["", "a/notes.txt", "notes.txt"])
def test_no_images(inside: str, tmp_path: Path):
    if inside:
        (tmp_path / inside).parent.mkdir(exist_ok=True)
        (tmp_path / inside).write_text("words")
    with pytest.raises(InputError, match=r"no images in class folders under .*expected CLASS/image"):
        FolderSource(tmp_path)


def test_only_unlabeled_images(tmp_path: Path):
    with pytest.raises(InputError, match="no images in class folders"):
        FolderSource(put_images(tmp_path, "unlabeled/1.png"))


@pytest.mark.parametrize("stray", ["stray.png", "train/stray.png", "val/stray.png"])
def test_a_image_outside_of_the_class_folders_is_named(stray: str, tmp_path: Path):
    put_images(tmp_path, "train/a/1.png", stray)
    with pytest.raises(InputError, match=f"the image {stray} is in no class folder"):
        FolderSource(tmp_path)


def test_missing_folder(tmp_path: Path):
    with pytest.raises(InputError, match="no such folder"):
        FolderSource(tmp_path / "gone")


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    put_images(tmp_path, "a/1.png", "b/1.png")
    scandir = os.scandir

    def refuse(folder):
        if Path(folder).name == "b":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="b cannot be listed: Permission denied"):
        FolderSource(tmp_path)


def test_class_names_file(tmp_path: Path):
    put_images(tmp_path / "p", "n01/1.png", "n02/1.png")
    names = tmp_path / "names.txt"
    names.write_text("tench\ngold fish\n")
    assert FolderSource(tmp_path / "p", class_names_file=names).class_names == ["tench", "gold fish"]


def test_reopening_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    put_images(tmp_path / "p", "a/1.png", "b/2.png")
    monkeypatch.chdir(tmp_path)
    source = open_source("p")
    assert source.describe() == {"kind": "folder", "path": str(tmp_path / "p")}
    monkeypatch.chdir("/")
    assert reopen_source({**source.describe(), "rows": 2, "fingerprint": "f"}).rows == source.rows


def test_images_without_labels(tmp_path: Path):
    put_images(tmp_path, "a/1.png", "2.png")
    (tmp_path / "words.txt").write_text("no image")
    source = ImageFolder(tmp_path)
    assert table(source) == [("2.png", -1, "test"), ("a/1.png", -1, "test")]
    assert [source.read(row).size for row in source.rows] == [(5, 4), (4, 4)]
    assert reopen_source(source.describe()).rows == source.rows
    assert table(ImageFolder(tmp_path / "2.png")) == [("2.png", -1, "test")]


def test_images_that_are_not_there(tmp_path: Path):
    with pytest.raises(InputError, match="no such folder or image"):
        ImageFolder(tmp_path / "gone")
    with pytest.raises(InputError, match="no images under"):
        ImageFolder(tmp_path)
