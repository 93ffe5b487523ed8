"""The page: its sections put together, and the file written."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from ulfine_fast._version import __version__
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import make_folder, write_atomically
from ulfine_fast.report.calibration import calibration_section
from ulfine_fast.report.charts import SLOTS, legend_mark
from ulfine_fast.report.classes import classes_section, pseudo_labels_section
from ulfine_fast.report.confusion import confusion_section
from ulfine_fast.report.feature_map import FeatureMap, map_section
from ulfine_fast.report.formats import percent
from ulfine_fast.report.gallery import gallery_section
from ulfine_fast.report.groups import Group, best_by_validation, group_runs, groups_to_chart
from ulfine_fast.report.one_byte import RoundingCost, one_byte_section
from ulfine_fast.report.plugins import PageInputs, added_sections, render_template
from ulfine_fast.report.results import paired_table, results_table, summary
from ulfine_fast.report.settings import settings_section
from ulfine_fast.report.sweep_links import links_to_sweeps
from ulfine_fast.report.sweeps import SweepFiles, sweeps_section
from ulfine_fast.runs.evidence import evidence_lines
from ulfine_fast.runs.files import RunFiles

_PACKAGE = "ulfine_fast.report"


def render_page(
    runs: Sequence[RunFiles],
    *,
    images: Callable[[str], Image.Image] | None = None,
    title: str | None = None,
    leakage: Sequence[str] = (),
    attributes: Mapping[str, str] | None = None,
    sweeps: Sequence[SweepFiles] = (),
    map_run: Callable[[RunFiles], FeatureMap | None] | None = None,
    rounding_cost: Callable[[RunFiles], RoundingCost | None] | None = None,
    page: Path | None = None,
) -> str:
    """Render the page of the given runs.

    Args:
        runs: at least one, all with the same classes.
        images: returns the image of a row id; None leaves the gallery out.
        title: heading of the page; None writes one from the number of methods, seeds and classes.
        leakage: warnings above the results.
        attributes: image id -> an attribute other than the class.
        sweeps: the sweeps to show.
        map_run: returns the map of a run's test images, None where it cannot; see :func:`feature_map.mapper`.
        rounding_cost: returns what int8 features cost a run, None where it cannot; see :func:`one_byte.rounder`.
        page: where the page will be, for relative links to sweeps and runs; None for a page without them.
    """
    groups, repeated = group_runs(runs)
    shown = best_by_validation(groups)
    charted = groups_to_chart(groups, limit=SLOTS)
    predictions = [run.predictions() for run in shown.runs]
    script = _read_text("sort.js")
    text = render_template(
        _PACKAGE,
        "page.html.jinja",
        percent=percent,
        # the head; a style element holds no entities, so the text is not escaped
        title=title or _default_title(groups),
        style=Markup(_read_text("style.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=__version__,
        leakage=leakage,
        # values that several sections use
        names=runs[0].class_names,
        shown=shown,
        summary=summary(groups, shown),
        legend=[(legend_mark(slot), group.label) for slot, group in enumerate(charted)],
        left_out=len(groups) - len(charted),
        # the sections, in the order of the page
        results=results_table(groups, shown, charted),
        paired=paired_table(groups, shown),
        classes=classes_section(charted, shown),
        pseudo=pseudo_labels_section(charted),
        evidence=[
            (group.label, lines)
            for group in charted
            if (lines := evidence_lines([run.metrics for run in group.runs], runs[0].class_names))
        ],
        calibration=calibration_section(shown, predictions),
        one_byte=one_byte_section(groups, rounding_cost),
        added=added_sections(PageInputs(groups, attributes)),
        confusion=confusion_section(shown, predictions),
        map=map_section(shown, map_run),
        gallery=gallery_section(shown, predictions[0], images),
        sweeps=sweeps_section(sweeps, groups, page),
        of_sweeps=links_to_sweeps(groups, [sweep.path for sweep in sweeps], page),
        settings=settings_section(groups, repeated),
    )
    return str(text)


def write_page(text: str, out: Path) -> Path:
    """Write the page, so that a reader never sees a part of it.

    Raises:
        InputError: `out` is a folder or cannot be written.
    """
    out = Path(out)
    if out.is_dir():
        raise InputError(f"{out} is a folder; give the file to write, such as {out / 'report.html'}")
    make_folder(out.parent)
    # class names may hold unpaired surrogates, which utf-8 cannot write
    write_atomically(out, text.encode("utf-8", errors="replace"))
    return out


def _read_text(name: str) -> str:
    return files(_PACKAGE).joinpath(name).read_text(encoding="utf-8")


def _default_title(groups: Sequence[Group]) -> str:
    """Such as "4 methods in 6 settings, 5 seeds, 10 classes"."""
    methods = {group.method for group in groups}
    seeds = max(len(group.runs) for group in groups)
    classes = len(groups[0].runs[0].class_names)
    title = groups[0].method.replace("_", " ") if len(methods) == 1 else f"{len(methods)} methods"
    if len(groups) > len(methods):
        title += f" in {len(groups)} settings"
    return f"{title}, {seeds} {'seed' if seeds == 1 else 'seeds'}, {classes} {'class' if classes == 1 else 'classes'}"
