"""`ulfine-fast cache`: a cache grows, caches become one, and features come from and go to plain arrays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from ulfine_fast.cache.io.terminal import printable
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
    print_copied,
    print_encoded,
    print_notes,
)


def describe(
    cache: Annotated[Path, typer.Argument(help="Folder of a finished cache.", show_default=False)],
    descriptions: Annotated[
        Path,
        typer.Option(
            help="JSON of class name to sentences, or a table with the columns class and sentence.", show_default=False
        ),
    ],
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Add sentences about classes to a finished cache, with the text encoder alone.

    ulfine_plus reads them where held-out labels say that they help.
    """
    from ulfine_fast.cache.descriptions import describe as run
    from ulfine_fast.cache.descriptions import read_sentences
    from ulfine_fast.cache.io.progress import working
    from ulfine_fast.cache.manifest import Manifest
    from ulfine_fast.cache.models.options import ModelOptions

    # the file first: a wrong name should not cost the loading of a model
    manifest = Manifest.read(cache)
    sentences = read_sentences(descriptions, manifest.class_names)
    with working("load model"):
        encoder = ModelOptions.of_manifest(manifest).load(device)
    with working("encode sentences"):
        made = run(cache, encoder, sentences)
    missing = [name for name in manifest.class_names if name not in sentences]
    if as_json:
        counts = {"sentences": len(made.sentences), "classes": len(sentences), "missing": missing}
        typer.echo(json.dumps({"cache": str(cache), **counts}))
        return
    typer.echo(f"{cache}: {len(made.sentences)} sentences about {len(sentences)} classes")
    if missing:
        shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        typer.echo(printable(f"no sentence, so their prompts alone: {shown}"))


def append(
    cache: Annotated[Path, typer.Argument(help="Folder of a finished cache.", show_default=False)],
    source: SourceName,
    class_names: ClassNames = None,
    workers: Workers = None,
    device: Device = "auto",
    engine: EngineName = "local",
    ray: RayAddress = None,
    ray_cpus: RayCpus = 1,
    ray_gpus: RayGpus = 0,
    as_json: AsJson = False,
) -> None:
    """Add the images and classes of a source that a cache lacks; model and settings are those of the cache."""
    from ulfine_fast.cache.io.progress import working
    from ulfine_fast.cache.manifest import Manifest
    from ulfine_fast.cache.models.options import ModelOptions
    from ulfine_fast.cache.pipeline.append import append as run
    from ulfine_fast.cache.sources import open_source

    options = ModelOptions.of_manifest(Manifest.read(cache))
    # The source first: a wrong path should not cost the loading of a model.
    with working("list images"):
        images = open_source(source, class_names_file=class_names)
    print_notes(images)
    with working("load model"):
        encoder = options.load(device)
    summary = run(
        images,
        encoder,
        cache,
        workers=workers,
        engine=engine_for(options, engine, ray, ray_cpus, ray_gpus),
    )
    print_encoded(summary, as_json, appended=True)


def merge(
    caches: Annotated[list[Path], typer.Argument(help="Folders of finished caches, at least two.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new cache.", show_default=False)],
    prefix: Annotated[
        bool, typer.Option("--prefix", help="Put each cache's folder name before its ids, where they share some.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make one cache of several that were extracted alike; classes are united by name."""
    from ulfine_fast.cache.pipeline.merge import merge as run

    print_copied(run(caches, out, prefix=prefix), as_json)


def export(
    cache: Annotated[Path, typer.Argument(help="Folder of a finished cache.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.", show_default=False)],
    to: Annotated[
        Literal["clip-retrieval", "npy", "parquet", "lance"],
        typer.Option(help="img_emb, text_emb and metadata; one array each; one table with a 2-d map, in two formats."),
    ] = "clip-retrieval",
    rows_per_file: Annotated[int, typer.Option(help="Rows of a file of clip-retrieval at most.")] = 1_000_000,
    as_json: AsJson = False,
) -> None:
    """Write the features of a cache as plain arrays."""
    from ulfine_fast.cache.interop.export import export as run

    summary = run(cache, out, to=to, rows_per_file=rows_per_file)
    kept = f", {summary.kept} finished before and kept" if summary.kept else ""
    text = f"{summary.out}: {summary.rows} rows, {summary.files} files written{kept}"
    typer.echo(json.dumps(summary.to_dict()) if as_json else text)


def import_(
    where: Annotated[
        Path,
        typer.Argument(
            help="clip-retrieval's folder; .npy files, .npz, parquet, Lance, or a saved data set of Hugging Face.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the cache.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(help="The model that made the features; it encodes the class names.", show_default=False),
    ] = None,
    pretrained: Annotated[str | None, typer.Option(help="Its tag or checkpoint file.", show_default=False)] = None,
    text_features: Annotated[
        Path | None,
        typer.Option(help="Features of the classes, .npy (K, P, D) or (K, D); no model is loaded.", show_default=False),
    ] = None,
    class_names: ClassNames = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file, one prompt a line, {} for the class name.", show_default=False),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(help="Column of a table's features.", show_default="the only one of lists of floats"),
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column of the labels in a table.", show_default="label")
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Column of the rows' ids.", show_default="id, image_path or key")
    ] = None,
    split: Annotated[
        Literal["train", "unlabeled", "val", "test"] | None,
        typer.Option(help="Split of rows without one.", show_default="by label"),
    ] = None,
    logit_scale: Annotated[
        float | None,
        typer.Option(help="The model's factor on cosine similarities.", show_default="the model's, or 100"),
    ] = None,
    dtype: Annotated[
        Literal["float16", "float32"] | None,
        typer.Option(help="Type of stored features.", show_default="that of the files"),
    ] = None,
    shard_size: Annotated[int, typer.Option(help="Rows of a shard; a stop loses at most one shard.")] = 1024,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps; for the class names.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Make a cache of features that another program computed."""
    from ulfine_fast.cache.interop.external_features import read_array
    from ulfine_fast.cache.interop.import_features import import_features, open_features
    from ulfine_fast.cache.io.progress import working
    from ulfine_fast.cache.models.options import ModelOptions
    from ulfine_fast.cache.models.prompts import read_class_names_alone, read_prompts

    # The files first: a wrong path should not cost the loading of a model.
    features = open_features(
        where,
        class_names=None if class_names is None else read_class_names_alone(class_names),
        column=column,
        label_column=label_column,
        id_column=id_column,
        split=split,
    )
    encoder = None
    if model and text_features is None:  # with text features the model is only a name
        with working("load model"):
            encoder = ModelOptions(model, pretrained).load(device)
    summary = import_features(
        features,
        out,
        encoder=encoder,
        text_features=None if text_features is None else read_array(text_features),
        model=model,
        prompts=None if prompts is None else read_prompts(prompts),
        logit_scale=logit_scale,
        dtype=dtype,
        shard_size=shard_size,
    )
    print_copied(summary, as_json)
