"""Every method on every cell: one table, one list of rows. `python -m benchmarks.studies.methods --help` says how."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.comparison.cells import Cell, parse_cell, parse_cells
from benchmarks.comparison.contenders import (
    Options,
    contender_names,
    engine_method,
    fit_cell,
    read_options,
    splits_of,
)
from benchmarks.comparison.parts import code_of, fingerprint_of, read_part, write_part
from benchmarks.comparison.scikit_learn import SCIKIT_LEARN, ScikitLearnClassifier
from benchmarks.comparison.search import search
from benchmarks.comparison.tables import Rows, print_tables
from benchmarks.data import MODEL, NAMES, check_data, open_data
from benchmarks.options import DeviceOption, JsonOption, SeedsOption, parse_methods, parse_seeds
from benchmarks.results import Row, write_rows
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.progress import progress_bar
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.config import SHAPES
from ulfine_fast.data.splits import Split

FASHION = ",".join(
    f"fashion_mnist:{n1}:{shape}"
    for n1 in (150, 50)
    for shape in ("consistent", "uniform", "reversed", "middle", "head-tail")
)
_CELLS_HELP = f"""Comma-separated DATA:N1:SHAPE. DATA: {", ".join(NAMES)}. N1: labelled images of the largest class,
as the data set's protocol has it. DATA::natural and DATA:25%:natural take the data's own counts and keep the labels of
half, or of a quarter, of each class. SHAPE: {", ".join(SHAPES)}. Default: the ten cells of Fashion-MNIST."""
_METRICS = (
    "accuracy",
    "balanced_accuracy",
    "tail_accuracy",
    "pseudo_label_precision",
    "confidence_on_false",
    "seconds",
)
_DECIDED = ("method", "seed", "split_seed", "n1", "m1", "gamma_l", "gamma_u", "shape", "labeled_fraction")


@dataclass(frozen=True)
class Plan:
    """What holds for all cells and methods.

    Attributes:
        methods: in the table's order.
        seeds: of splits, weights and mini-batches.
        trials: settings tried by the search; 0 takes the defaults.
        base: options for every method of the engine that reads them, over its defaults and over what a search draws.
        model: encoder of images.
        device: where extraction and training run.
        parts: folder of finished parts, None to keep none.
    """

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    trials: int
    base: Options
    model: str
    device: str
    parts: Path | None

    def base_of(self, method: str) -> Options:
        """The base options that a method reads."""
        return {} if method in SCIKIT_LEARN else read_options(method, self.base)


@dataclass(frozen=True)
class OpenedCell:
    """A cell with its data and splits.

    Attributes:
        cell: the cell.
        cache: features of its data set.
        fingerprint: of the cache.
        splits: one for each seed.
    """

    cell: Cell
    cache: FeatureCache
    fingerprint: str
    splits: list[Split]


def parse_settings(pairs: Sequence[str]) -> Options:
    """Read NAME=VALUE pairs, each value as JSON or else as text.

    Raises:
        InputError: no pair, or an option that cells, methods and seeds decide.
    """
    options: Options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"a setting is NAME=VALUE such as steps=300, got {pair!r}")
        if name in _DECIDED:
            raise InputError(f"{name} is decided by --cells, --methods, --seeds, --m1 or --gamma-u, not by --set")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def check_plan(plan: Plan, cells: Sequence[Cell]) -> None:
    """Refuse what would end the command after an hour of other cells.

    Raises:
        InputError: an unknown data set, an option that no method of the plan reads, or a value outside its range.
    """
    engine_methods = [method for method in plan.methods if method not in SCIKIT_LEARN]
    read = {name for method in engine_methods for name in plan.base_of(method)}
    for cell in cells:
        check_data(cell.data)
        for method in engine_methods or ["ulfine"]:
            unread = {name: value for name, value in plan.base.items() if name not in read}
            cell.config(**{**plan.base_of(method), **unread}, method=engine_method(method))


def run_plan(plan: Plan, cells: Sequence[Cell]) -> Iterator[list[Row]]:
    """The rows of each cell and method, cells of one data set together so that its cache is opened once."""
    for data in dict.fromkeys(cell.data for cell in cells):
        cache = open_data(data, plan.model, plan.device)
        fingerprint = fingerprint_of(cache)
        for cell in cells:
            if cell.data == data:
                opened = OpenedCell(cell, cache, fingerprint, splits_of(cell, cache, plan.seeds))
                for method in plan.methods:
                    yield _part(plan, opened, method)


def _part(plan: Plan, opened: OpenedCell, method: str) -> list[Row]:
    """The rows of one cell and method: those of its finished part, or measured."""
    if plan.parts is None:
        return _measure(plan, opened, method)

    # all that decides a part's results
    cell = opened.cell
    config: Row
    if method in SCIKIT_LEARN:
        config = {**cell.config().to_dict(), **asdict(ScikitLearnClassifier(method))}
    else:
        config = cell.config(**plan.base_of(method), method=engine_method(method)).to_dict()
    request = {
        "cell": asdict(cell),
        "method": method,
        "seeds": list(plan.seeds),
        "trials": plan.trials,
        "data": opened.fingerprint,
        "code": code_of(method, tuned=plan.trials > 0),
        "config": config,
    }

    gamma = "" if cell.n1 is None else f"-gamma{cell.gamma_u:g}"
    # a part of the protocol's own counts keeps the name that it had
    own = not cell.n1 or cell.m1 == parse_cell(cell.name).m1
    count = "" if own else f"-m{cell.m1}"
    name = f"{cell.name}{gamma}{count}-{method}-{_seeds_text(plan.seeds)}-trials{plan.trials}"
    path = plan.parts / (name.replace("/", "_").replace(":", "-") + ".json")
    rows = read_part(path, request)
    if rows is None:
        rows = _measure(plan, opened, method)
        write_part(path, request, rows)
    return rows


def _measure(plan: Plan, opened: OpenedCell, method: str) -> list[Row]:
    """Search where that is asked for, then read the test split once."""
    cell = opened.cell
    cache = opened.cache
    splits = opened.splits
    options = plan.base_of(method)
    if plan.trials:
        options = search(method, cell, cache, plan.seeds, splits, options, plan.trials, plan.device)
    [metrics] = fit_cell(method, cell, cache, plan.seeds, splits, [options], plan.device)
    return [
        {
            "data": cell.data,
            "n1": cell.n1,
            "gamma_l": cell.gamma_l,
            "m1": cell.m1,
            "gamma_u": cell.gamma_u,
            "shape": cell.shape,
            "cell": cell.name,
            "method": method,
            "seed": seed,
            **{name: of_seed.get(name) for name in _METRICS},
            # a cosine head of fixed scale is calibrated only after one temperature, fitted on validation
            "ece": of_seed.get("ece_temperature_scaled"),
            "tuned": plan.trials > 0,
            "trials": plan.trials,
            "settings": options,
            "model": plan.model,
        }
        for seed, of_seed in zip(plan.seeds, metrics, strict=True)
    ]


def _seeds_text(seeds: Sequence[int]) -> str:
    """Seeds in a file name."""
    is_range = list(seeds) == list(range(seeds[0], seeds[-1] + 1))
    return f"seeds{seeds[0]}-{seeds[-1]}" if is_range else "seeds" + "+".join(map(str, seeds))


def methods(
    cells: Annotated[str, typer.Option(help=_CELLS_HELP)] = FASHION,
    contenders: Annotated[
        str, typer.Option("--methods", help=f"Comma-separated, or all: {', '.join(contender_names())}.")
    ] = "linear_probe,ulfine,oracle",
    seeds: SeedsOption = "0-4",
    gamma_u: Annotated[
        float | None, typer.Option(help="Unlabelled imbalance of cells with N1.", show_default="100, or the protocol's")
    ] = None,
    m1: Annotated[
        int | None,
        typer.Option(help="Unlabelled images of the largest class of cells with N1.", show_default="the protocol's"),
    ] = None,
    trials: Annotated[
        int, typer.Option(help="Settings tried on validation for each method and cell; 0 takes the defaults.", min=0)
    ] = 16,
    against: Annotated[str, typer.Option(help="The method that the second table compares with the others.")] = "",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE for every method of the engine that reads it, such as steps=300."),
    ] = None,
    as_json: JsonOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of finished parts.", show_default="with --json, FILE without its suffix + .parts"),
    ] = None,
    model: Annotated[str, typer.Option(help="Encoder of the images, as in `ulfine-fast extract`.")] = MODEL,
    device: DeviceOption = "auto",
) -> None:
    """Fit methods on cells of data set, labelled count and unlabelled shape; print balanced accuracy.

    A finished cell and method is kept in --out and not repeated by the next run as long as data, options and code are
    the same.
    """
    parts = as_json.with_suffix(".parts") if out is None and as_json is not None else out
    names = parse_methods(contenders)
    plan = Plan(names, parse_seeds(seeds), trials, parse_settings(settings or []), model, device, parts)
    chosen_cells = parse_cells(cells, gamma_u, m1)
    if against and against not in names:
        raise InputError(f"--against {against} is not among the methods {', '.join(names)}")
    check_plan(plan, chosen_cells)

    # the file holds the rows so far
    rows: list[Row] = []
    with progress_bar() as bar:
        task = bar.add_task("benchmark", total=len(chosen_cells) * len(names), unit="parts", note="")
        for part in run_plan(plan, chosen_cells):
            rows += part
            write_rows(as_json, rows)
            bar.update(task, advance=1, note=f"{part[-1]['cell']} {part[-1]['method']}")

    if not against:
        own_methods = [name for name in ("ulfine_plus", "ulfine") if name in names]
        against = own_methods[0] if own_methods else ""
    print_tables(Rows(rows), chosen_cells, names, against)


if __name__ == "__main__":
    typer.run(guarded(methods))
