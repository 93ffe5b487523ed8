"""Encoding on Ray: several GPUs of a machine, or several machines, one shard a worker at a time."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ulfine_fast.cache.io.ray_cluster import RayWorkers, joined, result_of
from ulfine_fast.cache.pipeline.encode import EncodeJob, Engine, encode_parts
from ulfine_fast.cache.pipeline.fill import RowsDone
from ulfine_fast.cache.shard import ShardRecord

if TYPE_CHECKING:
    from ulfine_fast.cache.models.encoder import Encoder
    from ulfine_fast.cache.models.options import ModelOptions
    from ulfine_fast.cache.sources.rows import Part

# Shards submitted beyond those that have a worker: enough that none waits, few enough that the queue stays short.
_QUEUED = 2
# Of this worker process: the last job, by its key.
_JOBS: dict[str, EncodeJob] = {}


def ray_engine(model: ModelOptions, cluster: RayWorkers) -> Engine:
    """An engine for `extract` that gives shards to the workers of a Ray cluster.

    Each worker process loads the model once and then takes one shard after another, which it reads, encodes and writes
    itself, record last; so source and cache must be within reach of every machine under the same path. A worker that
    dies, or whose machine does, loses the shard it was at: Ray gives that to another. Shards are the same bytes
    wherever they are made, on machines with the same library versions.

    Args:
        model: of the encoder that `extract` has.
        cluster: where, and what a worker takes.
    """

    def run(
        job: EncodeJob,
        encoder: Encoder,
        parts: Sequence[Part],
        *,
        workers: int | None,
        on_rows: Callable[[RowsDone], None],
        on_shard: Callable[[ShardRecord], None],
    ) -> None:
        same_model = replace(model, exact=encoder.exact, compiled=encoder.compiled)
        device = "cuda" if cluster.gpus else "cpu"
        # several workers may run on one machine: each keeps to its own cores
        threads = max(1, int(cluster.cpus)) if workers is None else workers
        with joined(cluster) as ray:
            # The job is sent once, not with every shard; in a list, so that Ray does not unpack it for each.
            sent = [ray.put(job)]
            key = uuid.uuid4().hex
            # A machine may die any number of times. Ray would end a process that used a GPU after each task, and with
            # it the model; `max_calls=0` keeps it.
            task = ray.remote(max_calls=0)(_encode_one).options(
                num_cpus=cluster.cpus, num_gpus=cluster.gpus, max_retries=-1
            )
            todo = list(reversed(parts))
            pending: list[Any] = []
            while todo or pending:
                while todo and len(pending) < _slots(ray, cluster) + _QUEUED:
                    pending.append(task.remote(key, sent, same_model, device, todo.pop(), threads))
                done, pending = ray.wait(pending)
                for reference in done:
                    record = result_of(ray, reference)
                    seconds = {stage: spent for stage, spent in record.seconds.items() if stage != "write"}
                    on_rows(RowsDone(record.rows_read, record.skipped, seconds))
                    on_shard(record)

    return run


def _slots(ray: Any, cluster: RayWorkers) -> int:
    """Workers that the cluster has room for now; machines come and go."""
    available = ray.cluster_resources()
    slots = [available.get("CPU", 0) / cluster.cpus] if cluster.cpus else []
    slots += [available.get("GPU", 0) / cluster.gpus] if cluster.gpus else []
    return max(1, int(min(slots, default=1)))


def _encode_one(
    key: str, sent: list[Any], model: ModelOptions, device: str, part: Part, threads: int | None
) -> ShardRecord:
    """One shard, on a worker."""
    if key not in _JOBS:
        import ray  # an optional dependency

        _JOBS.clear()
        _JOBS[key] = ray.get(sent[0])
    records: list[ShardRecord] = []
    encoder = _encoder(model, device)
    # The record says all of the rows, so batches need not be reported.
    encode_parts(_JOBS[key], encoder, [part], workers=threads, on_rows=lambda _: None, on_shard=records.append)
    return records[0]


@lru_cache(maxsize=1)
def _encoder(model: ModelOptions, device: str) -> Encoder:
    return model.load(device)
