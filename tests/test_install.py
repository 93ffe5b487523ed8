"""What an installation is made from: the tested versions, the targets of make, the Dockerfile, the citation."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.cli.program import run
from ulfine_fast import __version__
from ulfine_fast.cache.io.toml import read_toml

ROOT = Path(__file__).parents[1]


def lines(name: str) -> list[str]:
    """Lines of a file without its comments."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return [line for line in (line.partition("#")[0].strip() for line in text.splitlines()) if line]


def planned(*arguments: str) -> str:
    """The commands that make would run in a fresh environment."""
    command = ["make", "--dry-run", f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_every_library_of_the_tests_has_a_tested_version_that_fits():
    pinned = dict(line.split("==") for line in lines("constraints.txt"))
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][\w.]*", line) for line in lines("constraints.txt"))
    versions = {canonicalize_name(name): Version(version) for name, version in pinned.items()}
    extras = read_toml(ROOT / "pyproject.toml")["project"]["optional-dependencies"]
    linux = {"platform_system": "Linux", "platform_machine": "x86_64", "python_version": "3.11", "extra": ""}
    for line in [*lines("requirements.txt"), *extras["offline"], *extras["dev"]]:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(linux):
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), line


def test_make_takes_the_tested_versions_and_make_latest_the_newest(tmp_path):
    if sys.version_info < (3, 11):
        pytest.skip("the tested versions need Python 3.11")
    install = r'pip install --quiet --editable "\.\[offline,dev\]" *(.*)'
    fresh = f"VENV={tmp_path}/fresh"
    assert re.findall(install, planned("docs", fresh)) == ["--constraint constraints.txt"]
    assert re.findall(install, planned("docs", fresh, "CONSTRAINTS=")) == [""]
    assert "VENV=.venv-latest CONSTRAINTS=\n" in planned("latest")


def test_the_tests_can_build_the_site():
    extras = read_toml(ROOT / "pyproject.toml")["project"]["optional-dependencies"]
    assert set(extras["docs"]) <= set(extras["dev"])


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments, without comments, joined over line ends."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    joined = re.sub(r"\\\n\s*", "", text)
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def test_the_dockerfile_copies_what_exists_and_what_is_not_ignored():
    kept = {line.removeprefix("!") for line in lines(".dockerignore") if line.startswith("!")}
    copied = [path for word, rest in instructions() if word == "COPY" for path in rest.split()[:-1]]
    assert copied
    for path in copied:
        assert (ROOT / path).exists(), path
        assert path in kept, f"{path} is in .dockerignore"
    project = read_toml(ROOT / "pyproject.toml")
    packages = project["tool"]["setuptools"]["package-dir"].values()
    assert {*packages, project["project"]["readme"], "requirements.txt"} <= set(copied)


def test_the_dockerfile_installs_extras_that_exist_and_starts_the_command():
    project = read_toml(ROOT / "pyproject.toml")["project"]
    steps = "\n".join(rest for word, rest in instructions() if word == "RUN")
    [extras] = re.findall(r'"\.\[([\w,]+)\]"', steps)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    pattern = re.search(r"grep -E '(.+?)'", steps)[1]
    chosen = [line for line in lines("constraints.txt") if re.search(pattern, line)]
    assert [line.partition("==")[0] for line in chosen] == ["torch", "torchvision"]

    entry, arguments = (json.loads(dict(instructions())[word]) for word in ("ENTRYPOINT", "CMD"))
    assert entry[0] in project["scripts"]
    assert "--version" in steps  # a build without a working command fails
    done = run(*arguments)
    assert done.exit_code == 0
    assert "extract" in done.stdout


def test_the_citation_names_the_version_and_the_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = read_toml(ROOT / "pyproject.toml")["project"]
    assert citation["version"] == __version__
    assert citation["license"] == project["license"]
    assert citation["authors"] == [{"name": "ulfine-fast contributors"}]
    assert {"cff-version", "message", "title", "type"} <= set(citation)
