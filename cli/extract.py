"""`ulfine-fast extract`: images to a cache."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ulfine_fast.cli.cache import append as append_to_cache
from ulfine_fast.cli.filling import (
    AsJson,
    ClassNames,
    Device,
    EngineName,
    RayAddress,
    RayCpus,
    RayGpus,
    SourceName,
    Workers,
    engine_for,
    print_encoded,
    print_notes,
)
from ulfine_fast.cli.options import is_named

# Options that an append takes from the cache.
_SETTINGS_OF_CACHE = (
    *("model", "pretrained", "precision", "features", "prompts", "weak", "strong", "view_seed", "smallest_crop"),
    *("dtype", "batch_size", "shard_size", "mode", "max_skipped", "exact", "compiled"),
)


def extract(
    context: typer.Context,
    source: SourceName,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the cache.", show_default=False)],
    model: Annotated[
        str,
        typer.Option(
            help="open_clip name, local-dir:FOLDER, hf-hub:OWNER/NAME, timm:NAME (images alone), or lite0-minilm."
        ),
    ] = "ViT-B-16",
    pretrained: Annotated[
        str | None,
        typer.Option(help="Tag or checkpoint file; openai for the default model.", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file, one prompt a line, {} for the class name.", show_default=False),
    ] = None,
    class_names: ClassNames = None,
    weak: Annotated[int, typer.Option(help="Weak views of each image of train and unlabeled.")] = 1,
    strong: Annotated[int, typer.Option(help="Strong views of each.")] = 1,
    view_seed: Annotated[int, typer.Option(help="Seed that the views are drawn from.")] = 0,
    smallest_crop: Annotated[
        float, typer.Option(help="Smallest fraction of an image's area that a view shows; LIFT+ wants 0.08.")
    ] = 0.5,
    dtype: Annotated[Literal["float16", "float32", "int8"], typer.Option(help="Type of stored features.")] = "float16",
    features: Annotated[
        Literal["projected", "pre-projection", "last-block"],
        typer.Option(help="The last two also store the model's tokens."),
    ] = "projected",
    batch_size: Annotated[int, typer.Option(help="Images encoded together; a GPU wants more, such as 256.")] = 32,
    shard_size: Annotated[int, typer.Option(help="Rows a shard covers; a stop loses at most one shard.")] = 1024,
    workers: Workers = None,
    device: Device = "auto",
    precision: Annotated[
        Literal["fp32", "tf32", "bf16", "fp16"],
        typer.Option(help="Of the model while it runs; fp32 is exact and slow on a GPU, which wants bf16 or tf32."),
    ] = "fp32",
    mode: Annotated[
        Literal["resume", "overwrite", "verify"],
        typer.Option(help="Continue, start anew, or check and extract nothing."),
    ] = "resume",
    max_skipped: Annotated[float, typer.Option(help="Fraction of images that may be unreadable, 0 to 1.")] = 0.01,
    exact: Annotated[
        bool | None,
        typer.Option(
            "--exact/--fast",
            help="Take images as they are, or reduce large ones first and let a GPU resize.",
            show_default="fast",
        ),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Let torch.compile make kernels for the model first.")
    ] = False,
    engine: EngineName = "local",
    ray: RayAddress = None,
    ray_cpus: RayCpus = 1,
    ray_gpus: RayGpus = 0,
    append: Annotated[
        bool, typer.Option("--append", hidden=True, help="Deprecated: use `ulfine-fast cache append CACHE SOURCE`.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Extract frozen features of images into a cache; a stopped run continues where it was."""
    if append:
        _refuse_settings_of_cache(context)
        print(
            f"warning: `extract --append` is deprecated, use `ulfine-fast cache append {out} {source}`", file=sys.stderr
        )
        append_to_cache(
            cache=out,
            source=source,
            class_names=class_names,
            workers=workers,
            device=device,
            engine=engine,
            ray=ray,
            ray_cpus=ray_cpus,
            ray_gpus=ray_gpus,
            as_json=as_json,
        )
        return
    from ulfine_fast.cache.io.progress import working
    from ulfine_fast.cache.models.options import ModelOptions
    from ulfine_fast.cache.models.prompts import read_prompts
    from ulfine_fast.cache.pipeline.extract import extract as run
    from ulfine_fast.cache.pipeline.views import ViewRecipe
    from ulfine_fast.cache.sources import open_source

    recipe = ViewRecipe(weak=weak, strong=strong, seed=view_seed, weak_scale=(smallest_crop, 1.0))
    templates = None if prompts is None else read_prompts(prompts)
    options = ModelOptions(model, pretrained, precision, features, exact, compiled)
    # The source first: a wrong path should not cost the loading of a model.
    with working("list images"):
        images = open_source(source, class_names_file=class_names)
    print_notes(images)
    with working("load model"):
        encoder = options.load(device)
    summary = run(
        images,
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
        engine=engine_for(options, engine, ray, ray_cpus, ray_gpus),
    )
    print_encoded(summary, as_json, verified=mode == "verify")


def _refuse_settings_of_cache(context: typer.Context) -> None:
    from ulfine_fast.cache.io.errors import InputError

    for name in _SETTINGS_OF_CACHE:
        if is_named(context, name):
            raise InputError(f"--append takes everything from the cache; leave out --{name.replace('_', '-')}")
