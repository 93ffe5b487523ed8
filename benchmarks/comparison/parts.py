"""Finished parts of a comparison, one JSON file for each cell and contender, so that a stopped run can go on."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from benchmarks.comparison.contenders import engine_method
from benchmarks.comparison.scikit_learn import SCIKIT_LEARN
from benchmarks.results import Row, write_json
from ulfine_fast.cache.io.files import make_folder
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.methods import registry

# every new method touches these without changing the others; what configs hold is compared value by value
_UNCOUNTED = ("ulfine_fast.config", "ulfine_fast.methods")


def read_part(path: Path, request: Row) -> list[Row] | None:
    """Rows of a finished part; None where there is none, or where it answers another request.

    Args:
        path: its file.
        request: what the part must have been made from. A stored config may lack options that came later.
    """
    try:
        part = json.loads(path.read_text(encoding="utf-8"))
        stored = dict(part["request"])
        rows = list(part["rows"])
        stored_config = dict(stored.pop("config"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    config = request["config"]
    same_config = all(name in config and config[name] == value for name, value in stored_config.items())
    same_rest = stored == {name: value for name, value in request.items() if name != "config"}
    return rows if same_config and same_rest else None


def write_part(path: Path, request: Row, rows: list[Row]) -> None:
    """Write a part whole or not at all.

    Raises:
        InputError: the file system refused.
    """
    make_folder(path.parent)
    write_json(path, {"request": request, "rows": rows})


def fingerprint_of(cache: FeatureCache) -> str:
    """A short name for a cache's features, labels and splits."""
    digest = hashlib.sha256()
    for array in (cache.plain, cache.labels, cache.views("strong")[:, :1]):
        digest.update(array.tobytes())
    digest.update("/".join(cache.splits.tolist()).encode())
    return digest.hexdigest()[:16]


def code_of(contender: str, *, tuned: bool) -> str:
    """A short name for the code that results come from: the contender's own, the engine's, and all that they import."""
    if contender in SCIKIT_LEARN:
        start = ["benchmarks.comparison.scikit_learn"]
    else:
        bases: Any = registry.find(engine_method(contender)).method.__mro__
        own = [base.__module__ for base in bases if base.__module__.startswith("ulfine_fast")]
        start = ["ulfine_fast.engine.fit", *own]
    if tuned:
        start.append("benchmarks.comparison.search")
    digest = hashlib.sha256()
    for name in sorted(_imported_by(start)):
        if name not in _UNCOUNTED:
            digest.update(_file(name).read_bytes())
    return digest.hexdigest()[:16]


def _file(module: str) -> Path:
    origin = importlib.import_module(module).__file__
    assert origin is not None
    return Path(origin)


def _imported_by(modules: list[str]) -> set[str]:
    """These modules, and those of the package that they import at any depth, but for lazy imports."""
    waiting = list(modules)
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for node in ast.parse(_file(name).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ulfine_fast."):
                waiting.append(node.module)
    return seen
