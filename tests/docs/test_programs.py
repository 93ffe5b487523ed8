"""Every command and program of the pages runs, from the top of a page to its end, in a folder of its own.

The folder has what pages take for granted: `images`, `new-images`, `more-images`, `cache`, `runs/plus`, `sweeps/first`
and so on. They are substitutes: noise images of three classes through a tiny CLIP of random weights. Where a page says
ViT-B-16, 128 trials or 150 images a class, a few are run (SMALLER). What cannot run here is in NOT_RUN, with the
reason. Commands of benchmarks run in tests/benchmarks on small data.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.cache.samples import write_images, write_tiny_model
from tests.cli.program import run
from tests.docs.test_pages import PAGES, ROOT, own_method  # noqa: F401
from ulfine_fast import FeatureCache, FitConfig, fit, fit_many
from ulfine_fast.cache.io.toml import read_toml

# What a command may not do here, and where it is tested instead.
NOT_RUN = {
    r"^demo\b": "a minute; tests/end_to_end/test_demo.py runs it",
    r"^review\b": "a server that does not end; tests/review",
    r"--install-completion": "changes the shell's files",
    r"--ray\b|--engine ray": "starts a cluster; tests/search/test_on_ray.py, tests/cache/pipeline/test_ray_engine.py",
    r"s3://": "needs S3; tests/cache and tests/end_to_end use a local server",
    r"^push\b": "needs the hub; tests/exports use a local server",
    r"cifar10": "needs torchvision's download; tests/cache/sources/test_torchvision_sets.py",
    r"^fit first\b": "needs two caches of CIFAR-10; tests/methods/test_ulfine_plus_second.py",
    r"^extract hf:": "needs a saved data set; tests/cache/sources/test_huggingface.py",
    r"--to onnx": "seconds of other libraries; tests/exports",
    r"^log\b": "half a minute of other libraries; tests/runs",
}
PROGRAMS_NOT_RUN = {
    r"hf://": "needs the hub; tests/exports use a local server",
    r"\.show\(\)": "opens a browser",
}
# Packages of recipes that are not among our extras; they run where they are installed.
RECIPES = ("cleanlab", "fiftyone", "lancedb", "renumics", "tabicl")
PROGRAMS_NOT_RUN |= {
    rf"(?m)^(import|from) {name}\b": "not installed" for name in RECIPES if importlib.util.find_spec(name) is None
}
PROGRAMS_NOT_RUN |= {r"launch_app|spotlight\.show": "opens a browser", r"TabICL": "downloads weights"}
# Pages whose commands and programs run in another test, with the demo's own images.
ELSEWHERE = {"tour.md", "own-features.md", "own-method.md", "cache-format.md"}
OTHER_PROGRAMS = {"embedding-atlas", "make", "pip", "uvx", "python", "ray", "optuna-dashboard"}
# Numbers that are too large for a few noise images.
SMALLER = {
    "--trials": "2",
    "--seeds": "2",
    "--n1": "8",
    "--m1": "8",
    "--gamma-l": "2",
    "--gamma-u": "2",
    "--batch-size": "8",
    "--batch-labeled": "8",
    "--bag-size": "4",
    "--epochs": "1",
}
SMALLER_IN_PROGRAMS = {"trials": 2, "n1": 8, "m1": 8, "gamma_l": 2, "gamma_u": 2}
QUICK = ["--steps", "4", "--eval-every", "1"]


def blocks_in_order(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"^```(console|python)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def shell_lines(block: str) -> list[str]:
    """The commands of a block, without their output and comments."""
    lines = block.replace("\\\n", " ").splitlines()
    matches = [re.match(r"(?:\w+)?\$ +(.*)", line.partition("  #")[0]) for line in lines]
    return [match[1].strip() for match in matches if match]


def reason(line: str, reasons: dict[str, str]) -> str | None:
    return next((why for pattern, why in reasons.items() if re.search(pattern, line)), None)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder that each page gets a copy of, and the name of the tiny model."""
    folder = tmp_path_factory.mktemp("world")
    model = write_tiny_model(tmp_path_factory.mktemp("model"), layers=2)
    classes = ("oak", "elm", "fir")
    counts = {f"train/{name}": 24 for name in classes} | {f"test/{name}": 4 for name in classes} | {"unlabeled": 24}
    write_images(folder / "images", counts)
    write_images(folder / "new-images", dict.fromkeys(classes, 4), seed=1)
    write_images(folder / "more-images", {"train/ash": 4}, seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        views = "--weak 2 --strong 4 --features last-block"
        do(f"extract images --out cache {views}", model)
        do(f"extract more-images --out features/b {views}", model)
        for name in ("CACHE", "features/a", "features/pets", "other", "stream"):
            shutil.copytree("cache", name)
        shutil.copytree("images", "IMAGES")
        for name, method in (("plus", "ulfine_plus"), ("probe", "linear_probe"), ("ulfine", "ulfine")):
            do(f"fit cache --method {method} --seeds 2 --out runs/{name}", model)
        do("fit cache --method zero_shot --out runs/zero-shot", model)
        do("sweep cache --method linear_probe --trials 2 --out sweeps/first", model)
        do("export runs/plus/seed-0 model", model)
        do("cache export cache --out embeddings", model)
        write_tables(FeatureCache.open("cache"))
    return folder, model


def write_tables(cache: FeatureCache) -> None:
    """The tables that pages name, about the images of the cache."""
    np.savez("probe.npz", features=cache.plain, labels=cache.labels, class_names=cache.class_names)
    np.save("texts.npy", cache.text_features)
    train = [(cache.ids[row], cache.labels[row]) for row in np.flatnonzero(cache.labels >= 0)]
    names = cache.class_names
    rows = {
        "labels.csv": [
            "id," + ",".join(names),
            *(f"{i},{','.join(str(int(k == y)) for k in range(3))}" for i, y in train),
        ],
        "runs/plus/labels.csv": ["id,label", f"{train[0][0]},{names[1]}"],
        "groups.csv": ["id,group", *(f"{i},{'ab'[n % 2]}" for n, i in enumerate(cache.ids))],
        "bags.csv": ["id,bag", *(f"{i},{n // 8}" for n, (i, _) in enumerate(train) if n < 64)],
        "proportions.csv": ["bag," + ",".join(names), *(f"{bag},0.5,0.25,0.25" for bag in range(8))],
        "names.txt": names,
    }
    for path, lines in rows.items():
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def do(line: str, model: str) -> None:
    """Runs a command of `ulfine-fast`, made small; its output goes to the file after `>`."""
    line, _, file = line.partition(" > ")
    arguments = smaller(shlex.split(line), model)
    done = run(*arguments)
    assert done.exit_code == 0, f"ulfine-fast {shlex.join(arguments)}\n{done.output}\n{done.exception!r}"
    if file:
        Path(file.strip()).write_text(done.stdout, encoding="utf-8")


def smaller(words: list[str], model: str) -> list[str]:
    """The arguments with the tiny model and small numbers, after what the command would write is removed."""
    words = [SMALLER.get(before, word) for before, word in pairwise(["", *words]) if word != "--open"]
    if "--help" in words or "--print-config" in words:
        return words
    command = next(word for word in words if not word.startswith("-") and not word.endswith(".toml"))
    for option in ("--out", "-o"):
        if option in words:
            remove(Path(words[words.index(option) + 1]))
    if command == "extract" or "--pretrained" in words:
        words = without(words, "--pretrained")
        words += ["--model", model]
    if command in ("fit", "sweep", "multilabel"):
        words += QUICK if command != "multilabel" else QUICK[:2]
    return words


def without(words: list[str], option: str) -> list[str]:
    """The arguments without an option and its value."""
    return [word for before, word in pairwise(["", *words]) if option not in (before, word)]


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def names_of_programs() -> dict[str, object]:
    """What programs of pages take for granted."""
    cache = FeatureCache.open("cache")
    features = np.asarray(cache.plain[cache.splits == "test"], np.float32)
    labels = np.asarray(cache.labels)
    import pandas as pd

    return {
        "FeatureCache": FeatureCache,
        "FitConfig": FitConfig,
        "fit": fit,
        "fit_many": fit_many,
        "np": np,
        "cache": cache,
        "features": np.asarray(cache.plain, np.float32),
        "y": labels,
        "new": features,
        "frame": pd.DataFrame({"path": sorted(map(str, Path("new-images").rglob("*.png")))}),
        "configs": [FitConfig(method="linear_probe", steps=4, eval_every=2, seed=seed) for seed in (0, 1)],
    }


PAGES_THAT_RUN = [page for page in PAGES if page.name not in ELSEWHERE and blocks_in_order(page)]


@pytest.mark.parametrize("page", PAGES_THAT_RUN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_runs(page, world, tmp_path, monkeypatch, own_method):  # noqa: F811
    folder, model = world
    monkeypatch.chdir(shutil.copytree(folder, tmp_path / "page"))
    names: dict[str, object] = {}
    for kind, block in blocks_in_order(page):
        if kind == "console":
            for line in shell_lines(block):
                program, _, rest = line.partition(" ")
                if program == "ulfine-fast":
                    if not reason(rest, NOT_RUN):
                        do(rest, model)
                else:
                    assert program in OTHER_PROGRAMS, f"{page.name} runs {program}"
        elif not reason(block, PROGRAMS_NOT_RUN):
            names = names or names_of_programs()
            for path in re.findall(r'(?:\bout=|export\("\S+, )"([^"]+)"', block):
                remove(Path(path))
            for name, value in SMALLER_IN_PROGRAMS.items():
                block = re.sub(rf"""(\b{name}["']?(?:=|: ))\d+""", rf"\g<1>{value}", block)
            exec(compile(block, page.name, "exec"), names)


def test_what_is_not_run_is_on_a_page():
    """A reason without its command is out of date."""
    lines = [line for page in PAGES for kind, block in blocks_in_order(page) for line in shell_lines(block)]
    programs = [block for page in PAGES for kind, block in blocks_in_order(page) if kind == "python"]
    for pattern in NOT_RUN:
        assert any(re.search(pattern, line.removeprefix("ulfine-fast ")) for line in lines), pattern
    for pattern in PROGRAMS_NOT_RUN:
        assert any(re.search(pattern, block) for block in programs), pattern


def test_other_programs_of_the_pages_exist():
    """Targets of make, extras of pip, and a test for each benchmark."""
    project = read_toml(ROOT / "pyproject.toml")["project"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    lines = [line for page in PAGES for kind, block in blocks_in_order(page) for line in shell_lines(block)]
    for line in lines:
        for extras in re.findall(r"^pip install ['\"]?(?:ulfine-fast|\.)\[([\w,]+)\]", line):
            assert set(extras.split(",")) <= set(project["optional-dependencies"]), line
        for target in re.findall(r"^make (\w+)", line):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), line
        for group, module in re.findall(r"^python -m benchmarks\.(\w+)\.(\w+)", line):
            tests = "".join(
                path.read_text(encoding="utf-8") for path in (ROOT / "tests/benchmarks" / group).glob("*.py")
            )
            assert re.search(rf"\b{module}\b", tests), f"no test runs {group}.{module}"
