"""A method from another package, through an entry point: fit, sweep, report, the estimators and help know it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "tests/fixtures/v0_1/cache"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An installed distribution whose entry point names the toy method's module."""
    site = tmp_path_factory.mktemp("site")
    info = site / "toy_method-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-method\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ulfine_fast.methods]\ntoy = toy_method\n")
    (site / "toy_method.py").write_bytes((ROOT / "tests/plugins/toy_method.py").read_bytes())
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "100"}


def run(environment, *arguments):
    command = [sys.executable, "-m", "ulfine_fast.cli.main", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_it_is_listed_with_its_options(environment):
    listed = json.loads(run(environment, "methods", "--json").stdout)
    assert {"name": "toy", "summary": "Class means beside the texts.", "needs": ["labels", "texts"]}.items() <= next(
        row for row in listed if row["name"] == "toy"
    ).items()
    shown = run(environment, "fit", "--method", "toy", "--help").stdout
    assert "--toy-weight" in shown
    assert "weight of the class mean" in shown.lower()


def test_fit_sweep_and_report_know_it(environment, tmp_path):
    out = tmp_path / "run"
    done = run(environment, "fit", CACHE, "--method", "toy", "--toy-weight", "2", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "config.json").read_text())["config"]["toy_weight"] == 2.0
    done = run(environment, "sweep", CACHE, "--method", "toy", "--trials", "6", "--out", tmp_path / "sweep", "--json")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["leaderboard"][0]["params"]) == {"toy_weight"}
    done = run(environment, "report", out, "--out", tmp_path / "report.html")
    assert done.returncode == 0, done.stderr
    assert "toy" in (tmp_path / "report.html").read_text()


def test_its_option_is_refused_elsewhere(environment, tmp_path):
    done = run(environment, "fit", CACHE, "--method", "linear_probe", "--toy-weight", "2", "--out", tmp_path / "run")
    assert done.returncode == 2
    assert "method linear_probe does not read toy_weight, which toy reads" in done.stderr


def test_the_estimators_know_it(environment):
    program = """
import numpy as np
from ulfine_fast import FeatureClassifier
from ulfine_fast.estimator import classifier_of
random = np.random.default_rng(0)
x, y = random.normal(size=(60, 8)), np.arange(60) % 3
x[np.arange(60), y] += 4
general = FeatureClassifier(method="toy", toy_weight=3.0).fit(x, y)
own = classifier_of("toy")(toy_weight=3.0).fit(x, y)
assert (general.predict(x) == own.predict(x)).all() and general.score(x, y) > 0.9
assert general.run_.config.toy_weight == 3.0
"""
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_registered_in_python(monkeypatch):
    from tests.plugins import toy_method
    from ulfine_fast import FeatureCache, FitConfig, fit
    from ulfine_fast.methods import registry

    assert registry.find("toy").method is toy_method.Toy
    random = np.random.default_rng(0)
    x, y = random.normal(size=(90, 8)), np.arange(90) % 3
    x[np.arange(90), y] += 4
    splits = ["train"] * 60 + ["test"] * 30
    cache = FeatureCache.from_arrays(x, y, class_names=["a", "b", "c"], splits=splits)
    run = fit(cache, FitConfig(method="toy", toy_weight=0.5))
    assert run.metrics["balanced_accuracy"] > 0.9
