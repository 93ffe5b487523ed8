from __future__ import annotations

import gzip
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cache.samples import write_idx
from ulfine_fast import demo
from ulfine_fast.cache.sources.folder import FolderSource
from ulfine_fast.demo import ARCHIVE, unpack_images
from ulfine_fast.demo.make_sample import CLASS_FOLDERS, PER_CLASS, make_sample

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return unpack_images(tmp_path_factory.mktemp("demo") / "deep" / "images")


def test_archive_is_small_and_licensed():
    assert ARCHIVE.stat().st_size <= 3_000_000
    text = ARCHIVE.with_name("LICENSE-fashion-mnist.txt").read_text(encoding="utf-8")
    assert "Copyright (c) 2017 Zalando SE" in text
    assert "Permission is hereby granted, free of charge" in text


def test_archive_is_made_the_same_way_every_time():
    with zipfile.ZipFile(ARCHIVE) as archive:
        entries = archive.infolist()
    assert [entry.filename for entry in entries] == sorted(entry.filename for entry in entries)
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert {entry.compress_type for entry in entries} == {zipfile.ZIP_STORED}


def test_images_are_a_source_of_ten_balanced_classes(images: Path):
    source = FolderSource(images)
    assert source.class_names == sorted(CLASS_FOLDERS)
    rows = [(row.split, row.label) for row in source.rows]
    for split, count in PER_CLASS.items():
        assert [rows.count((split, label)) for label in range(10)] == [count] * 10
    assert source.rows[0].id == "train/ankle_boot/00001.png"
    assert source.read(source.rows[0]).size == (28, 28)


def test_no_image_is_in_both_splits(images: Path):
    train, test = ({path.read_bytes() for path in (images / split).rglob("*.png")} for split in PER_CLASS)
    assert not train & test


def test_unpacking_again_touches_nothing(images: Path):
    before = {path: path.stat().st_mtime_ns for path in images.rglob("*")}
    assert unpack_images(images) == images
    assert {path: path.stat().st_mtime_ns for path in images.rglob("*")} == before
    assert [path.name for path in images.parent.iterdir()] == ["images"]


def test_an_empty_folder_may_be_there_already(tmp_path: Path):
    (tmp_path / "p").mkdir()
    assert (unpack_images(tmp_path / "p") / "test/bag/00050.png").is_file()


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something else"):
        unpack_images(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(FileExistsError, match="holds something else"):
        unpack_images(tmp_path / "mine.txt")


@pytest.fixture
def small_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with zipfile.ZipFile(tmp_path / "small.zip", "w") as archive:
        archive.writestr("train/bag/00001.png", b"one")
    monkeypatch.setattr(demo, "ARCHIVE", tmp_path / "small.zip")
    return tmp_path / "small.zip"


def test_another_version_of_the_sample_replaces_the_old(small_archive: Path, tmp_path: Path):
    unpack_images(tmp_path / "p")
    with zipfile.ZipFile(small_archive, "w") as archive:
        archive.writestr("train/hat/00001.png", b"two")
    unpack_images(tmp_path / "p")
    assert [path.name for path in (tmp_path / "p/train").iterdir()] == ["hat"]


def test_concurrent_calls_agree(small_archive: Path, tmp_path: Path):
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(unpack_images, [tmp_path / "p"] * 16))
    assert folders == {tmp_path / "p"}
    assert (tmp_path / "p/train/bag/00001.png").read_bytes() == b"one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p", "small.zip"]


def test_an_interrupted_unpacking_leaves_nothing(small_archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_move_to", interrupt)
    with pytest.raises(KeyboardInterrupt):
        unpack_images(tmp_path / "p")
    assert [path.name for path in tmp_path.iterdir()] == ["small.zip"]


def test_the_script_takes_the_first_images_of_every_class(tmp_path: Path):
    rng = np.random.default_rng(0)
    images, labels = {}, {}
    for name, count in (("train", 2600), ("t10k", 520)):
        images[name] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels[name] = np.arange(count) % 10
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", images[name])
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", labels[name])
    size = make_sample(tmp_path, tmp_path / "a.zip")
    assert size == (tmp_path / "a.zip").stat().st_size
    make_sample(tmp_path, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert len(archive.namelist()) == 3000
        with archive.open("test/pullover/00002.png") as file:
            assert np.array_equal(np.asarray(Image.open(file)), images["t10k"][12])


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="the package dataset-fashion-mnist is not installed")
def test_sample_is_pixel_for_pixel_fashion_mnist(images: Path):
    archived, classes = (
        (FASHION_MNIST / f"t10k-{kind}-ubyte.gz").read_bytes() for kind in ("images-idx3", "labels-idx1")
    )
    pixels = np.frombuffer(gzip.decompress(archived), np.uint8, offset=16).reshape(-1, 28, 28)
    labels = np.frombuffer(gzip.decompress(classes), np.uint8, offset=8)
    for label, name in enumerate(CLASS_FOLDERS):
        for number in (1, 25, 50):
            image = Image.open(images / f"test/{name}/{number:05d}.png")
            assert np.array_equal(np.asarray(image), pixels[labels == label][number - 1])


def test_importing_the_demo_is_light():
    code = "import sys, ulfine_fast.demo; print([name for name in ('torch', 'numpy', 'PIL') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
