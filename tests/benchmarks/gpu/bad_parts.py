"""Parts that tests/benchmarks/gpu/test_gpu.py runs in processes of their own; light, so that they begin at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time


def raises(settings, report):
    report("before it fails", number=1.0, missing=float("nan"))
    with report.attempt("a step", step=2):
        raise ValueError("of a step")
    raise RuntimeError("no such kernel")


def hangs(settings, report):
    report("before it hangs", number=2)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    report("a child", pid=child.pid)
    time.sleep(600)


def dies(settings, report):
    os.abort()


def works(settings, report, name):
    report("works", name=name, left=report.seconds_left)
