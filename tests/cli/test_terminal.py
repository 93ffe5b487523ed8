"""What reaches the terminal: no escape code of a name, and a command works without a terminal at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cache.samples import write_cache
from tests.cli.program import run as command
from tests.report.writer import RunSpec, edit_json, write_run
from ulfine_fast import FeatureCache, Run

ESCAPE = "\x1b]0;owned\x07\x1b[31mdog\u202e"
PARTS = [("train", 6), ("train", 6), ("unlabeled", 4), ("val", 2), ("test", 3)]
FIT = ["--method", "linear_probe", "--steps", "4", "--eval-every", "2"]


def no_codes(done):
    text = done.stdout + done.stderr
    assert not {char for char in text if char != "\n" and not char.isprintable()}, repr(text)
    return text


@pytest.fixture
def cache(tmp_path):
    """A cache of a version that does not tie its parts together, with hostile names in its manifest."""
    write_cache(tmp_path / "cache", PARTS)
    names = {"class_names": ["cat", ESCAPE], "created_by": ESCAPE, "precision": ESCAPE, "prompts": [ESCAPE + "{}"]}
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    model = {**manifest["model"], "name": ESCAPE, "pretrained": ESCAPE}
    source = {**manifest["source"], "path": ESCAPE}
    edit_json(tmp_path / "cache" / "manifest.json", **names, model=model, source=source)
    return tmp_path / "cache"


def test_inspect_prints_no_escape_code(cache):
    no_codes(command("inspect", cache))


def test_a_refusal_prints_no_escape_code(tmp_path):
    run = write_run(tmp_path / "run", RunSpec(classes=2, names=("cat", ESCAPE), rows=20))
    for changes in ({"status": 3, "cache": ESCAPE}, {"format": ESCAPE}, {"config": {"method": ESCAPE}}):
        edit_json(run / "config.json", **changes)
        done = command("eval", run)
        assert done.exit_code == 2
        assert len(no_codes(done).splitlines()) == 1


def test_a_report_prints_no_escape_code(tmp_path):
    run = write_run(tmp_path / "run", RunSpec(classes=2, names=("cat", ESCAPE), rows=20, cache=ESCAPE))
    done = command("report", run, "--out", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    assert r"\x1b]0;owned\x07" in no_codes(done)


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&-", "<&- >&- 2>&-"])
def test_a_command_works_with_closed_streams(tmp_path, closed):
    write_cache(tmp_path / "cache", PARTS)
    program = f"{sys.executable} -m ulfine_fast.cli.main"
    line = f"{program} fit {tmp_path}/cache --out {tmp_path}/run {' '.join(FIT)} {closed}"
    done = subprocess.run(
        ["sh", "-c", line], cwd=Path(__file__).parents[2], env={**os.environ}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Run.load(tmp_path / "run").status == "done"
    assert len(FeatureCache.open(tmp_path / "cache")) == 21
