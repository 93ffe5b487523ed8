from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.lock import NAME, writer
from ulfine_fast.cache.pipeline.extract import extract
from ulfine_fast.cache.sources import open_source
from ulfine_fast.cache.store import FeatureCache

SMALL = {"batch_size": 2, "shard_size": 3, "workers": 0, "prompts": ["{}"]}
# Holds the lock until its standard input is closed.
HOLDER = """
import sys
from pathlib import Path
from ulfine_fast.cache.io.lock import writer

with writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path / "cache"."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "cache")]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.communicate()


def test_a_second_writer_learns_which_process_holds_the_cache(tmp_path, holder, images, tiny_encoder):
    with pytest.raises(InputError, match=rf"another process writes to .*cache \(process {holder.pid} on .*, since 20"):
        extract(open_source(images), tiny_encoder, tmp_path / "cache", **SMALL)
    assert not (tmp_path / "cache/manifest.json").exists()
    holder.communicate()
    assert extract(open_source(images), tiny_encoder, tmp_path / "cache", **SMALL).images == 11


def test_what_a_killed_writer_leaves_blocks_no_other(tmp_path, holder, images, tiny_encoder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / "cache/.writer.json").read_text())["process"] == holder.pid
    assert extract(open_source(images), tiny_encoder, tmp_path / "cache", **SMALL).images == 11
    assert not (tmp_path / "cache/.writer.json").exists()


def test_two_writers_in_one_process(tmp_path):
    with (
        writer(tmp_path / "cache"),
        pytest.raises(InputError, match=f"process {os.getpid()} on"),
        writer(tmp_path / "cache"),
    ):
        pass
    with writer(tmp_path / "cache"):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"process": "x"}'])
def test_a_damaged_note_costs_only_the_name(tmp_path, content):
    with writer(tmp_path / "cache"):
        (tmp_path / "cache/.writer.json").write_text(content)
        with pytest.raises(InputError, match=r"another process writes to .*cache; wait"), writer(tmp_path / "cache"):
            pass


def test_an_error_lets_go(tmp_path):
    with pytest.raises(ZeroDivisionError), writer(tmp_path / "cache"):
        raise ZeroDivisionError
    with writer(tmp_path / "cache"):
        pass


def test_readers_need_no_lock(tmp_path, images, tiny_encoder):
    extract(open_source(images), tiny_encoder, tmp_path / "cache", **SMALL)
    with writer(tmp_path / "cache"):
        assert FeatureCache.open(tmp_path / "cache").verify() == []
        extract(open_source(images), tiny_encoder, tmp_path / "cache", **SMALL, mode="verify")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot write .*file"), writer(tmp_path / "file/cache"):
        pass
    assert NAME not in os.listdir(tmp_path)
