"""What the attacks share."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    """Disarms the timer by which a test ends the process with a traceback where something hangs, be it in C."""
    yield
    faulthandler.cancel_dump_traceback_later()
