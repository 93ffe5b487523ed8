"""Hooks of mkdocs: the three source folders shown as one package, the tables of docs/options.md, and pages as text.

Programs that read documentation find it at `llms.txt`, a list of all pages with a sentence each. Each page lies beside
it as Markdown, and `llms-full.txt` is all pages in one file.
"""

from __future__ import annotations

import dataclasses
import html
import inspect
import math
import pkgutil
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority

from ulfine_fast.config import own_options, shared_options
from ulfine_fast.methods import registry

OPTIONS_PAGE = "options.md"
OPTIONS_MARKER = "<!-- tables of options -->"

_ROOT = Path(__file__).parents[1]
_PACKAGE_PARENT = tempfile.TemporaryDirectory()
_NONE = "–"

# The Markdown of each page of the build in progress by its path, and the navigation.
_TEXTS: dict[str, str] = {}
_NAVIGATION: list[Any] = []


@event_priority(100)
def on_config(config: Any) -> Any:
    """Points mkdocstrings to `ulfine_fast` with `cache` and `cli` inside, as an installation has them."""
    package = Path(_PACKAGE_PARENT.name) / "ulfine_fast"
    if not package.exists():
        package.mkdir()
        for path in (_ROOT / "ulfine_fast").iterdir():
            (package / path.name).symlink_to(path)
        for folder in ("cache", "cli"):
            (package / folder).symlink_to(_ROOT / folder)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_PACKAGE_PARENT.name]
    return config


def on_nav(nav: Any, **_: Any) -> None:
    """Keeps the navigation, whose order llms.txt has."""
    _NAVIGATION[:] = nav.items


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replaces the marker in docs/options.md by the tables of options, and keeps each page's text.

    Raises:
        PluginError: the page has lost its marker.
    """
    if page.file.src_uri == OPTIONS_PAGE:
        if OPTIONS_MARKER not in markdown:
            raise PluginError(f"docs/{OPTIONS_PAGE} needs the line {OPTIONS_MARKER}")
        markdown = markdown.replace(OPTIONS_MARKER, options_markdown())
    _TEXTS[page.file.src_uri] = _with_docstrings(markdown)
    return markdown


def on_post_build(config: Any) -> None:
    """Writes llms.txt, llms-full.txt and the Markdown of each page beside the site."""
    site = Path(config.site_dir)
    lines = [f"# {config.site_name}", "", f"> {config.site_description}"]
    for section in _NAVIGATION:
        lines += ["", f"## {section.title}", ""]
        lines += [_entry(page.file.src_uri) for page in _pages(section)]
    for path, text in _TEXTS.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text, encoding="utf-8")
    (site / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    order = [page.file.src_uri for section in _NAVIGATION for page in _pages(section)]
    (site / "llms-full.txt").write_text("\n\n".join(_TEXTS[path] for path in order), encoding="utf-8")


def _pages(item: Any) -> Iterator[Any]:
    """The pages of a section in their order, or the page itself."""
    if item.is_page:
        yield item
    for child in item.children or ():
        yield from _pages(child)


def _entry(path: str) -> str:
    """A page's line in llms.txt: its title, its path, and its first sentence."""
    text = re.sub(r"^```.*?^```", "", _TEXTS[path], flags=re.DOTALL | re.MULTILINE)
    title = re.search(r"^# (.+)", text, re.MULTILINE)
    line = f"- [{title[1] if title else path}]({path})"
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    prose = next((part for part in paragraphs if part[:1].isalpha() and part[-1] in ".:"), "")
    sentence = re.sub(r"\[([^]]*)\]\([^)]*\)|[*`]", r"\1", prose.partition(". ")[0].rstrip(".:"))
    return f"{line}: {sentence}." if sentence else line


def _with_docstrings(markdown: str) -> str:
    """The page with each `::: name` and its options replaced by the object's signature and docstring."""

    def text(match: re.Match[str]) -> str:
        item = pkgutil.resolve_name(match[1])
        listed = re.search(r"members: \[(.*)\]", match[0])
        names = listed[1].split(", ") if listed else []
        return "\n\n".join([_described(match[1], item), *(_described(name, getattr(item, name)) for name in names)])

    return re.sub(r"^::: (\S+)(?:\n {4}.*)*", text, markdown, flags=re.MULTILINE)


def _described(name: str, item: Any) -> str:
    """An object's name, signature and docstring."""
    try:
        signature = str(inspect.signature(item)) if callable(item) else ""
    except ValueError:  # exceptions have none
        signature = ""
    return f"### {name.rpartition('.')[2]}{signature}\n\n{inspect.getdoc(item) or ''}"


def options_markdown() -> str:
    """The shared options by panel, then the options of each method, made from their declarations."""
    lines = ["## Shared options"]
    panels: dict[str, list[dataclasses.Field[Any]]] = {}
    for spec in shared_options().values():
        panels.setdefault(spec.metadata["panel"], []).append(spec)
    for panel, specs in panels.items():
        lines += ["", f"### {panel}", "", *_table(specs)]

    lines += ["", "## Options of each method"]
    for name in registry.names():
        entry = registry.find(name)
        source, needs = _escaped(entry.source), ", ".join(entry.needs)
        lines += ["", f"### {name}", "", _escaped(entry.summary), "", f"Source: {source}. Needs: {needs}.", ""]
        specs = list(own_options(name).values())
        lines += _table(specs) if specs else ["It has no options of its own."]
    return "\n".join(lines)


def _table(specs: Iterable[dataclasses.Field[Any]]) -> list[str]:
    """Lines of a Markdown table, one row an option."""
    lines = ["| option | type | default | range | meaning | swept by default |", "|---|---|---|---|---|---|"]
    for spec in specs:
        metadata = spec.metadata
        kind = str(spec.type).replace(" | None", " or none")
        name = f"`{spec.name}`" + ("\\*" if metadata["structural"] else "")
        text = _escaped(metadata["help"])
        if metadata["was"]:
            text += f" (in 0.1: {', '.join(f'`{old}`' for old in metadata['was'])})"
        cells = (name, kind, _value(spec.default), _range(metadata), text, _search(metadata["search"]))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _range(metadata: Any) -> str:
    """The legal values, in words."""
    low, high = metadata["low"], metadata["high"]
    if metadata["choices"]:
        return ", ".join(f"`{choice}`" for choice in metadata["choices"])
    if math.isfinite(low) and math.isfinite(high):
        return f"{low:.10g} to {high:.10g}"
    if math.isfinite(low):
        return f"at least {low:.10g}"
    return f"at most {high:.10g}" if math.isfinite(high) else _NONE


def _search(entry: Any) -> str:
    """What a sweep without a space file tries."""
    if entry is None:
        return _NONE
    if isinstance(entry, list):
        return ", ".join(map(_value, entry))
    return f"{entry['low']:.10g} to {entry['high']:.10g}" + (", log scale" if entry.get("log") else "")


def _value(value: Any) -> str:
    """A value as a config file has it."""
    if value is None:
        return _NONE
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:.6g}`" if isinstance(value, float) else f"`{value}`"


def _escaped(text: str) -> str:
    """A text inside a cell; Markdown's code spans keep their meaning."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("*", "\\*")
