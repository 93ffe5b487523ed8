"""Sections of packages that are installed separately."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.writer import PageTables
from ulfine_fast import build_report
from ulfine_fast.cache.io.errors import InputError

MODULE = """
from ulfine_fast.report.plugins import Section, render_template

def section(inputs):
    body = render_template("added_to_reports", "body.jinja", methods=[group.method for group in inputs.groups])
    return Section(id="added", heading="<b>Added", link="Added", body=body)

def nothing(inputs):
    return None
"""


def install(folder: Path, entries: str) -> None:
    """A package on disk, as pip installs it."""
    package = folder / "added_to_reports"
    package.mkdir()
    (package / "__init__.py").write_text(MODULE)
    (package / "body.jinja").write_text("<p>{{ methods|join('<br>') }}</p>\n")
    about = folder / "added_to_reports-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: added-to-reports\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[ulfine_fast.report_sections]\n{entries}\n")


def test_an_installed_package_adds_a_section(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "b = added_to_reports:section\na = added_to_reports:nothing")
    monkeypatch.syspath_prepend(tmp_path)
    text = build_report([single], tmp_path / "page.html").read_text()
    assert '<a href="#added">Added</a>' in text
    assert (2, "<b>Added") in PageTables(text).headings
    assert "<p>ulfine</p>" in text
    assert text.index('id="calibration"') < text.index('<section id="added"') < text.index('id="confusion"')


@pytest.mark.parametrize("value", ["added_to_reports:missing", "no_such_module_here:section"])
def test_a_section_that_cannot_be_imported_is_named(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    install(tmp_path, f"broken = {value}")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=f"{value} adds to the report but cannot be imported"):
        build_report([single], tmp_path / "page.html")
