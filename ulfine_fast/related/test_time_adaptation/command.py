"""`ulfine-fast adapt`: a run follows a stream of unlabelled images and predicts them as they arrive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def adapt(
    run: Annotated[Path, typer.Argument(help="Run folder that `fit` wrote.")],
    stream: Annotated[Path, typer.Argument(help="Cache folder of the run's encoder; its rows arrive in their order.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Table to write, .csv or .parquet; metrics go to .json beside it.")
    ] = Path("predictions.csv"),
    by: Annotated[
        Literal["cliptta", "tent", "none"], typer.Option(help="Loss to adapt by; none learns nothing.")
    ] = "cliptta",
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
    shuffle: Annotated[
        int | None, typer.Option(help="Seed of a random order; without it rows keep the cache's order.", min=0)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws from the memory.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Adapt a run to a stream of images without labels (CLIPTTA, TENT) and predict them as they arrive."""
    import numpy as np

    from ulfine_fast.cache.store import FeatureCache
    from ulfine_fast.metrics.classification import softmax
    from ulfine_fast.related.test_time_adaptation.adapt import Adaptation
    from ulfine_fast.related.test_time_adaptation.adapt import adapt as follow
    from ulfine_fast.related.test_time_adaptation.metrics import stream_labels, stream_metrics
    from ulfine_fast.runs.predict import Predictions, refuse_output, write_predictions
    from ulfine_fast.runs.run import Run

    settings = Adaptation(
        by=by,
        lr=lr,
        steps=steps,
        batch=batch_size,
        marginal=marginal,
        shots=shots,
        sample=sample,
        open_set=open_set,
        exposure=exposure,
        scale=scale,
        seed=seed,
    )
    refuse_output(out)
    fitted, cache = Run.load(run), FeatureCache.open(stream)
    order = None if shuffle is None else np.random.default_rng(shuffle).permutation(len(cache))
    adapted = follow(fitted, cache, settings, rows=order)
    labels = stream_labels(fitted, cache)[adapted.rows]
    metrics = {"by": by, **stream_metrics(adapted, labels, open_set=open_set)}

    predictions = Predictions(
        ids=[cache.ids[row] for row in adapted.rows],
        probabilities=softmax(adapted.logits / fitted.metrics.get("temperature", 1.0)).astype(np.float32),
        class_names=fitted.class_names,
        skipped=[],
        scores=adapted.scores if open_set else None,
    )
    write_predictions(predictions, out)
    out.with_suffix(".json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    typer.echo(json.dumps(metrics) if as_json else _sentence(metrics, out))


def _sentence(metrics: dict[str, Any], out: Path) -> str:
    """The most important metrics in a line."""
    parts = [f"{metrics['images']} images: {out}", f"{metrics['classes_predicted']} classes predicted at the end"]
    names = ("accuracy", "accuracy_before", "auroc", "fpr95")
    parts += [f"{name.replace('_', ' ')} {100 * metrics[name]:.1f}" for name in names if name in metrics]
    return ", ".join(parts)
