from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.report.test_images import draw_folder, run_of, write_cache
from tests.report.writer import PageTables
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cli.report import report

app = typer.Typer()
app.command()(report)


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, InputError):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_images_of_the_cache_are_in_the_page(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", draw_folder(tmp_path / "images"))
    run_of(tmp_path / "runs" / "a", cache)
    page = tmp_path / "page.html"
    code, out, err = run(tmp_path / "runs", "--out", page, "--title", "Four images")
    assert (code, err) == (0, "")
    assert out == f"report: {page} (1 runs, {page.stat().st_size / 1e3:,.0f} kB)\n"
    tables = PageTables(page.read_text())
    assert tables.headings[0] == (1, "Four images")
    assert sum(name == "img" for name, _ in tables.elements) >= 4


def test_without_images_it_goes_on_and_says_so(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", tmp_path / "gone")
    code, out, err = run(folder, "--out", tmp_path / "page.html")
    assert code == 0
    assert out.startswith("report: ")
    assert err == f"no images in the page: the cache {tmp_path / 'gone'} is gone; name their location with --images\n"


def test_images_can_be_named(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", tmp_path / "gone")
    images = draw_folder(tmp_path / "images")
    code, out, _ = run(folder, "--out", tmp_path / "page.html", "--images", images, "--json")
    assert code == 0
    page = tmp_path / "page.html"
    assert json.loads(out) == {
        "report": str(page), "runs": 1, "bytes": page.stat().st_size, "images": True, "no_images_because": None,
    }  # fmt: skip


def test_json_gives_the_reason_for_no_images(tmp_path: Path) -> None:
    code, out, err = run(run_of(tmp_path / "run", None), "--out", tmp_path / "page.html", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["no_images_because"] == "the run was made from features in memory, without a cache"


def test_several_folders(tmp_path: Path) -> None:
    first, second = run_of(tmp_path / "a", None), run_of(tmp_path / "b", None)
    _, out, _ = run(first, second, "--out", tmp_path / "page.html", "--json")
    assert json.loads(out)["runs"] == 2


def test_a_folder_without_runs_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run in"):
        run(tmp_path, "--out", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
