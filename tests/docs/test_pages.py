"""The pages: built without a warning, every command in them known with its options, every program in them run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from ulfine_fast.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """The arguments of each `ulfine-fast` that a page shows."""
    lines = "\n".join(blocks(page, "console") + blocks(page, "bash")).replace("\\\n", " ").splitlines()
    found = [
        re.search(r"(?:^|\s)ulfine-fast (?!\[)(.*)", line.partition("  #")[0].partition(" > ")[0]) for line in lines
    ]
    return [shlex.split(one[1]) for one in found if one and "pip install" not in one.string]


def refuse_unknown(arguments: list[str]) -> None:
    """Raises AssertionError where a command or an option does not exist."""
    command = get_command(app)
    while arguments:
        options = {text for one in command.params for text in [*one.opts, *one.secondary_opts]} | {"--help"}
        word = arguments.pop(0)
        inner = getattr(command, "commands", {})
        if word in inner:
            command = inner[word]
        elif word.startswith("-") and not re.fullmatch(r"-?\d.*", word):
            assert word.partition("=")[0] in options, f"{command.name} has no {word}"
        else:
            assert not inner or word in ("COMMAND", "options.toml"), f"there is no command {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist_with_their_options(page):
    for arguments in commands(page):
        refuse_unknown(list(arguments))


def test_the_check_of_commands_finds_what_is_wrong():
    for wrong in ("fitt cache", "fit cache --lrr 1", "cache marge a b"):
        with pytest.raises(AssertionError):
            refuse_unknown(shlex.split(wrong))
    assert sum(len(commands(page)) for page in PAGES) > 50


def test_the_site_is_built_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    page = (tmp_path / "site/api/index.html").read_text(encoding="utf-8")
    for name in ("FeatureCache", "FitConfig", "fit_many", "FeatureClassifier"):
        assert name in page
    assert "hyper-parameters, seeds, adapter ranks" in page  # a docstring's own words


def test_programs_of_the_page_on_own_features_run():
    for number, program in enumerate(blocks(ROOT / "docs/own-features.md", "python")):
        exec(compile(program, f"own-features.md, program {number}", "exec"), {})
