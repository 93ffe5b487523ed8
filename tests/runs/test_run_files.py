from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.report.writer import RunSpec, edit_json, write_run, write_study
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.runs.files import find_runs, load_run, load_runs


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """One run of ULFine."""
    return write_run(tmp_path / "one")


def test_a_run_is_read_from_its_files(single: Path) -> None:
    run = load_run(single)
    assert (run.method, run.seed, len(run.class_names)) == ("ulfine", 0, 10)
    labeled = sum(json.loads((single / "metrics.json").read_text())["class_counts"]) - 20
    assert run.split_rows == {"labeled": labeled, "unlabeled": 900, "val": 20, "test": 500}
    assert run.history["step"].tolist() == [50.0 * i for i in range(1, 11)]
    assert run.cache is None
    assert run.created_by == "ulfine-fast 0.1.0"


def test_an_empty_cell_of_the_history_is_not_a_number(single: Path) -> None:
    history = load_run(single).history
    assert math.isnan(history["precision_0"][0])
    assert np.isfinite(history["precision_1"]).all()


def test_numbers_reach_into_validation_and_null_is_not_a_number(single: Path) -> None:
    written = json.loads((single / "metrics.json").read_text())
    run = load_run(single)
    assert run.number("accuracy") == written["accuracy"]
    assert run.number("val.balanced_accuracy") == written["val"]["balanced_accuracy"]
    assert math.isnan(run.number("no_such_metric"))
    assert np.isnan(run.per_class("no_such_metric")).all()
    assert math.isnan(run.per_class("per_class_pseudo_label_precision")[0])


def test_runs_are_found_below_a_folder_in_natural_order(tmp_path: Path) -> None:
    for seed in (10, 2, 0):
        write_run(tmp_path / "study" / "ulfine" / f"seed-{seed}", RunSpec(seed=seed, rows=40))
    (tmp_path / "study" / "summary.json").write_text("{}")
    assert [path.name for path in find_runs(tmp_path)] == ["seed-0", "seed-2", "seed-10"]


def test_a_config_of_another_program_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"hidden_size": 384}')
    run = write_run(tmp_path / "run", RunSpec(rows=40))
    assert find_runs(tmp_path) == [run]


def test_a_run_named_twice_is_read_once(single: Path) -> None:
    assert len(load_runs([single, single, single.parent])) == 1


@pytest.mark.parametrize("make", [True, False])
def test_no_run_there(tmp_path: Path, make: bool) -> None:
    folder = tmp_path / "empty"
    if make:
        folder.mkdir()
    with pytest.raises(InputError, match="no run in .*empty" if make else "no folder at .*empty"):
        load_runs([folder])


def test_no_folder_at_all() -> None:
    with pytest.raises(InputError, match="at least one run folder"):
        load_runs([])


@pytest.mark.parametrize("name", ["config.json", "split.json", "metrics.json", "predictions.parquet", "history.csv"])
def test_a_missing_file_is_named(single: Path, name: str) -> None:
    (single / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing in .*one"):
        load_runs([single])


@pytest.mark.parametrize("name", ["config.json", "split.json", "metrics.json", "predictions.parquet", "history.csv"])
@pytest.mark.parametrize("fraction", [0.0, 0.7])
def test_a_cut_file_is_named(single: Path, name: str, fraction: float) -> None:
    content = (single / name).read_bytes()
    (single / name).write_bytes(content[: int(fraction * len(content)) or (0 if name != "history.csv" else 3)])
    with pytest.raises(InputError, match=name):
        load_runs([single])


@pytest.mark.parametrize(("name", "kind"), [("config.json", "ulfine-fast-run"), ("split.json", "ulfine-fast-split")])
def test_another_version_is_refused_with_both_versions(single: Path, name: str, kind: str) -> None:
    edit_json(single / name, version=3)
    with pytest.raises(InputError, match=f"'{kind}' version 3, this program reads '{kind}' version 1"):
        load_runs([single])


def test_a_json_file_that_is_no_object(single: Path) -> None:
    (single / "metrics.json").write_text("[1, 2]")
    with pytest.raises(InputError, match=r"metrics\.json cannot be read \(Expected object, got array\)"):
        load_runs([single])


def test_a_config_without_classes(single: Path) -> None:
    edit_json(single / "config.json", class_names=None)
    with pytest.raises(InputError, match=r"Expected array, got null at class_names"):
        load_runs([single])


def test_per_class_metrics_of_another_length(single: Path) -> None:
    edit_json(single / "metrics.json", per_class_accuracy=[0.5] * 9)
    with pytest.raises(InputError, match="per_class_accuracy should have 10 values, got 9"):
        load_runs([single])


def test_a_metric_that_is_text(single: Path) -> None:
    edit_json(single / "metrics.json", accuracy="<b>high</b>")
    with pytest.raises(InputError, match=r"Expected float \| null, got str at accuracy"):
        load_run(single)
    edit_json(single / "metrics.json", accuracy=0.5, few="<b>high</b>")
    with pytest.raises(InputError, match="few should be a number or null"):
        load_run(single).number("few")


def test_a_history_with_a_word_in_it(single: Path) -> None:
    file = single / "history.csv"
    file.write_text(file.read_text().replace("500,", "many,", 1))
    with pytest.raises(InputError, match="a cell that is not a number"):
        load_run(single)


def test_zero_shot_needs_no_history(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", RunSpec(method="zero_shot", rows=40))
    (run / "history.csv").unlink()
    assert load_run(run).history == {}
    (run / "history.csv").write_bytes(b"")
    assert load_run(run).history == {}


def test_other_classes_are_refused(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", RunSpec(rows=40))
    second = write_run(tmp_path / "b", RunSpec(rows=40, classes=4))
    with pytest.raises(InputError, match=r"b has other classes \(4\) than .*a \(10\)"):
        load_runs([first, second])


def test_predictions_keep_order_and_shape(single: Path) -> None:
    rows = load_run(single).predictions()
    assert rows.ids[:2] == ["test/00000.png", "test/00001.png"]
    assert rows.probabilities.shape == (500, 10)
    assert (rows.probabilities.argmax(axis=1) == rows.predicted).all()
    np.testing.assert_allclose(rows.confidence, rows.probabilities.max(axis=1))


def test_rows_of_other_splits_are_left_out(single: Path) -> None:
    file = single / "predictions.parquet"
    table = pq.read_table(file)
    split = pa.array(["val"] * 100 + ["test"] * 400)
    pq.write_table(table.set_column(1, "split", split), file)
    assert len(load_run(single).predictions().ids) == 400


@pytest.mark.parametrize(("column", "value"), [("label", 10), ("predicted", -1), ("label", -2), ("predicted", 10)])
def test_a_class_that_does_not_exist(single: Path, column: str, value: int) -> None:
    file = single / "predictions.parquet"
    table = pq.read_table(file)
    values = table[column].to_pylist()
    values[7] = value
    at = table.column_names.index(column)
    pq.write_table(table.set_column(at, column, pa.array(values, pa.int32())), file)
    with pytest.raises(InputError, match=r"names a class outside 0\.\.9"):
        load_run(single).predictions()


def test_predictions_without_a_column(single: Path) -> None:
    file = single / "predictions.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["probabilities"]), file)
    with pytest.raises(InputError, match="cannot be read"):
        load_run(single).predictions()


def test_the_digest_tells_splits_apart(tmp_path: Path) -> None:
    runs = load_runs([write_study(tmp_path / "s", ("ulfine", "zero_shot"), seeds=2, rows=40)])
    digests = {(run.method, run.seed): run.split_digest for run in runs}
    assert digests["ulfine", 0] == digests["zero_shot", 0] != digests["ulfine", 1]
