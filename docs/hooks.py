"""Hooks of mkdocs: the three source folders shown as one package, and the tables of docs/options.md."""

from __future__ import annotations

import dataclasses
import html
import math
import tempfile
from collections.abc import Iterable
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


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replaces the marker in docs/options.md by the tables of options.

    Raises:
        PluginError: the page has lost its marker.
    """
    if page.file.src_uri != OPTIONS_PAGE:
        return markdown
    if OPTIONS_MARKER not in markdown:
        raise PluginError(f"docs/{OPTIONS_PAGE} needs the line {OPTIONS_MARKER}")
    return markdown.replace(OPTIONS_MARKER, options_markdown())


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
