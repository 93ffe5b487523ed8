"""Every method on every cell: one table, one list of rows. `python -m benchmarks.studies.methods --help` says how."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.comparison.cells import Cell, parse_cells
from benchmarks.comparison.contenders import Settings, fit_cell, names, splits_of
from benchmarks.comparison.parts import code_of, fingerprint_of, read_part, write_json, write_part
from benchmarks.comparison.scikit_learn import OUTSIDE, OutsideClassifier
from benchmarks.comparison.search import search
from benchmarks.data import MODEL, NAMES, check_data, open_data
from benchmarks.options import parse_methods, parse_seeds, parse_settings
from benchmarks.tables import Rows, print_tables
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
_FIGURES = (
    "accuracy",
    "balanced_accuracy",
    "tail_accuracy",
    "pseudo_label_precision",
    "confidence_on_false",
    "seconds",
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What holds for all cells and methods.

    Attributes:
        methods: in the table's order. seeds: of splits, weights and mini-batches.
        trials: settings tried by the search; 0 takes the defaults.
        base: settings that hold for every method, over its defaults and over what a search draws.
        model: encoder of images. device: where extraction and training run.
        parts: folder of finished parts, None to keep none.
    """

    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    trials: int
    base: Settings
    model: str
    device: str
    parts: Path | None


@dataclass(frozen=True)
class _Place:
    """A cell with its data and splits."""

    cell: Cell
    cache: FeatureCache
    fingerprint: str
    splits: list[Split]


def run_plan(plan: Plan, cells: Sequence[Cell]) -> Iterator[list[Row]]:
    """The rows of each cell and method, cells of one data set together so that its cache is opened once."""
    for data in dict.fromkeys(cell.data for cell in cells):
        cache = open_data(data, plan.model, plan.device)
        fingerprint = fingerprint_of(cache)
        for cell in (one for one in cells if one.data == data):
            place = _Place(cell, cache, fingerprint, splits_of(cell, cache, plan.seeds))
            for method in plan.methods:
                yield _part(plan, place, method)


def _part(plan: Plan, place: _Place, method: str) -> list[Row]:
    """The rows of one cell and method: taken from its finished part, or measured."""
    if plan.parts is None:
        return _measure(plan, place, method)
    request = _request(plan, place, method)
    gamma = "" if place.cell.n1 is None else f"-gamma{place.cell.gamma_u:g}"
    name = f"{place.cell.name}{gamma}-{method}-{_seeds_text(plan.seeds)}-trials{plan.trials}"
    path = plan.parts / (name.replace("/", "_").replace(":", "-") + ".json")
    rows = read_part(path, request)
    if rows is None:
        rows = _measure(plan, place, method)
        write_part(path, request, rows)
    return rows


def _request(plan: Plan, place: _Place, method: str) -> dict[str, Any]:
    """All that decides a part's figures."""
    if method in OUTSIDE:
        config = {**place.cell.config().to_dict(), **asdict(OutsideClassifier(method))}
    else:
        config = place.cell.config(**plan.base).to_dict()
    return {
        "cell": asdict(place.cell),
        "method": method,
        "seeds": list(plan.seeds),
        "trials": plan.trials,
        "data": place.fingerprint,
        "code": code_of(method, tuned=plan.trials > 0),
        "config": config,
    }


def _measure(plan: Plan, place: _Place, method: str) -> list[Row]:
    """Search where that is asked for, then read the test split once."""
    base = {} if method in OUTSIDE else plan.base
    chosen = base
    cell, cache, splits = place.cell, place.cache, place.splits
    if plan.trials:
        chosen = search(method, cell, cache, plan.seeds, splits, base, plan.trials, plan.device)
    [figures] = fit_cell(method, cell, cache, plan.seeds, splits, [chosen], plan.device)
    about = {name: getattr(cell, name) for name in ("data", "n1", "gamma_l", "m1", "gamma_u", "shape", "name")}
    about["cell"] = about.pop("name")
    return [
        {
            **about,
            "method": method,
            "seed": seed,
            **{name: one.get(name) for name in _FIGURES},
            # a cosine head of fixed scale is calibrated only after one temperature, fitted on validation
            "ece": one.get("ece_temperature_scaled"),
            "tuned": plan.trials > 0,
            "trials": plan.trials,
            "settings": chosen,
            "model": plan.model,
        }
        for seed, one in zip(plan.seeds, figures, strict=True)
    ]


def _seeds_text(seeds: Sequence[int]) -> str:
    """Seeds in a file name."""
    whole = list(seeds) == list(range(seeds[0], seeds[-1] + 1))
    return f"seeds{seeds[0]}-{seeds[-1]}" if whole else "seeds" + "+".join(map(str, seeds))


def methods(
    cells: Annotated[str, typer.Option(help=_CELLS_HELP)] = FASHION,
    contenders: Annotated[
        str, typer.Option("--methods", help=f"Comma-separated, or all: {', '.join(names())}.")
    ] = "linear_probe,ulfine,oracle",
    seeds: Annotated[str, typer.Option(help="Seeds of splits and weights: 0-4, 3, or 0,2,5-7.")] = "0-4",
    gamma_u: Annotated[
        float | None, typer.Option(help="Unlabelled imbalance of cells with N1.", show_default="100, or the protocol's")
    ] = None,
    trials: Annotated[
        int, typer.Option(help="Settings tried on validation for each method and cell; 0 takes the defaults.", min=0)
    ] = 16,
    against: Annotated[str, typer.Option(help="The method that the second table holds against the others.")] = "",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE for every method of the engine, such as steps=300.")
    ] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write all rows to this file.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of finished parts.", show_default="with --json, FILE without its suffix + .parts"),
    ] = None,
    model: Annotated[str, typer.Option(help="Encoder of the images, as in `ulfine-fast extract`.")] = MODEL,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Fit methods on cells of data set, labelled count and unlabelled shape; print balanced accuracy.

    A finished cell and method is kept in --out and taken up again by the next run as long as data, settings and code
    are what they were.
    """
    parts = as_json.with_suffix(".parts") if out is None and as_json is not None else out
    wanted = parse_methods(contenders)
    plan = Plan(wanted, parse_seeds(seeds), trials, parse_settings(settings or []), model, device, parts)
    chosen = parse_cells(cells, gamma_u)
    if against and against not in wanted:
        raise InputError(f"--against {against} is not among the methods {', '.join(wanted)}")
    # a setting out of its range should not cost an hour of other cells
    for cell in chosen:
        check_data(cell.data)
        cell.config(**plan.base)
    rows = _collect(plan, chosen, as_json)
    print_tables(Rows(rows), chosen, wanted, against or _default_against(wanted))


def _collect(plan: Plan, cells: Sequence[Cell], file: Path | None) -> list[Row]:
    """All rows; the file holds those that are there at any time."""
    rows: list[Row] = []
    with progress_bar() as bar:
        task = bar.add_task("benchmark", total=len(cells) * len(plan.methods), unit="parts", note="")
        for part in run_plan(plan, cells):
            rows += part
            if file is not None:
                write_json(file, rows)
            bar.update(task, advance=1, note=f"{part[-1]['cell']} {part[-1]['method']}")
    return rows


def _default_against(methods: Sequence[str]) -> str:
    """The last of the project's own methods that takes part."""
    return next((name for name in ("ulfine_plus", "ulfine") if name in methods), "")


if __name__ == "__main__":
    typer.run(guarded(methods))
