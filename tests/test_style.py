"""The house rules that a program can check: lint, format, types, and the direction of imports."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ulfine_fast.cache.io.toml import read_toml

ROOT = Path(__file__).parents[1]
PACKAGES = ["ulfine_fast", "cache", "cli"]
# who may import whom, besides the package itself
MAY_IMPORT = {"cache": set(), "ulfine_fast": {"cache"}, "cli": {"cache", "ulfine_fast"}}


def run(*command):
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", [["ruff", "check", "."], ["ruff", "format", "--check", "."]], ids=" ".join)
def test_ruff(command):
    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr


def test_mypy(tmp_path):
    """Types of all rooms, three of them seen as one package: mypy does not follow pyproject.toml's mapping."""
    package = tmp_path / "ulfine_fast"
    package.mkdir()
    for path in (ROOT / "ulfine_fast").iterdir():
        (package / path.name).symlink_to(path)
    for room in ("cache", "cli"):
        (package / room).symlink_to(ROOT / room)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "-p",
            "ulfine_fast",
            "-p",
            "benchmarks",
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


def room_of(module):
    """Which of the three rooms a module belongs to, None for others."""
    parts = module.split(".")
    if parts[0] != "ulfine_fast":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ("cache", "cli") else "ulfine_fast"


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_the_wheel_lists_every_package_and_every_kind_of_file_beside_it():
    settings = read_toml(ROOT / "pyproject.toml")["tool"]["setuptools"]
    names = {"ulfine_fast": "ulfine_fast", "cache": "ulfine_fast.cache", "cli": "ulfine_fast.cli"}
    files = [path for room in PACKAGES for path in (ROOT / room).rglob("*") if path.is_file() and path.suffix != ".pyc"]
    found = {}
    for folder in {path.parent for path in files}:
        room, *inner = folder.relative_to(ROOT).parts
        found[".".join([names[room], *inner])] = folder
    assert set(settings["packages"]) == set(found)
    for package, folder in found.items():
        listed = settings["package-data"].get(package, [])
        for file in folder.iterdir():
            if file.is_file() and file.suffix not in (".py", ".pyc"):
                assert any(file.match(pattern) for pattern in listed), f"{file.relative_to(ROOT)} is left out"


@pytest.mark.parametrize("room", PACKAGES)
def test_imports_point_one_way(room):
    for path in (ROOT / room).rglob("*.py"):
        for module in imported(path):
            # every room may know the version
            if module == "ulfine_fast._version" or (other := room_of(module)) in (None, room):
                continue
            assert other in MAY_IMPORT[room], f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("module", ["ulfine_fast", "ulfine_fast.cli.main"])
def test_a_light_import_stays_light(module):
    heavy = ("torch", "open_clip", "sklearn", "pyarrow", "h5py", "numpy")
    code = f"import {module}, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
