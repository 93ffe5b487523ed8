"""What a cache of a source will hold: parts, one for each shard, and how a source is recognised."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from ulfine_fast.cache.digests import is_storable
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.prefetch import prefetch
from ulfine_fast.cache.sources.rows import ListedSource, Part, Row, Source, fingerprint

if TYPE_CHECKING:
    from typing_extensions import TypeIs


def is_listed(source: Source) -> TypeIs[ListedSource]:
    """Whether all rows of the source are known; of a stream only the parts are."""
    return hasattr(source, "rows")


def plan_parts(source: Source, shard_size: int) -> list[Part]:
    """The parts of a source, one for each shard.

    Args:
        source: listed or streamed.
        shard_size: rows a shard covers at most, at least 1; files of a stream may hold more.
    """
    return split_rows(source.rows, shard_size) if is_listed(source) else source.plan(shard_size)


def split_rows(rows: Sequence[Row], shard_size: int) -> list[Part]:
    """Splits listed rows into parts that never cross a split.

    Args:
        rows: in the source's order, split by split.
        shard_size: rows a part covers at most, at least 1.
    """
    parts: list[Part] = []
    for split, group in itertools.groupby(enumerate(rows), key=lambda pair: pair[1].split):
        indices = [index for index, _ in group]
        for start in range(0, len(indices), shard_size):
            parts.append(Part(len(parts), split, indices[start], len(indices[start : start + shard_size])))
    return parts


def open_parts(source: Source, parts: Sequence[Part]) -> Generator[tuple[Part, list[Row]], None, None]:
    """The rows of each part, in order; a stream's next part is opened while this one is worked on.

    Raises:
        InputError: a part cannot be read, or holds rows that cannot be stored.
    """
    if is_listed(source):
        for part in parts:
            yield part, rows_of(source.rows, part)
        return
    stream = source

    def open_part(part: Part) -> tuple[Part, list[Row]]:
        rows = stream.open(part)
        refuse_bad_rows(rows)
        return part, rows

    # Closing a part that is never yielded lets go of its local copy of a remote file.
    yield from prefetch(open_part, parts, threads=1, in_hand=2, discard=lambda opened: stream.close(opened[0]))


def rows_of(rows: Sequence[Row], part: Part) -> list[Row]:
    """The rows that a part of a listed source covers."""
    assert part.first_row is not None
    assert part.rows is not None
    return list(rows[part.first_row : part.first_row + part.rows])


def batches_of(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """Rows, `size` at a time: batches never cross parts, so that bytes do not depend on interruptions."""
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def describe_source(source: Source, parts: Sequence[Part]) -> dict[str, Any]:
    """The manifest's `source`: path, number of rows or parts, and a digest by which the source is recognised."""
    if is_listed(source):
        return {**source.describe(), "rows": len(source.rows), "fingerprint": fingerprint(source.rows)}
    return {**source.describe(), "parts": len(parts), "fingerprint": source.fingerprint()}


def refuse_bad_rows(rows: Sequence[Row]) -> None:
    """Refuses rows that a cache could not hold, before any image is read.

    Raises:
        InputError: an id that occurs twice or cannot be stored.
    """
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise InputError(f"two images have the id {row.id!r}; ids must differ, so remove or rename one")
        seen.add(row.id)
    for name in seen:
        if not name or not is_storable(name):
            raise InputError(f"the name {name!r} is not valid Unicode text and cannot be stored; rename the image")


def refuse_empty_class(source: ListedSource, missing: set[str]) -> None:
    """Refuses a class without labelled images, which could not be learned; a source without any label may have them.

    Args:
        source: all its rows are known.
        missing: ids of images that could not be read.

    Raises:
        InputError: names the class.
    """
    labelled = [row for row in source.rows if row.split == "train" and row.label >= 0]
    remaining = {row.label for row in labelled if row.id not in missing}
    for label, name in enumerate(source.class_names):
        if labelled and label not in remaining:
            why = "none of its labelled images can be read" if missing else "it has no labelled image in train"
            raise InputError(f"class {name!r} cannot be learned: {why}; add some, or leave the class out")
