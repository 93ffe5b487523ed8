"""Everything that a GPU is asked, in one call of a few minutes: `python -m benchmarks.gpu --minutes 8 --json out.json`.

`parts` runs each part in a child process with a time limit: `tests` and `checks` ask whether it is right, `trials` how
fast steps are, `sweep` and `plus` whole fits, `extraction` the encoders; `summary` compares the results with the aims.
It runs from a checkout in which nothing is installed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import ulfine_fast

# in a bare checkout `cache` and `cli` are beside the package that they belong to, where an installation maps them
if importlib.util.find_spec("ulfine_fast.cache") is None:
    ulfine_fast.__path__.append(str(Path(__file__).parents[2]))
