"""What a cache of a source will hold: parts, one a shard, and how a source is recognised."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.sources.rows import ListedSource, Part, Row, Source, StreamedSource, fingerprint

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
    return cut_rows(source.rows, shard_size) if is_listed(source) else source.plan(shard_size)


def cut_rows(rows: Sequence[Row], shard_size: int) -> list[Part]:
    """Cuts listed rows into parts that never cross a split.

    Args:
        rows: in the source's order, split by split.
        shard_size: rows a part covers at most, at least 1.
    """
    parts: list[Part] = []
    for split, group in itertools.groupby(enumerate(rows), key=lambda pair: pair[1].split):
        numbers = [number for number, _ in group]
        for start in range(0, len(numbers), shard_size):
            parts.append(Part(len(parts), split, numbers[start], len(numbers[start : start + shard_size])))
    return parts


def opened(source: Source, parts: Sequence[Part]) -> Iterator[tuple[Part, list[Row]]]:
    """The rows of each part, in order; a stream's next part is opened while this one is worked on.

    Raises:
        InputError: a part cannot be read, or holds rows that cannot be stored.
    """
    if is_listed(source):
        for part in parts:
            assert part.first_row is not None
            assert part.rows is not None
            yield part, source.rows[part.first_row : part.first_row + part.rows]
        return
    yield from _opened_ahead(source, parts)


def _opened_ahead(source: StreamedSource, parts: Sequence[Part]) -> Iterator[tuple[Part, list[Row]]]:
    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(source.open, part) for part in parts[:1]]
        try:
            for place, part in enumerate(parts):
                rows = ahead.pop().result()
                ahead = [pool.submit(source.open, later) for later in parts[place + 1 : place + 2]]
                refuse_bad_rows(rows)
                yield part, rows
        finally:
            # the copy of a remote file that nobody will ask for any more
            for future, part in zip(ahead, parts[place + 1 : place + 2], strict=False):
                if not future.cancel() and future.exception() is None:
                    source.close(part)


def batches_of(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """Rows, `size` at a time: batches never cross parts, so that bytes do not depend on interruptions."""
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def identity(source: Source, parts: Sequence[Part]) -> dict[str, Any]:
    """What a manifest says of a source: where it is, how much it holds, and a digest by which it is known again."""
    if is_listed(source):
        return {**source.describe(), "rows": len(source.rows), "fingerprint": fingerprint(source.rows)}
    return {**source.describe(), "parts": len(parts), "fingerprint": source.fingerprint()}


def refuse_bad_rows(rows: Sequence[Row]) -> None:
    """Looks for what would make rows useless in a cache, before any image is read.

    Raises:
        InputError: an id that occurs twice or cannot be stored.
    """
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise InputError(f"two images have the id {row.id!r}; ids must differ, so remove or rename one")
        seen.add(row.id)
    strange = next((name for name in seen if not _storable(name)), None)
    if strange is not None:
        raise InputError(f"the name {strange!r} is not valid Unicode text and cannot be stored; rename the image")


def refuse_empty_class(source: ListedSource, missing: set[str]) -> None:
    """A class that nothing labelled is left of could never be learned; only where there are labelled rows at all.

    Args:
        source: all rows are known.
        missing: ids of images that could not be read.

    Raises:
        InputError: names the class.
    """
    labelled = [row for row in source.rows if row.split == "train" and row.label >= 0]
    left = {row.label for row in labelled if row.id not in missing}
    for label, name in enumerate(source.class_names):
        if labelled and label not in left:
            why = "none of its labelled images can be read" if missing else "it has no labelled image in train"
            raise InputError(f"class {name!r} cannot be learned: {why}; add some, or leave the class out")


def _storable(name: str) -> bool:
    """Whether HDF5 can hold the text: it has no place for half characters and zero bytes."""
    try:
        return bool(name) and b"\0" not in name.encode()
    except UnicodeEncodeError:
        return False
