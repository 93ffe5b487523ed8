"""Extraction on Ray: several GPUs of a machine, or several machines, one shard a worker at a time."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ulfine_fast.cache.io.ray_cluster import RayWorkers, joined, result_of
from ulfine_fast.cache.pipeline.encode import Done
from ulfine_fast.cache.shard import ShardRecord

if TYPE_CHECKING:
    from ulfine_fast.cache.models.encoder import Encoder
    from ulfine_fast.cache.pipeline.extract import Engine, Job
    from ulfine_fast.cache.sources.rows import Part

# Shards handed out beyond those that have a worker: enough that none waits, few enough that what is queued stays small.
_QUEUED = 2


@dataclass(frozen=True, slots=True)
class Loading:
    """How a worker loads the model: the arguments of `load_encoder`.

    Attributes:
        model: its name. pretrained: tag or checkpoint. precision: "fp32", "bf16" or "fp16".
        features: "projected", "last-block" or "pre-projection".
        exact, compiled: see there; the engine sets them as the encoder of `extract` has them.
    """

    model: str
    pretrained: str | None = None
    precision: str = "fp32"
    features: str = "projected"
    exact: bool | None = None
    compiled: bool = False


def on_ray(loading: Loading, workers: RayWorkers) -> Engine:
    """An engine for `extract` that gives shards to the workers of a Ray cluster.

    Each worker process loads the model once and then takes one shard after another, which it reads, encodes and writes
    itself, record last; so source and cache must be within reach of every machine under the same path. A worker that
    dies, or whose machine does, loses the shard it was at: Ray gives that to another. Shards are the same bytes
    wherever they are made, on machines with the same library versions.

    Args:
        loading: the model of the encoder that `extract` has.
        workers: where, and what a worker takes.
    """

    def run(
        job: Job,
        encoder: Encoder,
        parts: Sequence[Part],
        *,
        workers: int | None,
        on_batch: Callable[[Done], None],
        on_shard: Callable[[ShardRecord], None],
    ) -> None:
        def finished(record: ShardRecord) -> None:
            on_batch(Done(record.rows_read, record.skipped, {k: v for k, v in record.seconds.items() if k != "write"}))
            on_shard(record)

        alike = replace(loading, exact=encoder.exact, compiled=encoder.compiled)
        _hand_out(job, alike, cluster, parts, workers, finished)

    cluster = workers
    return run


def _hand_out(
    job: Job,
    loading: Loading,
    cluster: RayWorkers,
    parts: Sequence[Part],
    threads: int | None,
    finished: Callable[[ShardRecord], None],
) -> None:
    """Keeps all workers busy until every part is done."""
    with joined(cluster) as ray:
        # sent once, not with every shard; in a list, so that Ray does not unpack it for each
        sent, key = [ray.put(job)], uuid.uuid4().hex
        device = "cuda" if cluster.gpus else "cpu"
        # several workers may share a machine: each keeps to its own cores
        threads = max(1, int(cluster.cpus)) if threads is None else threads
        # A machine may die any number of times. Ray would end a process that used a GPU after each task, and with it
        # the model; `max_calls=0` keeps it.
        task = ray.remote(max_calls=0)(_extract_one).options(
            num_cpus=cluster.cpus, num_gpus=cluster.gpus, max_retries=-1
        )
        todo = list(reversed(parts))
        pending: list[Any] = []
        while todo or pending:
            while todo and len(pending) < _slots(ray, cluster) + _QUEUED:
                pending.append(task.remote(key, sent, loading, device, todo.pop(), threads))
            done, pending = ray.wait(pending)
            for reference in done:
                finished(result_of(ray, reference))


def _slots(ray: Any, cluster: RayWorkers) -> int:
    """Workers that the cluster has room for now; machines come and go."""
    there = ray.cluster_resources()
    rooms = [there.get("CPU", 0) / cluster.cpus] if cluster.cpus else []
    rooms += [there.get("GPU", 0) / cluster.gpus] if cluster.gpus else []
    return max(1, int(min(rooms, default=1)))


def _extract_one(
    key: str, sent: list[Any], loading: Loading, device: str, part: Part, threads: int | None
) -> ShardRecord:
    """One shard on a worker."""
    from ulfine_fast.cache.pipeline.extract import extract_parts

    records: list[ShardRecord] = []
    job = _job(key, sent)
    extract_parts(job, _encoder(loading, device), [part], workers=threads, on_batch=_ignore, on_shard=records.append)
    return records[0]


def _ignore(_: Done) -> None:
    """A shard is told when it is done."""


_JOBS: dict[str, Any] = {}  # of this worker process: the last one


def _job(key: str, sent: list[Any]) -> Job:
    if key not in _JOBS:
        import ray

        _JOBS.clear()
        _JOBS[key] = ray.get(sent[0])
    found: Job = _JOBS[key]
    return found


@lru_cache(maxsize=1)
def _encoder(loading: Loading, device: str) -> Encoder:
    from ulfine_fast.cache.models.encoder import load_encoder

    return load_encoder(**asdict(loading), device=device)
