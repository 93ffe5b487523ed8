"""The pages: the site builds without a warning, commands exist with their options, programs run."""

from __future__ import annotations

import html
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import typer
from typer.main import get_command

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cli.main import app
from ulfine_fast.cli.options import MethodCommand
from ulfine_fast.config import FitConfig, all_options, options_of, own_options, shared_options
from ulfine_fast.methods import registry

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OWN_METHOD = ROOT / "docs/own-method.md"


def blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """The arguments of each `ulfine-fast` that a page shows."""
    lines = "\n".join(blocks(page, "console") + blocks(page, "bash")).replace("\\\n", " ").splitlines()
    matches = [
        re.search(r"(?:^|\s)ulfine-fast (?!\[)(.*)", line.partition("  #")[0].partition(" > ")[0]) for line in lines
    ]
    return [shlex.split(match[1]) for match in matches if match and "pip install" not in match.string]


def method_options(arguments: list[str]) -> set[str]:
    """Options of the method that a command line names; raises AssertionError where there is no such method."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    method = words[words.index("--method") + 1] if "--method" in words else FitConfig.method
    try:
        specs = options_of(method).values()
    except InputError as error:
        raise AssertionError(str(error)) from error
    names = {spec.name.replace("_", "-") for spec in specs}
    switches = {spec.name.replace("_", "-") for spec in specs if spec.type == "bool"}
    return {f"--{name}" for name in names} | {f"--no-{name}" for name in switches}


def is_deprecated(param) -> bool:
    return getattr(param, "hidden", False) or str(getattr(param, "help", "")).startswith("Deprecated")


def refuse_unknown(arguments: list[str]) -> None:
    """Raises AssertionError where a command, an option or a method does not exist, or an option is deprecated."""
    command = get_command(app)
    words = list(arguments)
    while words:
        params = [param for param in command.params if not is_deprecated(param)]
        options = {text for param in params for text in [*param.opts, *param.secondary_opts]}
        if isinstance(command, MethodCommand):
            options |= method_options(arguments)
        word = words.pop(0)
        inner = getattr(command, "commands", {})
        if word in inner:
            command = inner[word]
        elif word.startswith("-") and not re.fullmatch(r"-?\d.*", word):
            assert word.partition("=")[0] in options | {"--help"}, f"{command.name} has no {word}"
        else:
            assert not inner or word in ("COMMAND", "options.toml"), f"there is no command {word}"


@pytest.fixture
def own_method(tmp_path, monkeypatch):
    """The methods that docs/own-method.md writes, importable, and registered for one test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    nearest_mean, program, smoothed_probe = blocks(OWN_METHOD, "python")
    for name, code in (("nearest_mean", nearest_mean), ("smoothed_probe", smoothed_probe)):
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.import_module(name)
    yield program
    for name in ("nearest_mean", "smoothed_probe"):
        del registry._REGISTERED[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist_with_their_options(page, own_method):
    for arguments in commands(page):
        refuse_unknown(arguments)


def test_the_check_of_commands_finds_errors():
    for wrong in (
        "fitt cache",
        "fit cache --lrr 1",
        "cache marge a b",
        "fit cache --method linear_probe --mu 0.1",
        "fit cache --method=linear_probe --mu 0.1",
        "fit cache --lean 1 --method ulfine_plus",
        "fit cache --mu 0.1",
        "fit cache --method nearest",
        "sweep cache --method knn --no-paf",
        "sweep cache --forecast labels",
        "extract images --append",
        "report run --mu 0.1",
    ):
        with pytest.raises(AssertionError):
            refuse_unknown(shlex.split(wrong))
    for right in (
        "fit cache --mu 0.1 --no-paf --method ulfine",
        "fit cache --tau 2 --method=linear_probe",
        "sweep c --probe-weight 1",
    ):
        refuse_unknown(shlex.split(right))
    assert sum(len(commands(page)) for page in PAGES) > 50


def test_benchmarks_exist_with_their_options():
    """Every `python -m benchmarks...` of the pages, and every option that `--set` names."""
    calls = [
        call
        for page in PAGES
        for call in re.findall(
            r"python -m (benchmarks\.[a-z_]+\.[a-z_]+)([^`\n]*)", page.read_text(encoding="utf-8").replace("\\\n", " ")
        )
    ]
    assert len(calls) > 40
    for module, text in calls:
        path = ROOT / f"{module.replace('.', '/')}.py"
        assert path.exists(), f"there is no {module}"
        match = re.search(r"typer\.run\(guarded\((\w+)\)\)", path.read_text(encoding="utf-8"))
        assert match, f"{module} is no command"
        program = typer.Typer()
        program.command()(getattr(importlib.import_module(module), match[1]))
        params = get_command(program).params
        known = {text for param in params for text in [*param.opts, *param.secondary_opts]}
        for option in re.findall(r"(?:^|\s)(--[a-z0-9-]+)", text.partition("  #")[0]):
            assert option in known, f"{module} has no {option}"
    for page in PAGES:
        for name in re.findall(r"--set (\w+)=", page.read_text(encoding="utf-8")):
            assert name in all_options(), f"{page.name} sets {name}, which is no option"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` builds it; not --quiet, which hides the warnings from --strict."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_the_site_is_built_without_a_warning(site):
    page = (site / "api/index.html").read_text(encoding="utf-8")
    for name in ("FeatureCache", "FitConfig", "fit_many", "FeatureClassifier"):
        assert name in page
    assert "hyper-parameters, seeds, adapter ranks" in page  # a docstring's own words


def test_the_start_page_shows_the_report_and_the_review(site):
    page = (site / "index.html").read_text(encoding="utf-8")
    shown = re.findall(r'<img[^>]* src="(images/[^"]+)"', page)
    assert [name.partition("-")[0] for name in shown] == ["images/report", "images/review"]
    for name in shown:
        assert (site / name).is_file()


def test_the_site_has_four_parts_and_a_search(site):
    page = (site / "index.html").read_text(encoding="utf-8")
    tabs = re.findall(r'class="md-tabs__link">\s*([\w-]+)\s*<', page)
    assert tabs == ["Start", "Tutorial", "How-to", "Reference", "Explanation"]
    found = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))["docs"]
    indexed = {entry["location"].partition("#")[0] for entry in found}
    pages = [path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in PAGES if path.name != "README.md"]
    assert {"" if name == "index" else f"{name.removesuffix('index').rstrip('/')}/" for name in pages} == indexed


def test_pages_are_there_as_text_too(site):
    """llms.txt names each page, whose Markdown lies beside it; docstrings and tables of options are in the text."""
    listed = re.findall(r"^- \[[^]]+\]\(([^)]+)\)", (site / "llms.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(
        path.relative_to(ROOT / "docs").as_posix() for path in PAGES if path.name != "README.md"
    )
    whole = (site / "llms-full.txt").read_text(encoding="utf-8")
    for name in listed:
        assert (site / name).read_text(encoding="utf-8") in whole
    for name, text in (("options.md", "| `probe_weight`"), ("api.md", "hyper-parameters, seeds, adapter ranks")):
        assert text in (site / name).read_text(encoding="utf-8")
    assert not re.search(r"^::: ", whole, re.MULTILINE)


def test_every_option_has_a_row_in_the_table_of_its_method(site):
    page = (site / "options/index.html").read_text(encoding="utf-8")
    assert "tables of options" not in page
    shared, methods = page.split('<h2 id="options-of-each-method"')
    _check_rows(shared, shared_options())
    sections = {part.partition('"')[0]: part for part in methods.split('<h3 id="')[1:]}
    for name in registry.names():
        if name not in _registered_by_tests():
            _check_rows(sections[name], own_options(name))
            assert html.escape(registry.find(name).source, quote=False) in sections[name]


def _check_rows(section: str, options) -> None:
    """Each option has one row, with its help."""
    assert sorted(re.findall(r"<tr>\s*<td><code>(\w+)</code>", section)) == sorted(options)
    text = html.unescape(re.sub(r"<[^>]+>", "", section))
    for spec in options.values():
        assert spec.metadata["help"].replace("`", "") in text


def _registered_by_tests() -> set[str]:
    """Methods that other tests of this process registered; the site's build does not know them."""
    return {name for name in registry.names() if not registry.find(name).method.__module__.startswith("ulfine_fast.")}


def test_programs_of_the_page_on_own_features_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, program in enumerate(blocks(ROOT / "docs/own-features.md", "python")):
        exec(compile(program, f"own-features.md, program {number}", "exec"), {})


def test_the_program_of_the_page_on_own_methods_runs(own_method, capsys):
    exec(compile(own_method, "own-method.md", "exec"), {})
    assert float(capsys.readouterr().out) > 0.9


def test_the_methods_of_the_page_do_not_depend_on_other_trials(own_method):
    """Trials of other sizes pad the pool; a trial alone predicts the same."""
    from ulfine_fast import FeatureCache, FitConfig, fit, fit_many

    rng = np.random.default_rng(0)
    labels = np.arange(300) % 3
    features = rng.standard_normal((3, 16))[labels] + rng.standard_normal((300, 16))
    cache = FeatureCache.from_arrays(features.astype(np.float32), labels, class_names=["a", "b", "c"])
    options = {"nearest_mean": {"mean_weight": 3.0}, "smoothed_probe": {"label_smoothing": 0.2, "steps": 20}}
    for method, own in options.items():
        small, large = (FitConfig(method=method, n1=n1, gamma_l=2.0, gamma_u=2.0, **own) for n1 in (6, 40))
        alone = fit(cache, small, progress=False)
        beside = fit_many(cache, [large, small], progress=False)[1]
        np.testing.assert_allclose(alone.logits(features), beside.logits(features), atol=1e-4)
        assert alone.metrics["balanced_accuracy"] > 0.6


def test_label_smoothing_of_the_page_is_that_of_torch(own_method):
    import smoothed_probe  # type: ignore[import-not-found]
    import torch

    from ulfine_fast.core.types import Batch

    torch.manual_seed(0)
    features, labels, heads = torch.randn(2, 5, 8), torch.randint(0, 3, (2, 5)), torch.randn(2, 3, 8)

    class Trials:
        values: ClassVar = {"label_smoothing": torch.tensor([0.0, 0.3]), "scale": torch.tensor([25.0, 10.0])}

    class State:
        tensors: ClassVar = {"linear": heads}

    method = smoothed_probe.SmoothedProbe()
    losses = method.losses(Trials(), State(), Batch(features, labels)).labeled
    logits = method.logits(Trials(), State.tensors, features)
    for trial, smoothing in enumerate((0.0, 0.3)):
        expected = torch.nn.functional.cross_entropy(logits[trial], labels[trial], label_smoothing=smoothing)
        torch.testing.assert_close(losses[trial], expected)
