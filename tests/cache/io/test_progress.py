"""Progress is drawn on a terminal from the start, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ulfine_fast import fit
from ulfine_fast.cache.io.progress import progress_bar, working

ROOT = Path(__file__).parents[3]


def test_nothing_is_drawn_without_a_terminal(capsys):
    with pytest.raises(ValueError, match="stop"), working("work"):
        raise ValueError("stop")
    with progress_bar() as bar:
        bar.advance(bar.add_task("work", total=2, unit="rows", note=""))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("method", ["zero_shot", "knn", "label_propagation", "gmm", "lightweight", "linear_probe"])
def test_fits_with_and_without_steps_have_a_bar(clusters, quick, capsys, method):
    fit(clusters, quick(method=method), progress=True)
    assert f"fit {method.replace('_', ' ')}" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="terminals of Windows cannot be opened by a program")
def test_the_bar_is_there_before_the_fit_has_begun(tmp_path):
    """On a terminal, and within a moment of the command's start-up."""
    import pty

    code = """
import sys, time
from ulfine_fast.engine import fit as engine
from ulfine_fast.cli.main import main
load = engine.DeviceFeatures.load
def slow(*arguments, **options):
    time.sleep(1)
    return load(*arguments, **options)
engine.DeviceFeatures.load = slow
sys.argv = ["ulfine-fast", *sys.argv[1:]]
main()
"""
    leader, follower = pty.openpty()
    words = ["fit", ROOT / "tests/fixtures/v0_1/cache", "--method", "knn", "--out", tmp_path / "run"]
    command = [sys.executable, "-c", code, *map(str, words)]
    with subprocess.Popen(command, cwd=ROOT, stderr=follower, stdout=subprocess.DEVNULL) as process:
        os.close(follower)
        drawn = b""
        while b"prepare the fit" not in drawn and process.poll() is None:
            drawn += os.read(leader, 4096)
        assert process.poll() is None, drawn.decode()
        try:
            while chunk := os.read(leader, 4096):
                drawn += chunk
        except OSError:  # how Linux says that the other side is closed
            pass
    os.close(leader)
    assert process.returncode == 0, drawn.decode()
    assert b"fit knn" in drawn
