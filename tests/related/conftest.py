"""The small worlds of the methods' tests."""

from __future__ import annotations

from tests.methods.conftest import world

__all__ = ["world"]
