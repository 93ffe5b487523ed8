"""A run over real images, whose names are as bad as names get."""

from __future__ import annotations

import shutil

import pytest

from tests.cache.samples import write_images, write_tiny_model
from tests.cli.program import run
from ulfine_fast.review.session import Session

BAD = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="session")
def reviewed(tmp_path_factory):
    """A run folder of the classes cat, dog and BAD, with unlabelled images."""
    folder = tmp_path_factory.mktemp("reviewed")
    counts = {f"train/{name}": count for name, count in (("cat", 8), ("dog", 6), (BAD, 3))}
    held = {f"test/{name}": 2 for name in ("cat", "dog", BAD)}
    source = write_images(folder / "images", {**counts, **held, "unlabeled": 6})
    shutil.copy(source / "train" / "cat" / "000.png", source / "train" / "dog" / '"&<b>.png')
    model = write_tiny_model(tmp_path_factory.mktemp("model"))
    done = run("extract", source, "--out", folder / "cache", "--model", model, "--workers", 0)
    assert done.exit_code == 0, done.output
    options = ["--method", "linear_probe", "--steps", 20, "--eval-every", 10]
    done = run("fit", folder / "cache", *options, "--out", folder / "run")
    assert done.exit_code == 0, done.output
    return folder / "run"


@pytest.fixture
def session(reviewed, tmp_path):
    return Session(reviewed, tmp_path / "labels.csv", tmp_path / "fitted", device="cpu")
