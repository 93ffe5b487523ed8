from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.report.writer import RunSpec, edit_json, write_run, write_study
from ulfine_fast.report.groups import (
    best_by_validation,
    group_runs,
    groups_to_chart,
    nan_mean,
    paired_difference,
    rank_order,
    same_counts,
    tail_third,
)
from ulfine_fast.runs.files import load_run, load_runs


def test_seeds_of_one_setting_form_a_group(study: Path) -> None:
    groups, repeated = group_runs(load_runs([study]))
    assert {(g.method, len(g.runs), g.detail, g.number) for g in groups} == {
        (method, 5, "", 0) for method in ("zero_shot", "linear_probe", "lightweight", "ulfine")
    }
    assert repeated == []


def test_groups_are_ordered_by_validation_and_not_by_test(study: Path) -> None:
    for seed in range(5):
        edit_json(study / "zero_shot" / f"seed-{seed}" / "metrics.json", val={"balanced_accuracy": 0.99})
    groups, _ = group_runs(load_runs([study]))
    assert groups[0].method == "zero_shot" == best_by_validation(groups).method


def test_without_validation_the_first_group_is_shown(tmp_path: Path) -> None:
    for method in ("zero_shot", "ulfine"):
        run = write_run(tmp_path / method, RunSpec(method=method, rows=40))
        edit_json(run / "metrics.json", val={})
    groups, _ = group_runs(load_runs([tmp_path / "zero_shot", tmp_path / "ulfine"]))
    assert [group.method for group in groups] == ["zero_shot", "ulfine"]
    assert best_by_validation(groups).method == "zero_shot"


def test_settings_of_a_method_are_labelled_by_what_differs(tmp_path: Path) -> None:
    for i, mu in enumerate((0.01, 0.1)):
        write_run(tmp_path / f"{i}", RunSpec(rows=40, config={"mu": mu, "shape": "a long word that goes on"}))
    write_run(tmp_path / "other", RunSpec(method="linear_probe", rows=40, config={"mu": 0.5}))
    groups, _ = group_runs(load_runs([tmp_path]))
    labels = [group.label for group in groups]
    assert sorted(labels) == ["linear probe", "ulfine #1 (mu=0.01)", "ulfine #2 (mu=0.1)"]


def test_another_encoder_is_another_setting(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run = write_run(tmp_path / name, RunSpec(rows=40))
        edit_json(run / "config.json", encoder={"name": name, "sha256": name * 64})
    groups, _ = group_runs(load_runs([tmp_path]))
    assert sorted(group.detail for group in groups) == ["encoder=" + "a" * 15 + "…", "encoder=" + "b" * 15 + "…"]


def test_a_copied_run_is_not_counted_twice(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a" / "seed-0", RunSpec(rows=40))
    shutil.copytree(first, tmp_path / "copy")
    groups, repeated = group_runs(load_runs([tmp_path]))
    assert [len(group.runs) for group in groups] == [1]
    assert [run.path.name for run in repeated] == ["copy"]


def test_charts_take_the_best_of_every_method_first(tmp_path: Path) -> None:
    for i in range(7):
        run = write_run(tmp_path / f"ulfine-{i}", RunSpec(rows=40, config={"mu": i / 100}))
        edit_json(run / "metrics.json", val={"balanced_accuracy": 0.9 - i / 100})
    run = write_run(tmp_path / "zero", RunSpec(method="zero_shot", rows=40))
    edit_json(run / "metrics.json", val={"balanced_accuracy": 0.1})
    groups, _ = group_runs(load_runs([tmp_path]))
    chosen = groups_to_chart(groups, 4)
    assert [group.label for group in chosen] == [
        "ulfine #1 (mu=0.0)", "ulfine #2 (mu=0.01)", "ulfine #3 (mu=0.02)", "zero shot",
    ]  # fmt: skip


def test_pairs_need_the_same_seed_and_split(study: Path) -> None:
    groups, _ = group_runs(load_runs([study]))
    by_method = {group.method: group for group in groups}
    difference = paired_difference(by_method["ulfine"], by_method["zero_shot"], "accuracy")
    values = [
        json.loads((study / "ulfine" / f"seed-{s}" / "metrics.json").read_text())["accuracy"]
        - json.loads((study / "zero_shot" / f"seed-{s}" / "metrics.json").read_text())["accuracy"]
        for s in range(5)
    ]
    assert difference is not None
    assert difference.mean == pytest.approx(np.mean(values))
    # t with 4 degrees of freedom at 0.975 is 2.776445
    assert difference.half == pytest.approx(2.776445 * np.std(values, ddof=1) / math.sqrt(5), rel=1e-6)
    edit_json(study / "zero_shot" / "seed-3" / "split.json", labeled=["another"])
    groups, _ = group_runs(load_runs([study]))
    by_method = {group.method: group for group in groups}
    fewer = paired_difference(by_method["ulfine"], by_method["zero_shot"], "accuracy")
    assert fewer is not None
    assert fewer.n == 4


def test_classes_are_ordered_by_labelled_count_ties_in_class_order(single: Path) -> None:
    edit_json(single / "metrics.json", class_counts=[5, 90, 5, 3, 100, 2, 5, 40, 2, 60])
    run = load_run(single)
    assert rank_order(run).tolist() == [4, 1, 9, 7, 0, 2, 6, 3, 5, 8]
    assert tail_third(run).tolist() == [3, 5, 8]


@pytest.mark.parametrize(("classes", "tail"), [(2, []), (3, [2]), (5, [4]), (11, [8, 9, 10])])
def test_the_tail_is_a_third_rounded_down(tmp_path: Path, classes: int, tail: list[int]) -> None:
    run = load_run(write_run(tmp_path / "run", RunSpec(classes=classes, rows=44, permute=False)))
    assert tail_third(run).tolist() == tail


def test_same_counts_sees_permuted_classes(tmp_path: Path) -> None:
    write_study(tmp_path / "fixed", ("ulfine",), seeds=2, rows=40, permute=False)
    write_study(tmp_path / "permuted", ("ulfine",), seeds=2, rows=40)
    assert same_counts(group_runs(load_runs([tmp_path / "fixed"]))[0])
    assert not same_counts(group_runs(load_runs([tmp_path / "permuted"]))[0])


def test_the_mean_of_nothing_is_undefined() -> None:
    values = np.array([[1.0, math.nan, math.nan], [3.0, 5.0, math.nan]])
    np.testing.assert_array_equal(nan_mean(values, axis=0), [2.0, 5.0, math.nan])
