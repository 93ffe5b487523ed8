"""More images and classes for a finished cache; a reader sees the old cache until the new one is complete.

The new manifest waits beside the old one until its shards and texts are written, and then takes its name in one step.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ulfine_fast._version import __version__
from ulfine_fast.cache.ids import KnownIds, read_ids
from ulfine_fast.cache.io import lock
from ulfine_fast.cache.io.errors import CacheMismatch, InputError
from ulfine_fast.cache.io.files import refused_writes, write_atomically
from ulfine_fast.cache.io.paths import to_path
from ulfine_fast.cache.io.tables import label_key
from ulfine_fast.cache.manifest import Manifest
from ulfine_fast.cache.models.prompts import fill_prompts
from ulfine_fast.cache.pipeline.encode import EncodeJob, Engine, encode_parts
from ulfine_fast.cache.pipeline.extract import make_manifest
from ulfine_fast.cache.pipeline.fill import FillSummary, SkipLimit, fill_shards
from ulfine_fast.cache.pipeline.plan import describe_source, is_listed, refuse_bad_rows, rows_of, split_rows
from ulfine_fast.cache.pipeline.views import ViewRecipe
from ulfine_fast.cache.shard import ShardRecord, shard_path
from ulfine_fast.cache.sources.rows import UNKNOWN, Part, Row, fingerprint
from ulfine_fast.cache.store import read_records
from ulfine_fast.cache.text import TextFeatures, encode_classes, read_text, refuse_same_texts, write_text

if TYPE_CHECKING:
    from PIL import Image

    from ulfine_fast.cache.models.encoder import Encoder
    from ulfine_fast.cache.sources.rows import Source

PENDING = "manifest.append.json"


def append(
    source: Source,
    encoder: Encoder,
    cache: str | Path,
    *,
    workers: int | None = None,
    progress: bool | None = None,
    engine: Engine | None = None,
) -> FillSummary:
    """Adds what a source has and a cache has not: images of other ids, and classes of other names.

    Existing rows and classes keep their indices; new ones come after them. Everything else, such as prompts, views and
    batch size, is as the cache has it. Where only classes are new, no image is read. While ids are compared, memory
    holds 16 bytes of each row of the cache.

    Args:
        source: images; those whose ids the cache has (also as unreadable ones) are left out.
        encoder: the model that made the cache.
        cache: folder of a finished cache.
        workers: see `extract`.
        progress: see `extract`.
        engine: see `extract`.

    Raises:
        InputError: no finished cache, one that another process writes to, another append that is unfinished; and what
            `extract` raises.
        CacheMismatch: the encoder is not the one that made the cache.
        KeyboardInterrupt: Ctrl-C; the same call continues.
    """
    out = to_path(cache)
    Manifest.read(out)  # before the lock, which would make a folder of a mistyped name
    with lock.writer(out):
        # What is new, and the manifest of the whole.
        _remove_applied(out)
        before = Manifest.read(out)
        earlier = read_records(out, before)
        stored_ids = (read_ids(out, record) for record in earlier)
        skipped_ids = ([row["id"] for row in record.skipped] for record in earlier)
        new_rows = _NewRows(source, before, earlier, KnownIds(itertools.chain(stored_ids, skipped_ids)))
        recipe = _view_recipe(before)
        _refuse_other_model(before, encoder, recipe, new_rows)
        after = _grown_manifest(before, new_rows, len(earlier))
        if new_rows.class_count:
            refuse_same_texts(encoder, fill_prompts(after.class_names, after.prompts))
        grows = bool(new_rows.parts or new_rows.class_count)
        if grows:
            _write_pending(out, after, len(earlier))

        # Its shards, then its texts.
        job = EncodeJob(new_rows, recipe, out, after)
        summary = fill_shards(
            out,
            after,
            new_rows.parts,
            partial(engine or encode_parts, job, encoder, workers=workers),
            label="append",
            earlier=earlier,
            skip_limit=SkipLimit(before.max_skipped, before.shard_size, fix="fix or remove them and append again"),
            progress=progress,
        )
        if new_rows.class_count:
            # Readers of the old manifest take the first classes alone.
            new_classes = after.class_names[len(before.class_names) :]
            more = encode_classes(encoder, fill_prompts(new_classes, after.prompts))
            write_text(out, _joined_text(read_text(out, before), more))

        # The one step in which readers change over; killed before it, nothing has happened for them.
        if grows:
            after.write(out)
            _remove_pending(out)
        return replace(summary, known=new_rows.known, classes=new_rows.class_count)


class _NewRows:
    """The new rows of a source, as a stream whose parts continue the cache's shards.

    It has no `rows`, so that the first row of each part, as counted here, reaches the part's record.

    Attributes:
        kind: of the source.
        class_names: of the cache, then those that are new.
        class_count: how many classes are new.
        parts: numbered after the cache's shards.
        known: rows of the source that the cache has.
    """

    def __init__(self, source: Source, before: Manifest, earlier: Sequence[ShardRecord], known_ids: KnownIds) -> None:
        self.source = source
        self.kind = source.kind
        # A cache may hold a name in another form of Unicode than sources give it.
        stored = {label_key(name): name for name in before.class_names}
        source_names = [stored.get(name, name) for name in source.class_names]
        self.class_names = list(dict.fromkeys([*before.class_names, *source_names]))
        self.class_count = len(self.class_names) - len(before.class_names)
        self.parts: list[Part] = []
        self.known = 0
        index = {name: label for label, name in enumerate(self.class_names)}
        self._labels = [*(index[name] for name in source_names), UNKNOWN]  # label -1 finds the last entry
        self._known_ids = known_ids
        self._listed: list[Row] = []  # new rows of a listed source
        self._source_parts: dict[int, Part] = {}  # of the source, by the number of the part
        self._digest = hashlib.sha256()
        first_row = before.rows  # None in the cache of a stream, whose shards stand alone
        for source_part, rows in self._parts_of_source(before.shard_size):
            part = Part(len(earlier) + len(self.parts), source_part.split, first_row, len(rows), source_part.name)
            self.parts.append(part)
            self._source_parts[part.number] = source_part
            self._digest.update(fingerprint(rows).encode())
            first_row = None if first_row is None else first_row + len(rows)

    def plan(self, shard_size: int) -> list[Part]:
        """The parts."""
        return self.parts

    def open(self, part: Part) -> list[Row]:
        """The new rows of a part, with labels as in the class names of the whole."""
        source_part = self._source_parts[part.number]
        if is_listed(self.source):
            return rows_of(self._listed, source_part)
        return self._select_new(self.source.open(source_part))

    def close(self, part: Part) -> None:
        """Lets go of a part."""
        if not is_listed(self.source):
            self.source.close(self._source_parts[part.number])

    def read(self, row: Row) -> Image.Image:
        """The image of `row` as RGB; raises UnreadableImage."""
        return self.source.read(row)

    def describe(self) -> dict[str, Any]:
        """The description of the source."""
        return self.source.describe()

    def fingerprint(self) -> str:
        """Hex digest over the new rows."""
        return self._digest.hexdigest()

    def _parts_of_source(self, shard_size: int) -> Iterator[tuple[Part, list[Row]]]:
        """The source's parts that have new rows, and these rows; counts the others."""
        if is_listed(self.source):
            self._listed = self._select_new(self.source.rows)
            self.known = len(self.source.rows) - len(self._listed)
            refuse_bad_rows(self._listed)
            for part in split_rows(self._listed, shard_size):
                yield part, rows_of(self._listed, part)
            return
        # Every part is opened here and once more for its images: only so is it known which rows are new.
        for part in self.source.plan(shard_size):
            all_rows = self.source.open(part)
            rows = self._select_new(all_rows)
            self.known += len(all_rows) - len(rows)
            refuse_bad_rows(rows)
            self.source.close(part)
            if rows:
                yield part, rows

    def _select_new(self, rows: Sequence[Row]) -> list[Row]:
        known = self._known_ids.holds([row.id for row in rows])
        return [replace(row, label=self._labels[row.label]) for row, old in zip(rows, known, strict=True) if not old]


def _view_recipe(manifest: Manifest) -> ViewRecipe:
    """How the cache's views were drawn."""
    views: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in manifest.views.items()}
    try:
        recipe = ViewRecipe(**views)
    except TypeError as error:
        raise InputError(f"the cache's views were drawn in a way unknown here ({error}); extract anew") from error
    if recipe.weak + recipe.strong and "weak_scale" not in views:
        raise InputError("the cache was imported, so it is unknown how its views were drawn; extract the images anew")
    return recipe


def _refuse_other_model(before: Manifest, encoder: Encoder, recipe: ViewRecipe, new_rows: _NewRows) -> None:
    request = make_manifest(
        new_rows,
        new_rows.parts,
        encoder,
        recipe,
        before.prompts,
        dtype=before.dtype,
        batch_size=before.batch_size,
        shard_size=before.shard_size,
        max_skipped=before.max_skipped,
    )
    # The same weights may be in another folder; and what is appended is another source by its nature.
    same_names = {"name": before.model["name"], "pretrained": before.model["pretrained"]}
    request = replace(
        request,
        model={**request.model, **same_names},
        class_names=before.class_names,
        source=before.source,
        views=before.views,
    )
    try:
        before.refuse_mismatch(request)
    except CacheMismatch as error:
        raise error.with_fix("append with the model, precision and features that the cache was made with") from error


def _grown_manifest(before: Manifest, new_rows: _NewRows, first_shard: int) -> Manifest:
    """The manifest of the cache with the new rows and classes."""
    rows = sum(part.rows or 0 for part in new_rows.parts)
    addition = {
        **describe_source(new_rows, new_rows.parts),
        "rows": rows,
        "first_shard": first_shard,
        "classes": new_rows.class_count,
    }
    source = {**before.source, "appended": [*before.source.get("appended", []), addition]}
    if before.rows is None:
        source["parts"] = before.parts + len(new_rows.parts)
    else:
        source["rows"] = before.rows + rows
    return replace(before, class_names=new_rows.class_names, source=source, created_by=f"ulfine-fast {__version__}")


def _joined_text(text: TextFeatures, more: TextFeatures) -> TextFeatures:
    """The texts of all classes."""
    return replace(
        text,
        prompts=[*text.prompts, *more.prompts],
        features=np.concatenate([text.features, more.features]),  # (K, P, D)
        prototypes=np.concatenate([text.prototypes, more.prototypes]),  # (K, D)
    )


# -- the pending manifest


def _read_pending(out: Path) -> Manifest | None:
    path = out / PENDING
    try:
        return Manifest.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove it and append again") from error


def _write_pending(out: Path, after: Manifest, first_shard: int) -> None:
    """Leaves the pending manifest in `out`; refuses to replace that of another source's append."""
    pending = _read_pending(out)
    if pending is not None:
        if _is_same(pending, after):
            return
        # An append whose source has changed since is begun anew.
        earlier, wanted = (manifest.source["appended"][-1] for manifest in (pending, after))
        if any(earlier.get(name) != wanted.get(name) for name in ("kind", "path", "name")):
            raise InputError(
                f"an append of {earlier.get('path') or earlier.get('name')} to {out} is unfinished; run its command "
                f"again first, or give it up by removing {out / PENDING}"
            )
    # Shards of an append that was given up are removed: they may be of other images, and as many. In order, and
    # records first: what a kill leaves has no gap, and does not count.
    with refused_writes(out):
        for number in itertools.count(first_shard):
            shard = shard_path(out, number)
            record = shard.with_suffix(".json")
            if not shard.exists() and not record.exists():
                break
            record.unlink(missing_ok=True)
            shard.unlink(missing_ok=True)
    write_atomically(out / PENDING, (json.dumps(after.to_dict(), indent=2, sort_keys=True) + "\n").encode())


def _remove_applied(out: Path) -> None:
    """Removes the pending manifest where it has replaced the cache's already, and a kill came before its removal."""
    pending = _read_pending(out)
    if pending is not None and _is_same(pending, Manifest.read(out)):
        _remove_pending(out)


def _remove_pending(out: Path) -> None:
    with refused_writes(out / PENDING):
        (out / PENDING).unlink(missing_ok=True)


def _is_same(one: Manifest, other: Manifest) -> bool:
    try:
        one.refuse_mismatch(other)
    except CacheMismatch:
        return False
    return True
