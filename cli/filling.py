"""What the commands that fill a cache share: options, the engine that encodes, and the printed summary.

Heavy modules are imported inside the commands, so that `--help` answers quickly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ulfine_fast.cache.io.terminal import printable

if TYPE_CHECKING:
    from ulfine_fast.cache.models.options import ModelOptions
    from ulfine_fast.cache.pipeline.encode import Engine
    from ulfine_fast.cache.pipeline.fill import FillSummary
    from ulfine_fast.cache.sources.rows import Source
    from ulfine_fast.cache.store import FeatureCache

# Classes whose counts are printed at the end; `inspect` prints all.
_SHOWN_CLASSES = 30
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
SourceName = Annotated[
    str, typer.Argument(help="Folder, table, tar or parquet files, URL, hf:NAME, or a torchvision data set.")
]
ClassNames = Annotated[
    Path | None, typer.Option(help="Text file, one class name a line, in label order.", show_default=False)
]
Workers = Annotated[
    int | None, typer.Option(help="Threads on a processor, reader processes beside a GPU.", show_default="one a core")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
EngineName = Annotated[
    Literal["local", "ray"], typer.Option(help="Encode in this process, or shards on the workers of a Ray cluster.")
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="Ray's address: auto joins this machine's cluster, local starts one.", show_default="local"),
]
RayCpus = Annotated[float, typer.Option(help="CPU cores of a worker on Ray.", min=0)]
RayGpus = Annotated[float, typer.Option(help="GPUs of a worker on Ray.", min=0)]


def engine_for(model: ModelOptions, engine: str, ray: str | None, ray_cpus: float, ray_gpus: float) -> Engine | None:
    """What encodes the images: None for this process. An address of Ray alone asks for Ray too."""
    if engine == "local" and ray is None:
        return None
    from ulfine_fast.cache.io.ray_cluster import RayWorkers
    from ulfine_fast.cache.pipeline.ray_engine import ray_engine

    return ray_engine(model, RayWorkers(ray or "local", ray_cpus, ray_gpus))


def print_notes(source: Source | FeatureCache) -> None:
    """Prints what a source took for granted or passed over, to stderr."""
    for note in getattr(source, "notes", ()):
        typer.echo(f"note: {printable(note)}", err=True)


def print_encoded(summary: FillSummary, as_json: bool, *, verified: bool = False, appended: bool = False) -> None:
    """Prints what extract or append did, as JSON or in a few lines."""
    shards = count_shards(summary.shards)
    if as_json:
        typer.echo(json.dumps(summary.to_dict()))
        return
    if verified:
        typer.echo(f"{summary.out}: {shards} with {summary.images} images intact")
        return
    lines = [f"{summary.out}: {summary.images} images in {shards}"]
    if summary.kept:
        lines.append(f"{count_shards(summary.kept)} finished before and kept")
    if summary.encoded:
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in summary.stages.items())
        rate = f"{summary.images_per_second:.1f} images/s"
        lines.append(f"{summary.encoded} images encoded in {summary.seconds:.1f} s ({rate}; {stages})")
    lines += [f"skipped {row['id']}: {row['reason']}" for row in summary.skipped[:10]]
    if len(summary.skipped) > 10:
        lines.append(f"... and {len(summary.skipped) - 10} more; `ulfine-fast inspect {summary.out}` lists them")
    if appended:
        lines.append(f"{summary.known} images were there already and stay as they are")
    if appended and summary.classes:
        lines.append(f"{summary.classes} new classes")
    typer.echo("\n".join([printable(line) for line in lines] + _class_counts(summary.out)))


def _class_counts(cache: Path) -> list[str]:
    """Rows of each class by split, a line for a class, so that one sees what the source was taken for."""
    from ulfine_fast.cache.io.paths import to_path
    from ulfine_fast.cache.manifest import Manifest
    from ulfine_fast.cache.store import count_classes

    manifest = Manifest.read(to_path(cache))
    names, counts = manifest.class_names, count_classes(to_path(cache), manifest)
    others = {name for by_class in counts.values() for name in by_class} - set(names)
    lines = ["rows of each class by split:"]
    for name in [*names[:_SHOWN_CLASSES], *sorted(others)]:
        cells = [f"{split} {by_class[name]}" for split, by_class in counts.items() if name in by_class]
        lines.append(f"  {printable(name)}: {', '.join(cells) or 'none'}")
    if len(names) > _SHOWN_CLASSES:
        lines.append(f"  ... and {len(names) - _SHOWN_CLASSES} more classes; `ulfine-fast inspect {cache}` lists them")
    return lines


def print_copied(summary: FillSummary, as_json: bool) -> None:
    """Prints what merge or import did, as JSON or in a few lines."""
    if as_json:
        typer.echo(json.dumps(summary.to_dict()))
        return
    kept = f", {summary.kept} of them finished before and kept" if summary.kept else ""
    shards = count_shards(summary.shards)
    typer.echo(f"{printable(summary.out)}: {summary.images} images of {summary.classes} classes in {shards}{kept}")
    if summary.normalised:
        typer.echo(f"{summary.normalised} rows had another length than 1 and got it")


def count_shards(count: int) -> str:
    """How many shards, in words."""
    return "1 shard" if count == 1 else f"{count} shards"
