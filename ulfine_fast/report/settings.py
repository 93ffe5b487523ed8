"""The section about settings: which options all runs share, which differ, and the files behind the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ulfine_fast.report.formats import number_range
from ulfine_fast.report.groups import Group
from ulfine_fast.runs.files import RunFiles

_SHOWN_ELSEWHERE = ("method", "seed", "split_seed")


def settings_section(groups: Sequence[Group], repeated: Sequence[RunFiles]) -> dict[str, Any]:
    """Template values.

    Args:
        groups: the runs on the page.
        repeated: the runs left out because their setting and seed is there already.
    """
    runs = [run for group in groups for run in group.runs]

    # options: a value for each group
    fields = dict.fromkeys(
        field for run in runs for field in run.config if field not in ("method", "seed", "split_seed")
    )
    values = {field: [_to_text(group.runs[0].config.get(field)) for group in groups] for field in fields}

    # splits and folders of each group
    facts = []
    for group in groups:
        parts = group.runs[0].split_rows
        facts.append(
            {
                "label": group.label,
                "seeds": _seeds_text([run.seed for run in group.runs]),
                "parts": {part: number_range([run.split_rows[part] for run in group.runs]) for part in parts},
                "folders": [str(run.path) for run in group.runs],
            }
        )

    # encoders, each once
    encoders = dict.fromkeys(json.dumps(run.encoder, sort_keys=True) for run in runs)
    return {
        "common": [(field, row[0]) for field, row in values.items() if len(set(row)) == 1],
        "differing": [(field, row) for field, row in values.items() if len(set(row)) > 1],
        "groups": facts,
        "encoders": [[(key, _to_text(value)) for key, value in json.loads(text).items()] for text in encoders],
        "caches": [str(cache) for cache in dict.fromkeys(run.cache for run in runs) if cache is not None],
        "rules": list(dict.fromkeys(run.split_rule for run in runs)),
        "created_by": list(dict.fromkeys(run.created_by for run in runs)),
        "repeated": [str(run.path) for run in repeated],
    }


def _to_text(value: object) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value)


def _seeds_text(seeds: Sequence[object]) -> str:
    """Such as "0–4" for more than two consecutive numbers, otherwise all of them."""
    numbers = sorted(seed for seed in seeds if isinstance(seed, int))
    if len(numbers) == len(seeds) > 2 and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return f"{numbers[0]}–{numbers[-1]}"
    return ", ".join(str(seed) for seed in seeds)
