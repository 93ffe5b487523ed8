"""What the doctor says of this machine, and of machines that lack something."""

from __future__ import annotations

import json
from importlib import metadata

import huggingface_hub.constants
import pytest
import torch

from tests.cache.samples import write_cache
from tests.cli.program import run
from tests.test_install import ROOT
from ulfine_fast.cache.io.toml import read_toml
from ulfine_fast.core import machine


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("ULFINE_FAST_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ULFINE_FAST_DEVICE", "cpu")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def test_all_that_is_required_is_there(tmp_path):
    write_cache(tmp_path / "work" / "my-cache")
    done = run("doctor", "--json")
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["problems"] == []
    assert summary["packages"]["torch"] == torch.__version__.partition("+")[0] or metadata.version("torch")
    assert summary["device"] == "cpu"
    assert summary["hub"] == "HF_HUB_OFFLINE is set"
    assert summary["content"] == {str(tmp_path / "work" / "my-cache"): "cache"}
    assert summary["disk"].keys() == {str(tmp_path / "work"), str(tmp_path / "home")}
    assert all(gigabytes > 0 for gigabytes in summary["disk"].values())
    assert summary["extras"]["review"]["missing"] == []

    lines = run("doctor").stdout.splitlines()
    assert f"cache: {tmp_path / 'work' / 'my-cache'}" in lines
    assert "model hub: HF_HUB_OFFLINE is set" in lines
    assert lines[-1] == "everything required is there"


def test_every_extra_of_a_user_is_listed():
    extras = read_toml(ROOT / "pyproject.toml")["project"]["optional-dependencies"]
    assert set(machine.EXTRAS) == set(extras) - {"dev", "docs"}


@pytest.mark.parametrize(
    ("required", "problem", "missing"),
    [
        (["torch>=999"], "does not fit >=999; pip install 'torch>=999'", []),
        (["no-such-library>=1"], "no-such-library is not installed; pip install 'no-such-library>=1'", []),
        (["no-such-library; platform_system == 'Plan9'"], None, []),
        (["no-such-library; extra == 'umap'"], None, ["no-such-library"]),
    ],
)
def test_what_is_missing_is_named_with_its_fix(monkeypatch, required, problem, missing):
    monkeypatch.setattr(machine.metadata, "requires", lambda name: required)
    done = run("doctor", "--json")
    summary = json.loads(done.stdout)
    assert done.exit_code == (0 if problem is None else 1)
    assert problem is None or problem in summary["problems"][0]
    assert summary["extras"]["umap"]["missing"] == missing
    printed = run("doctor").stdout
    assert (f"problem: {summary['problems'][0]}" in printed) if problem else ("problem:" not in printed)
    assert ('umap: missing, pip install "ulfine-fast[umap]"' in printed) == bool(missing)


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setenv("ULFINE_FAST_DEVICE", "tpu")
    done = run("doctor")
    assert done.exit_code == 1
    assert "problem: device 'tpu' is not available here" in done.stdout
