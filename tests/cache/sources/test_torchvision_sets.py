from __future__ import annotations

import gzip
import struct
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from tests.cache.samples import write_idx
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.sources import UnreadableImage, open_source, reopen_source
from ulfine_fast.cache.sources.rows import Row
from ulfine_fast.cache.sources.torchvision_sets import TorchvisionSource


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """Three training and two test images of 2 x 3 pixels."""
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", np.arange(18).reshape(3, 2, 3))
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.array([9, 0, 1]))
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", np.arange(12).reshape(2, 2, 3) + 100)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.array([3, 3]))
    return tmp_path


def test_fashion_mnist_from_idx_files(idx_folder: Path):
    source = TorchvisionSource("fashion_mnist", idx_folder=idx_folder)
    assert source.class_names[0] == "T-shirt/top"
    assert source.class_names[9] == "Ankle boot"
    assert [(row.id, row.label, row.split, row.bytes) for row in source.rows] == [
        ("train/00000", 9, "train", 6),
        ("train/00001", 0, "train", 6),
        ("train/00002", 1, "train", 6),
        ("test/00000", 3, "test", 6),
        ("test/00001", 3, "test", 6),
    ]
    image = source.read(source.rows[1])
    assert image.mode == "RGB"
    assert np.asarray(image)[..., 1].tolist() == [[6, 7, 8], [9, 10, 11]]
    assert np.asarray(source.read(source.rows[4]))[0, 0].tolist() == [106, 106, 106]


def test_fashion_mnist_is_reopened_where_it_was(idx_folder: Path):
    source = TorchvisionSource("fashion_mnist", idx_folder=idx_folder)
    assert source.describe() == {"kind": "torchvision", "name": "fashion_mnist", "path": str(idx_folder)}
    assert reopen_source(source.describe()).rows == source.rows


def test_class_names_file(idx_folder: Path):
    names = idx_folder / "names.csv"
    names.write_text("folder,name\nT-shirt/top,t-shirt\n")
    source = TorchvisionSource("fashion_mnist", idx_folder=idx_folder, class_names_file=names)
    assert source.class_names[:2] == ["t-shirt", "Trouser"]


@pytest.mark.parametrize(
    "damage", [b"", b"\x1f\x8b", b"plain text", gzip.compress(b""), gzip.compress(b"\0\0\x08\x01\0")]
)
def test_damaged_idx_files(damage: bytes, idx_folder: Path):
    (idx_folder / "t10k-labels-idx1-ubyte.gz").write_bytes(damage)
    with pytest.raises(InputError, match=r"t10k-labels-idx1-ubyte.gz cannot be read"):
        TorchvisionSource("fashion_mnist", idx_folder=idx_folder)


def test_idx_files_of_another_kind(idx_folder: Path):
    floats = bytes([0, 0, 0x0D, 1]) + struct.pack(">i", 2) + bytes(8)
    (idx_folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(floats))
    with pytest.raises(InputError, match="it is not an IDX file of bytes"):
        TorchvisionSource("fashion_mnist", idx_folder=idx_folder)
    write_idx(idx_folder / "t10k-labels-idx1-ubyte.gz", np.array([1, 2, 3]))
    with pytest.raises(InputError, match="do not belong together"):
        TorchvisionSource("fashion_mnist", idx_folder=idx_folder)


def images(count: int, *, channels_first: bool = False) -> np.ndarray:
    shape = (count, 3, 4, 5) if channels_first else (count, 4, 5, 3)
    return np.random.default_rng(count).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ULFINE_FAST_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize(("name", "made_by"), [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100")])
def test_cifar(name: str, made_by: str, home: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def stand_in(root: str, *, train: bool, download: bool):
        asked.append((root, download))
        count = 3 if train else 2
        return SimpleNamespace(classes=["a", "b"], targets=[1, 0, 1][:count], data=images(count))

    monkeypatch.setattr(datasets, made_by, stand_in)
    source = open_source(name)
    assert asked == [(str(home / "datasets"), True)] * 2
    assert [(row.id, row.label, row.bytes) for row in source.rows] == [
        ("train/00000", 1, 60),
        ("train/00001", 0, 60),
        ("train/00002", 1, 60),
        ("test/00000", 1, 60),
        ("test/00001", 0, 60),
    ]
    assert np.array_equal(np.asarray(source.read(source.rows[4])), images(2)[1])
    assert source.describe() == {"kind": "torchvision", "name": name}


def test_stl10_has_an_unlabelled_split(home: Path, monkeypatch: pytest.MonkeyPatch):
    def stand_in(root: str, *, split: str, download: bool):
        labels = np.array([-1, -1] if split == "unlabeled" else [0, 1])
        return SimpleNamespace(classes=["a", "b"], labels=labels, data=images(2, channels_first=True))

    monkeypatch.setattr(datasets, "STL10", stand_in)
    source = TorchvisionSource("stl10")
    assert [(row.id, row.label) for row in source.rows] == [
        ("train/00000", 0),
        ("train/00001", 1),
        ("unlabeled/00000", -1),
        ("unlabeled/00001", -1),
        ("test/00000", 0),
        ("test/00001", 1),
    ]
    # (3, H, W) in the data set, (H, W, 3) in an image
    wanted = images(2, channels_first=True)[1].transpose(1, 2, 0)
    assert np.array_equal(np.asarray(source.read(source.rows[3])), wanted)


def test_svhn_digits_name_themselves(home: Path, monkeypatch: pytest.MonkeyPatch):
    def stand_in(root: str, *, split: str, download: bool):
        return SimpleNamespace(labels=np.array([7]), data=images(1, channels_first=True))

    monkeypatch.setattr(datasets, "SVHN", stand_in)
    source = TorchvisionSource("svhn")
    assert source.class_names == [str(digit) for digit in range(10)]
    assert [row.label for row in source.rows] == [7, 7]
    assert source.read(source.rows[0]).size == (5, 4)


def test_food101_reads_its_files(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Image.new("RGB", (6, 3), "red").save(tmp_path / "pie.jpg")

    def stand_in(root: str, *, split: str, download: bool):
        return SimpleNamespace(classes=["pie"], _labels=[0], _image_files=[tmp_path / "pie.jpg"])

    monkeypatch.setattr(datasets, "Food101", stand_in)
    source = TorchvisionSource("food101")
    assert source.rows[0] == Row(
        "train/00000", 0, "train", str(tmp_path / "pie.jpg"), (tmp_path / "pie.jpg").stat().st_size
    )
    assert source.read(source.rows[0]).size == (6, 3)


def test_fashion_mnist_is_downloaded_where_it_is_not_installed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stand_in(root: str, *, train: bool, download: bool):
        data = torch.full((1, 28, 28), 7, dtype=torch.uint8)
        return SimpleNamespace(classes=["a"], targets=torch.tensor([0]), data=data)

    monkeypatch.setattr(datasets, "FashionMNIST", stand_in)
    source = TorchvisionSource("fashion_mnist", idx_folder=tmp_path)
    assert [row.id for row in source.rows] == ["train/00000", "test/00000"]
    assert source.read(source.rows[0]).getpixel((3, 3)) == (7, 7, 7)


def test_no_network(home: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(root: str, **options):
        raise URLError("no route\nto host")

    monkeypatch.setattr(datasets, "CIFAR10", fail)
    with pytest.raises(
        InputError, match=r"cifar10 could not be downloaded to .*home/datasets \(.*no route to host"
    ) as caught:
        open_source("cifar10")
    assert "\n" not in str(caught.value)


def test_unknown_name():
    with pytest.raises(InputError, match=r"the data set must be one of cifar10, cifar100, .*got 'imagenet'"):
        TorchvisionSource("imagenet")


def test_a_row_of_another_data_set(idx_folder: Path):
    source = TorchvisionSource("fashion_mnist", idx_folder=idx_folder)
    with pytest.raises(UnreadableImage, match="no image 99 in fashion_mnist"):
        source.read(Row("train/00099", 0, "train", "99", 6))
