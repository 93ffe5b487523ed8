"""Images per second of an extraction: by ulfine-fast, by a script as one writes it, and what the machine allows.

    python -m benchmarks.speed.extract --json extract.json

Every contender runs in a process of its own, one after the other in each round; rates are medians over rounds. The
clock starts once the model is loaded and warm and stops when the features are on the disk. The bound is the rate of all
stages together, each measured alone with all cores. With `--memory` ulfine-fast runs over 10,000 and 100,000 images
with a tiny model, for its peak memory.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.images import SHAPES, TINY, VIT, model_name
from benchmarks.options import JsonOption, parse_names
from benchmarks.results import Row, print_table, write_rows
from benchmarks.speed.stages import stage_rates
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.models.encoder import load_encoder
from ulfine_fast.cache.models.lite0_minilm import NAME as LITE0
from ulfine_fast.cache.sources import FolderSource
from ulfine_fast.cli.main import guarded

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
        rounds: runs of each.
        peer: the Python that has clip-retrieval.
        precision: of the model while it runs, for all contenders; clip-retrieval knows fp32 alone on a processor.
    """
    name = model_name(model)
    folder = SHAPES[shape](count)
    if model == LITE0 or precision != "fp32":  # clip-retrieval takes architectures that open_clip knows by name alone
        contenders = [contender for contender in contenders if contender != "clip_retrieval"]
    commands = {
        contender: _peer_command(peer, model, name)
        if contender == "clip_retrieval"
        else _command(contender, name, precision)
        for contender in contenders
    }

    # runs, and the bound in each round, since a machine's rate changes with its load
    runs: dict[str, list[Row]] = {contender: [] for contender in contenders}
    rates: list[dict[str, float]] = []
    for _ in range(rounds):
        rates.append(stage_rates(FolderSource(folder), load_encoder(name, device="cpu", precision=precision)))
        for contender, command in commands.items():
            runs[contender].append(_run([*command, str(folder)]))

    stages = {stage: statistics.median(rate[stage] for rate in rates) for stage in rates[0]}
    return [
        {
            "shape": shape,
            "images": own[0]["images"],
            "model": model,
            "contender": contender,
            "images_per_second": statistics.median(run["images"] / run["seconds"] for run in own),
            "bound_images_per_second": stages["bound"],
            "stages": stages,
            "peak_rss_bytes": max(run["peak_rss_bytes"] for run in own),
            "precision": precision,
        }
        for contender, own in runs.items()
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
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def measure_memory() -> list[Row]:
    """ulfine-fast over few and many images, with a model so small that reading is most of the work."""
    command = _command("ulfine_fast", model_name(TINY))
    return [
        {
            "shape": "png28",
            "model": TINY,
            "contender": "ulfine_fast",
            **_run([*command, str(SHAPES["png28"](count))]),
        }
        for count in _MEMORY_COUNTS
    ]


def table(rows: list[Row]) -> list[list[str]]:
    """A line for each shape, model and contender."""
    scripts = {(row["shape"], row["model"]): row["images_per_second"] for row in rows if row["contender"] == "script"}
    lines = []
    for row in rows:
        rate = row["images_per_second"]
        script_rate = scripts.get((row["shape"], row["model"]))
        lines.append(
            [
                row["shape"],
                row["model"],
                row["contender"],
                "  ".join(f"{stage} {row['stages'][stage]:,.0f}" for stage in ("read", "encode", "write")),
                f"{rate:.1f}",
                "-" if script_rate is None else f"{rate / script_rate:.2f}",
                f"{rate / row['bound_images_per_second']:.2f}",
                _megabytes(row),
            ]
        )
    return lines


def _megabytes(row: Row) -> str:
    return f"{row['peak_rss_bytes'] / 1e6:,.0f}"


def extract(
    shapes: Annotated[str, typer.Option(help="Of png28, jpeg500, photograph.")] = "png28,jpeg500",
    models: Annotated[str, typer.Option(help="Of lite0-minilm, ViT-B-32, tiny.")] = "lite0-minilm,ViT-B-32",
    images: Annotated[int, typer.Option(help="Images of each shape.", min=64)] = 512,
    rounds: Annotated[int, typer.Option(help="Runs of each contender.", min=1)] = 3,
    contenders: Annotated[str, typer.Option(help="Of script, clip_retrieval, ulfine_fast.")] = "script,ulfine_fast",
    clip_retrieval: Annotated[Path | None, typer.Option(help="Python that has clip-retrieval.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16, of the models while they run.")] = "fp32",
    peak: Annotated[bool, typer.Option("--memory", help="Peak memory over 10,000 and 100,000 images instead.")] = False,
    as_json: JsonOption = None,
) -> None:
    """Measure images per second of extracting features on the processor, beside a script and the machine's bound."""
    shape_names = parse_names(shapes, SHAPES, "shapes")
    model_names = parse_names(models, (LITE0, VIT, TINY), "models")
    contender_names = parse_names(contenders, CONTENDERS, "contenders")
    if peak:
        rows = measure_memory()
        write_rows(as_json, rows)
        lines = [[f"{row['images']:,}", f"{row['seconds']:.0f}", _megabytes(row)] for row in rows]
        print_table(["images", "seconds", "peak memory, MB"], lines, texts=0)
        return
    rows = []
    for shape in shape_names:
        for model in model_names:
            rows += measure(shape, model, images, contender_names, rounds, clip_retrieval, precision)
    write_rows(as_json, rows)
    titles = ["shape", "model", "contender", "stages alone, images/s", "images/s", "over script", "of the bound"]
    print_table([*titles, "peak memory, MB"], table(rows), texts=4)


if __name__ == "__main__":
    typer.run(guarded(extract))
