"""Find the pictures behind a run's row ids: its cache's source, or a place the user names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ulfine_fast.cache.errors import InputError
from ulfine_fast.report.load import RunFiles

if TYPE_CHECKING:
    from ulfine_fast.cache.sources import Source


def find_pictures(
    runs: Sequence[RunFiles], where: str | None = None
) -> tuple[Callable[[str], Image.Image] | None, str]:
    """Open the pictures of the runs.

    Args:
        runs: the runs; their caches' manifests say where the pictures came from.
        where: a folder, table or data set name to use instead.

    Returns:
        A function from row id to picture, which raises KeyError for an id it does not know, or None when no source
        can be opened; and the reason why not, or "".

    Raises:
        InputError: `where` is given and cannot be opened.
    """
    from ulfine_fast.cache.sources import open_source, reopen_source

    if where is not None:
        return _reader([open_source(where)]), ""
    sources, reasons = [], []
    for cache in dict.fromkeys(run.cache for run in runs):
        try:
            sources.append(reopen_source(_described(cache)))
        except (InputError, OSError) as error:
            reasons.append(str(error))
    return (_reader(sources), "") if sources else (None, reasons[0])


def _described(cache: str | None) -> dict[str, Any]:
    if cache is None:
        raise InputError("the run was made from features in memory, without a cache")
    file = Path(cache) / "manifest.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["source"])
    except FileNotFoundError as error:
        raise InputError(f"the cache {cache} is gone") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is cut or not a cache's manifest") from error


def _reader(sources: Iterable[Source]) -> Callable[[str], Image.Image]:
    from ulfine_fast.cache.sources import UnreadablePicture

    rows = {row.id: (source, row) for source in sources for row in source.rows}

    def read(row_id: str) -> Image.Image:
        """The picture of one row id."""
        source, row = rows[row_id]
        try:
            return source.read(row)
        except UnreadablePicture as error:
            raise OSError(str(error)) from error

    return read
