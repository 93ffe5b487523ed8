"""Shared data: a small long-tailed world of features, without a model."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from ulfine_fast import FeatureCache, FitConfig

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


def pytest_addoption(parser):
    parser.addoption("--mutations", type=int, default=0, help="damages of each kind of folder; 0 for a few hundred")


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def make_clusters(classes=4, dim=16, train=60, test=15, noise=0.9, seed=0, text=True, views=True, text_noise=0.8):
    """Gaussian clusters around random directions; the text vectors are noisy class means."""
    random = np.random.default_rng(seed)
    means = unit(random.normal(size=(classes, dim)))

    def blur(rows, length):
        return unit(rows + length * random.normal(size=rows.shape) / dim**0.5)

    labels = np.concatenate([np.repeat(np.arange(classes), train), np.repeat(np.arange(classes), test)])
    splits = ["train"] * (classes * train) + ["test"] * (classes * test)
    plain = blur(means[labels], noise)
    pool = np.repeat(plain[: classes * train, None], 2, axis=1)
    return FeatureCache.from_arrays(
        plain.astype(np.float16),
        labels,
        class_names=[f"class {k}" for k in range(classes)],
        text_features=blur(means, text_noise)[:, None].astype(np.float32) if text else None,
        weak=blur(pool[:, :1], 0.2).astype(np.float16) if views else None,
        strong=blur(pool, 0.5).astype(np.float16) if views else None,
        splits=splits,
        ids=[f"{split}/{row:04d}.png" for row, split in enumerate(splits)],
    )


@pytest.fixture(scope="session")
def clusters():
    return make_clusters()


@pytest.fixture
def quick():
    """A config of a few steps on the clusters; give it what a test is about."""

    def make(**values):
        usual = {"method": "ulfine", "n1": 30, "gamma_l": 10, "gamma_u": 10, "steps": 40, "eval_every": 20}
        return FitConfig(**{**usual, **values})

    return make


@pytest.fixture
def cluster():
    """A Ray cluster of two nodes on this machine, and the second node."""
    pytest.importorskip("ray", reason="Ray is not installed (extra ray)")
    from ray.cluster_utils import Cluster

    # the least memory that Ray takes
    small = {"object_store_memory": 80 << 20, "num_cpus": 1}
    # the death of a node is noticed within a second
    alert = {"health_check_period_ms": 300, "health_check_failure_threshold": 2, "health_check_initial_delay_ms": 0}
    head = {**small, "include_dashboard": False, "_system_config": alert}
    made = Cluster(initialize_head=True, head_node_args=head)
    yield made, made.add_node(**small)
    import ray

    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def browser():
    """A Chromium without a window; for tests marked `needs_chromium`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()
