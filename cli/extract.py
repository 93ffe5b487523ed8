"""`ulfine-fast extract`: pictures to a cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ulfine_fast.cache.extract import ExtractSummary


def extract(
    source: Annotated[str, typer.Argument(help="A folder, a .csv or .parquet table, or a torchvision data set.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the cache.", show_default=False)],
    model: Annotated[
        str, typer.Option(help="open_clip name, local-dir:FOLDER, hf-hub:OWNER/NAME, or lite0-minilm.")
    ] = "ViT-B-16",
    pretrained: Annotated[
        str | None,
        typer.Option(help="Tag or checkpoint file; openai for the default model.", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file, one prompt a line, {} for the class name.", show_default=False),
    ] = None,
    class_names: Annotated[
        Path | None,
        typer.Option(help="Text file, one class name a line, in label order.", show_default=False),
    ] = None,
    weak: Annotated[int, typer.Option(help="Weak views of each picture of train and unlabeled.")] = 1,
    strong: Annotated[int, typer.Option(help="Strong views of each.")] = 1,
    view_seed: Annotated[int, typer.Option(help="Seed that the views are drawn from.")] = 0,
    dtype: Annotated[str, typer.Option(help="Type of stored features: float16 or float32.")] = "float16",
    batch_size: Annotated[int, typer.Option(help="Pictures encoded together; a GPU wants more, such as 256.")] = 32,
    shard_size: Annotated[int, typer.Option(help="Rows a shard covers; a stop loses at most one shard.")] = 1024,
    workers: Annotated[
        int | None,
        typer.Option(help="Reader processes, 0 for none.", show_default="by device"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16, of the model while it runs.")] = "fp32",
    mode: Annotated[
        str, typer.Option(help="resume continues, overwrite starts anew, verify checks and extracts nothing.")
    ] = "resume",
    max_skipped: Annotated[float, typer.Option(help="Share of pictures that may be unreadable, 0 to 1.")] = 0.01,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Extract frozen features of pictures into a cache; a stopped run continues where it was."""
    from ulfine_fast.cache.encoder import load_encoder
    from ulfine_fast.cache.extract import extract as run
    from ulfine_fast.cache.prompts import DEFAULT_PROMPTS, read_prompts
    from ulfine_fast.cache.sources import open_source
    from ulfine_fast.cache.views import ViewRecipe

    recipe = ViewRecipe(weak=weak, strong=strong, seed=view_seed)
    templates = DEFAULT_PROMPTS if prompts is None else read_prompts(prompts)
    # The source first: a wrong path should not cost the loading of a model.
    pictures = open_source(source, class_names_file=class_names)
    encoder = load_encoder(model, pretrained, device=device, precision=precision)
    summary = run(
        pictures,
        encoder,
        out,
        views=recipe,
        prompts=templates,
        dtype=dtype,
        batch_size=batch_size,
        shard_size=shard_size,
        workers=workers,
        mode=mode,
        max_skipped=max_skipped,
    )
    typer.echo(json.dumps(summary.to_dict()) if as_json else _text(summary, mode))


def _text(summary: ExtractSummary, mode: str) -> str:
    """The summary in a few lines."""
    if mode == "verify":
        return f"{summary.out}: {_shards(summary.shards)} with {summary.pictures} pictures intact"
    lines = [f"{summary.out}: {summary.pictures} pictures in {_shards(summary.shards)}"]
    if summary.kept:
        lines.append(f"{_shards(summary.kept)} finished before and kept")
    if summary.encoded:
        shares = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in summary.stages.items())
        rate = f"{summary.pictures_per_second:.1f} pictures/s"
        lines.append(f"{summary.encoded} pictures encoded in {summary.seconds:.1f} s ({rate}; {shares})")
    lines += [f"skipped {one['id']}: {one['reason']}" for one in summary.skipped[:10]]
    if len(summary.skipped) > 10:
        lines.append(f"... and {len(summary.skipped) - 10} more; `ulfine-fast inspect {summary.out}` lists them")
    return "\n".join(lines)


def _shards(count: int) -> str:
    return "1 shard" if count == 1 else f"{count} shards"
