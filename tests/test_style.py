"""The house rules that a program can check: lint, format, types, and the direction of imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ulfine_fast.cache.io.toml import read_toml

ROOT = Path(__file__).parents[1]
PACKAGES = ["ulfine_fast", "cache", "cli"]


def run(*command):
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["ruff", "format", "--check", "."]], ids=" ".join)
def test_ruff(command):
    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr


def test_mypy(tmp_path):
    """Types of all rooms, three of them seen as one package: mypy does not follow pyproject.toml's mapping.

    A user's program is checked with them, by the rules of --strict (pyproject.toml).
    """
    package = tmp_path / "ulfine_fast"
    package.mkdir()
    for path in (ROOT / "ulfine_fast").iterdir():
        (package / path.name).symlink_to(path)
    for room in ("cache", "cli"):
        (package / room).symlink_to(ROOT / room)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    (tmp_path / "users_program.py").symlink_to(ROOT / "tests/fixtures/users_program.py")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "-p",
            "ulfine_fast",
            "-p",
            "benchmarks",
            "-m",
            "users_program",
            "--cache-dir",
            str(ROOT / ".mypy_cache"),
        ],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_lists_every_package_and_every_kind_of_file_beside_it():
    settings = read_toml(ROOT / "pyproject.toml")["tool"]["setuptools"]
    names = {"ulfine_fast": "ulfine_fast", "cache": "ulfine_fast.cache", "cli": "ulfine_fast.cli"}
    files = [path for room in PACKAGES for path in (ROOT / room).rglob("*") if path.is_file() and path.suffix != ".pyc"]
    folders = {}
    for folder in {path.parent for path in files}:
        room, *inner = folder.relative_to(ROOT).parts
        folders[".".join([names[room], *inner])] = folder
    assert set(settings["packages"]) == set(folders)
    for package, folder in folders.items():
        listed = settings["package-data"].get(package, [])
        for file in folder.iterdir():
            if file.is_file() and file.suffix not in (".py", ".pyc"):
                assert any(file.match(pattern) for pattern in listed), f"{file.relative_to(ROOT)} is left out"


@pytest.mark.parametrize("module", ["ulfine_fast", "ulfine_fast.cli.main"])
def test_a_light_import_stays_light(module):
    heavy = ("torch", "open_clip", "sklearn", "pyarrow", "h5py", "numpy")
    code = f"import {module}, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
