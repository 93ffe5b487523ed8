"""`sweep` and `fit --config` from the command line: what is printed, what is refused."""

from __future__ import annotations

import json

import pytest

from tests.cache.samples import write_images, write_tiny_model
from tests.cli.program import refused, run
from ulfine_fast.cache.io.toml import read_toml
from ulfine_fast.search.space import default_space

SPACE = """
method = "linear_probe"
steps = 4
val_fraction = 0.3
lr = { low = 0.001, high = 0.3, log = true }
tau = [0.5, 1.0]
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    source = write_images(folder / "images", {"train/cat": 9, "train/dog": 7, "test/cat": 2, "test/dog": 2})
    model = write_tiny_model(folder / "model")
    done = run("extract", source, "--out", folder / "cache", "--model", model, "--workers", 0)
    assert done.exit_code == 0, done.output
    return folder / "cache"


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    path = tmp_path_factory.mktemp("space") / "space.toml"
    path.write_text(SPACE)
    return path


@pytest.fixture(scope="module")
def swept(cache, space, tmp_path_factory):
    """A finished sweep, its folder and what it printed."""
    out = tmp_path_factory.mktemp("swept") / "sweep"
    arguments = ("sweep", cache, "--space", space, "--trials", 4, "--seeds", 2, "--sampler", "random", "--out", out)
    return arguments, out, run(*arguments)


def test_the_tables(swept):
    _, out, done = swept
    assert done.exit_code == 0, done.output
    # no progress bar where stderr is not a terminal
    assert done.stderr == ""
    for words in ("rank", "balanced_accuracy", "lr", "tau", "±", "on the test split", "trials: 4 complete"):
        assert words in done.stdout
    assert (out / "best-1" / "seed-2" / "config.json").exists()


def test_json_of_a_finished_sweep_continued(swept):
    arguments, out, _ = swept
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["counts"] == {"complete": 4}
    assert result["out"] == str(out)
    assert [trial["rank"] for trial in result["leaderboard"]] == [1, 2, 3, 4]
    assert result["best"][0]["seeds"] == [2, 3, 4, 5, 6]
    assert 0 <= result["best"][0]["test"]["accuracy"]["mean"] <= 1


def test_the_best_is_a_config_that_fit_takes(swept, cache, tmp_path):
    _, out, _ = swept
    done = run(
        "fit", cache, "--config", out / "best.toml", "--seed", 2, "--seeds", 5, "--out", tmp_path / "r", "--json"
    )
    assert done.exit_code == 0, done.output
    refit = json.loads((out / "sweep.json").read_text())["best"][0]["test"]
    again = json.loads(done.stdout)["linear_probe"]
    assert again["accuracy"] == refit["accuracy"]
    config = json.loads((tmp_path / "r" / "seed-2" / "config.json").read_text())["config"]
    assert config["method"] == "linear_probe"
    assert config["steps"] == 4


def test_a_forecast_is_printed_or_refused(swept, cache):
    _, out, _ = swept
    done = run("forecast", out)
    assert done.exit_code == 0, done.output
    content = json.loads((out / "forecast.json").read_text())
    # 16 images are too few to forecast from
    assert done.stdout == f"no forecast: {content['refused']}\n"
    # the seeds of the refit, and the cache that its runs name
    assert content["seeds"] == [2, 3, 4, 5, 6]
    assert run("forecast", out, "--cache", cache).stdout == done.stdout

    losses, values = ([[value] * 5 for value in row] for row in ((1.0, 0.8, 0.7, 0.6), (0.6, 0.7, 0.75, 0.8)))
    # version 0.1 wrote no digest
    del content["digest"]
    content["curve"] = {"budgets": [10, 20, 30, 40], "losses": losses, "figures": values}
    (out / "forecast.json").write_text(json.dumps(content))
    done = run("forecast", out, "--over", "labels", "--times", 2)
    assert "balanced_accuracy on validation, forecast from 40 to 80 labels:" in done.stdout
    for name in ("by way of the loss", "the last value carried on: 80.0 (80.0 to 80.0)", "a power law", "a line over"):
        assert name in done.stdout
    assert "over steps the last value" not in done.stdout
    (out / "forecast.json").write_text(json.dumps({**content, "over": "steps"}))
    assert "over steps the last value has been the best forecast" in run("forecast", out, "--over", "steps").stdout
    printed = json.loads(run("forecast", out, "--over", "steps", "--json").stdout)
    assert printed == json.loads((out / "forecast.json").read_text())


def test_forecasts_that_are_refused(swept, cache, space, tmp_path):
    _, out, _ = swept
    assert "a forecast over views needs 4 of each kind, this cache has 1" in refused("forecast", out, "--over", "views")
    assert "times must be above 1 and at most 4, got 9" in refused("forecast", out, "--times", 9)
    assert "at least 3 seeds, got 2" in refused("forecast", out, "--seeds", 2)
    assert "is not a finished sweep" in refused("forecast", tmp_path)
    assert "leave out --split" in refused("forecast", out, "--split", out / "best-1" / "seed-2")
    done = run("forecast", out, "--over", "luck")
    assert (done.exit_code, "Invalid value for '--over'" in done.stderr) == (2, True)
    quick = ("--trials", 1, "--sampler", "random", "--refit", 0, "--out", tmp_path / "sweep")
    assert run("sweep", cache, "--space", space, *quick).exit_code == 0
    assert "refit no trial whose run would say which to use; give --cache" in refused("forecast", tmp_path / "sweep")
    assert run("forecast", tmp_path / "sweep", "--cache", cache, "--seeds", 3).exit_code == 0


def test_sweep_still_takes_a_forecast_and_warns(swept):
    arguments, out, before = swept
    done = run(*arguments, "--forecast", "labels")
    assert done.exit_code == 0, done.output
    content = json.loads((out / "forecast.json").read_text())
    assert done.stdout == f"{before.stdout}\nno forecast: {content['refused']}\n"
    assert done.stderr == (
        f"warning: sweep --forecast is deprecated; use `ulfine-fast forecast {out} --over labels --times 4` after the "
        "sweep\n"
    )
    assert json.loads(run(*arguments, "--forecast", "labels", "--json").stdout)["forecast"] == content
    assert "forecast" not in json.loads(run(*arguments, "--json").stdout)
    assert "--forecast" not in run("sweep", "--help").stdout


def test_an_option_wins_over_the_file(cache, tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('method = "linear_probe"\nsteps = 4\nlr = 0.5\n')
    done = run("fit", cache, "--config", path, "--steps", 6, "--lr", 0.03, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    # 0.03 is the default of lr too: an option on the command line wins all the same
    assert (config["method"], config["steps"], config["lr"]) == ("linear_probe", 6, 0.03)


def test_fit_and_sweep_use_ulfine_plus_unless_a_method_is_named(cache, tmp_path):
    done = run("fit", cache, "--probe-weight", 0.7, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (config["method"], config["probe_weight"]) == ("ulfine_plus", 0.7)

    options = ["--val-fraction", 0.3, "--trials", 2, "--sampler", "random", "--refit", 0, "--json"]
    done = run("sweep", cache, *options, "--out", tmp_path / "sweep")
    assert done.exit_code == 0, done.output
    params = json.loads(done.stdout)["leaderboard"][0]["params"]
    assert set(params) == set(default_space("ulfine_plus").searched)

    # a space that names no method too, and what is saved of it names it
    (tmp_path / "space.toml").write_text("label_weight = [5.0, 10.0]\n")
    done = run("sweep", cache, "--space", tmp_path / "space.toml", *options, "--out", tmp_path / "spaced")
    assert done.exit_code == 0, done.output
    assert read_toml(tmp_path / "spaced" / "best.toml")["method"] == "ulfine_plus"
    assert json.loads((tmp_path / "spaced" / "sweep.json").read_text())["space"]["method"] == "ulfine_plus"


def test_best_settings_of_version_0_1_without_a_method_are_of_ulfine(cache, tmp_path):
    path = tmp_path / "best.toml"
    path.write_text("# trial 1 of a sweep by ulfine-fast 0.1.0; on validation: few 0.5\nmu = 0.02\nsteps = 4\n")
    done = run("fit", cache, "--config", path, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (config["method"], config["mu"]) == ("ulfine", 0.02)
    # in a file of the user's own the method is today's default
    path.write_text("mu = 0.02\nsteps = 4\n")
    assert "such as --method ulfine" in refused("fit", cache, "--config", path, "--out", tmp_path / "run")


def test_configs_that_are_refused(cache, tmp_path):
    path = tmp_path / "c.toml"
    for text, words in {
        "steps = 0": "steps must be at least 1, got 0",
        "step = 3": "unknown option 'step'",
        "steps": "is not TOML",
        "lr = { low = 1, high = 2 }": "lr must be a finite number",
    }.items():
        path.write_text(text)
        sentence = refused("fit", cache, "--config", path, "--out", tmp_path / "run")
        assert words in sentence
        assert "c.toml" in sentence
    assert "No such file" in refused("fit", cache, "--config", tmp_path / "none.toml", "--out", tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trials", 0], "trials must be at least 1, got 0"),
        (["--lr", 0.1], "lr is in the space and given as 0.1 beside it"),
        (["--method", "ulfine"], "method is in the space and given as 'ulfine' beside it"),
        (["--forecast", "luck"], "over must be one of labels, views, steps, got 'luck'"),
        (["--forecast", "views"], "a forecast over views needs 4 of each kind, this cache has 1"),
        (["--forecast", "steps", "--forecast-times", 9], "times must be above 1 and at most 4, got 9"),
        (["--split", "nowhere.json"], "is not a saved split"),
        (["--storage", "nonsense"], "is no database URL"),
        (["--space", "nowhere.toml"], "nowhere.toml: No such file"),
        (["--n1", 500], "n1 = 500 needs 500 labelled images"),
    ],
)
def test_options_out_of_range(cache, space, tmp_path, arguments, words):
    assert words in refused("sweep", cache, "--space", space, "--out", tmp_path / "sweep", *arguments)


@pytest.mark.parametrize("option", ["metric", "sampler", "pruning", "engine"])
def test_choices_are_refused_with_what_there_is(cache, option):
    done = run("sweep", cache, f"--{option}", "luck")
    assert done.exit_code == 2
    assert f"Invalid value for '--{option}'" in done.stderr
    assert "is not one of" in done.stderr


def test_another_cache_and_another_objective_are_refused(swept, cache, tmp_path):
    arguments, _, _ = swept
    assert "was made with metrics = ['balanced_accuracy'], this sweep says ['ece']" in refused(
        *arguments, "--metric", "ece"
    )
    assert "was made with seed = 0, this sweep says 7" in refused(*arguments, "--seed", 7)
    assert "manifest.json" in refused("sweep", tmp_path)


def test_the_shipped_space_and_two_metrics(cache, tmp_path):
    settings = ["--method", "linear_probe", "--steps", 3, "--val-fraction", 0.3, "--lr", 0.1]
    options = ["--trials", 4, "--metric", "accuracy", "--metric", "ece", "--refit", 0, "--out", tmp_path / "sweep"]
    done = run("sweep", cache, *settings, *options, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["metrics"] == ["accuracy", "ece"]
    assert set(result["leaderboard"][0]["params"]) == {"tau", "weight_decay", "feature_noise"}
    assert result["best"] == []


def test_an_option_that_no_method_reads_is_refused(cache, tmp_path):
    path = tmp_path / "space.toml"
    path.write_text(SPACE + "mu = [0.1, 0.2]\n")
    sentence = refused("sweep", cache, "--space", path, "--trials", 1, "--out", tmp_path / "sweep")
    assert "method linear_probe does not read mu, which channel_ulfine and ulfine read" in sentence
    assert not (tmp_path / "sweep").exists()
