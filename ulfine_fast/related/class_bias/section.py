"""The section about what adapted classifiers keep of the zero-shot classifier's bias between classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ulfine_fast.cache.ids import RowIndex
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.tables import read_table
from ulfine_fast.metrics.intervals import mean_interval
from ulfine_fast.related.class_bias.transfer import Transfer, transfer
from ulfine_fast.report.groups import Group
from ulfine_fast.runs.files import Predictions, RunFiles

_FIGURES = ("bias_correlation", "count_correlation", "drift", "spread", "group_gap")
_ZERO_SHOT = "zero_shot"


def read_groups(path: Path) -> dict[str, str]:
    """Image id -> group, from a table with the columns id and group.

    Raises:
        InputError: not such a table (see `read_table`), or one without rows.
    """
    table = read_table(path, ["id", "group"], fill=True)
    if not len(table):
        raise InputError(f"{path} has no line; give each image a line with its id and group")
    return dict(zip(table.texts("id", strip=False), table.texts("group"), strict=True))


def transfer_section(groups: Sequence[Group], attributes: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A row for each adapted group, means over seeds; no row where no zero-shot run saw the same test images.

    Args:
        groups: the page's runs.
        attributes: image id -> another attribute than the class.
    """
    references = [run for group in groups if group.method == _ZERO_SHOT for run in group.runs]
    rows = []
    for group in groups:
        found = [one for run in group.runs if (one := _of_run(run, references, attributes)) is not None]
        if group.method != _ZERO_SHOT and found:
            rows.append({"label": group.label, **{name: _shown(found, name) for name in _FIGURES}})
    return {"rows": rows, "grouped": any(row["group_gap"] != "-" for row in rows)}


def _of_run(run: RunFiles, references: Sequence[RunFiles], attributes: Mapping[str, str] | None) -> Transfer | None:
    """One run beside a zero-shot run of the same test images, of its own seed where there is one."""
    own = run.predictions()
    for reference in sorted(references, key=lambda one: one.seed != run.seed):
        before = reference.predictions()
        if sorted(before.ids) == sorted(own.ids) and reference.class_names == run.class_names:
            return _compared(run, before, own, attributes)
    return None


def _compared(
    run: RunFiles, before: Predictions, own: Predictions, attributes: Mapping[str, str] | None
) -> Transfer | None:
    known = own.labels >= 0
    if not known.any():
        return None
    order = RowIndex(before.ids).rows(own.ids, source="the run", fix="leave one of the two runs out")
    groups = None if attributes is None else np.array([attributes.get(name, "") for name in own.ids])[known]
    return transfer(
        before.probabilities[order][known].astype(np.float64),
        own.probabilities[known].astype(np.float64),
        own.labels[known],
        run.per_class("class_counts"),
        groups,
    )


def _shown(found: Sequence[Transfer], name: str) -> str:
    values = [asdict(one)[name] for one in found]
    mean = mean_interval(value for value in values if np.isfinite(value))
    if mean is None:
        return "-"
    return f"{mean.mean:.2f}" if not np.isfinite(mean.half) else f"{mean.mean:.2f} ±{mean.half:.2f}"
