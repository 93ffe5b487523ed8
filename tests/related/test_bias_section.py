from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.report.writer import RunSpec, write_run
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.related.class_bias.section import read_groups, transfer_section
from ulfine_fast.report.groups import group_runs
from ulfine_fast.report.page import render_page
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
    section = transfer_section(group_runs(runs)[0])
    assert sorted(row["label"] for row in section["rows"]) == ["linear probe", "ulfine"]
    for row in section["rows"]:
        assert re.fullmatch(r"-?\d\.\d\d( ±\d+\.\d\d)?", row["bias_correlation"])
        assert row["group_gap"] == "-"
    assert not section["grouped"]


def test_without_a_zero_shot_run_there_is_no_section(runs):
    assert transfer_section(group_runs(runs[2:])[0])["rows"] == []
    assert 'id="transfer"' not in render_page(runs[2:])


def test_of_other_test_images_nothing_is_said(tmp_path, runs):
    other = load_run(write_run(tmp_path / "other", RunSpec(method="ulfine", ids="elsewhere/{}".format)))
    assert transfer_section(group_runs([*runs[:2], other])[0])["rows"] == []


def test_groups_of_images(tmp_path, runs):
    ids = runs[0].predictions().ids
    lines = ["id,group", *(f"{name},{'<b>odd' if i % 2 else 'even'}" for i, name in enumerate(ids))]
    (tmp_path / "groups.csv").write_text("\n".join(lines))
    attributes = read_groups(tmp_path / "groups.csv")
    section = transfer_section(group_runs(runs)[0], attributes)
    assert section["grouped"]
    page = render_page(runs, attributes=attributes)
    assert "gap of groups" in page
    assert 'href="#transfer"' in page


@pytest.mark.parametrize("text", ["", "name,group\na,b", None])
def test_a_wrong_file_of_groups_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "groups.csv").write_text(text)
    with pytest.raises(InputError, match=r"groups\.csv"):
        read_groups(tmp_path / "groups.csv")
