"""What version 0.1 wrote is read, and says what it said: cache, runs, sweep, export, options, and all predictions."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ulfine_fast import FeatureCache, FitConfig, Run, build_report, fit_many, load
from ulfine_fast.cli.main import app
from ulfine_fast.related.multilabel.run import MultiLabelRun

FOLDER = Path(__file__).parent / "fixtures/v0_1"
RUNS = sorted(path.parent.relative_to(FOLDER).as_posix() for path in FOLDER.glob("runs/*/config.json"))
SPLIT = {"labeled_fraction": 0.8, "val_fraction": 0.2, "steps": 30, "eval_every": 3}
ENSEMBLE = {"ensemble_heads": 3, "low_bias": 0.1, "low_variance": 0.1}

# name in predictions.npz -> options; methods that are not here have none, and their own name
VARIANTS = {
    "fixmatch/ensemble": {"method": "channel_fixmatch", **ENSEMBLE},
    "freematch/ensemble": {"method": "channel_freematch", **ENSEMBLE},
    "ulfine/ensemble": {"method": "channel_ulfine", **ENSEMBLE},
    "fixmatch/preference": {"method": "preference_fixmatch", "pseudo_loss": "preference"},
    "proportions": {"method": "proportions", "bag_size": 4},
    "proportions/argmax": {"method": "proportions", "bag_labels": "argmax", "mixup": 0, "bag_size": 4},
    "ulfine/sinkhorn": {"method": "ulfine", "pseudo_labels": "sinkhorn"},
    "ulfine/orthogonal-features": {"method": "ulfine", "orthogonality": "features"},
    "ulfine/no-paf": {"method": "ulfine", "paf": False},
    "ulfine/no-dlf": {"method": "ulfine", "dlf": False},
    "ulfine/max-ratio": {"method": "ulfine", "align": "max-ratio"},
    "ulfine_plus/settings": {
        "method": "ulfine_plus",
        "probe_weight": 0.7,
        "prior_pseudo_count": 0.5,
        "evidence_temperature": 12.0,
        "sharpness_start": 8.0,
        "sharpness_end": 25.0,
        "shrinkage": 0.1,
    },
    "ldam/early": {"method": "ldam", "reweight_after": 0.3},
    "poft/equal": {"method": "poft", "poft_form": "equal"},
}
PREDICTIONS = np.load(FOLDER / "predictions.npz")
FITS = sorted({name.rpartition("/")[0] for name in PREDICTIONS.files if name != "ids"})


@pytest.fixture(scope="module")
def cache():
    return FeatureCache.open(FOLDER / "cache")


@pytest.fixture(scope="module")
def test_features(cache):
    rows = np.flatnonzero(cache.splits == "test")
    assert [cache.ids[row] for row in rows] == json.loads((FOLDER / "expected.json").read_text())["test_ids"]
    return np.asarray(cache.plain[rows])


@pytest.mark.parametrize("folder", RUNS)
def test_runs_say_what_they_said(folder, test_features):
    expected = np.load(FOLDER / "expected.npz")[folder]
    if folder == "runs/multilabel":
        outputs = MultiLabelRun.load(FOLDER / folder).probabilities(test_features)
    else:
        outputs = Run.load(FOLDER / folder).logits(test_features)
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=2e-5)


def test_options_of_a_run_have_their_new_names():
    config = Run.load(FOLDER / "runs/ulfine_plus").config
    assert (config.probe_weight, config.prior_pseudo_count, config.evidence_temperature) == (0.7, 0.5, 12.0)
    assert (config.sharpness_start, config.sharpness_end, config.shrinkage) == (8.0, 25.0, 0.1)
    assert Run.load(FOLDER / "runs/ldam").config.reweight_after == 0.5
    assert Run.load(FOLDER / "runs/fixmatch_ensemble").config.method == "channel_fixmatch"
    assert Run.load(FOLDER / "runs/fixmatch_preference").config.method == "preference_fixmatch"


def test_the_export_says_what_it_said(test_features):
    expected = np.load(FOLDER / "expected.npz")["export"]
    np.testing.assert_allclose(load(FOLDER / "export").predict_proba(test_features), expected, rtol=0, atol=1e-5)


def test_runs_and_sweep_are_reported(tmp_path):
    folders = [FOLDER / name for name in RUNS if name != "runs/multilabel"]
    page = build_report([*folders, FOLDER / "sweep"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "ulfine_plus" in page


def test_old_names_of_other_options_are_accepted_with_a_warning(tmp_path):
    page = str(tmp_path / "report.html")
    images = str(tmp_path / "no-images")
    done = CliRunner().invoke(app, ["report", str(FOLDER / "runs/ulfine"), "--out", page, "--pictures", images])
    assert done.exit_code == 2
    assert "the option --pictures is now called --images" in done.stderr
    assert "no-images" in done.stderr.splitlines()[-1]


def test_the_cache_goes_on(tmp_path):
    shutil.copytree(FOLDER / "cache", tmp_path / "cache")
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "cache"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["images"] == 100


def test_old_names_of_options_are_accepted_with_a_warning(cache):
    with pytest.warns(FutureWarning, match="the option lean is now called probe_weight"):
        config = FitConfig(method="ulfine_plus", lean=0.7)
    assert config == FitConfig(method="ulfine_plus", probe_weight=0.7)
    with pytest.warns(FutureWarning, match="method fixmatch with ensemble_heads is now the method channel_fixmatch"):
        assert FitConfig(method="fixmatch", ensemble_heads=3).method == "channel_fixmatch"


def test_a_file_of_old_names_is_accepted_but_for_what_the_method_never_read(tmp_path):
    text = (FOLDER / "settings.toml").read_text()
    (tmp_path / "all.toml").write_text(text)
    (tmp_path / "own.toml").write_text("".join(line for line in text.splitlines(True) if not line.startswith("defer")))
    fit = ["fit", str(FOLDER / "cache"), "--out", str(tmp_path / "run"), "--steps", "3"]
    refused = CliRunner().invoke(app, [*fit, "--config", str(tmp_path / "all.toml")])
    assert refused.exit_code == 2
    assert "method ulfine_plus does not read defer, which ldam reads" in refused.stderr
    done = CliRunner().invoke(app, [*fit, "--config", str(tmp_path / "own.toml")])
    assert done.exit_code == 0, done.output
    assert "the option lean is now called probe_weight" in done.stderr
    assert Run.load(tmp_path / "run").config.probe_weight == 0.7


@pytest.mark.parametrize("name", FITS)
def test_every_method_predicts_what_it_predicted(name, cache):
    base, _, suffix = name.partition("@")
    options = VARIANTS.get(base, {"method": base})
    ids = list(PREDICTIONS["ids"])
    features = np.asarray(cache.plain[cache.row_of(ids)], dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        # defaults of version 0.1 that are others today
        former = {"lr": 0.03, **({"threshold": 0.9} if options["method"] == "ulfine" else {})}
        configs = [FitConfig(**{**former, **SPLIT, **options, "seed": seed}) for seed in (0, 1)]
    for run in fit_many(cache, configs, device="cpu", progress=False, engine="fused" if suffix else "specification"):
        expected = PREDICTIONS[f"{name}/{run.config.seed}"]
        if run.config.method == "ulfine_plus":
            # it has been made faster: other rounds, the same classes for most images
            agreement = (run.logits(features).argmax(1) == expected.argmax(1)).mean()
            assert agreement >= 0.85
            continue
        # products of other sizes and thread counts differ in the last bits
        np.testing.assert_allclose(run.logits(features), expected, rtol=1e-3, atol=2e-3)
