"""Sweeps that died, at any place, go on there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.search.conftest import SPACE, told
from ulfine_fast.search import sweep as module
from ulfine_fast.search.study import Ledger

ROOT = Path(__file__).parents[2]
EVERY_STEP = {**SPACE, "eval_every": 1}


def test_finished_trials_are_never_run_again(search, monkeypatch):
    before = told(search(trials=4, refit=1, refit_seeds=1))
    later = search(trials=6, refit=1, refit_seeds=1)
    assert told(later)[:4] == before
    assert len(later.study.trials) == 6
    assert json.loads((later.out / "sweep.json").read_text())["trials"] == 6
    monkeypatch.setattr(module, "run_share", None)
    monkeypatch.setattr("ulfine_fast.engine.fit.fit_many", None)
    assert told(search(trials=6, refit=1, refit_seeds=1)) == told(later)
    assert told(search(trials=2, refit=1, refit_seeds=1)) == told(later)


KILLED = """
import os, signal
from tests.conftest import make_clusters
from tests.search.conftest import SPACE
from ulfine_fast import sweep
from ulfine_fast.search import trial_batches as passes

look = passes.Watch.__call__

def fatal(watch, step, rows):
    dropped = look(watch, step, rows)
    if step == 14 and watch._trials[0].number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return dropped

passes.Watch.__call__ = fatal
sweep(make_clusters(), {{**SPACE, "eval_every": 1}}, out={out!r}, trials=6, batch=3, sampler="random", refit=0)
"""


def test_a_sweep_killed_in_its_second_pass_goes_on_there(search, tmp_path, monkeypatch):
    out = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", KILLED.format(out=str(out))],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(out.glob(".checkpoint/*/pass-*.safetensors"))) == 1
    steps = []
    look = module.run_share.__globals__["Watch"].__call__

    def spy(watch, step, rows):
        steps.append(step)
        return look(watch, step, rows)

    monkeypatch.setattr("ulfine_fast.search.trial_batches.Watch.__call__", spy)
    continued = search(EVERY_STEP, out=out, batch=3)
    # the evaluation it died in may be looked at again, the ones before may not
    assert 14 <= steps[0] <= 15
    assert steps[-1] == 27
    assert told(continued) == told(search(EVERY_STEP, out=tmp_path / "whole"))


def test_a_sweep_that_died_while_telling_keeps_what_was_told(search, tmp_path, monkeypatch):
    real = Ledger.tell

    def fatal(ledger, number, *rest):
        if number == 2:
            raise KeyboardInterrupt
        real(ledger, number, *rest)

    monkeypatch.setattr(Ledger, "tell", fatal)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on from here"):
        search()
    again = []
    monkeypatch.setattr(
        Ledger, "tell", lambda ledger, number, *rest: (again.append(number), real(ledger, number, *rest))
    )
    continued = search()
    assert again == [2, 3, 4, 5]
    assert told(continued) == told(search(out=tmp_path / "whole"))


def test_a_sweep_that_died_while_asking_asks_for_the_rest(search, tmp_path, monkeypatch):
    real = Ledger._write
    written = []

    def fatal(ledger, trial, share):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(trial)
        real(ledger, trial, share)

    monkeypatch.setattr(Ledger, "_write", fatal)
    with pytest.raises(KeyboardInterrupt):
        search()
    monkeypatch.setattr(Ledger, "_write", real)
    assert told(search()) == told(search(out=tmp_path / "whole"))
