from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from tests.report.writer import RunSpec, write_run
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.sources import TarSource, open_source
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
    assert reason.endswith("manifest.json is truncated or not a cache's manifest")


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
