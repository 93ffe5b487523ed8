"""Images per second of an extraction: ours, a script as one writes it, and what the machine allows.

    python -m benchmarks.speed.extract --json extract.json

Every contender runs in a process of its own, in turns; medians over rounds. The clock starts once the model is loaded
and warm and stops when the features are on the disk. The bound is the rate of all stages together, each measured alone
with all cores at it. With `--memory` ours runs over 10,000 and 100,000 images with a tiny model, for its peak memory.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.comparison.parts import write_json
from benchmarks.images import SHAPES, TINY, model_name
from benchmarks.options import parse_names
from benchmarks.speed.stages import stage_rates
from benchmarks.tables import print_table
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.models.encoder import load_encoder
from ulfine_fast.cache.models.lite0_minilm import NAME as LITE0
from ulfine_fast.cache.sources import FolderSource
from ulfine_fast.cli.main import guarded

Row = dict[str, Any]
CONTENDERS = ("script", "clip_retrieval", "ulfine_fast")
_MEMORY_COUNTS = (10_000, 100_000)


def measure(
    shape: str, model: str, count: int, contenders: list[str], rounds: int, peer: Path | None, precision: str = "fp32"
) -> list[Row]:
    """All contenders on one shape of images and one model.

    Args:
        shape: one of `SHAPES`.
        model: "lite0-minilm", "ViT-B-32" or "tiny".
        count: images.
        contenders: of `CONTENDERS`.
        rounds: runs of each, in turns.
        peer: the Python that has clip-retrieval.
        precision: of the model while it runs, for all contenders; clip-retrieval knows fp32 alone on a processor.
    """
    name, folder = model_name(model), SHAPES[shape](count)
    if model == LITE0 or precision != "fp32":  # clip-retrieval takes architectures that open_clip knows by name alone
        contenders = [contender for contender in contenders if contender != "clip_retrieval"]
    runs: dict[str, list[Row]] = {contender: [] for contender in contenders}
    bounds: list[dict[str, float]] = []
    for _ in range(rounds):
        # between the contenders of each round, since a machine's rate changes with its load
        bounds.append(stage_rates(FolderSource(folder), load_encoder(name, device="cpu", precision=precision)))
        for contender in contenders:
            command = (
                _peer_command(peer, model, name)
                if contender == "clip_retrieval"
                else _command(contender, name, precision)
            )
            runs[contender].append(_run([*command, str(folder)]))
    stages = {stage: statistics.median(found[stage] for found in bounds) for stage in bounds[0]}
    return [
        {**_row(shape, model, contender, runs[contender], stages), "precision": precision} for contender in contenders
    ]


def _command(contender: str, model: str, precision: str = "fp32") -> list[str]:
    return [sys.executable, "-m", "benchmarks.speed.extracting", contender, model, precision]


def _peer_command(python: Path | None, model: str, name: str) -> list[str]:
    if python is None:
        raise InputError("clip_retrieval needs --clip-retrieval, the Python of an environment that has it")
    checkpoint = Path(name.removeprefix("local-dir:")) / "open_clip_model.safetensors"
    return [str(python), str(Path(__file__).with_name("with_clip_retrieval.py")), model, str(checkpoint)]


def _run(command: list[str]) -> Row:
    """One run in a process of its own."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{' '.join(command[1:])} failed: {done.stderr.strip().splitlines()[-1]}")
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def _row(shape: str, model: str, contender: str, runs: list[Row], stages: dict[str, float]) -> Row:
    rate = statistics.median(run["images"] / run["seconds"] for run in runs)
    return {
        "shape": shape,
        "images": runs[0]["images"],
        "model": model,
        "contender": contender,
        "images_per_second": rate,
        "bound_images_per_second": stages["bound"],
        "stages": stages,
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
    }


def memory() -> list[Row]:
    """Ours over few and many images, with a model so small that reading is most of the work."""
    name = model_name(TINY)
    return [
        {
            "shape": "png28",
            "model": TINY,
            "contender": "ulfine_fast",
            **_run([*_command("ulfine_fast", name), str(SHAPES["png28"](count))]),
        }
        for count in _MEMORY_COUNTS
    ]


def extract(
    shapes: Annotated[str, typer.Option(help="Of png28, jpeg500, photograph.")] = "png28,jpeg500",
    models: Annotated[str, typer.Option(help="Of lite0-minilm, ViT-B-32, tiny.")] = "lite0-minilm,ViT-B-32",
    images: Annotated[int, typer.Option(help="Images of each shape.", min=64)] = 512,
    rounds: Annotated[int, typer.Option(help="Runs of each contender.", min=1)] = 3,
    contenders: Annotated[str, typer.Option(help="Of script, clip_retrieval, ulfine_fast.")] = "script,ulfine_fast",
    clip_retrieval: Annotated[Path | None, typer.Option(help="Python that has clip-retrieval.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16, of the models while they run.")] = "fp32",
    peak: Annotated[bool, typer.Option("--memory", help="Peak memory over 10,000 and 100,000 images instead.")] = False,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")] = None,
) -> None:
    """Measure images per second of extracting features on the processor, beside a script and the machine's bound."""
    kinds = parse_names(shapes, tuple(SHAPES), "shapes")
    nets = parse_names(models, (LITE0, "ViT-B-32", TINY), "models")
    names = parse_names(contenders, CONTENDERS, "contenders")
    if peak:
        rows = memory()
    else:
        rows = [
            row
            for kind in kinds
            for net in nets
            for row in measure(kind, net, images, names, rounds, clip_retrieval, precision)
        ]
    if as_json is not None:
        write_json(as_json, rows)
    if peak:
        print_table(["images", "seconds", "peak memory, MB"], [_memory_line(row) for row in rows], texts=0)
    else:
        _print(rows)


def _memory_line(row: Row) -> list[str]:
    return [f"{row['images']:,}", f"{row['seconds']:.0f}", f"{row['peak_rss_bytes'] / 1e6:,.0f}"]


def _print(rows: list[Row]) -> None:
    slowest = {(row["shape"], row["model"]): row["images_per_second"] for row in rows if row["contender"] == "script"}
    lines = []
    for row in rows:
        rate, bound = row["images_per_second"], row["bound_images_per_second"]
        base = slowest.get((row["shape"], row["model"]))
        over = "-" if base is None else f"{rate / base:.2f}"
        alone = "  ".join(f"{stage} {row['stages'][stage]:,.0f}" for stage in ("read", "encode", "write"))
        figures = [f"{rate:.1f}", over, f"{rate / bound:.2f}", f"{row['peak_rss_bytes'] / 1e6:,.0f}"]
        lines.append([row["shape"], row["model"], row["contender"], alone, *figures])
    titles = ["shape", "model", "contender", "stages alone, images/s", "images/s", "over script", "of the bound"]
    print_table([*titles, "peak memory, MB"], lines, texts=4)


if __name__ == "__main__":
    typer.run(guarded(extract))
