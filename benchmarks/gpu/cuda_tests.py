"""The suite's tests that need a GPU, run by pytest; this module is also the plugin that selects them.

A test that needs one is marked by `skipif` with a reason that names a GPU or CUDA.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu.parts import Report, Settings

ROOT = Path(__file__).parents[2]
_NEEDS_GPU = re.compile(r"GPU|CUDA")
_TEXT_OF_TEST = "cuda.is_available"


def run_tests(settings: Settings, report: Report) -> None:
    """Run them where pytest is installed, and report each."""
    if importlib.util.find_spec("pytest") is None:
        report("pytest is not installed here; the checks that follow are the script's own", tests=0)
        return
    files = [path for path in sorted(ROOT.glob("tests/**/test_*.py")) if _TEXT_OF_TEST in path.read_text()]
    if settings.tiny:
        files = [path for path in files if path.name == "test_cuda_graph.py"]
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        # the package makes a bare checkout importable, in what the tests start too
        environment = {**os.environ, "PYTEST_ADDOPTS": "-p benchmarks.gpu"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", __name__]
        done = subprocess.run(
            [*command, f"--junitxml={results}", *map(str, files)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if not results.exists():
            raise RuntimeError(f"pytest ended with code {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
        cases = list(ElementTree.parse(results).iter("testcase"))
    outcomes: Counter[str] = Counter()
    for case in cases:
        outcome, message = _outcome(case)
        outcomes[outcome] += 1
        name = f"{case.get('classname')}::{case.get('name')}"
        report(f"{outcome:8} {name}", test=name, outcome=outcome, seconds=float(case.get("time", 0)), message=message)
    counts = {outcome: outcomes[outcome] for outcome in ("passed", "failed", "skipped")}
    report(", ".join(f"{count} {outcome}" for outcome, count in counts.items()), tests=len(cases), **counts)


def _outcome(case: ElementTree.Element) -> tuple[str, str | None]:
    """Of one test: passed, failed or skipped, and why."""
    for child in case:
        if child.tag in ("failure", "error"):
            return "failed", (child.text or child.get("message") or "")[-1500:]
        if child.tag == "skipped":
            return "skipped", child.get("message")
    return "passed", None


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep the tests that need a GPU."""
    chosen = [item for item in items if any(_needs_gpu(marker) for marker in item.iter_markers("skipif"))]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def _needs_gpu(marker: Any) -> bool:
    return bool(_NEEDS_GPU.search(marker.kwargs.get("reason", "")))
