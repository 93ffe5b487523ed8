"""What labels, splits and samples mean, source by source: nothing is guessed without a word."""

from __future__ import annotations

import io
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from PIL import features as pillow_features
from pyarrow import parquet

from tests.cache.samples import write_images
from ulfine_fast.cache.interop.import_features import open_features
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.sources import open_source
from ulfine_fast.cache.sources.folder import FolderSource, ImageFolder
from ulfine_fast.cache.sources.image import UnreadableImage
from ulfine_fast.cache.sources.parquet_images import ParquetSource
from ulfine_fast.cache.sources.table import TableSource
from ulfine_fast.cache.sources.torchvision_sets import TorchvisionSource
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.data.corrections import corrected

NFC, NFD = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")


def png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def names_file(folder: Path, *names: str, name: str = "names.txt") -> Path:
    (folder / name).write_text("\n".join(names) + "\n", encoding="utf-8")
    return folder / name


def table(folder: Path, labels: list, form: str = "csv") -> Path:
    for row in range(len(labels)):
        (folder / f"{row}.png").write_bytes(png(row))
    paths = [f"{row}.png" for row in range(len(labels))]
    if form == "parquet":
        parquet.write_table(pa.table({"path": paths, "label": labels}), folder / "t.parquet")
    else:
        lines = [f"{path},{label}" for path, label in zip(paths, labels, strict=True)]
        text = "path,label\n" + "\n".join(lines) + "\n"
        (folder / f"t.{form}").write_text(text.replace(",", "\t") if form == "tsv" else text, encoding="utf-8")
    return folder / f"t.{form}"


def images_in_parquet(folder: Path, labels: list | pa.Array, name: str = "train.parquet", **columns) -> Path:
    content = {"image": [png(row) for row in range(len(labels))], "label": labels, **columns}
    parquet.write_table(pa.table(content), folder / name)
    return folder / name


def rows_of(source) -> list:
    return list(source.rows) if hasattr(source, "rows") else [r for part in source.plan(99) for r in source.open(part)]


def named(source) -> list[str]:
    """The class name of each row, in the order of the ids."""
    rows = sorted(rows_of(source), key=lambda row: row.id)
    return [source.class_names[row.label] if row.label >= 0 else "" for row in rows]


# -- class names that are numbers


@pytest.mark.parametrize("form", ["csv", "tsv", "parquet"])
def test_numbers_in_a_table(tmp_path, form):
    where = table(tmp_path, ["1", "2", "3", "1"], form)
    # All are names and all are indices, and these differ.
    with pytest.raises(InputError, match=r"label '1' is the name of class 0 and the index of class 1.*folder"):
        TableSource(where, class_names_file=names_file(tmp_path, "1", "2", "3", "4"))
    # Names alone: 3 is no index.
    source = TableSource(where, class_names_file=names_file(tmp_path, "3", "2", "1"))
    assert (named(source), source.notes) == (["1", "2", "3", "1"], [])
    source = TableSource(where, class_names_file=names_file(tmp_path, "folder,name", "1,2", "2,3", "3,1", name="n.csv"))
    assert named(source) == ["2", "3", "1", "2"]
    # Indices alone, which is said.
    source = TableSource(where, class_names_file=names_file(tmp_path, "a", "b", "c", "d"))
    assert named(source) == ["b", "c", "d", "b"]
    assert "taken as line numbers of" in source.notes[0]
    assert "from 0: 1 is b, 2 is c, 3 is d" in source.notes[0]


def test_numbers_as_folders(tmp_path):
    write_images(tmp_path / "images", {str(k): 1 for k in range(11)})
    names = names_file(tmp_path, *(f"class{k}" for k in range(11)))
    source = FolderSource(tmp_path / "images", class_names_file=names)
    assert {row.id.split("/")[0]: source.class_names[row.label] for row in source.rows} == {
        str(k): f"class{k}" for k in range(11)
    }
    # Counted from 1, the last is no index.
    write_images(tmp_path / "from1", {str(k): 1 for k in range(1, 12)})
    source = FolderSource(tmp_path / "from1", class_names_file=names)
    assert {row.id.split("/")[0]: source.class_names[row.label] for row in source.rows} == {
        str(k + 1): f"class{k}" for k in range(11)
    }
    assert "renames the classes in their order: 1 is class0, 2 is class1" in source.notes[0]


def test_numbers_in_parquet(tmp_path):
    names = names_file(tmp_path, "1", "2", "3", "4")
    # Whole numbers are indices, texts may be either.
    assert named(ParquetSource(str(images_in_parquet(tmp_path, [0, 1, 2])), class_names_file=names)) == ["1", "2", "3"]
    with pytest.raises(InputError, match="name of class 0 and the index of class 1"):
        ParquetSource(str(images_in_parquet(tmp_path, ["1", "2", "3"], "b.parquet")), class_names_file=names)
    assert named(ParquetSource(str(images_in_parquet(tmp_path, ["1", "2", "cat"], "c.parquet")))) == ["1", "2", "cat"]
    features = '{"info": {"features": {"label": {"names": ["1", "2", "0"]}}}}'
    content = pa.table({"image": [png(), png(1), png(2)], "label": [0, 1, 2]})
    parquet.write_table(content.replace_schema_metadata({"huggingface": features}), tmp_path / "d.parquet")
    assert named(ParquetSource(str(tmp_path / "d.parquet"))) == ["1", "2", "0"]


def test_numbers_of_an_import(tmp_path):
    features = np.eye(3, dtype=np.float32)
    np.savez(tmp_path / "a.npz", features=features, labels=np.array([0, 1, 2]), class_names=np.array(["1", "2", "0"]))
    opened = open_features(tmp_path / "a.npz")
    assert [opened.class_names[label] for label in opened.labels] == ["1", "2", "0"]
    np.savez(tmp_path / "b.npz", features=features, labels=np.array(["1", " 2", "-1"]))
    opened = open_features(tmp_path / "b.npz", class_names=["0", "1", "2"])
    assert [opened.class_names[label] if label >= 0 else "" for label in opened.labels] == ["1", "2", ""]


def test_numbers_in_corrections_are_names():
    cache = FeatureCache.from_arrays(
        np.eye(3, dtype=np.float32), [0, 1, 2], class_names=["1", "2", "0"], ids=list("abc")
    )
    assert corrected(cache, {"a": "2", "b": "0", "c": " 1.0 "}).labels.tolist() == [1, 2, 0]


def test_numbers_in_a_saved_data_set(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    images = [{"bytes": png(row), "path": None} for row in range(3)]

    def saved(labels, kind):
        features = datasets.Features({"image": datasets.Image(), "label": kind})
        datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).save_to_disk(tmp_path / "s")
        return f"hf:{tmp_path / 's'}"

    where = saved([0, 1, 2], datasets.ClassLabel(names=["1", "2", "0"]))
    assert named(open_source(where)) == ["1", "2", "0"]
    assert named(open_source(where, class_names_file=names_file(tmp_path, "0", "1", "2"))) == ["1", "2", "0"]
    source = open_source(where, class_names_file=names_file(tmp_path, "a", "b", "c"))
    assert (named(source), len(source.notes)) == (["a", "b", "c"], 1)
    where = saved(["1", "2", "3"], datasets.Value("string"))
    assert named(open_source(where)) == ["1", "2", "3"]


# -- a names file and labels that are texts


def labelled(kind: str, folder: Path, *labels: str) -> Path:
    if kind == "folder":
        return write_images(folder / "images", dict.fromkeys(labels, 1))
    if kind == "parquet":
        return images_in_parquet(folder, list(labels))
    return table(folder, list(labels), kind)


@pytest.mark.parametrize("kind", ["folder", "csv", "tsv", "parquet"])
def test_a_file_of_the_same_names_orders_the_classes(tmp_path, kind):
    where = labelled(kind, tmp_path, "cat", "dog", "emu")
    source = open_source(where, class_names_file=names_file(tmp_path, " emu ", "cat", "dog"))
    assert source.class_names == ["emu", "cat", "dog"]
    assert named(source) == ["cat", "dog", "emu"]
    assert not [note for note in source.notes if "renames" in note]


@pytest.mark.parametrize("kind", ["folder", "csv", "tsv", "parquet"])
def test_a_file_of_other_names_renames_and_says_so(tmp_path, kind):
    where = labelled(kind, tmp_path, "n01", "n02")
    source = open_source(where, class_names_file=names_file(tmp_path, "tench", "goldfish"))
    assert named(source) == ["tench", "goldfish"]
    assert source.notes[-1].endswith("renames the classes in their order: n01 is tench, n02 is goldfish")


@pytest.mark.parametrize("kind", ["folder", "csv", "tsv", "parquet"])
def test_a_file_of_some_of_the_names_in_another_order_is_refused(tmp_path, kind):
    where = labelled(kind, tmp_path, "cat", "dog", "emu")
    with pytest.raises(InputError, match=r"holds the class 'cat' at another place .* neither orders nor renames"):
        open_source(where, class_names_file=names_file(tmp_path, "dog", "cat", "bird"))


def test_a_data_set_by_name_is_matched_by_name(tmp_path, monkeypatch):
    from ulfine_fast.cache.sources import torchvision_sets

    split = torchvision_sets._Split([0, 1, -1], np.zeros((3, 4, 4), np.uint8))
    monkeypatch.setitem(torchvision_sets._OPENERS, "svhn", lambda root: (["zero", "one"], {"train": split}))
    monkeypatch.setenv("ULFINE_FAST_HOME", str(tmp_path))
    source = TorchvisionSource("svhn", class_names_file=names_file(tmp_path, "one", "zero"))
    assert named(source) == ["zero", "one", ""]


@pytest.mark.parametrize("kind", ["folder", "csv", "tsv", "parquet"])
def test_two_forms_of_unicode_are_one_class(tmp_path, kind):
    if kind == "folder":
        where = write_images(tmp_path / "images", {f"train/{NFC}": 1, f"train/{NFD}": 1, f"test/{NFD}": 1})
    else:
        where = labelled(kind, tmp_path, NFC, NFD, f" {NFD}" if kind != "folder" else NFD)
    source = open_source(where)
    assert (source.class_names, [row.label for row in rows_of(source)]) == ([NFC], [0, 0, 0])
    assert open_source(where, class_names_file=names_file(tmp_path, NFD)).class_names == [NFC]


def test_two_forms_of_unicode_in_arrays_corrections_and_samples(tmp_path):
    np.savez(tmp_path / "a.npz", features=np.eye(2, dtype=np.float32), labels=np.array([NFC, NFD]))
    assert open_features(tmp_path / "a.npz").labels.tolist() == [0, 0]
    cache = FeatureCache.from_arrays(np.eye(2, dtype=np.float32), [0, 1], class_names=["x", NFD], ids=["a", "b"])
    assert corrected(cache, {"a": NFC}).labels.tolist() == [1, 1]
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name, content in (("0.png", png()), ("0.cls", NFD.encode())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    source = open_source(tmp_path / "train.tar", class_names_file=names_file(tmp_path, "x", NFC))
    assert [row.label for row in rows_of(source)] == [1]


# -- unknown labels, and texts that look like ones


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_a_label_that_reads_like_a_missing_value_is_named(tmp_path, kind):
    source = open_source(labelled(kind, tmp_path, "cat", "nan", "N/A"))
    assert sum("is taken as a class; leave the cell empty" in note for note in source.notes) == 2


@pytest.mark.parametrize("labels", [["a", None, "b"], [0, None, 1], [0.0, float("nan"), 1.0]])
def test_missing_labels_of_tables(tmp_path, labels):
    for column in (pa.array(labels), pa.array(labels).dictionary_encode()):
        assert [row.label for row in rows_of(TableSource(table(tmp_path, column, "parquet")))] == [0, 1, -1]
        assert [row.label for row in rows_of(ParquetSource(str(images_in_parquet(tmp_path, column))))] == [0, -1, 1]


# -- splits


def test_what_archives_and_systems_leave_is_passed_over(tmp_path):
    root = write_images(tmp_path, {"train/a": 1, "test/a": 1, "__MACOSX/train": 1, ".cache/b": 1})
    (root / "docs").mkdir()
    source = FolderSource(root)
    assert [(row.id, row.split) for row in source.rows] == [("train/a/000.png", "train"), ("test/a/000.png", "test")]
    assert source.notes == ["folders without images are passed over: docs"]
    assert [row.id for row in ImageFolder(root).rows] == ["test/a/000.png", "train/a/000.png"]


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["train/a", "test/a", "extra/a"], "mixes splits .test, train. with other folders of images .extra"),
        (["Train/a", "TEST/a"], "TEST, Train, which look like splits; rename TEST to test"),
        (["training/a", "validation/a"], "rename training to train"),
        (["Train/a", "cat/x"], "mixes splits .Train. with other folders of images .cat"),
        (["train/a", "Test/a"], "folder Test beside train; rename it to test"),
    ],
)
def test_splits_that_are_not_certain_are_refused_with_their_names(tmp_path, folders, names):
    with pytest.raises(InputError, match=names):
        FolderSource(write_images(tmp_path, dict.fromkeys(folders, 1)))


def test_a_class_that_is_called_like_a_split_is_said(tmp_path):
    source = FolderSource(write_images(tmp_path, {"train": 1, "boat": 1}))
    assert source.class_names == ["boat", "train"]
    assert source.notes == ["train beside boat: taken as a class, since there is no class folder in it"]


def test_splits_of_parquet_files(tmp_path):
    source = ParquetSource(str(images_in_parquet(tmp_path, ["a"], name="x.parquet")))
    assert source.notes == ["the name of x.parquet says no split; taken as train, since there is a column of labels"]
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX/train.parquet").write_bytes(b"x")
    (tmp_path / "._train.parquet").write_bytes(b"x")
    assert [file.name for file in ParquetSource(str(tmp_path)).files] == ["x.parquet"]


def test_splits_of_saved_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    rows = {"image": [{"bytes": png(), "path": None}], "label": ["a"]}
    one = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": one, "extra": one}).save_to_disk(tmp_path / "extra")
    assert "the split extra is passed over" in open_source(tmp_path / "extra").notes[0]
    datasets.DatasetDict({"train": one, "dev": one, "validation": one}).save_to_disk(tmp_path / "twice")
    with pytest.raises(InputError, match="has the splits dev and validation, which are both val; keep one"):
        open_source(tmp_path / "twice")


# -- several columns


def test_of_several_columns_the_choice_is_said(tmp_path):
    where = images_in_parquet(tmp_path, ["a"], depth=[png(9)], fine_label=["b"])
    source = ParquetSource(str(where))
    assert source.notes[0].endswith("train.parquet are taken from the column image, not from depth")
    assert source.notes[1].endswith("train.parquet are taken from the column label, not from fine_label")
    parquet.write_table(pa.table({"depth": [png(9)], "img": [png(1)], "label": ["a"]}), tmp_path / "b.parquet")
    (row,) = rows_of(source := ParquetSource(str(tmp_path / "b.parquet")))
    assert source.read(row).getpixel((0, 0)) == (1, 0, 0)


def test_of_several_columns_of_a_saved_data_set_the_choice_is_said(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    rows = {"depth": [{"bytes": png(9), "path": None}], "image": [{"bytes": png(1), "path": None}], "label": ["a"]}
    data = datasets.Dataset.from_dict(rows)
    for column in ("depth", "image"):
        data = data.cast_column(column, datasets.Image())
    data.save_to_disk(tmp_path / "saved")
    (row,) = rows_of(source := open_source(tmp_path / "saved"))
    assert source.read(row).getpixel((0, 0)) == (1, 0, 0)
    assert source.notes[0].endswith("are taken from the column image, not from depth")


# -- files


def test_a_cell_may_hold_a_path_alone(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/0.png").write_bytes(png(7))
    cells = [{"bytes": None, "path": path} for path in ("images/0.png", str(tmp_path / "images/0.png"), "gone.png", "")]
    cells.append({"bytes": png(5), "path": "images/0.png"})
    parquet.write_table(pa.table({"image": cells, "label": list("aabba")}), tmp_path / "train.parquet")
    rows = rows_of(source := ParquetSource(str(tmp_path / "train.parquet")))
    assert [source.read(rows[number]).getpixel((0, 0))[0] for number in (0, 1, 4)] == [7, 7, 5]
    with pytest.raises(UnreadableImage, match="no such file"):
        source.read(rows[2])
    with pytest.raises(UnreadableImage, match="its cell is empty"):
        source.read(rows[3])


def test_stereo_images_are_images(tmp_path):
    (tmp_path / "a").mkdir()
    images = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (200, 10)]
    images[0].save(tmp_path / "a/0.mpo", save_all=True, append_images=images[1:])
    rows = FolderSource(tmp_path).rows
    assert [row.id for row in rows] == ["a/0.mpo"]
    assert FolderSource(tmp_path).read(rows[0]).getpixel((0, 0))[0] > 150


@pytest.mark.parametrize("name", ["train.tar.gz", "train.tgz", "train.zip"])
def test_a_compressed_archive_is_named_for_what_it_is(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=rf"{name} is a compressed archive; unpack it"):
        open_source(tmp_path / name)
    with pytest.raises(InputError, match=r"no images in class folders .*1 \.\w+ file passed over"):
        open_source(tmp_path)


# -- archives and images that are passed over


@pytest.mark.parametrize("name", ["a/backup.tar", "backup.tar", "a/old.parquet", "old.parquet", "dataset_info.json"])
def test_images_in_class_folders_win_over_what_was_left_in_them(tmp_path, name):
    root = write_images(tmp_path / "images", {"a": 2, "b": 1})
    images_in_parquet(tmp_path, ["x"])
    content = (tmp_path / "train.parquet").read_bytes() if name.endswith("parquet") else b"{}"
    (root / name).write_bytes(content)
    source = open_source(root)
    assert (source.kind, source.class_names, len(rows_of(source))) == ("folder", ["a", "b"], 3)
    if not name.endswith("json"):
        assert f"passed over beside the images: {name}" in source.notes[0]


def test_an_image_beside_tar_files_changes_nothing(tmp_path):
    root = write_images(tmp_path / "tars", {"": 1, "train": 1})
    (root / "train/0.tar").write_bytes(b"")
    assert open_source(root, class_names_file=names_file(tmp_path, "a")).kind == "tar"


def test_images_that_cannot_be_decoded_are_counted_and_named(tmp_path, monkeypatch):
    root = write_images(tmp_path / "images", {"a": 1, "b": 1})
    for name in ("a/1.heic", "b/2.HEIC", "b/3.dng", "b/notes.txt"):
        (root / name).write_bytes(b"x")
    monkeypatch.setattr("ulfine_fast.cache.sources.folder.image_suffixes", lambda: frozenset({".png"}))
    notes = FolderSource(root).notes
    assert notes == ImageFolder(root).notes
    assert notes == [
        "1 .dng file passed over beside the images: b/3.dng",
        '2 .heic files passed over beside the images: a/1.heic, b/2.HEIC; pip install "ulfine-fast[heif]" reads them',
    ]
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone/1.heic").write_bytes(b"x")
    with pytest.raises(InputError, match=r"no images in class folders .*1 \.heic file passed over"):
        FolderSource(tmp_path / "phone")


@pytest.mark.parametrize("suffix", [".heic", ".heif", ".avif"])
def test_images_of_telephones_are_read_with_the_plugin(tmp_path, suffix):
    """From a folder, a table, a tar file, a parquet file and alone."""
    heif = pytest.importorskip("pillow_heif")
    picture = Image.new("RGB", (64, 48), (200, 30, 30))
    image = heif.from_pillow(picture)
    (tmp_path / "images/a").mkdir(parents=True)
    path = tmp_path / f"images/a/1{suffix.upper()}"
    if suffix == ".avif":
        if not pillow_features.check("avif"):
            pytest.skip("this Pillow reads no AVIF")
        picture.save(path, "AVIF")
    else:
        image.save(path)
    data = path.read_bytes()
    (tmp_path / "t.csv").write_text(f"path,label\nimages/a/{path.name},a\n")
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name, content in ((f"0{suffix}", data), ("0.cls", b"0")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    parquet.write_table(pa.table({"image": [data], "label": ["a"]}), tmp_path / "train.parquet")
    names = names_file(tmp_path, "a")
    sources = [open_source(tmp_path / name) for name in ("images", "t.csv", "train.parquet")]
    sources += [open_source(tmp_path / "train.tar", class_names_file=names), ImageFolder(path)]
    for source in sources:
        (row,) = rows_of(source)
        read = source.read(row)
        assert (read.size, read.getpixel((9, 9))[0] > 180) == ((64, 48), True)
