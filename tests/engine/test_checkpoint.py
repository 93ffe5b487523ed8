from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import make_clusters
from ulfine_fast import FitConfig, InputError, fit, fit_many
from ulfine_fast.cache.io import files as atomic
from ulfine_fast.data.splits import draw_split
from ulfine_fast.engine import checkpoint, scheduling
from ulfine_fast.engine.trial_batch import TrialBatch

WILD = {
    "method": "ulfine",
    "lr": 0.5,
    "steps": 30,
    "eval_every": 10,
    "val_fraction": 0.3,
    "n1": 30,
    "gamma_l": 10,
    "gamma_u": 10,
}


def mixed():
    """Trials of two trial batches; one diverges, one selects its best heads, one stops early."""
    return [
        FitConfig(**WILD, seed=0, select="best"),
        FitConfig(**{**WILD, "lr": 1e38}, seed=1, weight_decay=1e3),
        FitConfig(**WILD, seed=2, rank=5, patience=1),
        FitConfig(**{**WILD, "method": "ulfine_plus"}, seed=3),
    ]


def draw(cache, config):
    return draw_split(cache.labels, cache.splits, cache.class_names, config)


def same(runs, others):
    for one, other in zip(runs, others, strict=True):
        assert one.status == other.status
        assert one.history == other.history
        assert {**one.metrics, "seconds": 0} == {**other.metrics, "seconds": 0}
        assert one.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
        np.testing.assert_array_equal(one.test_probabilities, other.test_probabilities)
        if one.status != "failed":
            assert one.calibration.ids == other.calibration.ids
            np.testing.assert_array_equal(one.calibration.scores, other.calibration.scores)


class Died(BaseException):
    """An error that no code handles, as when the process is killed."""


@pytest.fixture(scope="module")
def whole(clusters):
    return fit_many(clusters, mixed())


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", [0, 1, 2, 3, 4])
def test_after_dying_at_any_write_the_rest_is_made_up(clusters, whole, tmp_path, monkeypatch, number, after):
    """The writes are the head, three validations of the first trial batch, and the end of the second."""
    done, move = [], os.replace

    def dying(source, target):
        if len(done) == number and not after:
            raise Died
        move(source, target)
        done.append(target)
        if len(done) > number:
            raise Died

    monkeypatch.setattr(atomic.os, "replace", dying)
    with pytest.raises(Died):
        fit_many(clusters, mixed(), checkpoint=tmp_path / "c")
    monkeypatch.setattr(atomic.os, "replace", move)
    same(fit_many(clusters, mixed(), checkpoint=tmp_path / "c"), whole)
    assert not (tmp_path / "c").exists()


def test_a_killed_process_leaves_what_another_goes_on_from(tmp_path):
    """The child stops inside its second validation, says so through a pipe, and is killed there with SIGKILL."""
    code = """
import sys
from tests.conftest import make_clusters
from tests.engine.test_checkpoint import WILD
from ulfine_fast import FitConfig, fit_many
def watch(step, rows):
    if step == 20:
        print("here", flush=True)
        sys.stdin.read()
    return ()
fit_many(make_clusters(), [FitConfig(**WILD, seed=s) for s in range(2)], checkpoint=sys.argv[1], watch=watch)
"""
    folder = tmp_path / "c"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout.readline() == "here\n"
        child.send_signal(signal.SIGKILL)
    assert checkpoint.saved_step(folder) == 10
    configs, steps = [FitConfig(**WILD, seed=s) for s in range(2)], []
    runs = fit_many(make_clusters(), configs, checkpoint=folder, watch=lambda step, rows: steps.append(step) or ())
    assert steps == [20, 30]
    same(runs, fit_many(make_clusters(), configs))


def test_what_is_finished_is_not_run_again(clusters, whole, tmp_path, monkeypatch):
    saves, trained = [], []
    plain_save, plain_train = checkpoint.Checkpoint.save, TrialBatch._advance

    def dying(self, trials, tensors, notes):
        saves.append(trials)
        if len(saves) == 4:
            raise Died
        plain_save(self, trials, tensors, notes)

    monkeypatch.setattr(checkpoint.Checkpoint, "save", dying)
    with pytest.raises(Died):
        fit_many(clusters, mixed(), checkpoint=tmp_path / "c")
    monkeypatch.setattr(checkpoint.Checkpoint, "save", plain_save)
    monkeypatch.setattr(TrialBatch, "_advance", lambda *args: trained.append(args) or plain_train(*args))
    same(fit_many(clusters, mixed(), checkpoint=tmp_path / "c"), whole)
    assert trained == []


@pytest.fixture
def interrupted(clusters, tmp_path):
    """A checkpoint of the first validation of one trial."""

    def stop(step, rows):
        if step == 20:
            raise Died
        return ()

    with pytest.raises(Died):
        fit_many(clusters, [FitConfig(**WILD)], checkpoint=tmp_path / "c", watch=stop)
    return tmp_path / "c"


def test_the_rest_may_train_in_other_trial_batches(clusters, tmp_path, monkeypatch):
    """Interrupted in the second of three trial batches; the other trials go on in trial batches of another size."""
    configs = [FitConfig(**WILD, seed=s) for s in range(5)]
    whole, saves, plain_save = fit_many(clusters, configs), [], checkpoint.Checkpoint.save

    def dying(self, trials, tensors, notes):
        plain_save(self, trials, tensors, notes)
        saves.append(list(trials))
        if len(saves) == 5:
            raise Died

    monkeypatch.setattr(checkpoint.Checkpoint, "save", dying)
    monkeypatch.setattr(scheduling, "trials_that_fit", lambda *args: 2)
    with pytest.raises(Died):
        fit_many(clusters, configs, checkpoint=tmp_path / "c")
    assert saves == [[0]] * 3 + [[1, 2]] * 2
    monkeypatch.setattr(scheduling, "trials_that_fit", lambda *args: 1)
    for one, other in zip(fit_many(clusters, configs, checkpoint=tmp_path / "c"), whole, strict=True):
        np.testing.assert_allclose(one.test_probabilities, other.test_probabilities, atol=1e-5)
        assert one.metrics["per_class_accuracy"] == other.metrics["per_class_accuracy"]


def test_a_fit_that_came_to_nothing_leaves_nothing_that_binds(clusters, interrupted):
    for path in interrupted.glob("batch-*"):
        path.unlink()
    config = FitConfig(**{**WILD, "lr": 0.1})
    same([fit(clusters, config, checkpoint=interrupted)], [fit(clusters, config)])
    with pytest.raises(InputError, match=r"views\.strong = 0"):
        fit(make_clusters(views=False), config, checkpoint=interrupted)
    assert not interrupted.exists()


def test_a_checkpoint_of_another_fit_is_refused_by_what_differs(clusters, interrupted):
    config = FitConfig(**WILD)
    with pytest.raises(InputError, match=r"checkpoint of a fit with lr = 0\.5, not 0\.1; finish that one, or remove"):
        fit(clusters, replace(config, lr=0.1), checkpoint=interrupted)
    with pytest.raises(InputError, match="a fit of 1 trials, not 2"):
        fit_many(clusters, [config, config], checkpoint=interrupted)
    with pytest.raises(InputError, match="a fit of another cache"):
        fit(make_clusters(seed=1), config, checkpoint=interrupted)
    with pytest.raises(InputError, match="engine auto, not specification"):
        fit(clusters, config, checkpoint=interrupted, engine="specification")
    same([fit(clusters, config, checkpoint=interrupted)], [fit(clusters, config)])


def test_a_checkpoint_of_other_splits_or_another_version_is_refused(clusters, interrupted):
    head = json.loads((interrupted / "head.json").read_text())
    (interrupted / "head.json").write_text(json.dumps({**head, "splits": "other"}))
    with pytest.raises(InputError, match="a fit of other splits"):
        fit(clusters, FitConfig(**WILD), checkpoint=interrupted)
    (interrupted / "head.json").write_text(json.dumps({**head, "version": "0.0"}))
    with pytest.raises(InputError, match=r"version 0\.0, not "):
        fit(clusters, FitConfig(**WILD), checkpoint=interrupted)


def test_a_damaged_checkpoint_is_named(clusters, interrupted):
    path = next(interrupted.glob("batch-*"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"batch-0\.safetensors in .* is damaged .*; remove .* to start anew"):
        fit(clusters, FitConfig(**WILD), checkpoint=interrupted)
    (interrupted / "head.json").write_text("{")
    with pytest.raises(InputError, match=r"head\.json cannot be read .*; remove .* to start anew"):
        fit(clusters, FitConfig(**WILD), checkpoint=interrupted)


@pytest.mark.parametrize("name", ["head.json", "batch-0.safetensors"])
def test_any_changed_byte_is_refused(clusters, interrupted, name):
    random = np.random.default_rng(0)
    whole = (interrupted / name).read_bytes()
    for position in [*range(9), *random.integers(0, len(whole), 200)]:
        changed = bytearray(whole)
        changed[position] ^= random.integers(1, 256)
        (interrupted / name).write_bytes(changed)
        with pytest.raises(InputError, match=r"to start anew|no checkpoint"):
            fit(clusters, FitConfig(**WILD), checkpoint=interrupted)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b'{"version": 3}', b"\xff", b"null"])
def test_a_head_of_another_program_is_refused(clusters, interrupted, content):
    (interrupted / "head.json").write_bytes(content)
    with pytest.raises(InputError, match=r"head\.json cannot be read .*; remove .* to start anew"):
        fit(clusters, FitConfig(**WILD), checkpoint=interrupted)


def test_what_is_no_file_is_not_waited_for(clusters, interrupted):
    for name in ("batch-0.safetensors", "head.json"):
        (interrupted / name).unlink()
        os.mkfifo(interrupted / name)
        with pytest.raises(InputError, match="not a regular file"):
            fit(clusters, FitConfig(**WILD), checkpoint=interrupted)


def test_a_checkpoint_with_another_tensor_and_a_right_digest_is_refused(clusters, interrupted):
    path = interrupted / "batch-0.safetensors"
    begun = checkpoint.Checkpoint(
        interrupted, clusters, [FitConfig(**WILD)], [draw(clusters, FitConfig(**WILD))], "auto"
    )
    [(trials, tensors, notes)] = begun.load()
    tensors["history/loss"] = tensors.pop("score/best")
    begun.save(trials, tensors, notes)
    assert path.exists()
    with pytest.raises(InputError, match=r"the checkpoint in .* is damaged .*; remove .* to start anew"):
        fit(clusters, FitConfig(**WILD), checkpoint=interrupted)


def test_a_folder_of_other_things_is_no_checkpoint(clusters, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is no checkpoint; name a new folder"):
        fit(clusters, FitConfig(**WILD), checkpoint=tmp_path)
    assert (tmp_path / "notes.txt").exists()


def test_a_cache_is_known_by_what_it_holds():
    prints = {checkpoint.cache_fingerprint(make_clusters(**values)) for values in ({}, {"seed": 1}, {"views": False})}
    assert len(prints) == 3
    assert checkpoint.cache_fingerprint(make_clusters()) in prints
