"""Finished parts of a benchmark, one JSON file for each cell and method, so that a stopped run goes on where it was."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from benchmarks.comparison.contenders import ORACLE
from benchmarks.comparison.scikit_learn import OUTSIDE
from ulfine_fast.cache.io.files import make_folder, write_atomically
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.config import FitConfig
from ulfine_fast.methods.registry import method_of

Part = dict[str, Any]

# every new method touches these two without changing the others; what configs hold is compared value by value
_SHARED = ("ulfine_fast.config", "ulfine_fast.methods")


def read_part(path: Path, request: Part) -> list[Part] | None:
    """Rows of a finished part; None where there is none, or where it answers another request.

    Args:
        path: its file.
        request: what the part must have been made from. A stored config may lack settings that came later.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        stored, rows = dict(found["request"]), list(found["rows"])
        config = dict(stored.pop("config"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    wanted = {name: value for name, value in request.items() if name != "config"}
    same = all(name in request["config"] and request["config"][name] == value for name, value in config.items())
    return rows if same and stored == wanted else None


def write_part(path: Path, request: Part, rows: list[Part]) -> None:
    """Write a part whole or not at all.

    Raises:
        InputError: the file system refused.
    """
    make_folder(path.parent)
    write_json(path, {"request": request, "rows": rows})


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all; what is no number becomes an error, not a file that others cannot read."""
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def fingerprint_of(cache: FeatureCache) -> str:
    """A short name for a cache's features, labels and splits."""
    seen = hashlib.sha256()
    for array in (cache.plain, cache.labels, cache.views("strong")[:, :1]):
        seen.update(array.tobytes())
    seen.update("/".join(cache.splits.tolist()).encode())
    return seen.hexdigest()[:16]


def code_of(method: str, *, tuned: bool) -> str:
    """A short name for the code that a method's figures come from: its own module, the engine, all they import."""
    if method in OUTSIDE:
        start = ["benchmarks.comparison.scikit_learn"]
    else:
        engine = "linear_probe" if method == ORACLE else method
        own = [base.__module__ for base in type(method_of(FitConfig(method=engine))).__mro__]
        start = ["ulfine_fast.engine.fit", *(name for name in own if name.startswith("ulfine_fast"))]
    seen = hashlib.sha256()
    for name in sorted(_imported([*start, *(["benchmarks.comparison.search"] if tuned else [])])):
        if name not in _SHARED:
            seen.update(_file(name).read_bytes())
    return seen.hexdigest()[:16]


def _file(module: str) -> Path:
    origin = importlib.import_module(module).__file__
    assert origin is not None
    return Path(origin)


def _imported(modules: list[str]) -> set[str]:
    """The engine's modules that these import as a whole, at any depth, and themselves."""
    found: set[str] = set()
    while modules:
        name = modules.pop()
        if name in found:
            continue
        found.add(name)
        for node in ast.parse(_file(name).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ulfine_fast."):
                modules.append(node.module)
    return found
