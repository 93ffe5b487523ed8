"""Tables that sort by their headings, in a browser: by mouse and by keyboard, and unchanged without a script."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import needs_chromium
from ulfine_fast import build_report

pytestmark = needs_chromium


@pytest.fixture
def page(browser, study: Path, tmp_path: Path):
    address = build_report([study], tmp_path / "page.html").resolve().as_uri()
    opened = browser.new_page()
    opened.goto(address)
    yield opened
    opened.close()


def column(page, number):
    """Numbers of a column of the first table, from top to bottom."""
    cells = page.locator(f"table.headline tbody tr td:nth-child({number}) .value").all_inner_texts()
    return [float(cell) for cell in cells]


def test_numbers_sort_both_ways_and_back(page):
    written, head = column(page, 3), page.locator("table.headline thead th").nth(2)
    button = head.locator("button")
    button.click()
    assert head.get_attribute("aria-sort") == "descending"
    assert column(page, 3) == sorted(written, reverse=True)
    button.click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert column(page, 3) == sorted(written)
    button.click()
    assert head.get_attribute("aria-sort") is None
    assert column(page, 3) == written


def test_names_sort_by_the_keyboard(page):
    head = page.locator("table.headline thead th").first
    head.locator("button").focus()
    page.keyboard.press("Enter")
    names = page.locator("table.headline tbody th b").all_inner_texts()
    assert names == sorted(names)
    assert len(set(names)) > 1
    assert head.get_attribute("aria-sort") == "ascending"


def test_without_a_script_the_tables_keep_their_order(browser, study: Path, tmp_path: Path):
    address = build_report([study], tmp_path / "page.html").resolve().as_uri()
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    assert page.locator("table.headline thead button").count() == 0
    assert page.locator("table.headline tbody tr").count() == 4
    context.close()
