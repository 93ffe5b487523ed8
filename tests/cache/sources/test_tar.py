from __future__ import annotations

import functools
import http.server
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from tests.cache.samples import png
from ulfine_fast.cache.io.errors import CacheMismatch, InputError
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.sources import open_source, reopen_source, streams
from ulfine_fast.cache.sources.image import UnreadableImage
from ulfine_fast.cache.sources.tar import TarSource
from ulfine_fast.cache.store import FeatureCache

NAMES = ["cat", "dog"]


def packed(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def samples(count: int, first: int = 0, label: bytes | None = b"0") -> dict[str, bytes]:
    members = {}
    for number in range(first, first + count):
        members[f"{number:04d}.png"] = png(number)
        if label is not None:
            members[f"{number:04d}.cls"] = label
    return members


@pytest.fixture
def names(tmp_path) -> Path:
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    return tmp_path / "names.txt"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two tar files of train, one each of the other splits."""
    root = tmp_path / "tars"
    root.mkdir()
    (root / "train-000.tar").write_bytes(packed(samples(3, label=b"0")))
    (root / "train-001.tar").write_bytes(packed(samples(2, first=3, label=b"dog")))
    (root / "unlabelled-000.tar").write_bytes(packed(samples(2, first=5, label=None)))
    (root / "test-000.tar").write_bytes(packed(samples(2, first=7, label=b"1")))
    return root


def one(tmp_path, names, members: dict[str, bytes], name: str = "a.tar") -> TarSource:
    (tmp_path / name).write_bytes(packed(members))
    return TarSource(str(tmp_path / name), class_names_file=names)


def rows_of(source):
    return [row for part in source.plan(1) for row in source.open(part)]


def test_a_tar_file_is_a_part_and_its_name_says_the_split(folder, names):
    source = TarSource(str(folder), class_names_file=names)
    assert [(part.number, part.split, part.name) for part in source.plan(1024)] == [
        (0, "train", "train-000.tar"),
        (1, "train", "train-001.tar"),
        (2, "unlabeled", "unlabelled-000.tar"),
        (3, "test", "test-000.tar"),
    ]
    assert [(row.id, row.label) for row in rows_of(source)] == [
        *((f"train-000/{number:04d}", 0) for number in range(3)),
        *((f"train-001/{number:04d}", 1) for number in (3, 4)),
        *((f"unlabelled-000/{number:04d}", -1) for number in (5, 6)),
        *((f"test-000/{number:04d}", 1) for number in (7, 8)),
    ]


def test_images_are_those_that_went_in_also_after_a_journey(folder, names):
    source = pickle.loads(pickle.dumps(TarSource(str(folder), class_names_file=names)))
    for number, row in enumerate(rows_of(source)):
        wanted = np.asarray(Image.open(io.BytesIO(png(number))).convert("RGB"))
        assert np.array_equal(np.asarray(source.read(row)), wanted)


@pytest.mark.parametrize(
    ("name", "label", "split"),
    [
        ("training/0.tar", b"0", "train"),
        ("validation-3.tar", b"0", "val"),
        ("test/0.tar", None, "test"),
        ("00017.tar", b"0", "train"),
        ("00017.tar", None, "unlabeled"),
        ("trainers.tar", None, "unlabeled"),
    ],
)
def test_splits(tmp_path, names, name, label, split):
    path = tmp_path / "root" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(packed(samples(1, label=label)))
    source = TarSource(str(tmp_path / "root"), class_names_file=names)
    assert [part.split for part in source.plan(1)] == [split]


@pytest.mark.parametrize(
    ("beside", "label"),
    [
        ({"x.cls": b"1"}, 1),
        ({"x.cls": b" dog\n"}, 1),
        ({"x.json": b'{"label": 0, "class": 1}'}, 0),
        ({"x.json": b'{"class": "dog"}'}, 1),
        ({"x.json": b'{"label": null}'}, -1),
        ({"x.json": b"[1]"}, -1),
        ({"x.json": b"cut"}, -1),
        ({"x.txt": b"a dog"}, -1),
    ],
)
def test_labels(tmp_path, names, beside, label):
    assert [row.label for row in rows_of(one(tmp_path, names, {"x.png": png(), **beside}))] == [label]


def test_what_a_downloader_leaves_is_understood(tmp_path, names):
    """Captions, notes, failed samples without an image, statistics and tables beside the tar files."""
    members = {"000/0000.jpg": png(), "000/0000.txt": b"a cat", "000/0000.json": b'{"url": "x"}'}
    members |= {"000/0001.json": b'{"status": "failed"}', "000/0002.left.png": png(2)}
    root = tmp_path / "out"
    root.mkdir()
    (root / "00000.tar").write_bytes(packed(members))
    (root / "00000_stats.json").write_text(json.dumps({"count": 3}))
    (root / "00000.parquet").write_bytes(b"beside")
    source = open_source(root, class_names_file=names)
    assert [row.id for row in rows_of(source)] == ["00000/000/0000", "00000/000/0002"]


def test_braces_and_stars(folder, names):
    both = TarSource(f"{folder}/train-00{{0..1}}.tar", class_names_file=names)
    stars = TarSource(f"{folder}/train-*.tar", class_names_file=names)
    assert (
        [file.name for file in both.files] == [file.name for file in stars.files] == ["train-000.tar", "train-001.tar"]
    )


def test_two_files_of_one_name_keep_their_folders(tmp_path, names):
    for place in "ab":
        (tmp_path / place).mkdir()
        (tmp_path / place / "0.tar").write_bytes(packed(samples(1)))
    source = TarSource(f"{tmp_path}/{{a,b}}/0.tar", class_names_file=names)
    assert len({row.id for row in rows_of(source)}) == 2


def test_a_remote_file_is_copied_while_it_is_worked_on(folder, names, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "copies"))
    (tmp_path / "copies").mkdir()
    memory = fsspec.filesystem("memory")
    memory.pipe("/images/train-0.tar", packed(samples(2)))
    source = open_source("memory://images", class_names_file=names)
    (part,) = source.plan(1)
    assert (part.name, part.split) == ("train-0.tar", "train")
    rows = source.open(part)
    assert len(list((tmp_path / "copies").iterdir())) == 1
    assert source.read(rows[1]).size == (24, 20)
    source.close(part)
    assert list((tmp_path / "copies").iterdir()) == []
    memory.rm("/images", recursive=True)


# -- bad input


def test_a_tar_file_cut_in_the_middle_is_named(tmp_path, names):
    whole = packed(samples(4))
    for length in (len(whole) // 2, 700, 1024 + 600):
        (tmp_path / "train.tar").write_bytes(whole[:length])
        source = TarSource(str(tmp_path / "train.tar"), class_names_file=names)
        with pytest.raises(InputError, match=r"train\.tar cannot be read as a tar file .*fetch it again"):
            rows_of(source)


def test_a_damaged_header_after_the_first_is_no_end(tmp_path, names):
    source = one(tmp_path, names, samples(3))
    whole = (tmp_path / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        second = tar.getmembers()[2].offset
    (tmp_path / "a.tar").write_bytes(whole[:second] + bytes([255]) * 512 + whole[second + 512 :])
    with pytest.raises(InputError, match=rf"a\.tar.*{second}"):
        rows_of(source)


def test_a_tar_file_cut_between_members_has_no_mark_of_its_end(tmp_path, names):
    source = one(tmp_path, names, samples(3))
    with tarfile.open(tmp_path / "a.tar") as tar:
        third = tar.getmembers()[4].offset
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:third])
    with pytest.raises(InputError, match=r"a\.tar.*mark of the end"):
        rows_of(source)


def test_a_name_that_comes_again_is_refused(tmp_path, names, tiny_encoder):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for _ in range(2):
            for name, content in samples(1).items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    source = TarSource(str(tmp_path / "a.tar"), class_names_file=names)
    with pytest.raises(InputError, match="0000"):
        extract(source, tiny_encoder, tmp_path / "cache", workers=0)


def test_signs_of_patterns_in_a_files_very_name(tmp_path, names):
    for name in ("train[1].tar", "train{2}.tar", "train*.tar"):
        assert len(rows_of(one(tmp_path, names, samples(2), name))) == 2
        assert len(TarSource(str(tmp_path / name), class_names_file=names).files) == 1


def test_a_brace_without_its_other_half_is_named(tmp_path, names):
    with pytest.raises(InputError, match=r"\{0\.\.3"):
        TarSource(str(tmp_path / "train-{0..3.tar"), class_names_file=names)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A web server as Python has it: it says lengths of files, none in its listings, and gives no pieces."""

    def log_message(self, *_):
        pass


@pytest.fixture
def served(folder):
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_files_of_a_web_server(served, folder, names, tiny_encoder, tmp_path):
    there = TarSource(served + "/train-{000..001}.tar", class_names_file=names)
    here = TarSource(str(folder / "train-{000..001}.tar"), class_names_file=names)
    assert [(file.name, file.bytes) for file in there.files] == [(file.name, file.bytes) for file in here.files]
    assert [part.split for part in there.plan(1)] == [part.split for part in here.plan(1)]
    done = extract(there, tiny_encoder, tmp_path / "cache", workers=1)
    assert (done.images, done.skipped) == (5, [])
    assert not streams._copies  # copies are removed once their shard is written


def test_a_web_server_without_the_file(served, names):
    with pytest.raises(InputError, match="nothing-here"):
        TarSource(served + "/nothing-here.tar", class_names_file=names)


def test_copies_of_remote_files_go_with_the_process(served, names, tmp_path):
    code = (
        "import sys; from ulfine_fast.cache.sources.tar import TarSource;"
        "from pathlib import Path;"
        f"source = TarSource('{served}/train-000.tar', class_names_file=Path({str(names)!r}));"
        "source.open(source.plan(1)[0]); print(len(list(Path(sys.argv[1]).iterdir()))); raise KeyboardInterrupt"
    )
    (tmp_path / "copies").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "copies")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "copies")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.stdout.strip() == "1", done.stderr
    assert list((tmp_path / "copies").iterdir()) == []


@pytest.mark.parametrize("content", [b"no tar file at all" * 100, b"\x1f\x8b compressed"])
def test_what_is_no_tar_file_is_named(tmp_path, names, content):
    (tmp_path / "train.tar").write_bytes(content)
    with pytest.raises(InputError, match=r"train\.tar cannot be read as a tar file"):
        rows_of(TarSource(str(tmp_path / "train.tar"), class_names_file=names))


@pytest.mark.parametrize("name", ["../../x.png", "/etc/x.png", "a/../../x.png", "bell\a.png"])
def test_names_that_lead_out_are_skipped_with_a_reason(tmp_path, names, name):
    source = one(tmp_path, names, {"0.png": png(), name: png(), "2.png": png()})
    rows = rows_of(source)
    assert [row.id for row in rows] == ["a/0", f"a/member-{rows[1].id.rpartition('-')[2]}", "a/2"]
    with pytest.raises(UnreadableImage, match="leads out of the tar file"):
        source.read(rows[1])


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_never_followed(tmp_path, names, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo("0.png")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    source = TarSource(str(tmp_path / "a.tar"), class_names_file=names)
    (row,) = rows_of(source)
    with pytest.raises(UnreadableImage, match="a link or a device"):
        source.read(row)


def test_an_empty_tar_file_has_no_rows(tmp_path, names):
    assert rows_of(one(tmp_path, names, {})) == []


@pytest.mark.parametrize("label", [b"emu", b"2", b"1.5", b"-7"])
def test_an_unknown_class_is_named(tmp_path, names, label):
    with pytest.raises(InputError, match=r"a\.tar.*the label .* is no class; there are 2"):
        rows_of(one(tmp_path, names, {"x.png": png(), "x.cls": label}))


def test_class_names_are_needed(folder, tmp_path):
    with pytest.raises(InputError, match="--class-names FILE"):
        open_source(folder)
    (tmp_path / "twice.txt").write_text("cat\ncat\n")
    with pytest.raises(InputError, match="'cat' twice"):
        open_source(folder, class_names_file=tmp_path / "twice.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match="is empty"):
        open_source(folder, class_names_file=tmp_path / "empty.txt")


def test_nothing_there(tmp_path, names):
    with pytest.raises(InputError, match=r"no \.tar files in"):
        TarSource(str(tmp_path / "absent.tar"), class_names_file=names)


# -- samples that a person must say something about


def test_of_several_images_the_one_with_a_single_suffix_is_taken(tmp_path, names):
    deep = {
        "0.depth.png": png(1),
        "0.cls": b"1",
        "0.png": png(2),
        "1.seg.png": png(3),
        "1.jpeg": png(4),
        "1.cls": b"0",
    }
    source = one(tmp_path, names, deep)
    rows = rows_of(source)
    assert [row.label for row in rows] == [1, 0]
    for row, seed in zip(rows, (2, 4), strict=True):
        wanted = np.asarray(Image.open(io.BytesIO(png(seed))).convert("RGB"))
        assert np.array_equal(np.asarray(source.read(row)), wanted)


@pytest.mark.parametrize(
    "members",
    [
        {"0.left.png": b"", "0.right.png": b""},
        {"0.jpg": b"", "0.png": b""},
        {"0.png": b"", "0.coarse.cls": b"0", "0.fine.cls": b"1"},
        {"0.png": b"", "0.a.json": b"{}", "0.b.json": b"{}"},
    ],
)
def test_an_ambiguous_sample_is_refused_with_its_files(tmp_path, names, members):
    members = {name: content or png() for name, content in members.items()}
    with pytest.raises(InputError, match=r"a\.tar: the sample '0' holds .*, .*, and it is not known which is meant"):
        rows_of(one(tmp_path, names, members))


@pytest.mark.parametrize(
    "order",
    [
        ["0.png", "1.png", "0.cls", "1.cls"],
        ["0.cls", "1.cls", "0.png", "1.png"],
        ["0.png", "1.png", "1.cls", "0.json"],
        ["0.png", "0.cls", "1.png", "1.cls", "0.png"],
    ],
)
def test_a_key_that_comes_back_is_refused(tmp_path, names, order):
    contents = {"png": png(), "cls": b"1", "json": b'{"label": 1}'}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in order:
            member = tarfile.TarInfo(name)
            content = contents[name.partition(".")[2]]
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match=r"the sample '[01]' are not in a row.*sort the tar by name"):
        rows_of(TarSource(str(tmp_path / "a.tar"), class_names_file=names))


def test_what_is_not_read_may_come_back(tmp_path, names):
    """Captions after all images lose nothing."""
    members = {
        "0.png": png(),
        "0.cls": b"1",
        "1.png": png(),
        "1.cls": b"0",
        "0.txt": b"a dog",
        "1.txt": b"a cat",
    }
    assert [row.label for row in rows_of(one(tmp_path, names, members))] == [1, 0]


def test_hidden_members_are_passed_over(tmp_path, names):
    """As a Mac writes a tar file: with a hidden file before each, in folders called `.`, and a folder of such files."""
    members: dict[str, bytes] = {}
    for name, content in samples(2, label=b"1").items():
        members |= {f"./._{name}": b"\0\5\26\7", f"./{name}": content, f"__MACOSX/{name}": b"x"}
    members = dict(sorted(members.items()))
    rows = rows_of(one(tmp_path, names, {**members, ".cache/9.png": png()}))
    assert [(row.id, row.label, row.split) for row in rows] == [("a/0000", 1, "train"), ("a/0001", 1, "train")]


def test_hidden_files_and_folders_hold_no_tar_files(folder, names):
    for hidden in ("._train-000.tar", ".cache/train-9.tar", "__MACOSX/train-9.tar"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        (folder / hidden).write_bytes(b"x")
    assert len(TarSource(str(folder), class_names_file=names).files) == 4


def test_an_index_that_is_a_name_is_refused(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("1\n2\n3\n")
    with pytest.raises(InputError, match=r"label '1' is the name of class 0 and the index of class 1.*folder"):
        rows_of(one(tmp_path, names, {"x.png": png(), "x.cls": b"1"}))
    # What is no name is an index, and what is no index is a name.
    assert [row.label for row in rows_of(one(tmp_path, names, {"x.png": png(), "x.cls": b"0"}))] == [0]
    assert [row.label for row in rows_of(one(tmp_path, names, {"x.png": png(), "x.cls": b"3"}))] == [2]
    # Not both in one source.
    with pytest.raises(InputError, match="'3' is a class name, and '0' is an index"):
        rows_of(one(tmp_path, names, {"x.png": png(), "x.cls": b"0", "y.png": png(), "y.cls": b"3"}))
    # A number in JSON is an index, a text there may be either.
    assert [row.label for row in rows_of(one(tmp_path, names, {"x.png": png(), "x.json": b'{"label": 1}'}))] == [1]
    with pytest.raises(InputError, match="name of class 0 and the index of class 1"):
        rows_of(one(tmp_path, names, {"x.png": png(), "x.json": b'{"label": "1"}'}))


@pytest.mark.parametrize(("lines", "label"), [("0,1\n1,2\n2,3", 1), ("1,one\n2,two", 0), ("2,b\n1,a", 1)])
def test_a_table_says_how_labels_are_written(tmp_path, lines, label):
    (tmp_path / "names.csv").write_text(f"folder,name\n{lines}\n")
    source = one(tmp_path, tmp_path / "names.csv", {"x.png": png(), "x.cls": b"1"})
    assert source.class_names == [line.partition(",")[2] for line in lines.split("\n")]
    assert [row.label for row in rows_of(source)] == [label]
    with pytest.raises(InputError, match="label '7' is no class"):
        rows_of(one(tmp_path, tmp_path / "names.csv", {"x.png": png(), "x.cls": b"7"}))


# -- through the pipeline


SMALL = {"batch_size": 2, "workers": 0, "prompts": ["a photo of a {}."]}


def bytes_of(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(cache.rglob("*.h5"))}


def test_a_tar_file_and_a_folder_give_the_same_features(images, tiny_encoder, names, tmp_path):
    root = tmp_path / "tars"
    root.mkdir()
    for split in ("train", "unlabeled", "val", "test"):
        members = {}
        for path in sorted((images / split).rglob("*.png")):
            key = str(path.relative_to(images / split).with_suffix("")).replace("/", "-")
            members[f"{key}.png"] = path.read_bytes()
            if split != "unlabeled":
                members[f"{key}.cls"] = path.parent.name.encode()
        (root / f"{split}.tar").write_bytes(packed(members))
    views = {"weak": 0, "strong": 0}  # drawn by id, which differs
    from ulfine_fast.cache.pipeline.views import ViewRecipe

    extract(open_source(images), tiny_encoder, tmp_path / "a", views=ViewRecipe(**views), **SMALL)
    source = open_source(root, class_names_file=names)
    summary = extract(source, tiny_encoder, tmp_path / "b", views=ViewRecipe(**views), **SMALL)
    assert (summary.images, summary.shards) == (11, 4)
    one, two = FeatureCache.open(tmp_path / "a"), FeatureCache.open(tmp_path / "b")
    assert np.array_equal(one.plain, two.plain)
    assert one.labels.tolist() == two.labels.tolist()
    assert one.splits.tolist() == two.splits.tolist()
    assert two.manifest.to_dict()["version"] == 3
    assert two.verify() == []
    assert extract(source, tiny_encoder, tmp_path / "b", views=ViewRecipe(**views), **SMALL, mode="verify").shards == 4


class Stopping:
    """A source that is interrupted when a part is opened."""

    def __init__(self, source, at):
        self.source, self.at = source, at
        self.kind, self.class_names = source.kind, source.class_names

    def __getattr__(self, name):
        if name == "rows":
            raise AttributeError(name)
        return getattr(self.source, name)

    def open(self, part):
        if part.number == self.at:
            raise KeyboardInterrupt
        return self.source.open(part)


@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_stopped_run_continues_to_the_same_bytes(folder, names, tiny_encoder, tmp_path, at):
    source = open_source(folder, class_names_file=names)
    extract(source, tiny_encoder, tmp_path / "whole", **SMALL)
    with pytest.raises(KeyboardInterrupt, match="of 4 shards are finished"):
        extract(Stopping(source, at), tiny_encoder, tmp_path / "cache", **SMALL)
    summary = extract(source, tiny_encoder, tmp_path / "cache", **SMALL)
    assert summary.images == 9
    assert bytes_of(tmp_path / "cache") == bytes_of(tmp_path / "whole")
    assert extract(source, tiny_encoder, tmp_path / "cache", **SMALL).encoded == 0


def test_a_changed_file_is_another_source(folder, names, tiny_encoder, tmp_path):
    extract(open_source(folder, class_names_file=names), tiny_encoder, tmp_path / "cache", **SMALL)
    (folder / "test-000.tar").write_bytes(packed(samples(30, first=7)))
    with pytest.raises(CacheMismatch, match=r"source\.fingerprint"):
        extract(open_source(folder, class_names_file=names), tiny_encoder, tmp_path / "cache", **SMALL)


def test_two_samples_of_one_key_are_named(tmp_path, names, tiny_encoder):
    source = one(tmp_path, names, {"0.png": png(), "1.png": png(), "0.jpg": png()}, "train.tar")
    with pytest.raises(InputError, match="sample '0' are not in a row, or it is there twice"):
        extract(source, tiny_encoder, tmp_path / "cache", **SMALL)


def test_skipped_images_are_counted_and_listed(tmp_path, names, tiny_encoder):
    members = {**samples(3), "../out.png": png(), "bad.png": b"no image", "bad.cls": b"1"}
    source = one(tmp_path, names, members, "train.tar")
    summary = extract(source, tiny_encoder, tmp_path / "cache", **SMALL)
    assert (summary.images, len(summary.skipped)) == (3, 2)
    assert FeatureCache.open(tmp_path / "cache").verify() == []


def test_too_many_skipped_images_stop_the_work(tmp_path, names, tiny_encoder):
    members = {f"{number}.png": b"no image" for number in range(6)}
    source = one(tmp_path, names, members, "train.tar")
    with pytest.raises(InputError, match="more than the fraction of"):
        extract(source, tiny_encoder, tmp_path / "cache", **SMALL, shard_size=4)


def test_a_manifest_opens_its_images_again(folder, names, tiny_encoder, tmp_path):
    extract(open_source(folder, class_names_file=names), tiny_encoder, tmp_path / "cache", **SMALL)
    again = reopen_source(FeatureCache.open(tmp_path / "cache").manifest.source)
    assert [row.id for row in rows_of(again)] == FeatureCache.open(tmp_path / "cache").ids


@pytest.mark.parametrize(
    "pattern", ["t-{000..999999999}.tar", "{0..9}{1..99999999999}.tar", "{a,b,c,d,e,f,g}" * 8 + ".tar"]
)
def test_a_pattern_of_very_many_names_is_refused(tmp_path, pattern):
    """Before they are made."""
    with pytest.raises(InputError, match="names 1,000,000 files or more; name their folder"):
        TarSource(str(tmp_path / pattern), class_names=["a"])
