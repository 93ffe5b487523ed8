"""What the documents tell a reader to do, done: the tour's commands and programs, and the example scripts."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.test_pages import blocks, commands

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs/examples"
METHODS = ("zero_shot", "linear_probe", "ulfine_plus")


@pytest.fixture(scope="module")
def workspace(demo, tmp_path_factory):
    """A folder in which the demo's output has the name that the documents give it."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "demo-output").symlink_to(demo[0])
    return folder


def program(workspace, *arguments):
    """Output of a Python program, run there by the interpreter that the package is installed for."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=workspace, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_tours_commands_and_programs_run(workspace, ulfine):
    first, *others = commands(ROOT / "docs/tour.md")
    assert first == ["demo", "--out", "demo-output"]  # the fixture has run it
    assert len(others) == 6
    for arguments in others:
        ulfine(*arguments, cwd=workspace)
    assert (workspace / "report.html").stat().st_size > 50_000
    assert len((workspace / "predictions.csv").read_text().splitlines()) == 501
    [code] = blocks(ROOT / "docs/tour.md", "python")
    accuracies = [float(word) for word in program(workspace, "-c", code).split()]
    assert len(accuracies) == 3
    assert all(0.2 < accuracy < 1 for accuracy in accuracies)


def test_the_program_that_reads_a_cache_without_us_runs(workspace):
    [code] = blocks(ROOT / "docs/cache-format.md", "python")
    (workspace / "CACHE").symlink_to(workspace / "demo-output/cache")
    shapes = program(workspace, "-c", code + "\n    print(len(ids), len(labels), plain.shape[1])").split("\n")
    rows = [list(map(int, line.split())) for line in shapes if line]
    assert sum(row[0] for row in rows) == 3000
    assert all(row[0] == row[1] for row in rows)


def test_predictions_from_and_to_tables(workspace):
    run, images = workspace / "demo-output/runs/linear_probe/seed-0", workspace / "demo-output/images/test"
    printed = program(workspace, EXAMPLES / "tables.py", run, images)
    assert printed.startswith("20 rows: id, class, probability")


def test_the_notebook_runs_from_its_start_to_its_end(workspace):
    """Its cells one after another, as a program; the demo has encoded the images, which takes the longest."""
    cells = json.loads((EXAMPLES / "first-steps.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    printed = program(workspace, "-c", "\n\n".join("".join(cell["source"]) for cell in code) + "\nprint(sheet.size)")
    few = {row[0]: float(row[-1]) for row in map(str.split, printed.splitlines()) if row[0] in METHODS}
    assert few["ulfine_plus"] > few["linear_probe"] > few["zero_shot"]
    assert printed.endswith("(650, 300)\n")
    assert (workspace / "demo-output/notebook.html").stat().st_size > 50_000
    # a reader on the web sees what it printed
    stored = "".join("".join(output.get("text", "")) for cell in code for output in cell["outputs"])
    assert all(method in stored for method in METHODS)
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell["outputs"])


def test_many_trials_from_python(workspace):
    printed = program(workspace, EXAMPLES / "many_trials.py")
    assert [line.split(":")[0] for line in printed.splitlines()] == ["by hand", "best options", "by search", "report"]


def test_the_command_line_with_options_from_a_file(workspace, tmp_path, ulfine):
    images, small = workspace / "demo-output/images", tmp_path / "images"
    for folder in sorted(images.glob("*/*/")):
        (small / folder.relative_to(images)).mkdir(parents=True)
        for image in sorted(folder.iterdir())[:12]:
            shutil.copy(image, small / image.relative_to(images))
    environment = {**ulfine.environment, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    script = ["sh", EXAMPLES / "command_line.sh", small]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "facts.json").read_text())["images"] == 240
    config = json.loads((tmp_path / "runs/plus/seed-1/config.json").read_text())
    assert config["config"]["method"] == "ulfine_plus"
    with (tmp_path / "predictions.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 120
    assert list((tmp_path / "logs/tensorboard/probe/seed-0").iterdir())
    assert (tmp_path / "model/model.safetensors").is_file()
