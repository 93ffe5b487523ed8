"""Training through the encoder beside training on its cached features: what the paper's claims C1 to C4 compare.

    python -m benchmarks.studies.end_to_end --seeds 0,1 --lrs 0.003,0.01,0.03 --json end_to_end.json

FixMatch with one loss, one split, the same mini-batches and test images, through Lite0's image tower at a small
size: full fine-tuning (`fft`), norm layers only (`lft`), frozen tower (`lp`, a control of the cached one) and all
weights from random ones (`scratch`); and on features cached from the same tower at the same size. The learning rate of
each is chosen on validation images, over all seeds. Every run is kept as one JSON file and not repeated, so the command
can be interrupted, and two commands with different `--methods` may use one folder; the last one prints all.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import open_clip
import torch
import typer
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from benchmarks.data import MODEL, VIEWS, FirstOfEachClass
from benchmarks.options import JsonOption, parse_names, parse_numbers, parse_seeds, split_options
from benchmarks.results import Row, grouped, print_table, write_json, write_rows
from benchmarks.studies.backbone import WAYS, Model, Rows, World, cache_of, new_model, train
from ulfine_fast.cache.io.files import make_folder
from ulfine_fast.cache.io.home import cache_home
from ulfine_fast.cache.models.encoder import Encoder, load_encoder
from ulfine_fast.cache.models.prompts import DEFAULT_PROMPTS, fill_prompts
from ulfine_fast.cache.pipeline.views import ViewRecipe
from ulfine_fast.cache.sources import ListedSource, open_source
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cache.text import encode_classes
from ulfine_fast.cli.main import guarded
from ulfine_fast.config import FitConfig
from ulfine_fast.data.splits import Split, draw_split, labeled_counts
from ulfine_fast.engine.fit import fit
from ulfine_fast.metrics import classification as metrics
from ulfine_fast.metrics.calibration import fit_temperature

CACHED: dict[str, dict[str, Any]] = {
    "cached-zero-shot": {"method": "zero_shot"},
    "cached-probe": {"method": "linear_probe"},
    "cached-lp": {"method": "lightweight", "adapter": "none"},
    "cached-lft": {"method": "lightweight"},
    "cached-ulfine": {"method": "ulfine"},
}
"""Contenders on cached features: text alone, labelled images alone, FixMatch on the head, with an adapter, ULFine."""

METHODS = (*WAYS, *CACHED)

Logits = NDArray[np.float32]

_COLUMNS = {
    "lr": "{:g}",
    "accuracy": "{:.1%}",
    "balanced_accuracy": "{:.1%}",
    "tail_accuracy": "{:.1%}",
    "ece": "{:.3f}",
    "kept": "{:.0f}",
    "false_kept": "{:.0f}",
    "confidence_on_false": "{:.2f}",
    "pseudo_label_precision": "{:.2f}",
    "false_guesses": "{:.0f}",
    "confidence_on_false_guesses": "{:.2f}",
    "seconds": "{:.1f}",
    "extraction_seconds": "{:.1f}",
}


@dataclass(frozen=True)
class Settings:
    """What is the same for all runs of a table.

    Attributes:
        size: side of the images in pixels.
        steps: mini-batch steps.
        scratch_steps: mini-batch steps from random weights; 0 for twice as many.
        batch: images in a mini-batch, labelled and unlabelled alike.
        n1: labelled images of the largest class.
        m1: unlabelled images of the largest class.
        gamma: imbalance of both.
        val: fraction of the labelled images that choose the learning rate and the temperature.
        test: test images of each class.
        threads: of torch, for seconds that can be compared.
    """

    size: int = 48
    steps: int = 200
    scratch_steps: int = 0
    batch: int = 16
    n1: int = 150
    m1: int = 400
    gamma: float = 100.0
    val: float = 0.2
    test: int = 150
    threads: int = 1

    @property
    def digest(self) -> str:
        """Eight hex digits, others for other settings."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]

    def config(self, method: str, lr: float, seed: int) -> FitConfig:
        """A trial; split, losses and their weights are the same for all methods.

        Raises:
            InputError: a value outside its range.
        """
        steps = (self.scratch_steps or 2 * self.steps) if method == "scratch" else self.steps
        return FitConfig.from_dict(
            {
                **CACHED.get(method, {"method": "lightweight", "adapter": "none"}),
                **split_options(self.n1, self.m1, self.gamma),
                "val_fraction": self.val,
                "batch_labeled": self.batch,
                "batch_unlabeled": self.batch,
                "eval_every": steps,
                "steps": steps,
                "lr": lr,
                "seed": seed,
            }
        )


def fashion_world(settings: Settings) -> World:
    """Fashion-MNIST, as many images a class as the settings need, and Lite0's image tower."""
    limits = {"train": settings.n1 + settings.m1, "test": settings.test}
    source = FirstOfEachClass(open_source("fashion_mnist"), limits)
    return world_of(source, load_encoder(MODEL, device="cpu"), settings.size)


def world_of(source: ListedSource, encoder: Encoder, size: int) -> World:
    """A source's images, kept in memory, for an encoder's image tower at another size.

    The evaluation view is the encoder's own preprocessing at that size.
    """
    rows = source.rows
    names = list(source.class_names)
    text = encode_classes(encoder, fill_prompts(names, DEFAULT_PROMPTS))
    plain = image_transform_v2(
        PreprocessCfg(**{**open_clip.get_model_preprocess_cfg(encoder.model), "size": size}), is_train=False
    )

    @cache
    def image(row: int) -> Image.Image:
        return source.read(rows[row])

    return World(
        image=image,
        ids=[row.id for row in rows],
        labels=np.array([row.label for row in rows], dtype=np.int64),
        splits=np.array([row.split for row in rows]),
        class_names=names,
        text=text.features,
        prototypes=text.prototypes,
        tower=encoder.model.visual,
        plain=plain,
        mean=encoder.mean,
        std=encoder.std,
        size=size,
    )


# -- one run


def evaluate(logits_of: Callable[[Rows], Logits], labels: Rows, split: Split, config: FitConfig, classes: int) -> Row:
    """Metrics of a fitted model, by one forward pass over each part of the split.

    Args:
        logits_of: row numbers (n,) to logits (n, K) of plain views.
        labels: of all rows, those of unlabelled ones included (N,).
        split: validation gives the temperature of `ece` and the accuracy to choose by; test is read once.
        config: its threshold says which pseudo-labels train.
        classes: K.

    Returns:
        Metrics on test and validation, and of the unlabelled images' pseudo-labels: those `kept`, and all guesses.
    """
    counts = labeled_counts(labels, split, classes)
    val = logits_of(split.val)
    test = logits_of(split.test)
    temperature = fit_temperature(val, labels[split.val])
    # of methods without pseudo-labels all that FixMatch would train on
    threshold = getattr(config, "threshold", FitConfig(method="lightweight").threshold)
    on_val = metrics.classification(val, labels[split.val], counts, temperature)
    on_test = metrics.classification(test, labels[split.test], counts, temperature)
    return {
        **{name: on_test.get(name) for name in ("accuracy", "balanced_accuracy")},
        "tail_accuracy": on_test.get("few"),
        "ece": on_test.get("ece_temperature_scaled"),
        "val_balanced_accuracy": on_val.get("balanced_accuracy"),
        "temperature": temperature,
        **pseudo_labels(logits_of(split.unlabeled), labels[split.unlabeled], threshold),
    }


def pseudo_labels(logits: Logits, labels: Rows, threshold: float) -> Row:
    """How many pseudo-labels of unlabelled images (n, K) with hidden labels (n,) are false, and how sure those are.

    Returns:
        unlabeled: n. kept, false_kept: pseudo-labels over the threshold, and the false ones among them, with
        pseudo_label_precision and confidence_on_false; None without any. false_guesses, confidence_on_false_guesses:
        the same over all n, since a model that is sure of nothing keeps nothing.
    """
    probabilities = metrics.softmax(logits)  # (n, K)
    confidence = probabilities.max(axis=1)
    kept = confidence >= threshold
    false = probabilities.argmax(axis=1) != labels
    return {
        "unlabeled": len(labels),
        "kept": int(kept.sum()),
        "false_kept": int((kept & false).sum()),
        "pseudo_label_precision": _mean(~false[kept]),
        "confidence_on_false": _mean(confidence[kept & false]),
        "false_guesses": int(false.sum()),
        "confidence_on_false_guesses": _mean(confidence[false]),
    }


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None


def run_through(world: World, way: str, config: FitConfig) -> Row:
    """Train one of `WAYS` and evaluate it; `seconds` are those of training, views included."""
    split = draw_split(world.labels, world.splits, world.class_names, config)
    model: Model = new_model(way, world, split, config)
    seconds = train(model, world, split, config)
    return {
        **evaluate(lambda rows: model.logits(world, rows), world.labels, split, config, len(world.class_names)),
        "seconds": seconds,
        "extraction_seconds": 0.0,
        "trained_weights": sum(weight.numel() for weight in model.trained()),
    }


@dataclass(frozen=True)
class Cached:
    """A split's features in memory.

    Attributes:
        cache: features of the split's images.
        split: in the cache's rows.
        seconds: that they took.
    """

    cache: FeatureCache
    split: Split
    seconds: float


def run_cached(cached: Cached, config: FitConfig) -> Row:
    """Fit heads on cached features and evaluate them as `run_through` does."""
    started = time.perf_counter()
    run = fit(cached.cache, config, split=cached.split, device="cpu", progress=False)
    seconds = time.perf_counter() - started
    plain = cached.cache.plain
    classes = len(cached.cache.class_names)
    return {
        **evaluate(lambda rows: run.logits(plain[rows]), cached.cache.labels, cached.split, config, classes),
        "seconds": seconds,
        "extraction_seconds": cached.seconds,
        "trained_weights": sum(tensor.numel() for tensor in run.tensors.values()),
    }


# -- all runs


def measure(
    open_world: Callable[[], World],
    settings: Settings,
    methods: Sequence[str],
    rates: Sequence[float],
    seeds: Sequence[int],
    folder: Path,
) -> list[Row]:
    """Every run that the folder lacks, seed by seed; then all of them, in the order asked for.

    Args:
        open_world: called once, and not at all where nothing is left to run.
        settings: shared by all runs; runs of other settings in the folder are not touched.
        methods: of `METHODS`.
        rates: learning rates; a method that does not train has none.
        seeds: of split, weights and mini-batches.
        folder: one JSON file a run.
    """
    make_folder(folder)
    world = lru_cache(maxsize=1)(open_world)

    @lru_cache(maxsize=1)
    def cached(seed: int) -> Cached:
        # which images a seed gives does not depend on the method
        config = settings.config("cached-probe", rates[0], seed)
        split = draw_split(world().labels, world().splits, world().class_names, config)
        return Cached(*cache_of(world(), split, ViewRecipe(**VIEWS)))

    rows = []
    for seed, method, lr in planned_runs(methods, rates, seeds):
        path = folder / f"{method}-lr{lr:g}-seed{seed}-{settings.digest}.json"
        if not path.exists():
            config = settings.config(method, lr, seed)
            results = run_cached(cached(seed), config) if method in CACHED else run_through(world(), method, config)
            row = {
                "data": "fashion_mnist",
                "shape": config.shape,
                "method": method,
                "lr": lr,
                "seed": seed,
                **split_options(settings.n1, settings.m1, settings.gamma),
                "tuned": True,
                "settings": {**asdict(settings), "steps": config.steps},
                **results,
            }
            write_json(path, row)
            typer.echo(f"{path.name}: {row['balanced_accuracy']:.1%} balanced, {row['seconds']:.1f} s")
        rows.append(json.loads(path.read_text(encoding="utf-8")))
    return rows


def planned_runs(methods: Iterable[str], rates: Sequence[float], seeds: Iterable[int]) -> list[tuple[int, str, float]]:
    """Seed, method and learning rate of every run; 0 for the one method without steps."""
    methods = list(methods)
    return [
        (seed, method, lr)
        for seed in seeds
        for method in methods
        for lr in ([0.0] if method == "cached-zero-shot" else rates)
    ]


# -- choosing and showing


def choose(rows: Sequence[Row]) -> list[Row]:
    """The rows with `chosen`: whether the learning rate has its method's best validation balanced accuracy.

    The mean over the seeds decides, since one seed has a few dozen validation images; of equal ones the smaller rate.
    """
    scores: dict[str, dict[float, float]] = {}
    for (method, lr), own in sorted(grouped(rows, "method", "lr").items()):
        score = float(np.mean([row["val_balanced_accuracy"] or 0.0 for row in own]))
        scores.setdefault(method, {})[lr] = score
    best = {method: max(by_rate, key=by_rate.__getitem__) for method, by_rate in scores.items()}
    return [{**row, "chosen": row["lr"] == best[row["method"]]} for row in rows]


def table(rows: Sequence[Row], *, chosen: bool = True) -> list[list[str]]:
    """Means over seeds, a line per method, or per method and learning rate.

    Args:
        rows: of :func:`choose`.
        chosen: show the chosen learning rates only. A rate at the end of those tried is marked with an asterisk.
    """
    lines = []
    for (method, lr), own in grouped((row for row in rows if row["chosen"] or not chosen), "method", "lr").items():
        rates = {row["lr"] for row in rows if row["method"] == method}
        is_at_the_end = len(rates) > 1 and lr in (min(rates), max(rates))
        cells = {}
        for name, form in _COLUMNS.items():
            values = [row[name] for row in own if row[name] is not None]
            cells[name] = form.format(float(np.mean(values))) if values else "-"
        cells["lr"] += "*" if is_at_the_end else ""
        lines.append([method, *cells.values()])
    return lines


def end_to_end(
    methods: Annotated[str, typer.Option(help=f"Of {', '.join(METHODS)}.")] = ",".join(METHODS),
    lrs: Annotated[str, typer.Option(help="Peak learning rates to choose from.")] = "0.003,0.01,0.03",
    seeds: Annotated[str, typer.Option(help="Seeds of split, weights and mini-batches.")] = "0,1",
    out: Annotated[Path | None, typer.Option(help="Folder of the runs.", show_default="in the cache home")] = None,
    as_json: JsonOption = None,
    show_all: Annotated[
        bool, typer.Option("--all", help="Show every learning rate, not only the chosen ones.")
    ] = False,
    size: Annotated[int, typer.Option(help="Side of the images in pixels.")] = Settings.size,
    steps: Annotated[int, typer.Option(help="Mini-batch steps.")] = Settings.steps,
    scratch_steps: Annotated[
        int, typer.Option(help="Mini-batch steps from random weights; 0 for twice as many.")
    ] = Settings.scratch_steps,
    batch: Annotated[int, typer.Option(help="Images in a mini-batch, of each kind.")] = Settings.batch,
    n1: Annotated[int, typer.Option(help="Labelled images of the largest class.")] = Settings.n1,
    m1: Annotated[int, typer.Option(help="Unlabelled images of the largest class.")] = Settings.m1,
    gamma: Annotated[float, typer.Option(help="Imbalance of both.")] = Settings.gamma,
    val: Annotated[float, typer.Option(help="Fraction of the labelled images for validation.")] = Settings.val,
    test: Annotated[int, typer.Option(help="Test images of each class.")] = Settings.test,
    threads: Annotated[int, typer.Option(help="Threads of torch.", min=1)] = Settings.threads,
) -> None:
    """Run what is missing, print the table, write the rows."""
    settings = Settings(
        size=size,
        steps=steps,
        scratch_steps=scratch_steps,
        batch=batch,
        n1=n1,
        m1=m1,
        gamma=gamma,
        val=val,
        test=test,
        threads=threads,
    )
    torch.set_num_threads(threads)
    rows = choose(
        measure(
            lambda: fashion_world(settings),
            settings,
            parse_names(methods, METHODS, "methods"),
            parse_numbers(lrs, "learning rates", 0),
            parse_seeds(seeds),
            out or cache_home() / "benchmarks" / "end-to-end",
        )
    )
    write_rows(as_json, rows)
    print_table(["method", *(name.replace("_", " ") for name in _COLUMNS)], table(rows, chosen=not show_all))


if __name__ == "__main__":
    typer.run(guarded(end_to_end))
