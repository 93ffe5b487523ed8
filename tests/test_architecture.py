"""The architecture of docs/architecture.md: imports point one way, without a cycle, and names are where they belong."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"ulfine_fast": "ulfine_fast", "cache": "ulfine_fast.cache", "cli": "ulfine_fast.cli"}

# what each package may import beside itself; every module may read the version
BASE = {"cache"}
CONFIG = {*BASE, "config"}
CORE = {*CONFIG, "data", "ops", "metrics", "core"}
RUNS = {*CORE, "methods", "runs"}
ENGINE = {*RUNS, "engine"}
MAY_IMPORT = {
    "cache": set(),
    "config": BASE,
    "metrics": BASE,
    "ops": BASE,
    "data": CONFIG,
    "demo": BASE,
    "core": CORE,
    "methods": {*CORE, "methods"},
    "runs": RUNS,
    "engine": ENGINE,
    "exports": RUNS,
    "distillation": {*RUNS, "exports"},
    "search": ENGINE,
    "report": {*ENGINE, "search"},
    "review": {*ENGINE, "search", "report"},
    "estimator": ENGINE,
    "related": {*ENGINE, "exports", "search", "report"},
    "cli": {*ENGINE, "demo", "exports", "distillation", "search", "report", "review"},
    "command": {*ENGINE, "exports", "search", "report", "related", "cli"},
    "__main__": {"cli"},
}


def modules() -> dict[str, Path]:
    """Every module of the package with its file."""
    paths = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            paths[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return paths


MODULES = modules()


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports when it runs, inside functions too."""
    imported = set()

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                imported.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                names = [f"{child.module}.{alias.name}" for alias in child.names]
                imported.update(name if name in MODULES else child.module for name in names)
            walk(child)

    walk(ast.parse(path.read_text(encoding="utf-8")))
    return imported & set(MODULES)


IMPORTS = {module: imports(path) - {module} for module, path in MODULES.items()}


def package_of(module: str) -> str | None:
    """The row of MAY_IMPORT that a module belongs to."""
    parts = module.split(".")
    if parts[1:] in ([], ["_version"]):
        return None
    # names of methods are looked up by configs, and this module imports none of them
    if parts[1:] == ["methods", "registry"]:
        return "config"
    if parts[1] == "related" and parts[-1] == "command":
        return "command"
    return parts[1]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_one_way(module):
    package = package_of(module)
    for other in IMPORTS[module]:
        wanted = package_of(other)
        assert wanted in (None, package) or wanted in MAY_IMPORT[package], f"{module} imports {other}"


def test_no_module_imports_itself_through_others():
    state: dict[str, str] = {}

    def visit(module: str, path: list[str]) -> None:
        if state.get(module) == "done":
            return
        assert state.get(module) != "open", " -> ".join([*path[path.index(module) :], module])
        state[module] = "open"
        for other in sorted(IMPORTS[module]):
            visit(other, [*path, module])
        state[module] = "done"

    for module in MODULES:
        visit(module, [])


def test_nothing_outside_related_names_it():
    """But for the list of commands, the list of the report's sections, and one hook of a release ago."""
    lists = {"commands.py", "plugins.py", "sweep.py"}
    for module, path in MODULES.items():
        if not module.startswith("ulfine_fast.related") and path.name not in lists:
            assert "ulfine_fast.related" not in path.read_text(encoding="utf-8"), module


def test_there_are_few_modules_at_the_top():
    assert len(list((ROOT / "ulfine_fast").glob("*.py"))) <= 5


def test_a_package_says_what_is_in_it():
    for module, path in MODULES.items():
        if path.name == "__init__.py" and module != "ulfine_fast":
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), module


def walks() -> list[list[tuple[list[str], str]]]:
    """The numbered lists of docs/architecture.md: the names of each step and the file that they are in."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    lists = []
    for section in text.split("\n## ")[1:]:
        steps = re.findall(r"^\d+\. (.*?)(?=^\d+\. |^$)", section, re.MULTILINE | re.DOTALL)
        lists.append([(re.findall(r"`([A-Za-z_.]+)`", step.partition("(`")[0]), step) for step in steps])
    return lists


def test_the_walks_name_what_is_there():
    files = []
    for walk in walks():
        files.append([])
        for names, step in walk:
            path = re.search(r"\(`([a-z_/0-9]+\.py)`\)", step)
            if path is None:
                continue
            files[-1].append(path[1])
            text = (ROOT / path[1]).read_text(encoding="utf-8")
            for name in names:
                last = name.rpartition(".")[2]
                assert re.search(rf"(def|class) {last}\b|^    {last}: ", text, re.MULTILINE), (name, path[1])
    assert [len(set(walk)) for walk in files] == [12, 10, 6]


# words of version 0.1 that people do not search for, with what to say instead
WORDS = {
    "picture": "image",
    "pictures": "images",
    "nobody": "no one",
    "somebody": "a person",
    "whoever": "the caller",
    "mend": "fix",
    "mends": "fixes",
    "mended": "fixed",
    "strange": "unexpected",
    "told": "labels, options or arguments",
}
NAMES = {*WORDS, "found", "given", "place", "places", "share", "shares", "lean", "pull", "trust", "blunt", "sharp"}
# keys and values of files on disk, and names that libraries chose
KEPT = {
    "cache/sources/__init__.py": {"pictures"},
    "cache/sources/folder.py": {"pictures"},
    "cache/sources/table.py": {"pictures"},
    "cache/io/errors.py": {"found"},
    "cache/pipeline/merge.py": {"found"},
    "cli/report.py": {"pictures"},
    "cli/review.py": {"pictures"},
    "ulfine_fast/exports/__init__.py": {"pull"},
    "ulfine_fast/exports/graphs.py": {"pictures"},
    "ulfine_fast/exports/config.py": {"pictures"},
    "ulfine_fast/exports/hub.py": {"pull"},
    "ulfine_fast/exports/load.py": {"pull"},
    "ulfine_fast/exports/student.py": {"pictures"},
    "ulfine_fast/methods/label_propagation.py": {"pictures"},
}


PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]


def names_in(path: Path) -> set[str]:
    """The words that identifiers of a file consist of, each identifier whole too."""
    words = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [getattr(node, field, None) for field in ("id", "arg", "attr", "name", "asname")]
        for name in names:
            if isinstance(name, str):
                words |= {name.lower().strip("_"), *name.lower().replace("in_place", "inplace").split("_")}
    return words


@pytest.mark.parametrize("module", sorted(MODULES))
def test_identifiers_are_in_the_words_of_the_field(module):
    path = MODULES[module]
    kept = KEPT.get(path.relative_to(ROOT).as_posix(), set())
    private = sorted(names_in(path) & NAMES - kept)
    assert private == []


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_pages_are_in_the_words_of_the_field(page):
    text = re.sub(r"`[^`]*`", "", (ROOT / page).read_text(encoding="utf-8").lower())
    used = {word for word in WORDS if re.search(rf"\b{word}\b", text)}
    assert not used - KEPT.get(page, set()), {word: WORDS[word] for word in used}
