"""LIFT's claims over stored features: what the texts, the adjusted logits, the crops and a light hand are worth.

    python -m benchmarks.studies.lift_head --data demo --data fashion_mnist --json lift_head.json

Settings are LIFT+'s as published, nothing is tuned; only learning rate and epochs are varied, since their product says
how far the head goes from its start. Splits, mini-batches and crops of a seed are the same for all, so that differences
are paired. Last, the head is trained through the frozen encoder as well, on the same crops: see
`benchmarks.studies.through_encoder`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.comparison.parts import write_json
from benchmarks.data import FirstOfEachClass, extracted
from benchmarks.options import parse_names, parse_seeds
from benchmarks.studies.through_encoder import both_ways
from benchmarks.tables import print_table
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.home import cache_home
from ulfine_fast.cache.pipeline.five_crops import PLACES
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cli.main import guarded
from ulfine_fast.config import FitConfig
from ulfine_fast.data.splits import draw_split
from ulfine_fast.engine.fit import fit_many
from ulfine_fast.methods.lift_head import lift_head_settings
from ulfine_fast.metrics import classification as metrics
from ulfine_fast.metrics.intervals import mean_interval
from ulfine_fast.runs.run import Run

if TYPE_CHECKING:
    from ulfine_fast.cache.pipeline.views import ViewRecipe
    from ulfine_fast.cache.sources import Source

Row = dict[str, Any]
Floats = NDArray[np.floating[Any]]

CROPS = 4  # cached crops of a training image
STARTS = ("text", "random", "text, cross-entropy")
"""Of the head; the last one with plain cross-entropy in place of adjusted logits."""
SEEN = ("whole", "middle crop", "five crops")
_FIGURES = ("balanced_accuracy", "many_shot", "medium_shot", "few_shot")
_DRIFTS = ("drift_many", "drift_medium", "drift_few")
_TEST_IMAGES = 10**9  # all of them


@dataclass(frozen=True)
class Pace:
    """Learning rate, and epochs of the labelled images."""

    lr: float
    epochs: int

    def __str__(self) -> str:
        return f"{self.lr:g} x {self.epochs}"


@dataclass(frozen=True)
class World:
    """A cache whose training images have crops, and its test images once more, in five crops (5, E, D)."""

    cache: FeatureCache
    test_crops: Floats

    @property
    def test(self) -> NDArray[np.int64]:
        """Rows of the test images."""
        return np.flatnonzero(self.cache.splits == "test")

    @classmethod
    def of(cls, name: str) -> World:
        """One of `SOURCES`, extracted on the first call: four crops of 8% to all of an image."""
        cache = extracted(f"{name.replace('_', '-')}-lift", SOURCES[name], views=_crops)
        return cls(cache, _five_crops(name, cache))


def _crops() -> ViewRecipe:
    from ulfine_fast.cache.pipeline.views import ViewRecipe

    return ViewRecipe(weak=CROPS, strong=0, weak_scale=(0.08, 1.0))


def _demo() -> Source:
    from ulfine_fast.cache.sources import open_source
    from ulfine_fast.demo import unpack_images

    return open_source(unpack_images(cache_home() / "datasets" / "demo"))


def _fashion() -> Source:
    from ulfine_fast.cache.sources import open_source

    return FirstOfEachClass(open_source("fashion_mnist"), {"train": 400, "test": 200})


SOURCES: dict[str, Callable[[], Source]] = {"demo": _demo, "fashion_mnist": _fashion}
"""Images by name: those of `ulfine-fast demo`; 400 training and 200 test images a class of Fashion-MNIST."""


def _five_crops(name: str, cache: FeatureCache) -> Floats:
    """Features of five crops of the test images (5, E, D), in the cache's order; encoded once and kept."""
    assert cache.manifest is not None
    path = cache_home() / "benchmarks" / f"{name}-five-crops-{cache.manifest.model['sha256'][:12]}.npy"
    if not path.exists():
        from ulfine_fast.cache.models.encoder import load_encoder
        from ulfine_fast.runs.predict import encode_images

        source = FirstOfEachClass(SOURCES[name](), {"train": 0, "test": _TEST_IMAGES})
        encoder = load_encoder(cache.manifest.model["name"])
        found = [encode_images(source, encoder, 32, place) for place in range(PLACES)]
        assert all(ids == [cache.ids[row] for row in np.flatnonzero(cache.splits == "test")] for ids, *_ in found)
        np.save(path, np.stack([crop.features for crop in found]))
    kept: Floats = np.load(path, allow_pickle=False)
    return kept


# -- fitting


def random_start(cache: FeatureCache, seed: int) -> FeatureCache:
    """The same cache with random directions in place of its texts."""
    return _started(cache, np.random.default_rng([seed, 0x11F7]).normal(size=(len(cache.class_names), cache.dim)))


def trusted_start(cache: FeatureCache, count: int) -> FeatureCache:
    """The same cache with means of images in place of its texts, to see what better texts are worth.

    Of each class the first `count` training images give their mean. They lose their label, so that nothing trains or
    is judged on them.

    Raises:
        InputError: a class with too few training images.
    """
    train = [np.flatnonzero((cache.splits == "train") & (cache.labels == k)) for k in range(len(cache.class_names))]
    if min(map(len, train)) <= count:
        raise InputError(f"--trusted {count} takes as many images of each class, one has {min(map(len, train))}")
    labels = cache.labels.copy()
    labels[np.concatenate([rows[:count] for rows in train])] = -1
    unit = cache.plain.astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return _started(cache.with_labels(labels), np.stack([unit[rows[:count]].mean(0) for rows in train]))


def _started(cache: FeatureCache, texts: NDArray[Any]) -> FeatureCache:
    """The same cache beside other texts (K, D), of any length."""
    other = copy.copy(cache)
    other.prototypes = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float32)
    other.text_features = other.prototypes[:, None]
    return other


def fewer_views(cache: FeatureCache, count: int) -> FeatureCache:
    """The same images with the first `count` of their crops; nobody knows any more what those show."""
    return FeatureCache.from_arrays(
        cache.plain,
        cache.labels,
        class_names=cache.class_names,
        text_features=cache.text_features,
        weak=cache.views("weak")[:, :count],
        splits=cache.splits.tolist(),
        ids=cache.ids,
        logit_scale=cache.logit_scale,
    )


def config_of(cache: FeatureCache, pace: Pace, seed: int, values: Row) -> FitConfig:
    """LIFT+'s settings at a pace; epochs are counted in the labelled images of that seed's split."""
    draft = FitConfig.from_dict({"seed": seed, **values})
    split = draw_split(cache.labels, cache.splits, cache.class_names, draft)
    own = lift_head_settings(len(split.labeled), len(cache.class_names), epochs=pace.epochs)
    given = {"method": "lift_head", **own, "lr": pace.lr, "eval_every": own["steps"], "seed": seed, **values}
    return FitConfig.from_dict(given)


def fitted(cache: FeatureCache, pace: Pace, seeds: Sequence[int], values: Row) -> list[Run]:
    """A run for each seed."""
    return fit_many(cache, [config_of(cache, pace, seed, values) for seed in seeds], device="cpu", progress=False)


def drift(run: Run, start: Floats) -> Row:
    """1 - cos(W_k, W_k at the start), a mean for each group of classes; None for a group without classes.

    Args:
        run: with a head "linear" (K, D).
        start: unit rows (K, D).
    """
    heads = run.tensors["linear"].numpy()
    moved = 1 - (heads * start).sum(1) / np.linalg.norm(heads, axis=1)  # (K,)
    counts = np.asarray(run.metrics["class_counts"])
    groups = {
        "drift_many": counts > metrics.SHOT_MANY,
        "drift_medium": (counts <= metrics.SHOT_MANY) & (counts >= metrics.SHOT_FEW),
        "drift_few": counts < metrics.SHOT_FEW,
    }
    return {name: float(moved[group].mean()) if group.any() else None for name, group in groups.items()}


# -- what is compared


def starts(world: World, paces: Sequence[Pace], seeds: Sequence[int], values: Row) -> Iterator[Row]:
    """Heads from the texts, from random directions, and from the texts by cross-entropy, at each pace."""
    for pace in paces:
        for start in STARTS:
            own = {**values, "tau": 0.0} if start == STARTS[2] else values
            for seed in seeds:
                cache = random_start(world.cache, seed) if start == "random" else world.cache
                (run,) = fitted(cache, pace, [seed], own)
                assert cache.prototypes is not None
                yield {**_row("starts", pace, start, seed, run.metrics), **drift(run, cache.prototypes)}


def predicted_crops(world: World, paces: Sequence[Pace], seeds: Sequence[int], values: Row) -> Iterator[Row]:
    """Test images as the encoder takes them, cut to the middle, and in five crops whose logits are averaged."""
    plain, labels = world.cache.plain[world.test], world.cache.labels[world.test]
    for pace in paces:
        for seed, run in zip(seeds, fitted(world.cache, pace, seeds, values), strict=True):
            crops = [run.logits(rows) for rows in world.test_crops]
            for name, logits in zip(SEEN, (run.logits(plain), crops[-1], np.mean(crops, axis=0)), strict=True):
                counts = np.asarray(run.metrics["class_counts"], dtype=np.int64)
                yield _row("test crops", pace, name, seed, metrics.classification(logits, labels, counts))


def train_crops(world: World, paces: Sequence[Pace], seeds: Sequence[int], values: Row) -> Iterator[Row]:
    """Training on the whole image alone, with one crop, with all, and with all by the schedule."""
    arms = {f"whole and {count} cropped": count for count in (0, 1, CROPS)}
    for pace in paces:
        for name, count in arms.items():
            cache = fewer_views(world.cache, count)
            for seed, run in zip(seeds, fitted(cache, pace, seeds, {**values, "crop_epochs": 0}), strict=True):
                yield _row("train crops", pace, name, seed, run.metrics)
        for seed, run in zip(seeds, fitted(world.cache, pace, seeds, values), strict=True):
            yield _row("train crops", pace, "by the schedule", seed, run.metrics)


def _row(test: str, pace: Pace | str, arm: str, seed: int, found: Row) -> Row:
    return {"test": test, "pace": str(pace), "arm": arm, "seed": seed, **{name: found[name] for name in _FIGURES}}


def zero_shot(world: World, seeds: Sequence[int], values: Row) -> Iterator[Row]:
    """The texts as they are: where all heads but random ones start."""
    configs = [FitConfig.from_dict({**values, "method": "zero_shot", "seed": seed}) for seed in seeds]
    for seed, run in zip(seeds, fit_many(world.cache, configs, device="cpu", progress=False), strict=True):
        yield _row("zero-shot", "-", "zero-shot", seed, run.metrics)


def measure(world: World, paces: Sequence[Pace], seeds: Sequence[int], values: Row) -> list[Row]:
    """One row for each comparison, pace, arm and seed."""
    compared = (starts, predicted_crops, train_crops)
    rows = [row for compare in compared for row in compare(world, paces, seeds, values)]
    return [*zero_shot(world, seeds, values), *rows]


# -- telling


def table(rows: Sequence[Row], test: str) -> list[list[str]]:
    """A line for each pace and arm of a comparison: means, and what it is above the first arm, paired, in percent."""
    lines, inside = [], [row for row in rows if row["test"] == test]
    for pace, arm in dict.fromkeys((row["pace"], row["arm"]) for row in inside):
        there = [row for row in inside if row["pace"] == pace]
        own = [row for row in there if row["arm"] == arm]
        first = [row for row in there if row["arm"] == there[0]["arm"]]
        gaps = [gap(own, first, name) if arm != there[0]["arm"] else "" for name in ("balanced_accuracy", "few_shot")]
        drifts = [_mean(own, name, 1.0, 3) for name in _DRIFTS if name in own[0]]
        lines.append([pace, arm, *(_mean(own, name) for name in _FIGURES), *gaps, *drifts])
    return lines


def _mean(rows: Sequence[Row], name: str, factor: float = 100.0, digits: int = 1) -> str:
    found = mean_interval(row[name] for row in rows if row[name] is not None)
    return "-" if found is None else f"{factor * found.mean:.{digits}f}"


def gap(rows: Sequence[Row], others: Sequence[Row], name: str) -> str:
    """How far a figure is above another arm's, paired by seed, in percent; "-" where a group has no classes."""
    pairs = [(a[name], b[name]) for a, b in zip(rows, others, strict=True)]
    found = mean_interval(a - b for a, b in pairs if a is not None and b is not None)
    return "-" if found is None else f"{100 * found.mean:+.1f} ±{100 * found.half:.1f}"


def parse_paces(text: str) -> list[Pace]:
    """Read learning rates and epochs such as `0.02x5,0.5x15`.

    Raises:
        InputError: anything else, or none.
    """
    try:
        found = [Pace(float(lr), int(epochs)) for lr, epochs in (part.split("x") for part in text.split(","))]
    except ValueError:
        found = []
    if not found or any(pace.lr <= 0 or pace.epochs < 1 for pace in found):
        raise InputError(f"--paces are learning rates and epochs such as 0.02x5,0.5x15, got {text!r}")
    return found


def lift_head(
    data: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(SOURCES)}; repeatable.")] = None,
    paces: Annotated[str, typer.Option(help="Learning rates and epochs.")] = "0.02x5,0.02x50,0.1x15,0.5x15",
    seeds: Annotated[str, typer.Option(help="Such as 0-4.")] = "0-4",
    n1: Annotated[int, typer.Option(help="Labelled images of the largest class.", min=1)] = 200,
    gamma: Annotated[float, typer.Option(help="Imbalance of the labelled images.", min=1.0)] = 50.0,
    trusted: Annotated[
        int, typer.Option(help="Take texts from so many images of each class; 0 for the texts.", min=0)
    ] = 0,
    encoder: Annotated[
        str, typer.Option(help="Random ViT to train through as well: tiny, ViT-B-32, or none.")
    ] = "tiny",
    as_json: Annotated[Path | None, typer.Option("--json", help="Write all rows to this file.")] = None,
) -> None:
    """Compare starts, test crops and training crops; print means and paired 95% intervals, in percent."""
    names, told, seen = parse_names(",".join(data or ["demo"]), list(SOURCES), "--data"), parse_paces(paces), []
    chosen, values = parse_seeds(seeds), {"n1": n1, "m1": 0, "gamma_l": gamma, "gamma_u": gamma}
    for name in names:
        world = World.of(name)
        if trusted:
            world = replace(world, cache=trusted_start(world.cache, trusted))
        rows = measure(world, told, chosen, values)
        seen += [{"data": name, "trusted": trusted, **row} for row in rows]
        _print(name, rows)
    if encoder != "none":
        seen += list(_through(encoder, chosen))
    if as_json is not None:
        write_json(as_json, seen)


def _print(name: str, rows: Sequence[Row]) -> None:
    titles = ["lr x epochs", "", "all", "many", "medium", "few", "all, gain", "few, gain"]
    for test in dict.fromkeys(row["test"] for row in rows):
        typer.echo(f"\n{name}: {test}")
        drifts = ["drift, many", "medium", "few"] if test == "starts" else []
        print_table([*titles, *drifts], table(rows, test), texts=2)


def _through(encoder: str, seeds: Iterable[int]) -> Iterator[Row]:
    """Rows of `benchmarks.studies.through_encoder`, printed."""
    typer.echo(f"\n{encoder}, random weights: logits after training on cached crops and through the encoder")
    for row in both_ways(encoder, seeds):
        typer.echo(f"seed {row['seed']}: largest difference {row['difference']:.4f}, moved by {row['moved']:.2f}")
        yield {"data": "demo", "test": "through the encoder", **row}


if __name__ == "__main__":
    typer.run(guarded(lift_head))
