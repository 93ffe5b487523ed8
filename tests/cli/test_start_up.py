"""What a command imports: nothing that it does not use."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.speed import start
from tests.cache.samples import write_images, write_tiny_model
from tests.cli.program import run

# each takes a tenth of a second or more; scipy is for intervals over seeds
UNUSED = ("open_clip", "optuna", "sklearn", "pandas", "matplotlib", "torchvision", "timm", "transformers", "scipy")
UNUSED += ("PIL", "fsspec", "braceexpand", "jinja2", "faiss", "onnx", "cmaes", "huggingface_hub")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    source = write_images(folder / "images", {"train/cat": 8, "train/dog": 6, "test/cat": 2, "test/dog": 2})
    model = write_tiny_model(tmp_path_factory.mktemp("model"))
    assert run("extract", source, "--out", folder / "cache", "--model", model, "--workers", 0).exit_code == 0
    return folder / "cache"


def test_a_fit_imports_nothing_that_it_does_not_use(cache, tmp_path):
    code = (
        "import sys, json, atexit; from ulfine_fast.cli.main import main;"
        "atexit.register(lambda: print(json.dumps(sorted(sys.modules)))); main()"
    )
    command = ["fit", str(cache), "--method", "linear_probe", "--steps", "10", "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    modules = json.loads(done.stdout.splitlines()[-1])
    assert "torch" in modules
    assert (tmp_path / "run" / "predictions.parquet").exists()
    assert [name for name in UNUSED if name in modules] == []


def test_the_benchmark_of_starting_times_both(cache):
    imported, fitted = start.measure(cache, 1)
    assert (imported["contender"], fitted["contender"]) == ("import torch", "fit")
    assert fitted["ratio"] == pytest.approx(fitted["seconds"] / imported["seconds"])
