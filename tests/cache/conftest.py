from __future__ import annotations

from pathlib import Path

import pytest

from tests.cache.samples import write_images, write_tiny_model
from ulfine_fast.cache.models.encoder import Encoder, load_encoder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    return write_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def tiny_encoder(tiny_model) -> Encoder:
    return load_encoder(tiny_model, device="cpu")


@pytest.fixture
def images(tmp_path) -> Path:
    """11 images in all four splits, two classes."""
    counts = {"train/cat": 3, "train/dog": 2, "unlabeled": 3, "val/dog": 1, "test/cat": 1, "test/dog": 1}
    return write_images(tmp_path / "images", counts)
