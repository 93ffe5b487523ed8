"""`ulfine-fast multilabel`: images of several classes, from a cache and a table of labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ulfine_fast.cli.options import with_options_of
from ulfine_fast.related.multilabel.settings import MultiLabelConfig

if TYPE_CHECKING:
    from ulfine_fast.related.multilabel.run import MultiLabelRun


@with_options_of(MultiLabelConfig)
def multilabel(
    cache: Annotated[Path, typer.Argument(help="Cache folder that `extract` wrote.")],
    labels: Annotated[Path, typer.Argument(help="CSV with a column id and one for each class: 1, 0, or empty.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder to write.")] = Path("run"),
    seeds: Annotated[int, typer.Option(help="How many seeds to fit in one pass, from --seed on.")] = 1,
    table: Annotated[str, typer.Option(help="Form of the predictions: csv or parquet.")] = "csv",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    **settings: Any,
) -> None:
    """Train a classifier for images that show several classes, where some labels are unknown."""
    from ulfine_fast.cache.io.errors import InputError
    from ulfine_fast.cache.store import FeatureCache

    if seeds < 1:
        raise InputError(f"seeds must be at least 1, got {seeds}")
    if table not in ("csv", "parquet"):
        raise InputError(f"table must be csv or parquet, got {table!r}")
    first = MultiLabelConfig(**settings)
    configs = [MultiLabelConfig(**{**settings, "seed": first.seed + i}) for i in range(seeds)]
    refuse_other_folder(out)

    from ulfine_fast.related.multilabel.labels import read_label_table
    from ulfine_fast.related.multilabel.run import save_label_runs
    from ulfine_fast.related.multilabel.train import fit_labels

    runs = fit_labels(FeatureCache.open(cache), read_label_table(labels), configs, device=device)
    summary = save_label_runs(runs, out, table=table)
    typer.echo(json.dumps({first.method: summary}) if as_json else _sentences(runs, summary, out))


def refuse_other_folder(out: Path) -> None:
    """Refuse to write over what is no multi-label run, before minutes of training.

    Raises:
        InputError: `out` is a file, or holds something else.
    """
    from ulfine_fast.cache.io.errors import InputError
    from ulfine_fast.related.multilabel.run import is_label_folder

    if out.exists() and not is_label_folder(out):
        raise InputError(f"{out} exists and is no multi-label run; name a new folder")


def _sentences(runs: list[MultiLabelRun], summary: dict[str, dict[str, Any]], out: Path) -> str:
    """Mean average precision in a line, and where the rest is."""
    shown = ", ".join(
        f"{name} {100 * found['mean']:.1f}" + (f" ±{100 * found['half_width']:.1f}" if found["n"] > 1 else "")
        for name, found in summary.items()
    )
    told = [f"{runs[0].config.method}, mean average precision in percent: {shown or 'no test image to judge by'}"]
    restored = sum(len(run.restored) for run in runs) / len(runs)
    if restored:
        told.append(f"{restored:.0f} unknown labels are taken for present: restored.csv")
    return "\n".join([*told, f"run: {out}"])
