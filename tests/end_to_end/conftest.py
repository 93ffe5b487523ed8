"""The real commands, as a user's shell runs them: real images, real encoder, no network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).with_name("ulfine-fast")


@pytest.fixture(scope="session")
def ulfine(tmp_path_factory):
    """Run the command in a process of its own, with an empty cache home and every way to the network closed."""
    home = tmp_path_factory.mktemp("home")
    closed = "http://127.0.0.1:9"
    environment = {
        **os.environ,
        "ULFINE_FAST_HOME": str(home),
        "COLUMNS": "200",
        **{name: closed for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")},
    }

    def run(*arguments, code=0, cwd=None):
        command = [str(COMMAND), *map(str, arguments)]
        done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)
        assert done.returncode == code, f"{arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    run.environment = environment
    return run


@pytest.fixture(scope="session")
def demo(ulfine, tmp_path_factory):
    """The folder of one whole `ulfine-fast demo`, and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    return folder, ulfine("demo", "--out", folder, "--seeds", 2).stdout
