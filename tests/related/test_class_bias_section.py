from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.report.writer import RunSpec, write_run
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.related.class_bias.section import class_bias_rows, class_bias_section
from ulfine_fast.report.groups import group_runs
from ulfine_fast.report.images import read_attributes
from ulfine_fast.report.page import render_page
from ulfine_fast.report.plugins import PageInputs
from ulfine_fast.runs.files import load_run


@pytest.fixture
def runs(tmp_path: Path):
    """Two seeds each of three methods."""
    return [
        load_run(write_run(tmp_path / f"{method}-{seed}", RunSpec(method=method, seed=seed, permute=False)))
        for method in ("zero_shot", "linear_probe", "ulfine")
        for seed in (0, 1)
    ]


def test_a_row_for_each_adapted_method(runs):
    rows = class_bias_rows(group_runs(runs)[0])
    assert sorted(row["label"] for row in rows) == ["linear probe", "ulfine"]
    for row in rows:
        assert re.fullmatch(r"-?\d\.\d\d( ±\d+\.\d\d)?", row["bias_correlation"])
        assert row["group_gap"] == "–"
    assert "gap of groups" not in class_bias_section(PageInputs(group_runs(runs)[0])).body


def test_without_a_zero_shot_run_there_is_no_section(runs):
    assert class_bias_section(PageInputs(group_runs(runs[2:])[0])) is None
    assert 'id="class-bias"' not in render_page(runs[2:])


def test_runs_on_other_test_images_are_not_compared(tmp_path, runs):
    other = load_run(write_run(tmp_path / "other", RunSpec(method="ulfine", ids="elsewhere/{}".format)))
    assert class_bias_rows(group_runs([*runs[:2], other])[0]) == []


def test_groups_of_images(tmp_path, runs):
    ids = runs[0].predictions().ids
    lines = ["id,group", *(f"{name},{'<b>odd' if i % 2 else 'even'}" for i, name in enumerate(ids))]
    (tmp_path / "groups.csv").write_text("\n".join(lines))
    attributes = read_attributes(tmp_path / "groups.csv")
    assert all(row["group_gap"] != "–" for row in class_bias_rows(group_runs(runs)[0], attributes))
    page = render_page(runs, attributes=attributes)
    assert "gap of groups" in page
    assert 'href="#class-bias"' in page


def test_the_section_is_between_calibration_and_confusion(runs):
    page = render_page(runs)
    positions = [page.index(f'<section id="{name}"') for name in ("calibration", "class-bias", "confusion")]
    assert positions == sorted(positions)


@pytest.mark.parametrize("text", ["", "name,group\na,b", None])
def test_an_error_names_a_wrong_file_of_groups(tmp_path, text):
    if text is not None:
        (tmp_path / "groups.csv").write_text(text)
    with pytest.raises(InputError, match=r"groups\.csv"):
        read_attributes(tmp_path / "groups.csv")
