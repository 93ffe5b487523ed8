"""Run folders for the report's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.writer import write_run, write_study


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Four methods with five seeds each, classes permuted by the seed."""
    return write_study(tmp_path / "runs")


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """One run of ULFine."""
    return write_run(tmp_path / "one")
