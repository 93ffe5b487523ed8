"""Caches behind URLs: in memory, where one process is enough, and on a real S3 server of this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from typer.testing import CliRunner

from tests.cache.samples import write_images
from ulfine_fast.cache.io import lock
from ulfine_fast.cache.io.errors import CacheMismatch, InputError
from ulfine_fast.cache.io.paths import RemotePath, is_remote, to_path
from ulfine_fast.cache.pipeline.append import append
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.pipeline.merge import merge
from ulfine_fast.cache.sources import open_source
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import app
from ulfine_fast.config import FitConfig
from ulfine_fast.engine.fit import fit

SMALL = {"batch_size": 2, "shard_size": 3, "workers": 0, "prompts": ["a photo of a {}.", "{}"]}


@pytest.fixture
def memory():
    """The URL of an empty folder in this process's memory."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    return "memory://shelf/cache"


@pytest.fixture
def undisturbed(images, tiny_encoder, tmp_path):
    """The bytes of the same cache in a folder."""
    extract(open_source(images), tiny_encoder, tmp_path / "here", **SMALL)
    return content(tmp_path / "here")


def content(location) -> dict[str, bytes]:
    """Bytes by name, of all but what says when and how long."""
    files = {path.name: path for path in to_path(location).rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name.endswith(".h5") or name == "manifest.json"}


# -- paths


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("memory://shelf/cache", "memory:///shelf/cache"),
        ("memory://shelf/cache/", "memory:///shelf/cache"),
        (Path("memory://shelf/cache"), "memory:///shelf/cache"),
    ],
)
def test_urls_are_remote_paths(text, shown):
    path = to_path(text)
    assert is_remote(path)
    assert str(path).replace("memory:////", "memory:///").replace("memory://shelf", "memory:///shelf") == shown
    assert to_path(path) is path


@pytest.mark.parametrize("text", ["cache", "/abs/cache", "c:/cache", "with:colon", "file:///abs/cache"])
def test_other_texts_are_folders(text):
    path = to_path(text)
    assert isinstance(path, Path)
    assert str(path) == text.removeprefix("file://")


def test_an_unknown_kind_of_store_is_named():
    with pytest.raises(InputError, match=r"nowhere://x/y cannot be used .*nowhere"):
        to_path("nowhere://x/y")


def test_a_remote_path_does_what_a_path_does(memory, tmp_path):
    for root in (tmp_path, to_path(memory)):
        file = root / "a" / "b.h5"
        assert not file.exists()
        file.parent.mkdir(parents=True, exist_ok=True)
        assert file.write_bytes(b"12345") == 5
        assert (file.name, file.stem, file.suffix, file.parent.name) == ("b.h5", "b", ".h5", "a")
        assert file.with_suffix(".json").name == "b.json"
        assert file.with_name("c").name == "c"
        assert (file.exists(), file.is_file(), file.is_dir(), file.parent.is_dir()) == (True, True, False, True)
        assert [path.name for path in (root / "a").iterdir()] == ["b.h5"]
        assert file.stat().st_size == 5
        assert (file.read_bytes(), file.read_text(encoding="utf-8")) == (b"12345", "12345")
        with file.open("rb") as opened:
            opened.seek(3)
            assert opened.read() == b"45"
        assert sorted([file, file.with_name("a")])[0].name == "a"
        file.unlink()
        file.unlink(missing_ok=True)
        with pytest.raises(FileNotFoundError):
            file.unlink()


def test_a_store_with_errors_of_its_own_raises_oserror():
    class OddStore:
        protocol = "odd"

        def exists(self, path):
            raise ZeroDivisionError("the store\nis odd")

        def unstrip_protocol(self, path):
            return f"odd://{path}"

    with pytest.raises(OSError, match="odd://a: the store is odd"):
        RemotePath(OddStore(), "a").exists()


# -- caches


def test_a_cache_behind_a_url_is_the_same(memory, images, tiny_encoder, undisturbed, tmp_path):
    done = extract(open_source(images), tiny_encoder, memory, **SMALL)
    assert (done.images, done.encoded, done.shards) == (11, 11, 5)
    assert done.to_dict()["out"].endswith("shelf/cache")
    assert content(memory) == undisturbed
    again = extract(open_source(images), tiny_encoder, memory, **SMALL)
    assert (again.encoded, again.kept) == (0, 5)
    assert extract(open_source(images), tiny_encoder, memory, **SMALL, mode="verify").shards == 5
    here, there = FeatureCache.open(tmp_path / "here"), FeatureCache.open(memory)
    assert (here.ids, here.plain.tobytes()) == (there.ids, there.plain.tobytes())
    assert there.verify() == []
    assert there.summary()["bytes"] > sum(record.bytes for record in there.records)


def test_what_is_missing_or_cut_is_made_again(memory, images, tiny_encoder, undisturbed):
    extract(open_source(images), tiny_encoder, memory, **SMALL)
    shards = to_path(memory) / "shards"
    (shards / "00001.json").unlink()
    (shards / "00003.h5").write_bytes((shards / "00003.h5").read_bytes()[:100])
    done = extract(open_source(images), tiny_encoder, memory, **SMALL)
    assert done.kept == 3
    assert content(memory) == undisturbed


def test_another_model_is_refused_and_overwrite_starts_anew(memory, images, tiny_encoder, undisturbed):
    extract(open_source(images), tiny_encoder, memory, **{**SMALL, "prompts": ["{}"]})
    with pytest.raises(CacheMismatch, match="prompts"):
        extract(open_source(images), tiny_encoder, memory, **SMALL)
    extract(open_source(images), tiny_encoder, memory, **SMALL, mode="overwrite")
    assert content(memory) == undisturbed


def test_a_folder_with_other_files_is_left_alone(memory, images, tiny_encoder):
    (to_path(memory) / "thesis.txt").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"thesis\.txt"):
        extract(open_source(images), tiny_encoder, memory, **SMALL)


def test_append_and_merge_take_urls(memory, images, tiny_encoder, tmp_path):
    extract(open_source(images), tiny_encoder, memory, **SMALL)
    more = write_images(tmp_path / "more", {"train/cow": 2, "train/cat": 1}, seed=5)
    assert append(open_source(more), tiny_encoder, memory, workers=0).images >= 13
    assert FeatureCache.open(memory).class_names == ["cat", "dog", "cow"]
    extract(open_source(more), tiny_encoder, "memory://shelf/more", **SMALL)
    done = merge([memory, "memory://shelf/more"], "memory://shelf/both", prefix=True)
    assert FeatureCache.open("memory://shelf/both").verify() == []
    assert len(FeatureCache.open("memory://shelf/both")) == done.images


def test_a_store_that_refuses_ends_in_a_sentence(memory, images, tiny_encoder, monkeypatch):
    upload = RemotePath.write_bytes

    def full(self, data):
        if self.name == "00002.h5":
            raise OSError("quota exceeded")
        return upload(self, data)

    monkeypatch.setattr(RemotePath, "write_bytes", full)
    with pytest.raises(InputError, match=r"cannot write .*00002\.h5 \(quota exceeded\)"):
        extract(open_source(images), tiny_encoder, memory, **SMALL)
    monkeypatch.undo()
    assert extract(open_source(images), tiny_encoder, memory, **SMALL).kept == 2


# -- one writer


def holder(memory: str, process: int, host: str | None = None) -> Path:
    note = to_path(memory) / ".writer.json"
    content = {"host": host or socket.gethostname(), "process": process, "since": "2026-01-01T00:00:00+00:00"}
    note.write_bytes(json.dumps(content).encode())
    return note


@pytest.mark.parametrize(("process", "host"), [(os.getppid(), None), (1, "another-machine")])
def test_a_second_writer_learns_which_process_holds_the_folder(memory, images, tiny_encoder, process, host):
    note = holder(memory, process, host)
    with pytest.raises(InputError, match=rf"process {process} on .*remove .*\.writer\.json"):
        extract(open_source(images), tiny_encoder, memory, **SMALL)
    note.unlink()
    assert extract(open_source(images), tiny_encoder, memory, **SMALL).encoded == 11
    assert not note.exists()


def test_the_note_of_a_killed_process_of_this_machine_blocks_no_other(memory, images, tiny_encoder):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    holder(memory, child.pid)
    assert extract(open_source(images), tiny_encoder, memory, **SMALL).encoded == 11


def test_two_of_one_process_do_not_both_write(memory):
    with lock.writer(to_path(memory)), pytest.raises(InputError, match="another process writes"):  # noqa: SIM117
        with lock.writer(to_path(memory)):
            pass


# -- a real S3 server

CHILD = """
import os, signal, sys
from ulfine_fast.cache.models.encoder import load_encoder
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.io.paths import RemotePath
from ulfine_fast.cache.sources import open_source

upload = RemotePath.write_bytes
def die(self, data):
    if self.name == "00002.json":
        os.kill(os.getpid(), signal.SIGKILL)
    return upload(self, data)
RemotePath.write_bytes = die
images, model, out = sys.argv[1:]
extract(open_source(images), load_encoder(model, device="cpu"), out, batch_size=2, shard_size=3,
        workers=0, prompts=["a photo of a {}.", "{}"])
"""


@pytest.fixture(scope="module")
def server():
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    running = moto.ThreadedMotoServer(port=0, verbose=False)
    running.start()
    yield "http://{}:{}".format(*running.get_host_and_port())
    running.stop()


@pytest.fixture
def bucket(server, monkeypatch):
    """The URL of an empty bucket, with credentials where s3fs looks for them."""
    import s3fs

    settings = {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    if system.exists("shelf"):
        system.rm("shelf", recursive=True)
    system.mkdir("shelf")
    yield "s3://shelf"
    s3fs.S3FileSystem.clear_instance_cache()


def test_s3_killed_and_continued(bucket, images, tiny_model, tiny_encoder, undisturbed, tmp_path):
    out = f"{bucket}/some/cache"
    child = subprocess.run([sys.executable, "-c", CHILD, str(images), tiny_model, out], check=False)
    assert child.returncode == -signal.SIGKILL
    assert (to_path(out) / "shards/00002.h5").exists()
    done = extract(open_source(images), tiny_encoder, out, **SMALL)
    assert (done.kept, done.encoded) == (2, 6)
    assert content(out) == undisturbed
    cache = FeatureCache.open(out)
    assert cache.verify() == []
    run = fit(cache, FitConfig(method="linear_probe", n1=1, gamma_l=1, m1=0, steps=3), progress=False)
    run.save(tmp_path / "run")
    assert "shelf/some/cache" in "".join(path.read_text() for path in (tmp_path / "run").rglob("*.json"))


def test_s3_holds_tars_and_caches(bucket, tmp_path, tiny_model):
    import io
    import tarfile

    root = write_images(tmp_path / "p", {"train/cat": 3, "train/dog": 3})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, path in enumerate(sorted(root.rglob("*.png"))):
            for suffix, data in (("png", path.read_bytes()), ("cls", str(number % 2).encode())):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (to_path(bucket) / "in/train-000.tar").write_bytes(buffer.getvalue())
    (tmp_path / "names.txt").write_text("cat\ndog")
    arguments = ["extract", f"{bucket}/in/*.tar", "--out", f"{bucket}/out", "--model", tiny_model, "--workers", "0"]
    arguments += ["--class-names", str(tmp_path / "names.txt"), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["images"] == 6
    seen = CliRunner().invoke(app, ["inspect", f"{bucket}/out", "--json"])
    assert json.loads(seen.stdout)["problems"] == []
    fitted = ["fit", f"{bucket}/out", "--out", str(tmp_path / "run"), "--method", "linear_probe", "--steps", "2"]
    fitted += ["--n1", "2", "--gamma-l", "1", "--m1", "0", "--gamma-u", "1", "--json"]
    ended = CliRunner().invoke(app, fitted)
    assert ended.exit_code == 0, ended.output


def test_s3_without_the_bucket(bucket, images, tiny_encoder):
    with pytest.raises(InputError, match=r"s3://not-there/cache cannot be used \(there is no bucket not-there\)"):
        extract(open_source(images), tiny_encoder, "s3://not-there/cache", **SMALL)
    assert not (to_path(bucket).system.exists("not-there"))


def test_s3_without_credentials(bucket, images, tiny_model, monkeypatch):
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    done = CliRunner().invoke(app, ["extract", str(images), "--out", f"{bucket}/cache", "--model", tiny_model])
    assert done.exit_code == 2
    assert "check the address and your credentials" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
