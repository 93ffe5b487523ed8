"""`ulfine-fast extract`: images to a cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from ulfine_fast.cache.pipeline.append import AppendSummary
    from ulfine_fast.cache.pipeline.extract import Engine, ExtractSummary


def extract(
    context: typer.Context,
    source: Annotated[
        str, typer.Argument(help="Folder, table, tar or parquet files, URL, hf:NAME, or a torchvision data set.")
    ],
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
    weak: Annotated[int, typer.Option(help="Weak views of each image of train and unlabeled.")] = 1,
    strong: Annotated[int, typer.Option(help="Strong views of each.")] = 1,
    view_seed: Annotated[int, typer.Option(help="Seed that the views are drawn from.")] = 0,
    smallest_crop: Annotated[
        float, typer.Option(help="Smallest share of an image's area that a view shows; LIFT+ wants 0.08.")
    ] = 0.5,
    dtype: Annotated[str, typer.Option(help="Type of stored features: float16, float32 or int8.")] = "float16",
    features: Annotated[
        str, typer.Option(help="projected; pre-projection or last-block also store the model's tokens.")
    ] = "projected",
    batch_size: Annotated[int, typer.Option(help="Images encoded together; a GPU wants more, such as 256.")] = 32,
    shard_size: Annotated[int, typer.Option(help="Rows a shard covers; a stop loses at most one shard.")] = 1024,
    workers: Annotated[
        int | None,
        typer.Option(help="Threads on a processor, reader processes beside a GPU.", show_default="one a core"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16, of the model while it runs.")] = "fp32",
    mode: Annotated[
        str, typer.Option(help="resume continues, overwrite starts anew, verify checks and extracts nothing.")
    ] = "resume",
    max_skipped: Annotated[float, typer.Option(help="Share of images that may be unreadable, 0 to 1.")] = 0.01,
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
    engine: Annotated[str, typer.Option(help="local, or ray: shards on the workers of a cluster.")] = "local",
    ray: Annotated[
        str | None,
        typer.Option(help="Ray's address: auto joins this machine's cluster, local starts one.", show_default="local"),
    ] = None,
    ray_cpus: Annotated[float, typer.Option(help="CPU cores of a worker on Ray.", min=0)] = 1,
    ray_gpus: Annotated[float, typer.Option(help="GPUs of a worker on Ray.", min=0)] = 0,
    append: Annotated[
        bool, typer.Option("--append", help="Add the images and classes that a finished cache lacks.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Extract frozen features of images into a cache; a stopped run continues where it was."""
    on = _engine(engine, ray, ray_cpus, ray_gpus)
    if append:
        _append(context, source, out, class_names, workers, device, on, as_json)
        return
    from ulfine_fast.cache.models.encoder import load_encoder
    from ulfine_fast.cache.models.prompts import DEFAULT_PROMPTS, read_prompts
    from ulfine_fast.cache.pipeline.extract import extract as run
    from ulfine_fast.cache.pipeline.views import ViewRecipe
    from ulfine_fast.cache.sources import open_source

    recipe = ViewRecipe(weak=weak, strong=strong, seed=view_seed, weak_scale=(smallest_crop, 1.0))
    templates = DEFAULT_PROMPTS if prompts is None else read_prompts(prompts)
    # The source first: a wrong path should not cost the loading of a model.
    images = open_source(source, class_names_file=class_names)
    encoder = load_encoder(
        model, pretrained, device=device, precision=precision, features=features, exact=exact, compiled=compiled
    )
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
        engine=on(model, pretrained, precision, features),
    )
    typer.echo(json.dumps(summary.to_dict()) if as_json else _text(summary, mode))


def _engine(engine: str, address: str | None, cpus: float, gpus: float) -> Callable[..., Engine | None]:
    """Arguments of the model -> where its shards are worked on; None for here."""
    from ulfine_fast.cache.io.errors import InputError

    if engine not in ("local", "ray"):
        raise InputError(f"engine must be local or ray, got {engine!r}")
    if engine == "local" and address is None:
        return lambda *_: None
    from ulfine_fast.cache.io.ray_cluster import RayWorkers
    from ulfine_fast.cache.pipeline.on_ray import Loading, on_ray

    return lambda *model: on_ray(Loading(*model), RayWorkers(address or "local", cpus, gpus))


# What an append must have as the cache has it.
_OF_THE_CACHE = (
    *("model", "pretrained", "precision", "features", "prompts", "weak", "strong", "view_seed", "smallest_crop"),
    *("dtype", "batch_size", "shard_size", "mode", "max_skipped", "exact", "compiled"),
)


def _append(
    context: typer.Context,
    source: str,
    out: Path,
    class_names: Path | None,
    workers: int | None,
    device: str,
    on: Callable[..., Engine | None],
    as_json: bool,
) -> None:
    """Adds to the cache with the model and settings that its manifest names."""
    from ulfine_fast.cache.io.errors import InputError
    from ulfine_fast.cache.manifest import Manifest
    from ulfine_fast.cache.models.encoder import load_encoder
    from ulfine_fast.cache.pipeline.append import append, features_of
    from ulfine_fast.cache.sources import open_source

    for name in _OF_THE_CACHE:
        given = context.get_parameter_source(name)
        if given is not None and given.name in ("COMMANDLINE", "ENVIRONMENT"):
            raise InputError(f"--append takes everything from the cache; leave out --{name.replace('_', '-')}")
    manifest = Manifest.read(out)
    images = open_source(source, class_names_file=class_names)
    name, pretrained = manifest.model["name"], manifest.model["pretrained"]
    precision, features = manifest.precision, features_of(manifest)
    encoder = load_encoder(
        name,
        pretrained,
        device=device,
        precision=precision,
        features=features,
        exact=manifest.exact,
        compiled=manifest.compiled,
    )
    added = append(images, encoder, out, workers=workers, engine=on(name, pretrained, precision, features))
    typer.echo(json.dumps(added.to_dict()) if as_json else _added(added))


def _added(summary: AppendSummary) -> str:
    """The summary in a few lines."""
    lines = [_text(summary, "append")]
    lines.append(f"{summary.known} images were there already and stay as they are")
    return "\n".join([*lines, f"{summary.classes} new classes"] if summary.classes else lines)


def _text(summary: ExtractSummary, mode: str) -> str:
    """The summary in a few lines."""
    if mode == "verify":
        return f"{summary.out}: {_shards(summary.shards)} with {summary.images} images intact"
    lines = [f"{summary.out}: {summary.images} images in {_shards(summary.shards)}"]
    if summary.kept:
        lines.append(f"{_shards(summary.kept)} finished before and kept")
    if summary.encoded:
        shares = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in summary.stages.items())
        rate = f"{summary.images_per_second:.1f} images/s"
        lines.append(f"{summary.encoded} images encoded in {summary.seconds:.1f} s ({rate}; {shares})")
    lines += [f"skipped {one['id']}: {one['reason']}" for one in summary.skipped[:10]]
    if len(summary.skipped) > 10:
        lines.append(f"... and {len(summary.skipped) - 10} more; `ulfine-fast inspect {summary.out}` lists them")
    return "\n".join(lines)


def _shards(count: int) -> str:
    return "1 shard" if count == 1 else f"{count} shards"
