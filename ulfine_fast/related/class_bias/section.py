"""The report's section about what adapted classifiers keep of the zero-shot classifier's bias between classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ulfine_fast.cache.ids import RowIndex
from ulfine_fast.metrics.intervals import mean_interval
from ulfine_fast.related.class_bias.bias import BiasComparison, compare_bias
from ulfine_fast.report.groups import Group
from ulfine_fast.report.plugins import PageInputs, Section, render_template
from ulfine_fast.runs.files import RunFiles

_METRICS = ("bias_correlation", "count_correlation", "drift", "spread", "group_gap")
_ZERO_SHOT = "zero_shot"


def class_bias_section(inputs: PageInputs) -> Section | None:
    """The section; None where no zero-shot run has the same test images as another run."""
    rows = class_bias_rows(inputs.groups, inputs.attributes)
    if not rows:
        return None
    has_groups = any(row["group_gap"] != "–" for row in rows)
    body = render_template("ulfine_fast.related.class_bias", "section.html.jinja", rows=rows, has_groups=has_groups)
    return Section(id="class-bias", heading="Class bias", link="Class bias", body=body)


def class_bias_rows(groups: Sequence[Group], attributes: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """The measures of each adapted method and setting as text, means over the seeds that can be compared.

    Args:
        groups: the page's runs.
        attributes: image id -> an attribute other than the class.
    """
    references = [run for group in groups if group.method == _ZERO_SHOT for run in group.runs]
    rows = []
    for group in groups:
        if group.method == _ZERO_SHOT:
            continue
        comparisons = [c for run in group.runs if (c := _compare_with_zero_shot(run, references, attributes))]
        if not comparisons:
            continue
        row = {"label": group.label}
        for name in _METRICS:
            interval = mean_interval(asdict(comparison)[name] for comparison in comparisons)
            if interval is None:
                row[name] = "–"
            elif np.isfinite(interval.half):
                row[name] = f"{interval.mean:.2f} ±{interval.half:.2f}"
            else:
                row[name] = f"{interval.mean:.2f}"
        rows.append(row)
    return rows


def _compare_with_zero_shot(
    run: RunFiles, references: Sequence[RunFiles], attributes: Mapping[str, str] | None
) -> BiasComparison | None:
    """Compare a run with a zero-shot run of the same test images, of the same seed if there is one."""
    adapted = run.predictions()
    for reference in sorted(references, key=lambda other: other.seed != run.seed):
        zero_shot = reference.predictions()
        if sorted(zero_shot.ids) == sorted(adapted.ids) and reference.class_names == run.class_names:
            break
    else:
        return None
    known = adapted.labels >= 0
    if not known.any():
        return None
    same_order = RowIndex(zero_shot.ids).rows(adapted.ids, source="the run", fix="leave one of the two runs out")
    image_groups = None if attributes is None else np.array([attributes.get(name, "") for name in adapted.ids])
    return compare_bias(
        zero_shot=zero_shot.probabilities[same_order][known].astype(np.float64),
        adapted=adapted.probabilities[known].astype(np.float64),
        labels=adapted.labels[known],
        counts=run.per_class("class_counts"),
        groups=None if image_groups is None else image_groups[known],
    )
