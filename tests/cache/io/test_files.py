from __future__ import annotations

import errno
import os

import pytest

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import atomic_file, make_folder, remove_partial_files, write_atomically


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path):
    path = tmp_path / "a.npy"
    with atomic_file(path) as file:
        file.write(b"first ")
        file.write(b"second")
        assert [one.name for one in tmp_path.iterdir()] == ["a.npy.tmp"]
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("a.npy", b"first second")]


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_file_and_no_new_one(tmp_path, error):
    write_atomically(tmp_path / "a.json", b"old")

    def write():
        with atomic_file(tmp_path / "a.json") as file:
            file.write(b"new")
            raise error

    with pytest.raises(type(error)):
        write()
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("a.json", b"old")]


def test_a_refused_write_names_the_file(tmp_path):
    with (
        pytest.raises(InputError, match=r"cannot write .*a\.json \(No space left on device\); make room"),
        atomic_file(tmp_path / "a.json"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(InputError, match=r"cannot write .*none/a\.json"):
        write_atomically(tmp_path / "none/a.json", b"")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*file/folder"):
        make_folder(tmp_path / "file/folder")


def test_processes_at_one_file_have_temporary_names_of_their_own(tmp_path):
    with atomic_file(tmp_path / "00000.h5", concurrent=True):
        assert [one.name for one in tmp_path.iterdir()] == [f"00000.h5.{os.getpid()}.tmp"]


def test_only_temporary_files_of_a_cache_are_removed(tmp_path):
    (tmp_path / "shards").mkdir()
    kept = ["mine.tmp", "notes.txt", "shards/00000.h5"]
    for name in ("manifest.json.tmp", "shards/00001.h5.77.tmp", "shards/00001.json.tmp", *kept):
        (tmp_path / name).write_bytes(b"")
    remove_partial_files(tmp_path)
    assert sorted(str(one.relative_to(tmp_path)) for one in tmp_path.rglob("*") if one.is_file()) == kept
