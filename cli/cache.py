"""`ulfine-fast cache`: caches to one cache, to plain arrays, and from plain arrays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ulfine_fast.cache.models.encoder import Encoder
    from ulfine_fast.cache.pipeline.assemble import Assembled

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


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

    done = run(caches, out, prefix=prefix)
    typer.echo(json.dumps(done.to_dict()) if as_json else _text(done))


def export(
    cache: Annotated[Path, typer.Argument(help="Folder of a finished cache.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.", show_default=False)],
    to: Annotated[
        str, typer.Option(help="clip-retrieval (img_emb, text_emb, metadata) or npy (one array each).")
    ] = "clip-retrieval",
    rows_per_file: Annotated[int, typer.Option(help="Rows of a file of clip-retrieval at most.")] = 1_000_000,
    as_json: AsJson = False,
) -> None:
    """Write the features of a cache as plain arrays."""
    from ulfine_fast.cache.interop.export import export as run

    done = run(cache, out, to=to, rows_per_file=rows_per_file)
    said = f"{done.out}: {done.rows} rows, {done.files} files written"
    said += f", {done.kept} finished before and kept" if done.kept else ""
    typer.echo(json.dumps(done.to_dict()) if as_json else said)


def import_(
    where: Annotated[
        Path,
        typer.Argument(
            help="clip-retrieval's folder, a folder of .npy files, an .npz or .npy file.", show_default=False
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
    class_names: Annotated[
        Path | None,
        typer.Option(help="Text file, one class name a line, in label order.", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file, one prompt a line, {} for the class name.", show_default=False),
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column of clip-retrieval's metadata.", show_default="label")
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Column that tells its rows apart.", show_default="id, image_path or key")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Split of rows without one: train, unlabeled, val, test.", show_default="by label"),
    ] = None,
    logit_scale: Annotated[
        float | None,
        typer.Option(help="The model's factor on cosine similarities.", show_default="the model's, or 100"),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type of stored features: float16 or float32.", show_default="that of the files")
    ] = None,
    shard_size: Annotated[int, typer.Option(help="Rows of a shard; a stop loses at most one shard.")] = 1024,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps; for the class names.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Make a cache of features that another program computed."""
    from ulfine_fast.cache.interop.found import read_array
    from ulfine_fast.cache.interop.import_features import import_features, open_features
    from ulfine_fast.cache.models.prompts import read_prompts

    names = None if class_names is None else _lines(class_names)
    # The files first: a wrong path should not cost the loading of a model.
    found = open_features(where, class_names=names, label_column=label_column, id_column=id_column, split=split)
    done = import_features(
        found,
        out,
        # With texts at hand the model is but a name.
        encoder=_encoder(model, pretrained, device) if model and text_features is None else None,
        text_features=None if text_features is None else read_array(text_features),
        model=model,
        prompts=None if prompts is None else read_prompts(prompts),
        logit_scale=logit_scale,
        dtype=dtype,
        shard_size=shard_size,
    )
    also = f"\n{done.normalised} rows had another length than 1 and got it" if done.normalised else ""
    typer.echo(json.dumps(done.to_dict()) if as_json else _text(done) + also)


def _encoder(model: str, pretrained: str | None, device: str) -> Encoder:
    from ulfine_fast.cache.models.encoder import load_encoder

    return load_encoder(model, pretrained, device=device)


def _lines(class_names: Path) -> Sequence[str]:
    """Class names in label order; how many there are is for the file to say."""
    from ulfine_fast.cache.models.prompts import count_names, read_class_names

    return read_class_names(class_names, [str(label) for label in range(count_names(class_names))])


def _text(done: Assembled) -> str:
    shards = "1 shard" if done.shards == 1 else f"{done.shards} shards"
    kept = f", {done.kept} of them finished before and kept" if done.kept else ""
    return f"{done.out}: {done.images} images of {done.classes} classes in {shards}{kept}"
