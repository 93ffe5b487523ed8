"""What the tests of commands share."""

from __future__ import annotations

import pytest

from tests.cache.samples import write_tiny_model


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))
