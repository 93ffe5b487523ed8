from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from fsspec import AbstractFileSystem
from fsspec.registry import _registry
from PIL import Image
from typer.testing import CliRunner

from tests.report.writer import RunSpec, edit_json, write_run
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.sources import TarSource, open_source
from ulfine_fast.cli.main import app
from ulfine_fast.report.images import find_images
from ulfine_fast.runs.files import load_run

COLORS = ("red", "green", "blue", "white")


def draw_folder(root: Path) -> Path:
    """Four images, two in each of two classes."""
    for i, color in enumerate(COLORS):
        file = root / f"class{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 8), color).save(file)
    return root


def write_cache(folder: Path, images: Path) -> Path:
    folder.mkdir()
    source = open_source(str(images)).describe()
    (folder / "manifest.json").write_text(json.dumps({"format": "ulfine-fast-cache", "version": 1, "source": source}))
    return folder


def run_of(folder: Path, cache: Path | None) -> Path:
    ids = "class{0}/{1}.png"
    spec = RunSpec(
        classes=2,
        rows=4,
        permute=False,
        cache=None if cache is None else str(cache),
        ids=lambda i: ids.format(i % 2, i),
    )
    return write_run(folder, spec)


def test_images_come_from_the_source_of_the_cache(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", draw_folder(tmp_path / "images"))
    read, reason = find_images([load_run(run_of(tmp_path / "run", cache))])
    assert reason == ""
    assert read is not None
    assert read("class0/2.png").getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(KeyError):
        read("class0/9.png")


def test_a_damaged_image_is_an_os_error(tmp_path: Path) -> None:
    images = draw_folder(tmp_path / "images")
    cache = write_cache(tmp_path / "cache", images)
    (images / "class0" / "2.png").write_bytes(b"\x89PNG broken")
    read, _ = find_images([load_run(run_of(tmp_path / "run", cache))])
    assert read is not None
    with pytest.raises(OSError, match=r"\w+"):
        read("class0/2.png")


def test_a_cache_that_is_gone_gives_the_reason(tmp_path: Path) -> None:
    run = load_run(run_of(tmp_path / "run", tmp_path / "gone"))
    assert find_images([run]) == (None, f"the cache {tmp_path / 'gone'} is gone")


def test_images_that_are_gone_give_the_reason(tmp_path: Path) -> None:
    images = draw_folder(tmp_path / "images")
    cache = write_cache(tmp_path / "cache", images)
    images.rename(tmp_path / "moved")
    read, reason = find_images([load_run(run_of(tmp_path / "run", cache))])
    assert read is None
    assert str(images) in reason


def test_a_run_without_a_cache(tmp_path: Path) -> None:
    run = load_run(run_of(tmp_path / "run", None))
    assert find_images([run]) == (None, "the run was made from features in memory, without a cache")


def test_a_truncated_manifest_gives_the_reason(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", draw_folder(tmp_path / "images"))
    (cache / "manifest.json").write_text('{"source": ')
    _, reason = find_images([load_run(run_of(tmp_path / "run", cache))])
    assert "manifest.json cannot be read (Input data was truncated); it is truncated or not a cache's" in reason


def test_a_named_location_wins(tmp_path: Path) -> None:
    read, _ = find_images([load_run(run_of(tmp_path / "run", None))], str(draw_folder(tmp_path / "images")))
    assert read is not None
    assert read("class1/1.png").size == (12, 8)


def test_a_missing_location_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        find_images([load_run(run_of(tmp_path / "run", None))], str(tmp_path / "nowhere"))


def test_one_cache_of_two_is_enough(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", draw_folder(tmp_path / "images"))
    runs = [load_run(run_of(tmp_path / "a", tmp_path / "gone")), load_run(run_of(tmp_path / "b", cache))]
    read, reason = find_images(runs)
    assert reason == ""
    assert read is not None


def test_images_of_tar_files_are_found_by_opening_their_own_alone(tmp_path: Path, monkeypatch) -> None:
    folder = draw_folder(tmp_path / "images")
    (tmp_path / "tars").mkdir()
    for name in ("class0", "class1"):
        with tarfile.open(tmp_path / "tars" / f"{name}.tar", "w") as tar:
            for path in sorted((folder / name).iterdir()):
                tar.add(path, path.name)
    source = TarSource(str(tmp_path / "tars"), class_names=[])
    opened: list[str] = []
    real = TarSource.open
    monkeypatch.setattr(TarSource, "open", lambda self, part: (opened.append(part.name), real(self, part))[1])
    cache = tmp_path / "cache"
    cache.mkdir()
    manifest = {"format": "ulfine-fast-cache", "version": 2, "source": source.describe()}
    (cache / "manifest.json").write_text(json.dumps(manifest))
    read, _ = find_images([load_run(run_of(tmp_path / "run", cache))])
    assert read is not None
    assert read("class1/1").getpixel((0, 0)) == (0, 128, 0)
    assert read("class1/3").getpixel((0, 0)) == (255, 255, 255)
    assert opened == ["class1.tar"]
    with pytest.raises(KeyError):
        read("class1/9")


def test_images_of_merged_and_grown_caches(tmp_path: Path) -> None:
    """One cache kept its ids, the other got a prefix, and has grown by a tar file since."""
    described = [open_source(str(draw_folder(tmp_path / name))).describe() for name in ("one", "other")]
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        tar.add(tmp_path / "one/class0/2.png", "late.png")
    names = tmp_path / "names.txt"
    names.write_text("class0")
    described[1]["appended"] = [TarSource(str(tmp_path / "train-0.tar"), class_names_file=names).describe()]
    caches = [{"source": described[0]}, {"source": described[1], "prefix": "other/"}]
    cache = write_cache(tmp_path / "cache", tmp_path / "one")
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["source"] = {"kind": "merged", "caches": caches}
    (cache / "manifest.json").write_text(json.dumps(manifest))
    read, reason = find_images([load_run(run_of(tmp_path / "run", cache))])
    assert reason == ""
    assert read is not None
    for row_id, color in (
        ("class1/1.png", (0, 128, 0)),
        ("other/class1/1.png", (0, 128, 0)),
        ("other/train-0/late", (0, 0, 255)),
    ):
        assert read(row_id).getpixel((0, 0)) == color
    with pytest.raises(KeyError):
        read("train-0/late")


@pytest.fixture
def server(monkeypatch):
    """An address, and what was asked of it or of any other machine."""
    asked: list[str] = []

    class Elsewhere(AbstractFileSystem):
        """Files of another machine; every way to one is counted."""

        protocol = ("http", "s3")
        cachable = False

        def info(self, path: str, **_: object) -> dict[str, object]:
            asked.append(path)
            raise FileNotFoundError(path)

        def ls(self, path: str, detail: bool = True, **_: object) -> list[object]:
            asked.append(path)
            raise FileNotFoundError(path)

    monkeypatch.setitem(_registry, "http", Elsewhere)
    monkeypatch.setitem(_registry, "s3", Elsewhere)
    monkeypatch.setattr("datasets.load_dataset", lambda name, **_: asked.append(name))
    monkeypatch.setattr("torchvision.datasets.SVHN", lambda *_, **__: asked.append("svhn"))
    return "http://127.0.0.1:9", asked


@pytest.mark.parametrize(
    "source",
    [
        {"kind": "tar", "path": "URL/a.tar"},
        {"kind": "tar", "path": "URL/{0..3}.tar"},
        {"kind": "tar", "path": "{/tmp/a,URL/a}.tar"},
        {"kind": "tar", "path": "simplecache::URL/a.tar"},
        {"kind": "tar", "path": "file::URL/a.tar"},
        {"kind": "parquet", "path": "URL/a.parquet"},
        {"kind": "parquet", "path": "s3://bucket/a.parquet"},
        {"kind": "huggingface", "path": "URL/data"},
        {"kind": "huggingface", "path": "owner/name"},
        {"kind": "folder", "path": "URL/images"},
        {"kind": "table", "path": "URL/table.csv"},
        {"kind": "torchvision", "name": "svhn"},
        {"kind": "merged", "caches": [{"source": {"kind": "tar", "path": "URL/a.tar"}}]},
        {"kind": "folder", "path": "IMAGES", "appended": [{"kind": "tar", "path": "URL/a.tar"}]},
    ],
)
def test_nothing_is_fetched_that_a_manifest_names(tmp_path: Path, server, monkeypatch, source) -> None:
    monkeypatch.setenv("ULFINE_FAST_HOME", str(tmp_path / "home"))
    address, asked = server
    images = draw_folder(tmp_path / "images")
    cache = write_cache(tmp_path / "cache", images)
    named = json.loads(json.dumps(source).replace("URL", address).replace("IMAGES", str(images)))
    (cache / "manifest.json").write_text(json.dumps({"format": "ulfine-fast-cache", "version": 2, "source": named}))
    _, reason = find_images([load_run(run_of(tmp_path / "run", cache))])
    assert "fetches nothing" in reason or named["kind"] == "folder"
    assert asked == []


def test_nothing_is_fetched_from_a_cache_that_a_run_names(tmp_path: Path, server) -> None:
    address, asked = server
    run = run_of(tmp_path / "run", None)
    for cache in (f"{address}/cache", f"{address}/cache".replace("//", "/"), f"simplecache::{address}/cache"):
        edit_json(run / "config.json", cache=cache)
        _, reason = find_images([load_run(run)])
        assert "from which a report fetches nothing" in reason
        done = CliRunner().invoke(app, ["report", str(run), "--out", str(tmp_path / "page.html")])
        assert done.exit_code == 0, done.output
    assert asked == []


def test_what_the_user_names_is_fetched(tmp_path: Path, server) -> None:
    address, asked = server
    with pytest.raises(InputError):
        find_images([load_run(run_of(tmp_path / "run", None))], f"{address}/a.parquet")
    assert asked


@pytest.mark.parametrize(
    "source",
    [
        None,
        "x",
        {},
        {"kind": 3},
        {"kind": "folder", "path": 3},
        {"kind": "folder", "path": "a\0b"},
        {"kind": "table", "path": ["x"]},
        {"kind": "tar", "path": {}},
        {"kind": "torchvision"},
        {"kind": "merged", "caches": ["x"]},
        {"kind": "merged", "caches": [{"source": 3}]},
        {"kind": "folder", "appended": {"x": 1}},
    ],
)
def test_a_manifest_of_other_types_gives_the_reason(tmp_path: Path, source) -> None:
    cache = write_cache(tmp_path / "cache", draw_folder(tmp_path / "images"))
    (cache / "manifest.json").write_text(json.dumps({"format": "ulfine-fast-cache", "version": 1, "source": source}))
    read, reason = find_images([load_run(run_of(tmp_path / "run", cache))])
    assert read is None
    assert reason
