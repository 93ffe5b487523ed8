"""Put the sections together in the template, and write the page."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup
from PIL import Image

from ulfine_fast._version import __version__
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.related.class_bias.section import transfer_section
from ulfine_fast.report import charts, headline, sections
from ulfine_fast.report.feature_map import FeatureMap, map_section
from ulfine_fast.report.groups import Group, best_by_validation, charted, group_runs
from ulfine_fast.report.one_byte import Cost, cost_section
from ulfine_fast.report.sweeps import SweepFiles, sweeps_section
from ulfine_fast.runs.files import RunFiles

_LINES = 6  # colours and markers that stay apart for every reader


def render_page(
    runs: Sequence[RunFiles],
    *,
    images: Callable[[str], Image.Image] | None = None,
    title: str | None = None,
    leakage: Sequence[str] = (),
    attributes: Mapping[str, str] | None = None,
    sweeps: Sequence[SweepFiles] = (),
    mapped: Callable[[RunFiles], FeatureMap | None] | None = None,
    rounded: Callable[[RunFiles], Cost | None] | None = None,
) -> str:
    """Render the page of the given runs; arguments as in :func:`ulfine_fast.report.build_report`."""
    groups, repeated = group_runs(runs)
    shown, lines = best_by_validation(groups), charted(groups, _LINES)
    rows = [run.predictions() for run in shown.runs]
    script = _text("sort.js")
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            title=title or _title(groups),
            style=Markup(_text("style.css")),  # ours, and a style element holds no entities
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            version=__version__,
            names=runs[0].class_names,
            shown=shown,
            lead=headline.lead(groups, shown),
            headline=headline.headline(groups, shown, lines),
            paired=headline.paired(groups, shown),
            lines=[(charts.legend_mark(i), group.label) for i, group in enumerate(lines)],
            left_out=len(groups) - len(lines),
            classes=sections.classes_section(lines, shown),
            pseudo=sections.pseudo_section(lines),
            calibration=sections.calibration_section(shown, rows),
            storage=cost_section(groups, rounded),
            transfer=transfer_section(groups, attributes),
            confusion=sections.confusion_section(shown, rows),
            gallery=sections.gallery_section(shown, rows[0], images),
            map=map_section(shown, mapped),
            sweeps=sweeps_section(sweeps),
            leakage=leakage,
            settings=sections.settings_section(groups, repeated),
        )
    )


def write_page(text: str, out: Path) -> Path:
    """Write the page beside its name, then move it there, so that a reader never sees half of it.

    Raises:
        InputError: the place cannot be written.
    """
    out = Path(out)
    if out.is_dir():
        raise InputError(f"{out} is a folder; give the file to write, such as {out / 'report.html'}")
    draft = out.with_name(out.name + ".tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # class names may hold halves of surrogate pairs, which utf-8 cannot write
        draft.write_bytes(text.encode("utf-8", errors="replace"))
        os.replace(draft, out)
    except OSError as error:
        raise InputError(f"cannot write {out} ({error.strerror}); choose another --out") from error
    return out


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.DictLoader({"page.html.jinja": _text("page.html.jinja")}),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = headline.percent
    return environment


def _text(name: str) -> str:
    return files("ulfine_fast.report").joinpath(name).read_text(encoding="utf-8")


def _title(groups: Sequence[Group]) -> str:
    seeds = max(len(group.runs) for group in groups)
    methods, settings = len({group.method for group in groups}), len(groups)
    what = groups[0].method.replace("_", " ") if methods == 1 else f"{methods} methods"
    more = f" in {settings} settings" if settings > methods else ""
    classes = len(groups[0].runs[0].class_names)
    return f"{what}{more}, {_plural(seeds, 'seed', 'seeds')}, {_plural(classes, 'class', 'classes')}"


def _plural(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"
