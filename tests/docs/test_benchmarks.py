"""The pages of results: a question each, the table first with its command above it, few words, one row in the index."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs/benchmarks"
PAGES = sorted(page for page in FOLDER.glob("*.md") if page.name != "index.md")
WORDS = 370  # about a screen

# Pages of facts that no command of today prints, and the page of commands that have not been run.
NO_COMMAND = {"negative.md", "before-and-after.md", "descriptions.md", "step-ideas.md"}
NO_TABLE = {"other-data.md"}


def words_outside_tables(text: str) -> int:
    """Words of the sentences alone, without tables and programs."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return sum(len(line.split()) for line in text.splitlines() if not line.startswith(("|", "#")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_table_comes_first_with_its_command_above_it(page):
    text = page.read_text(encoding="utf-8")
    title = text.splitlines()[0]
    assert title.startswith("# "), f"{page.name} has no title"
    assert title.endswith("?"), f"the title of {page.name} is no question"
    assert words_outside_tables(text) <= WORDS

    table = re.search(r"^\|---", text, re.MULTILINE)
    if page.name not in NO_TABLE:
        assert table, f"{page.name} has no table"
        before = text[: table.start()]
        assert words_outside_tables(before) <= 40, f"{page.name} says too much before its table"
        assert page.name in NO_COMMAND or re.search(r"\$ (python -m benchmarks\.|ulfine-fast fit)", before)


def test_the_index_has_a_row_for_each_page():
    rows = re.findall(
        r"^\| [^|]+\? \| \[[^]]+\]\(([^)#]+)", (FOLDER / "index.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(row for row in rows if not row.startswith("../")) == [page.name for page in PAGES]
