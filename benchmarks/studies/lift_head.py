"""LIFT's claims over stored features: what texts, adjusted logits, crops and few small steps are worth.

    python -m benchmarks.studies.lift_head --data demo --data fashion_mnist --json lift_head.json

Settings are LIFT+'s as published, nothing is tuned; only learning rate and epochs are varied, since their product says
how far the head goes from its start. Splits, mini-batches and crops of a seed are the same for all, so that differences
are paired. Last, the head is trained through the frozen encoder as well, on the same crops: see
`benchmarks.studies.through_encoder`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.data import FirstOfEachClass, changed_cache, demo_source, extracted, source_of, unit_rows
from benchmarks.options import (
    GammaOption,
    JsonOption,
    N1Option,
    SeedsOption,
    parse_names,
    parse_seeds,
    split_options,
    trial_configs,
)
from benchmarks.results import Row, gap_text, grouped, mean_text, print_table, where, write_rows
from benchmarks.studies.through_encoder import both_ways
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.home import cache_home
from ulfine_fast.cache.pipeline.five_crops import NUM_CROPS
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.config import FitConfig
from ulfine_fast.data.splits import draw_split
from ulfine_fast.engine.fit import fit_many
from ulfine_fast.methods.lift_head import lift_head_settings
from ulfine_fast.metrics import classification as metrics
from ulfine_fast.runs.run import Run

if TYPE_CHECKING:
    from ulfine_fast.cache.sources import Source

Floats = NDArray[np.floating[Any]]

CROPS = 4  # cached crops of a training image
STARTS = ("text", "random", "text, cross-entropy")
"""Of the head; the last one with plain cross-entropy instead of adjusted logits."""
TEST_VIEWS = ("whole", "middle crop", "five crops")
_METRICS = ("balanced_accuracy", "many_shot", "medium_shot", "few_shot")
_DRIFTS = ("drift_many", "drift_medium", "drift_few")


@dataclass(frozen=True)
class Pace:
    """How far a head goes from its start.

    Attributes:
        lr: learning rate.
        epochs: of the labelled images.
    """

    lr: float
    epochs: int

    def __str__(self) -> str:
        return f"{self.lr:g} x {self.epochs}"


@dataclass(frozen=True)
class World:
    """Images with crops.

    Attributes:
        cache: features; training images have crops.
        test_crops: features of five crops of the test images (5, E, D), in the cache's order.
    """

    cache: FeatureCache
    test_crops: Floats

    @property
    def test(self) -> NDArray[np.int64]:
        """Rows of the test images."""
        return np.flatnonzero(self.cache.splits == "test")

    @classmethod
    def open(cls, name: str) -> World:
        """One of `SOURCES`, extracted on the first call: four crops of 8% to all of an image."""
        views = {"weak": CROPS, "strong": 0, "weak_scale": (0.08, 1.0)}
        cache = extracted(f"{name.replace('_', '-')}-lift", SOURCES[name], views=views)
        return cls(cache, _five_crops(name, cache))


SOURCES: dict[str, Callable[[], Source]] = {
    "demo": demo_source,
    "fashion_mnist": lambda: FirstOfEachClass(source_of("fashion_mnist"), {"train": 400, "test": 200}),
}
"""Images by name: those of `ulfine-fast demo`; 400 training and 200 test images a class of Fashion-MNIST."""


def _five_crops(name: str, cache: FeatureCache) -> Floats:
    """Features of five crops of the test images (5, E, D), in the cache's order; encoded once and kept."""
    assert cache.manifest is not None
    path = cache_home() / "benchmarks" / f"{name}-five-crops-{cache.manifest.model['sha256'][:12]}.npy"
    if not path.exists():
        # these take seconds to import, and kept features need none of them
        from ulfine_fast.cache.models.encoder import load_encoder
        from ulfine_fast.runs.predict import encode_images

        test_images = FirstOfEachClass(SOURCES[name](), {"train": 0})
        encoder = load_encoder(cache.manifest.model["name"])
        crops = [encode_images(test_images, encoder, 32, crop) for crop in range(NUM_CROPS)]
        test_ids = [cache.ids[row] for row in np.flatnonzero(cache.splits == "test")]
        assert all(ids == test_ids for ids, *_ in crops)
        np.save(path, np.stack([crop.features for crop in crops]))
    features: Floats = np.load(path, allow_pickle=False)
    return features


# -- fitting


def random_start(cache: FeatureCache, seed: int) -> FeatureCache:
    """The same cache with random directions for its texts."""
    return _with_texts(cache, np.random.default_rng([seed, 0x11F7]).normal(size=(len(cache.class_names), cache.dim)))


def trusted_start(cache: FeatureCache, count: int) -> FeatureCache:
    """The same cache with means of images for its texts, to see what better texts are worth.

    Of each class the first `count` training images give their mean. They lose their label, so that nothing trains or
    is evaluated on them.

    Raises:
        InputError: a class with too few training images.
    """
    train = [np.flatnonzero((cache.splits == "train") & (cache.labels == k)) for k in range(len(cache.class_names))]
    fewest = min(len(rows) for rows in train)
    if fewest <= count:
        raise InputError(f"--trusted {count} takes as many images of each class, one has {fewest}")
    labels = cache.labels.copy()
    labels[np.concatenate([rows[:count] for rows in train])] = -1
    unit = unit_rows(cache.plain)
    return _with_texts(cache.with_labels(labels), np.stack([unit[rows[:count]].mean(0) for rows in train]))


def _with_texts(cache: FeatureCache, texts: NDArray[Any]) -> FeatureCache:
    """The same cache beside other texts (K, D), of any length."""
    other = copy.copy(cache)
    other.prototypes = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float32)
    other.text_features = other.prototypes[:, None]
    return other


def config_of(cache: FeatureCache, pace: Pace, seed: int, options: Row) -> FitConfig:
    """LIFT+'s settings at a pace; epochs are counted in the labelled images of that seed's split."""
    draft = FitConfig.from_dict({"method": "lift_head", "seed": seed, **options})
    split = draw_split(cache.labels, cache.splits, cache.class_names, draft)
    published = lift_head_settings(len(split.labeled), len(cache.class_names), epochs=pace.epochs)
    return FitConfig.from_dict(
        {
            "method": "lift_head",
            **published,
            "lr": pace.lr,
            "eval_every": published["steps"],
            "seed": seed,
            **options,
        }
    )


def fitted(cache: FeatureCache, pace: Pace, seeds: Sequence[int], options: Row) -> list[Run]:
    """A run for each seed."""
    return fit_many(cache, [config_of(cache, pace, seed, options) for seed in seeds], device="cpu", progress=False)


def drift(run: Run, start: Floats) -> Row:
    """1 - cos(W_k, W_k at the start), a mean for each group of classes; None for a group without classes.

    Args:
        run: with a head "linear" (K, D).
        start: unit rows (K, D).
    """
    heads = run.tensors["linear"].numpy()
    distances = 1 - (heads * start).sum(1) / np.linalg.norm(heads, axis=1)  # (K,)
    counts = np.asarray(run.metrics["class_counts"])
    groups = {
        "drift_many": counts > metrics.SHOT_MANY,
        "drift_medium": (counts <= metrics.SHOT_MANY) & (counts >= metrics.SHOT_FEW),
        "drift_few": counts < metrics.SHOT_FEW,
    }
    return {name: float(distances[group].mean()) if group.any() else None for name, group in groups.items()}


# -- what is compared


def starts(world: World, paces: Sequence[Pace], seeds: Sequence[int], options: Row) -> Iterator[Row]:
    """Heads from the texts, from random directions, and from the texts by cross-entropy, at each pace."""
    for pace in paces:
        for start in STARTS:
            start_options = {**options, "tau": 0.0} if start == "text, cross-entropy" else options
            for seed in seeds:
                cache = random_start(world.cache, seed) if start == "random" else world.cache
                [run] = fitted(cache, pace, [seed], start_options)
                assert cache.prototypes is not None
                yield {**_row("starts", pace, start, seed, run.metrics), **drift(run, cache.prototypes)}


def predicted_crops(world: World, paces: Sequence[Pace], seeds: Sequence[int], options: Row) -> Iterator[Row]:
    """Test images as the encoder takes them, cropped to the middle, and in five crops whose logits are averaged."""
    plain = world.cache.plain[world.test]
    labels = world.cache.labels[world.test]
    for pace in paces:
        for seed, run in zip(seeds, fitted(world.cache, pace, seeds, options), strict=True):
            crops = [run.logits(rows) for rows in world.test_crops]
            counts = np.asarray(run.metrics["class_counts"], dtype=np.int64)
            for view, logits in zip(TEST_VIEWS, (run.logits(plain), crops[-1], np.mean(crops, axis=0)), strict=True):
                yield _row("test crops", pace, view, seed, metrics.classification(logits, labels, counts))


def train_crops(world: World, paces: Sequence[Pace], seeds: Sequence[int], options: Row) -> Iterator[Row]:
    """Training on the whole image alone, with one crop, with all, and with all by the schedule."""
    for pace in paces:
        for count in (0, 1, CROPS):
            # in memory, without the areas of the crops, which the schedule reads
            cache = changed_cache(world.cache, weak=world.cache.views("weak")[:, :count])
            for seed, run in zip(seeds, fitted(cache, pace, seeds, {**options, "crop_epochs": 0}), strict=True):
                yield _row("train crops", pace, f"whole and {count} cropped", seed, run.metrics)
        for seed, run in zip(seeds, fitted(world.cache, pace, seeds, options), strict=True):
            yield _row("train crops", pace, "by the schedule", seed, run.metrics)


def zero_shot(world: World, seeds: Sequence[int], options: Row) -> Iterator[Row]:
    """The texts as they are: where all heads but random ones start."""
    runs = fit_many(world.cache, trial_configs(["zero_shot"], seeds, options), device="cpu", progress=False)
    for seed, run in zip(seeds, runs, strict=True):
        yield _row("zero-shot", "-", "zero-shot", seed, run.metrics)


def _row(test: str, pace: Pace | str, arm: str, seed: int, values: Row) -> Row:
    return {"test": test, "pace": str(pace), "arm": arm, "seed": seed, **{name: values[name] for name in _METRICS}}


def measure(world: World, paces: Sequence[Pace], seeds: Sequence[int], options: Row) -> list[Row]:
    """One row for each comparison, pace, arm and seed."""
    rows = list(zero_shot(world, seeds, options))
    for compare in (starts, predicted_crops, train_crops):
        rows += compare(world, paces, seeds, options)
    return rows


# -- showing


def table(rows: Sequence[Row], test: str) -> list[list[str]]:
    """A line for each pace and arm of a comparison: means, and paired gaps to the first arm, in percent."""
    lines = []
    for (pace,), of_pace in grouped(where(rows, test=test), "pace").items():
        first = where(of_pace, arm=of_pace[0]["arm"])
        for (arm,), own in grouped(of_pace, "arm").items():
            lines.append(
                [
                    pace,
                    arm,
                    *(mean_text(own, name) for name in _METRICS),
                    *(gap_text(own, first, name) for name in ("balanced_accuracy", "few_shot")),
                    *(mean_text(own, name, factor=1.0, digits=3) for name in _DRIFTS if name in own[0]),
                ]
            )
    return lines


def parse_paces(text: str) -> list[Pace]:
    """Read learning rates and epochs such as `0.02x5,0.5x15`.

    Raises:
        InputError: anything else, or none.
    """
    try:
        paces = [Pace(float(lr), int(epochs)) for lr, epochs in (part.split("x") for part in text.split(","))]
    except ValueError:
        paces = []
    if not paces or any(pace.lr <= 0 or pace.epochs < 1 for pace in paces):
        raise InputError(f"--paces are learning rates and epochs such as 0.02x5,0.5x15, got {text!r}")
    return paces


def lift_head(
    data: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(SOURCES)}; repeatable.")] = None,
    paces: Annotated[str, typer.Option(help="Learning rates and epochs.")] = "0.02x5,0.02x50,0.1x15,0.5x15",
    seeds: SeedsOption = "0-4",
    n1: N1Option = 200,
    gamma: GammaOption = 50.0,
    trusted: Annotated[
        int, typer.Option(help="Take texts from so many images of each class; 0 for the texts.", min=0)
    ] = 0,
    encoder: Annotated[
        str, typer.Option(help="Random ViT to train through as well: tiny, ViT-B-32, or none.")
    ] = "tiny",
    as_json: JsonOption = None,
) -> None:
    """Compare starts, test crops and training crops; print means and paired 95% intervals, in percent."""
    names = parse_names(",".join(data or ["demo"]), SOURCES, "--data")
    chosen_paces = parse_paces(paces)
    seed_numbers = parse_seeds(seeds)
    results: list[Row] = []
    for name in names:
        world = World.open(name)
        if trusted:
            world = replace(world, cache=trusted_start(world.cache, trusted))
        rows = measure(world, chosen_paces, seed_numbers, split_options(n1, 0, gamma))
        results += [{"data": name, "trusted": trusted, **row} for row in rows]
        titles = ["lr x epochs", "", "all", "many", "medium", "few", "all, gain", "few, gain"]
        for test in dict.fromkeys(row["test"] for row in rows):
            typer.echo(f"\n{name}: {test}")
            drifts = ["drift, many", "medium", "few"] if test == "starts" else []
            print_table([*titles, *drifts], table(rows, test), texts=2)
    if encoder != "none":
        typer.echo(f"\n{encoder}, random weights: logits after training on cached crops and through the encoder")
        for row in both_ways(encoder, seed_numbers):
            typer.echo(f"seed {row['seed']}: largest difference {row['difference']:.4f}, moved by {row['moved']:.2f}")
            results.append({"data": "demo", "test": "through the encoder", **row})
    write_rows(as_json, results)


if __name__ == "__main__":
    typer.run(guarded(lift_head))
