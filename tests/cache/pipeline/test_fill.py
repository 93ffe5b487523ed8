"""The pipeline itself, with shards that need no model; extract, append, merge and import test the rest of it."""

from __future__ import annotations

import dataclasses
import signal
import threading

import pytest

from tests.cache.samples import make_manifest, make_shard, make_text
from ulfine_fast.cache.io.errors import CacheMismatch, InputError
from ulfine_fast.cache.pipeline.fill import ShardContent, ShardWriter, SkipLimit, create_cache, ready_shards
from ulfine_fast.cache.sources.rows import Part
from ulfine_fast.cache.store import FeatureCache

PARTS = [Part(0, "train", 0, 3), Part(1, "train", 3, 3), Part(2, "test", 6, 2)]
MANIFEST = make_manifest(source={"kind": "import", "rows": 8, "fingerprint": "ab"})


def content(part: Part, skipped: int = 0) -> ShardContent:
    n = (part.rows or 0) - skipped
    shard = make_shard(n, MANIFEST.layout(part.split), part.split, seed=part.number)
    ids = [f"{part.number}/{row}" for row in range(n)]
    left_out = [{"id": f"{part.number}/lost{row}", "reason": "cut"} for row in range(skipped)]
    return ShardContent(dataclasses.replace(shard, ids=ids, labels=shard.labels.clip(-1, 1)), left_out)


def fill(out, make=content, **options):
    return create_cache(out, MANIFEST, PARTS, ready_shards(out, make), text=lambda: make_text(MANIFEST), **options)


def test_a_filled_folder_is_a_cache_and_the_summary_counts_it(tmp_path):
    done = fill(tmp_path / "cache", lambda part: content(part, skipped=part.number))
    assert (done.images, done.encoded, done.shards, done.kept, done.classes) == (5, 0, 3, 0, 2)
    assert [row["id"] for row in done.skipped] == ["1/lost0", "2/lost0", "2/lost1"]
    cache = FeatureCache.open(tmp_path / "cache")
    assert (len(cache), cache.verify()) == (5, [])
    again = fill(tmp_path / "cache", lambda part: pytest.fail("it is there"))
    assert (again.kept, again.images, again.seconds, again.skipped) == (3, 5, 0.0, done.skipped)


def test_only_missing_shards_are_made(tmp_path):
    fill(tmp_path / "cache")
    (tmp_path / "cache/shards/00001.h5").unlink()
    made = []
    done = fill(tmp_path / "cache", lambda part: made.append(part.number) or content(part))
    assert (made, done.kept) == ([1], 2)


def test_the_limit_of_skipped_rows_holds_for_finished_shards_too(tmp_path):
    def make(part):
        return content(part, skipped=1)

    limit = SkipLimit(0.25, shard_size=3, fix="do something")
    with pytest.raises(
        InputError, match=r"3 of 8 images cannot be read .* fraction of 0\.25 .*0/lost0: cut\); do some"
    ):
        fill(tmp_path / "cache", make, skip_limit=limit)
    assert fill(tmp_path / "cache", make, skip_limit=dataclasses.replace(limit, fraction=0.5)).images == 5
    with pytest.raises(InputError, match=r"3 of 8 images"):
        fill(tmp_path / "cache", make, skip_limit=limit)


def test_another_cache_is_refused_with_the_callers_advice_or_overwritten(tmp_path):
    fill(tmp_path / "cache")
    other = dataclasses.replace(MANIFEST, prompts=["{}"])

    def again(**options):
        make = ready_shards(tmp_path / "cache", content)
        return create_cache(tmp_path / "cache", other, PARTS, make, text=lambda: make_text(other), **options)

    with pytest.raises(CacheMismatch, match="--mode overwrite"):
        again()
    with pytest.raises(CacheMismatch, match=r"the request says '{}'; take another folder"):
        again(mismatch_fix="take another folder")
    assert again(overwrite=True).kept == 0
    assert FeatureCache.open(tmp_path / "cache").manifest.prompts == ["{}"]


def test_a_shard_that_is_being_written_when_an_interrupt_comes_is_finished_and_reported(tmp_path):
    (tmp_path / "shards").mkdir()
    records, main, submitted = [], threading.main_thread().ident, threading.Event()

    def interrupting():
        submitted.wait()
        signal.pthread_kill(main, signal.SIGINT)
        return content(PARTS[0])

    def write():
        with ShardWriter(tmp_path, MANIFEST, records.append) as writer:
            writer.write(PARTS[0], interrupting)
            submitted.set()
            writer.write(PARTS[1], lambda: content(PARTS[1]))

    with pytest.raises(KeyboardInterrupt):
        write()
    assert [record.shard for record in records] == [0]
    assert (tmp_path / "shards/00000.json").exists()
