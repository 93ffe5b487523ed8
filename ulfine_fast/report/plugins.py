"""Where other packages add to the page: sections, and notes below a sweep's table.

A maker is a function, named here or, for sections of packages that are installed separately, in the entry point group
`ulfine_fast.report_sections`:

    [project.entry-points."ulfine_fast.report_sections"]
    my_section = "my_package.report:my_section"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.report.groups import Group

ENTRY_POINTS = "ulfine_fast.report_sections"
_SECTIONS = ("ulfine_fast.related.class_bias.section:class_bias_section",)
_SWEEP_NOTES = ("ulfine_fast.related.forecast.note:forecast_note",)


@dataclass(frozen=True, slots=True)
class PageInputs:
    """What a section maker can show.

    Attributes:
        groups: the runs by method and setting, best validation balanced accuracy first.
        attributes: image id -> an attribute other than the class ("" where unknown), None without any.
    """

    groups: Sequence[Group]
    attributes: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Section:
    """A section that a maker adds to the page.

    Attributes:
        id: of its HTML element, unique on the page.
        heading: text.
        link: its name in the navigation; text.
        body: the HTML below the heading, as :func:`render_template` makes it.
    """

    id: str
    heading: str
    link: str
    body: Markup


SectionMaker = Callable[[PageInputs], Section | None]
SweepNoteMaker = Callable[[Path], str | None]


def added_sections(inputs: PageInputs) -> list[Section]:
    """Sections of all makers that have one to show: ours in the order listed, then installed ones by name.

    Raises:
        InputError: a maker cannot be imported.
    """
    installed = sorted(entry_points(group=ENTRY_POINTS), key=lambda point: (point.name, point.value))
    makers: list[SectionMaker] = [*map(_load, _SECTIONS), *(_load(point.value) for point in installed)]
    return [section for maker in makers if (section := maker(inputs)) is not None]


def sweep_notes(folder: Path) -> list[str]:
    """Notes below the table of the sweep in `folder`; each is plain text.

    Raises:
        InputError, OSError: a maker's file is damaged.
    """
    makers: list[SweepNoteMaker] = [_load(name) for name in _SWEEP_NOTES]
    return [note for maker in makers if (note := maker(folder)) is not None]


def render_template(package: str, name: str, **values: object) -> Markup:
    """Render a Jinja template that is a data file of a package; values are escaped unless they are Markup."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package, ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return Markup(environment.get_template(name).render(**values))


def _load(name: str) -> Any:
    """The function that "module:name" names."""
    try:
        return EntryPoint(name=name, value=name, group=ENTRY_POINTS).load()
    except (ImportError, AttributeError) as error:
        raise InputError(f"{name} adds to the report but cannot be imported ({error}); repair or remove it") from error
