"""What more labels, views or steps would bring, extrapolated from smaller runs of a sweep's best trial (FLP).

`growth` fits a trial with fractions of its budget, `forecast` extrapolates the curve, `saved` is its file, `from_sweep`
does it all for a finished sweep, `command` is `ulfine-fast forecast`. Imports search, engine, runs, data, metrics,
config and cache.
"""

from __future__ import annotations

from typing import Literal

Budget = Literal["labels", "views", "steps"]
"""What there may be more of."""
