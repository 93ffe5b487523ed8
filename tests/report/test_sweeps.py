"""Sweeps in a report: their folder as `sweep` writes it, the table and the bars on the page."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from tests.cli.program import run as command
from tests.report.writer import write_run
from ulfine_fast import build_report, sweep
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.report.charts import bar_chart
from ulfine_fast.report.sweeps import find_sweeps, sweeps_section

SPACE = {
    "method": ["lightweight", "linear_probe"],
    "n1": 30,
    "gamma_l": 10.0,
    "steps": 20,
    "eval_every": 10,
    "val_fraction": 0.4,
    "lr": {"low": 0.0001, "high": 0.3, "log": True},
}


@pytest.fixture(scope="module")
def swept(clusters, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweeps") / "<b>first"
    sweep(clusters, SPACE, out=out, trials=12, seeds=2, sampler="random", refit=1, refit_seeds=2, progress=False)
    return out


def test_the_section_says_what_the_sweep_wrote(swept: Path):
    [section] = sweeps_section(find_sweeps([swept]))
    leaderboard = (swept / "leaderboard.csv").read_text().splitlines()
    assert [row["rank"] for row in section["rows"]] == [str(i + 1) for i in range(len(leaderboard) - 1)]
    first = dict(zip(leaderboard[0].split(","), leaderboard[1].split(","), strict=True))
    metric = section["metrics"][0]
    assert section["rows"][0]["metrics"][0][0] == f"{float(first[metric]):.4f}"
    assert section["settings"] == [("method", False), ("lr", True)]
    assert section["rows"][0]["settings"] == [first["method"], f"{float(first['lr']):.4g}"]
    assert section["counts"] == "12 complete"
    importance = json.loads((swept / "importance.json").read_text())
    assert len(section["charts"]) == len([fractions for fractions in importance.values() if fractions])


def test_a_page_about_a_sweep_has_its_runs_and_its_leaderboard(swept: Path, tmp_path: Path):
    done = command("report", swept, "--out", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    text = (tmp_path / "page.html").read_text()
    assert 'href="#sweeps"' in text
    assert len(re.findall(r"<td class=\"num\">\d+</td><td class=\"num\">\d+</td><td class=\"num\"><span", text)) == 12
    assert "<b>first" not in text
    assert "&lt;b&gt;first" in text


LINK = re.compile(r'<a href="([^"]*)">')


def links(page: Path, words: str) -> list[str]:
    """The addresses in the paragraphs of a page that say these words, as a browser reads them."""
    paragraphs = [line for line in page.read_text().splitlines() if words in line]
    return [unquote(unescape(address)) for line in paragraphs for address in LINK.findall(line)]


def test_a_sweep_and_the_runs_of_its_refit_link_to_each_other_where_both_move(swept: Path, tmp_path: Path):
    folder = tmp_path / "here" / "<b>first"
    shutil.copytree(swept, folder)
    run = build_report([folder / "best-1"], folder / "best-1" / "report.html")
    assert links(run, "of the sweep") == ["../leaderboard.csv"]
    sweep_page = build_report([folder], folder / "report.html")
    assert links(sweep_page, "Refit with fresh seeds") == ["#results", "best-1/report.html", "best-1.toml"]
    assert links(sweep_page, "of the sweep") == ["#h-sweep-1"]
    assert 'id="h-sweep-1"' in sweep_page.read_text()
    assert links(build_report([folder / "best-1"], run), "of the sweep") == ["../report.html"]
    elsewhere = build_report([folder / "best-1" / "seed-2"], tmp_path / "pages" / "one.html")
    assert links(elsewhere, "of the sweep") == ["../here/<b>first/report.html"]

    # every file that a page names is there, also after the folder moved
    (tmp_path / "here").rename(tmp_path / "there")
    for page in (tmp_path / "there" / "<b>first" / "report.html", tmp_path / "there" / "<b>first/best-1/report.html"):
        for address in links(page, "weep") + links(page, "Refit"):
            assert address.startswith("#") or (page.parent / address).exists(), address


def test_runs_of_a_damaged_sweep_have_no_link(swept: Path, tmp_path: Path):
    folder = tmp_path / "sweep"
    shutil.copytree(swept, folder)
    (folder / "sweep.json").write_text("{")
    assert links(build_report([folder / "best-1"], tmp_path / "page.html"), "of the sweep") == []


def test_without_a_sweep_there_is_no_section(tmp_path: Path):
    write_run(tmp_path / "run")
    (tmp_path / "run" / "sweep.json").write_text('{"format": "of another program"}')
    assert find_sweeps([tmp_path]) == []
    assert 'id="sweeps"' not in build_report([tmp_path], tmp_path / "page.html").read_text()


@pytest.mark.parametrize("broken", ["leaderboard.csv", "importance.json"])
def test_half_a_sweep_is_refused(swept: Path, tmp_path: Path, broken: str):
    folder = tmp_path / "half"
    folder.mkdir()
    for name in ("sweep.json", "leaderboard.csv", "importance.json"):
        if name != broken:
            (folder / name).write_bytes((swept / name).read_bytes())
    with pytest.raises(InputError, match=r"cannot be read .* run it again, which goes on"):
        find_sweeps([folder])


def test_a_forecast_is_a_line_under_the_leaderboard(swept: Path, tmp_path: Path):
    folder = tmp_path / "sweep"
    shutil.copytree(swept, folder)
    assert sweeps_section(find_sweeps([folder]))[0]["notes"] == []
    content: dict[str, Any] = {"trial": 3, "over": "labels", "metric": "few", "curve": None, "forecast": None}
    (folder / "forecast.json").write_text(json.dumps({**content, "refused": "<i>too few"}))
    text = build_report([folder], tmp_path / "page.html").read_text()
    assert "Forecast of trial 3 over labels: refused, &lt;i&gt;too few." in text
    forecast = {"target": 80.0, "figures": {"flp": {"value": 0.81, "low": 0.7, "high": 0.9}}}
    content |= {"curve": {"budgets": [20.0, 40.0]}, "forecast": forecast}
    (folder / "forecast.json").write_text(json.dumps(content))
    [line] = sweeps_section(find_sweeps([folder]))[0]["notes"]
    assert line == (
        "Forecast of trial 3 over labels, from 40 to 80, few: 0.8100 (0.7000 to 0.9000) by way of the loss."
    )
    (folder / "forecast.json").write_text('{"trial": 3}')
    with pytest.raises(InputError, match="run it again"):
        find_sweeps([folder])


def test_bars_are_as_long_as_their_fractions():
    text = bar_chart("title", [("lr", 0.6), ("<mu>", 0.3), ("rank", 0.0)])
    wide = [float(width) for width in re.findall(r'width="([\d.]+)" height="15"', text)]
    assert wide[0] == pytest.approx(2 * wide[1], rel=0.01)
    assert wide[2] == 1.0
    assert "&lt;mu&gt;" in text
    assert "<mu>" not in text
