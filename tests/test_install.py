"""What an installation is made from: the versions that were tested, and the targets of make that take them or not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

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
