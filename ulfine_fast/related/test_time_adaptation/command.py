"""`ulfine-fast adapt`: a run follows a stream of unlabelled images and predicts them as they arrive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ulfine_fast.cache.store import FeatureCache
    from ulfine_fast.related.test_time_adaptation.adapt import Adapted
    from ulfine_fast.runs.run import Run


def adapt(
    run: Annotated[Path, typer.Argument(help="Run folder that `fit` wrote.")],
    stream: Annotated[Path, typer.Argument(help="Cache folder of the run's encoder; its rows arrive in their order.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Table to write, .csv or .parquet; figures go to .json beside it.")
    ] = Path("predictions.csv"),
    by: Annotated[str, typer.Option(help="cliptta, tent, or none.")] = "cliptta",
    lr: Annotated[float, typer.Option(help="Adam's learning rate.")] = 1e-4,
    steps: Annotated[int, typer.Option(help="Steps on each batch.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Images that arrive together.")] = 128,
    marginal: Annotated[
        float, typer.Option(help="Weight of the marginal regulariser, for streams of even classes; published: 1.")
    ] = 0.0,
    shots: Annotated[int, typer.Option(help="Images of each class in the memory; 0 for no memory.")] = 4,
    sample: Annotated[int, typer.Option(help="Images drawn from the memory in a step.")] = 40,
    open_set: Annotated[bool, typer.Option("--open-set", help="Images of unknown classes are among them.")] = False,
    exposure: Annotated[float, typer.Option(help="Weight of the outlier contrastive exposure.")] = 1.0,
    scale: Annotated[float | None, typer.Option(help="Factor on cosines in the losses.")] = None,
    shuffle: Annotated[int | None, typer.Option(help="Seed of a random order, in place of the cache's.", min=0)] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn from the memory.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Adapt a run to a stream of images without labels (CLIPTTA, TENT) and predict them as they arrive."""
    from ulfine_fast.cache.store import FeatureCache
    from ulfine_fast.related.test_time_adaptation import adapt as adapting
    from ulfine_fast.runs.run import Run

    settings = adapting.Adaptation(by, lr, steps, batch_size, marginal, shots, sample, open_set, exposure, scale, seed)
    fitted, cache = Run.load(run), FeatureCache.open(stream)
    found = adapting.adapt(fitted, cache, settings, rows=_order(len(cache), shuffle))
    told = {"by": by, **adapting.figures(found, adapting.stream_labels(fitted, cache)[found.rows], open_set=open_set)}
    _write(fitted, cache, found, out, open_set)
    out.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    typer.echo(json.dumps(told) if as_json else _sentence(told, out))


def _order(n: int, seed: int | None) -> Any:
    """A permutation drawn by the seed, None for the rows as they stand."""
    import numpy as np

    return None if seed is None else np.random.default_rng(seed).permutation(n)


def _write(run: Run, cache: FeatureCache, found: Adapted, out: Path, open_set: bool) -> None:
    """The table, in `predict`'s form."""
    import numpy as np

    from ulfine_fast.metrics.classification import softmax
    from ulfine_fast.runs.predict import Predictions, write_predictions

    probabilities = softmax(found.logits / run.metrics.get("temperature", 1.0)).astype(np.float32)
    ids = [cache.ids[row] for row in found.rows]
    scores = found.scores if open_set else None
    write_predictions(Predictions(ids, probabilities, run.class_names, [], scores), out)


def _sentence(told: dict[str, Any], out: Path) -> str:
    """The figures that matter in a line."""
    parts = [f"{told['images']} images: {out}", f"{told['classes_predicted']} classes predicted at the end"]
    names = ("accuracy", "accuracy_before", "auroc", "fpr95")
    parts += [f"{name.replace('_', ' ')} {100 * told[name]:.1f}" for name in names if name in told]
    return ", ".join(parts)
