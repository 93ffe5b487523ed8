"""`fit` interrupted, and `fit` of a trial that diverges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.cache.samples import write_images, write_tiny_model
from tests.cli.program import run
from ulfine_fast import Run
from ulfine_fast.engine import fit as train
from ulfine_fast.engine.checkpoint import Checkpoint

OPTIONS = ["--method", "ulfine", "--steps", 30, "--eval-every", 10]
WILD = ["--lr", 1e38, "--weight-decay", 1e3]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    source = write_images(folder / "images", {"train/cat": 8, "train/dog": 6, "test/cat": 2, "test/dog": 2})
    model = write_tiny_model(tmp_path_factory.mktemp("model"))
    done = run("extract", source, "--out", folder / "cache", "--model", model, "--workers", 0)
    assert done.exit_code == 0, done.output
    return folder / "cache"


@pytest.fixture
def interrupted(cache, tmp_path, monkeypatch):
    """A run folder whose fit died at its second evaluation."""
    save, saved = Checkpoint.save, []

    def dying(*given):
        if saved:
            raise KeyboardInterrupt
        saved.append(given)
        save(*given)

    monkeypatch.setattr(Checkpoint, "save", dying)
    assert run("fit", cache, *OPTIONS, "--out", tmp_path / "run").exit_code == 130
    monkeypatch.setattr(Checkpoint, "save", save)
    return tmp_path / "run"


def test_the_same_command_goes_on(cache, interrupted, tmp_path):
    done = run("fit", cache, *OPTIONS, "--out", interrupted)
    assert done.exit_code == 0, done.output
    assert "continuing from step 10" in done.stderr
    assert not (interrupted / ".checkpoint").exists()
    whole = run("fit", cache, *OPTIONS, "--out", tmp_path / "whole")
    assert "continuing" not in whole.stderr
    one, other = Run.load(interrupted), Run.load(tmp_path / "whole")
    assert one.history == other.history
    assert torch.equal(one.tensors["linear"], other.tensors["linear"])


def test_other_settings_do_not_go_on_from_there(cache, interrupted):
    done = run("fit", cache, *OPTIONS, "--lr", 0.5, "--out", interrupted)
    assert done.exit_code == 2
    sentence = done.stderr.strip().splitlines()[-1]
    assert "is the checkpoint of a fit with lr = 0.01, not 0.5; finish that one, or remove the folder" in sentence


def test_a_diverged_run_is_one_sentence_and_no_folder(cache, tmp_path):
    done = run("fit", cache, *OPTIONS, *WILD, "--out", tmp_path / "run")
    assert done.exit_code == 1
    assert done.stderr.strip() == (
        "error: seed 0 of ulfine diverged: its loss or weights were not finite at step 10; lower lr (now 1e+38)"
    )
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()


def test_of_several_seeds_those_that_did_not_diverge_are_saved(cache, tmp_path, monkeypatch):
    plain = train.fit_many

    def second_is_wild(features, configs, **given):
        wild = replace(configs[1], lr=1e38, weight_decay=1e3)
        return plain(features, [configs[0], wild, *configs[2:]], **given)

    monkeypatch.setattr(train, "fit_many", second_is_wild)
    done = run("fit", cache, *OPTIONS, "--seeds", 3, "--out", tmp_path / "run")
    assert done.exit_code == 1
    assert done.stderr.strip().startswith("error: seed 1 of ulfine diverged")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["seed-0", "seed-2", "summary.json"]
    assert Run.load(tmp_path / "run" / "seed-2").status == "done"
