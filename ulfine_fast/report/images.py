"""Find the images behind a run's row ids: its cache's source, or a place the user names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.paths import to_path
from ulfine_fast.runs.files import RunFiles

if TYPE_CHECKING:
    from ulfine_fast.cache.sources import Row, Source, StreamedSource

_PART_ROWS = 1024  # rows opened together to find an image of a stream


def find_images(runs: Sequence[RunFiles], where: str | None = None) -> tuple[Callable[[str], Image.Image] | None, str]:
    """Open the images of the runs.

    Args:
        runs: the runs; their caches' manifests say where the images came from.
        where: a folder, table or data set name to use instead.

    Returns:
        A function from row id to image, which raises KeyError for an id it does not know, or None when no source
        can be opened; and the reason why not, or "".

    Raises:
        InputError: `where` is given and cannot be opened.
    """
    from ulfine_fast.cache.sources import open_source, reopen_source

    if where is not None:
        return _reader([("", open_source(where))]), ""
    sources, reasons = [], []
    for cache in dict.fromkeys(run.cache for run in runs):
        try:
            for prefix, described in _parts(_described(cache)):
                sources.append((prefix, reopen_source(described)))
        except (InputError, OSError) as error:
            reasons.append(str(error))
    return (_reader(sources), "") if sources else (None, reasons[0])


def _described(cache: str | None) -> dict[str, Any]:
    if cache is None:
        raise InputError("the run was made from features in memory, without a cache")
    file = to_path(cache) / "manifest.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["source"])
    except FileNotFoundError as error:
        raise InputError(f"the cache {cache} is gone") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is cut or not a cache's manifest") from error


def _parts(described: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """What stands before ids, and the source of these images: of every cache that was merged, of every append."""
    for cache in described.get("caches", []):
        yield from _parts(cache["source"], prefix + cache.get("prefix", ""))
    if described["kind"] != "merged":
        yield prefix, described
    for part in described.get("appended", []):
        yield prefix, part


def _reader(sources: Sequence[tuple[str, Source]]) -> Callable[[str], Image.Image]:
    from ulfine_fast.cache.pipeline.plan import is_listed
    from ulfine_fast.cache.sources import UnreadableImage

    rows = {prefix + row.id: (source, row) for prefix, source in sources if is_listed(source) for row in source.rows}
    streamed = [_Streamed(source, prefix) for prefix, source in sources if not is_listed(source)]

    def read(row_id: str) -> Image.Image:
        """The image of one row id."""
        found: tuple[Source, Row] | None = rows.get(row_id)
        for one in streamed if found is None else ():
            found = found or one.find(row_id)
        if found is None:
            raise KeyError(row_id)
        source, row = found
        try:
            return source.read(row)
        except UnreadableImage as error:
            raise OSError(str(error)) from error

    return read


class _Streamed:
    """Rows of a stream by id: a part is opened when the first of its images is asked for, and stays open."""

    def __init__(self, source: StreamedSource, prefix: str) -> None:
        self.source, self.prefix = source, prefix
        # of the shard size only the cut of long files depends, and images are found whatever that is
        self.parts = source.plan(_PART_ROWS)
        self.rows: dict[int, dict[str, Row]] = {}

    def find(self, row_id: str) -> tuple[Source, Row] | None:
        """The row, None where no part has it."""
        if not row_id.startswith(self.prefix):
            return None
        row_id = row_id.removeprefix(self.prefix)
        for part in self.parts:
            if not row_id.startswith(part.name.partition("#")[0].rpartition(".")[0] or part.split):
                continue
            if part.number not in self.rows:
                self.rows[part.number] = {row.id: row for row in self.source.open(part)}
            found = self.rows[part.number].get(row_id)
            if found is not None:
                return self.source, found
        return None
