from __future__ import annotations

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file

from ulfine_fast import FitConfig, InputError, Run, fit, fit_many
from ulfine_fast.metrics.classification import softmax
from ulfine_fast.runs.seeds import mean_metrics, save_runs


@pytest.fixture(scope="module")
def run(clusters):
    return fit(
        clusters, FitConfig(method="ulfine", n1=40, gamma_l=4, gamma_u=4, steps=40, eval_every=20, val_fraction=0.3)
    )


@pytest.fixture
def folder(run, tmp_path):
    return run.save(tmp_path / "run")


def test_a_run_comes_back_as_it_was(run, folder, clusters):
    again = Run.load(folder)
    assert again.config == run.config
    assert again.metrics == run.metrics
    assert again.split == run.split
    assert again.test_ids == run.test_ids
    np.testing.assert_array_equal(again.test_labels, run.test_labels)
    np.testing.assert_array_equal(again.test_probabilities, run.test_probabilities)
    np.testing.assert_array_equal(again.logits(clusters.plain), run.logits(clusters.plain))
    assert again.history == run.history


def test_a_loaded_run_saves_the_same_bytes(folder, tmp_path):
    again = Run.load(folder).save(tmp_path / "again")
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_predictions_of_the_test_rows_are_those_of_the_fit(run, clusters):
    rows = [clusters.ids.index(name) for name in run.test_ids]
    probabilities = run.predict_proba(clusters.plain[rows])
    np.testing.assert_allclose(probabilities, run.test_probabilities, atol=1e-5)
    np.testing.assert_array_equal(run.predict(clusters.plain[rows]), run.test_probabilities.argmax(1))
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)


def test_probabilities_are_at_the_fitted_temperature(run, clusters):
    assert run.metrics["temperature"] != 1
    expected = softmax(run.logits(clusters.plain) / run.metrics["temperature"])
    np.testing.assert_allclose(run.predict_proba(clusters.plain), expected, atol=1e-6)


def test_the_length_of_a_feature_does_not_matter(run, clusters):
    features = clusters.plain[:5].astype(np.float32)
    np.testing.assert_allclose(run.logits(features), run.logits(7 * features), atol=1e-3)


def test_each_file_is_readable_by_other_programs(run, folder):
    config = json.loads((folder / "config.json").read_text())
    assert (config["format"], config["version"]) == ("ulfine-fast-run", 2)
    assert config["config"]["n1"] == 40
    assert config["cache"] is None
    assert json.loads((folder / "split.json").read_text())["labeled"] == run.split["labeled"]
    assert load_file(folder / "heads.safetensors")["linear"].shape == (4, 16)
    table = pq.read_table(folder / "predictions.parquet")
    assert table.column_names == ["id", "split", "label", "predicted", "confidence", "probabilities"]
    assert table["predicted"].to_pylist() == run.test_probabilities.argmax(1).tolist()
    with (folder / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["20", "40"]
    assert float(rows[1]["loss_labeled"]) == pytest.approx(run.history[1]["loss_labeled"])
    assert float(rows[1]["recall_3"]) == run.history[1]["per_class_pseudo_label_recall"][3]


def test_the_same_run_writes_the_same_bytes(run, folder, tmp_path):
    again = run.save(tmp_path / "again")
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_saving_over_a_run_is_fine_over_other_things_is_not(run, folder, tmp_path):
    run.save(folder)
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(InputError, match="exists and is no run"):
        run.save(other)
    assert [path.name for path in other.iterdir()] == ["cat.jpg"]


def test_a_folder_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the run to"):
        run.save(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    "same",
    [
        lambda x: x[::-1].copy()[::-1],  # negative strides
        lambda x: np.asfortranarray(x),
        lambda x: np.repeat(x, 2, axis=1)[:, ::2],
        lambda x: x.astype(">f8"),  # the other byte order
        lambda x: x.astype(np.float64),
        lambda x: x.tolist(),
        lambda x: torch.from_numpy(x.copy()).requires_grad_(),
        lambda x: torch.from_numpy(x.copy()).double(),
    ],
)
@pytest.mark.parametrize("exact", [False, True])
def test_any_array_of_the_same_numbers_has_the_same_logits(run, clusters, same, exact):
    features = np.array(clusters.plain[:5], dtype=np.float32)
    np.testing.assert_array_equal(run.logits(same(features), exact=exact), run.logits(features, exact=exact))


@pytest.mark.parametrize("features", [np.zeros(16), np.zeros((2, 15)), np.zeros((2, 3, 16))])
def test_features_of_another_shape_are_refused(run, features):
    with pytest.raises(InputError, match=r"features must have shape \(n, 16\)"):
        run.predict(features)


def test_features_that_are_not_finite_are_refused(run):
    with pytest.raises(InputError, match="must be finite"):
        run.predict(np.full((1, 16), np.nan))


def test_no_run_there(tmp_path):
    with pytest.raises(InputError, match=r"is no run: it has no config\.json"):
        Run.load(tmp_path)


def test_a_folder_of_several_runs_names_one(run, tmp_path):
    run.save(tmp_path / "seed-0")
    with pytest.raises(InputError, match=r"holds 1 runs; name one, such as .*seed-0"):
        Run.load(tmp_path)


@pytest.mark.parametrize(
    "name", ["metrics.json", "heads.safetensors", "predictions.parquet", "split.json", "history.csv"]
)
def test_a_damaged_or_missing_file_is_one_sentence(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:10])
    with pytest.raises(InputError, match=f"{name}.* fit the run again"):
        Run.load(folder)
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing in .*; the run was not finished, fit it again"):
        Run.load(folder)


def test_a_run_of_a_later_version_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "version": 3}))
    with pytest.raises(
        InputError, match="is 'ulfine-fast-run' version 3, this program reads 'ulfine-fast-run' version 1 and 2"
    ):
        Run.load(folder)


def test_several_seeds_are_folders_and_a_summary(clusters, tmp_path):
    runs = fit_many(clusters, [FitConfig(method="zero_shot", n1=20, seed=s) for s in (3, 4)])
    means = save_runs(runs, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["seed-3", "seed-4", "summary.json"]
    written = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert written["metrics"] == means
    assert written["seeds"] == [3, 4]
    values = [run.metrics["many"] for run in runs]
    assert means["many"]["mean"] == pytest.approx(np.mean(values))
    # a second time over the same folder
    save_runs(runs, tmp_path / "out")


@pytest.mark.parametrize(
    ("first", "second", "stays"), [([3, 4], [3], "seed-3"), ([3], [3, 4], "out"), ([3, 4], [4, 5], "seed-3")]
)
def test_runs_that_a_fit_does_not_replace_are_not_mixed_with_its_own(clusters, tmp_path, first, second, stays):
    def save(seeds):
        save_runs(fit_many(clusters, [FitConfig(method="zero_shot", n1=20, seed=s) for s in seeds]), tmp_path / "out")

    save(first)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=f"{stays} holds a run that this fit does not replace"):
        save(second)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    save(first)


def test_metrics_that_no_run_has_are_left_out():
    means = mean_metrics([{"accuracy": 0.5, "few": None}, {"accuracy": 0.7, "few": 0.1}])
    # t(0.975, 1 degree) = 12.7062; the deviation of 0.5 and 0.7 over the root of 2 is 0.1
    assert means["accuracy"] == {"mean": pytest.approx(0.6), "half_width": pytest.approx(1.27062, rel=1e-4), "n": 2}
    assert means["few"] == {"mean": 0.1, "half_width": 0.0, "n": 1}
    assert "many" not in means
