"""Training through the encoder beside training on its cached features: what the paper's claims C1 to C4 compare.

FixMatch with one loss, one split, the same mini-batches and test images, through Lite0's image tower at a small
size: full fine-tuning (`fft`), norm layers only (`lft`), frozen tower (`lp`, a control of the cached one) and all
weights from random ones (`scratch`); and on features cached from the same tower at the same size. The learning rate of
each is chosen on validation images, over all seeds.

    python -m benchmarks.studies.end_to_end --seeds 0,1 --lrs 0.003,0.01,0.03 --json end_to_end.json

Every run is kept as one JSON file and not repeated, so the command can be interrupted, and two commands with different
`--methods` may share a folder; the last one prints all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from benchmarks.data import MODEL, VIEWS, FirstOfEachClass
from benchmarks.studies.backbone import WAYS, Model, Rows, World, cache_of, new_model, train
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.files import make_folder, write_atomically
from ulfine_fast.cache.io.home import cache_home
from ulfine_fast.cache.models.encoder import Encoder, load_encoder
from ulfine_fast.cache.models.prompts import DEFAULT_PROMPTS, fill_prompts
from ulfine_fast.cache.sources import ListedSource, open_source
from ulfine_fast.cache.store import FeatureCache
from ulfine_fast.cache.text import encode_classes
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
Row = dict[str, Any]

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
    """What all runs of a table share.

    Attributes:
        size: side of the images in pixels.
        steps: mini-batch steps. scratch_steps: those from random weights, twice as many where 0.
        batch: images in a mini-batch, labelled and unlabelled alike.
        n1, m1: labelled and unlabelled images of the largest class. gamma: imbalance of both.
        val: share of the labelled images that choose the learning rate and the temperature.
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
        """Eight hex digits that tell these settings from others."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]

    def config(self, method: str, lr: float, seed: int) -> FitConfig:
        """A trial; split, losses and their weights are the same for all methods.

        Raises:
            InputError: a value outside its range.
        """
        own = CACHED.get(method, {"method": "lightweight", "adapter": "none"})
        steps = (self.scratch_steps or 2 * self.steps) if method == "scratch" else self.steps
        counts = {"n1": self.n1, "m1": self.m1, "gamma_l": self.gamma, "gamma_u": self.gamma, "val_fraction": self.val}
        batch = {"batch_labeled": self.batch, "batch_unlabeled": self.batch, "eval_every": steps}
        return FitConfig.from_dict({**own, **counts, **batch, "steps": steps, "lr": lr, "seed": seed})


def fashion_world(settings: Settings) -> World:
    """Fashion-MNIST, as many images a class as the settings need, and Lite0's image tower."""
    limits = {"train": settings.n1 + settings.m1, "test": settings.test}
    source = FirstOfEachClass(open_source("fashion_mnist"), limits)
    return world_of(source, load_encoder(MODEL, device="cpu"), settings.size)


def world_of(source: ListedSource, encoder: Encoder, size: int) -> World:
    """A source's images, kept in memory, seen through an encoder's image tower at another size.

    The evaluation view is the encoder's own preprocessing at that size.
    """
    rows, names = source.rows, list(source.class_names)
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


def figures(read: Callable[[Rows], Logits], labels: Rows, split: Split, config: FitConfig, classes: int) -> Row:
    """What a fitted model is judged by, one forward pass over each part of the split.

    Args:
        read: row numbers (n,) to logits (n, K) of plain views.
        labels: of all rows, those of unlabelled ones included (N,).
        split: validation gives the temperature of `ece` and the figures to choose by; test is read once.
        config: its threshold says which pseudo-labels train.
        classes: K.

    Returns:
        Test figures, validation figures, and pseudo-labels of the unlabelled images: those `kept`, and all guesses.
    """
    counts = labeled_counts(labels, split, classes)
    val, test = read(split.val), read(split.test)
    temperature = fit_temperature(val, labels[split.val])
    on_val = metrics.classification(val, labels[split.val], counts, temperature)
    on_test = metrics.classification(test, labels[split.test], counts, temperature)
    return {
        **{name: on_test.get(name) for name in ("accuracy", "balanced_accuracy")},
        "tail_accuracy": on_test.get("few"),
        "ece": on_test.get("ece_temperature_scaled"),
        "val_balanced_accuracy": on_val.get("balanced_accuracy"),
        "temperature": temperature,
        **pseudo_labels(read(split.unlabeled), labels[split.unlabeled], config.threshold),
    }


def pseudo_labels(logits: Logits, labels: Rows, threshold: float) -> Row:
    """How many pseudo-labels of unlabelled images (n, K) with hidden labels (n,) are false, and how sure those are.

    Returns:
        unlabeled: n. kept, false_kept: pseudo-labels over the threshold, and the false ones among them, with
        pseudo_label_precision and confidence_on_false; None without any. false_guesses, confidence_on_false_guesses:
        the same over all n, since a model that is sure of nothing keeps nothing.
    """
    probabilities = metrics.softmax(logits)  # (n, K)
    sure, guess = probabilities.max(axis=1), probabilities.argmax(axis=1)
    kept, false = sure >= threshold, guess != labels
    return {
        "unlabeled": len(labels),
        "kept": int(kept.sum()),
        "false_kept": int((kept & false).sum()),
        "pseudo_label_precision": _mean(~false[kept]),
        "confidence_on_false": _mean(sure[kept & false]),
        "false_guesses": int(false.sum()),
        "confidence_on_false_guesses": _mean(sure[false]),
    }


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None


def run_through(world: World, way: str, config: FitConfig) -> Row:
    """Train one of `WAYS` and judge it; `seconds` are those of training, views included."""
    split = draw_split(world.labels, world.splits, world.class_names, config)
    model: Model = new_model(way, world, split, config)
    seconds = train(model, world, split, config)
    judged = figures(lambda rows: model.logits(world, rows), world.labels, split, config, len(world.class_names))
    weights = sum(weight.numel() for weight in model.trained())
    return {**judged, "seconds": seconds, "extraction_seconds": 0.0, "trained_weights": weights}


@dataclass(frozen=True)
class Cached:
    """A split's features in memory: the cache, the split in its rows, and the seconds they took."""

    cache: FeatureCache
    split: Split
    seconds: float


def run_cached(cached: Cached, config: FitConfig) -> Row:
    """Fit heads on cached features and judge them as `run_through` does."""
    started = time.perf_counter()
    run = fit(cached.cache, config, split=cached.split, device="cpu", progress=False)
    seconds = time.perf_counter() - started
    features = cached.cache
    judged = figures(
        lambda rows: run.logits(features.plain[rows]), features.labels, cached.split, config, len(features.class_names)
    )
    weights = sum(tensor.numel() for tensor in run.tensors.values())
    return {**judged, "seconds": seconds, "extraction_seconds": cached.seconds, "trained_weights": weights}


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
        settings: shared by all runs; runs of other settings in the folder are left alone.
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
        return Cached(*cache_of(world(), split, VIEWS))

    rows = []
    for seed, method, lr in cells(methods, rates, seeds):
        path = folder / f"{method}-lr{lr:g}-seed{seed}-{settings.digest}.json"
        if not path.exists():
            config = settings.config(method, lr, seed)
            found = run_cached(cached(seed), config) if method in CACHED else run_through(world(), method, config)
            keep(path, {**labelled(settings, method, lr, config), **found})
        rows.append(json.loads(path.read_text(encoding="utf-8")))
    return rows


def cells(methods: Iterable[str], rates: Sequence[float], seeds: Iterable[int]) -> list[tuple[int, str, float]]:
    """Seed, method and learning rate of every run; 0 for the one method without steps."""
    methods = list(methods)
    return [
        (seed, method, lr)
        for seed in seeds
        for method in methods
        for lr in ([0.0] if method == "cached-zero-shot" else rates)
    ]


def labelled(settings: Settings, method: str, lr: float, config: FitConfig) -> Row:
    """The part of a row that says what was run."""
    cell = {"data": "fashion_mnist", "shape": config.shape, "method": method, "lr": lr, "seed": config.seed}
    counts = {"n1": config.n1, "m1": config.m1, "gamma_l": config.gamma_l, "gamma_u": config.gamma_u}
    return {**cell, **counts, "tuned": True, "settings": {**asdict(settings), "steps": config.steps}}


def keep(path: Path, row: Row) -> None:
    """Write a run and say so."""
    write_atomically(path, (json.dumps(row, indent=1, allow_nan=False) + "\n").encode())
    print(f"{path.name}: {row['balanced_accuracy']:.1%} balanced, {row['seconds']:.1f} s", flush=True)


# -- choosing and showing


def choose(rows: Sequence[Row]) -> list[Row]:
    """The rows with `chosen`: whether the learning rate has its method's best validation balanced accuracy.

    The mean over the seeds decides, since one seed has a few dozen validation images; of equal ones the smaller rate.
    """
    scores: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        scores[row["method"]][row["lr"]].append(row["val_balanced_accuracy"] or 0.0)
    best = {
        method: max(sorted(by_rate), key=lambda lr: float(np.mean(by_rate[lr]))) for method, by_rate in scores.items()
    }
    return [{**row, "chosen": row["lr"] == best[row["method"]]} for row in rows]


def table(rows: Sequence[Row], *, chosen: bool = True) -> str:
    """Means over seeds as a Markdown table, a line per method, or per method and learning rate.

    Args:
        rows: of :func:`choose`.
        chosen: show the chosen learning rates only. A rate at the end of those tried is marked with an asterisk.
    """
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        if row["chosen"] or not chosen:
            groups.setdefault((row["method"], row["lr"]), []).append(row)
    lines = ["| method | " + " | ".join(_COLUMNS).replace("_", " ") + " |", "|---" * (len(_COLUMNS) + 1) + "|"]
    for (method, lr), group in groups.items():
        rates = {row["lr"] for row in rows if row["method"] == method}
        edge = "*" if len(rates) > 1 and lr in (min(rates), max(rates)) else ""
        cells = [_cell(group, name, form) + (edge if name == "lr" else "") for name, form in _COLUMNS.items()]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(group: Sequence[Row], name: str, form: str) -> str:
    """The mean of the seeds that have the figure."""
    values = [row[name] for row in group if row[name] is not None]
    return form.format(float(np.mean(values))) if values else "-"


# -- the command


def numbers(text: str, kind: Callable[[str], Any]) -> list[Any]:
    """Numbers separated by commas, ranges of whole ones such as 0-4 among them, each once.

    Raises:
        InputError: none, or a part that is no number of the kind.
    """
    found: list[Any] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        low, _, high = part.partition("-")
        try:
            # the minus of 3e-3 makes no range
            whole = low.isdecimal() and high.isdecimal()
            found += range(int(low), int(high) + 1) if whole else [kind(part)]
        except ValueError:
            raise InputError(f"expected numbers such as 0,1 or 0-4, got {text!r}") from None
    if not found:
        raise InputError(f"expected at least one number, got {text!r}")
    return list(dict.fromkeys(found))


def named_methods(text: str) -> list[str]:
    """Methods separated by commas.

    Raises:
        InputError: one that is not among `METHODS`.
    """
    found = [part.strip() for part in text.split(",") if part.strip()]
    for name in found:
        if name not in METHODS:
            raise InputError(f"unknown method {name!r}; the methods are {', '.join(METHODS)}")
    return found or list(METHODS)


def parser() -> argparse.ArgumentParser:
    """The command line; an option for every field of `Settings`."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.studies.end_to_end", description=__doc__.split("\n")[0])
    made.add_argument("--methods", default=",".join(METHODS), help="of %(default)s")
    made.add_argument("--lrs", default="0.003,0.01,0.03", help="peak learning rates to choose from (%(default)s)")
    made.add_argument("--seeds", default="0,1", help="of split, weights and mini-batches (%(default)s)")
    made.add_argument("--out", type=Path, help="folder of the runs; default: in the cache home")
    made.add_argument("--json", type=Path, help="write the list of all rows here")
    made.add_argument("--all", action="store_true", help="show every learning rate, not the chosen ones only")
    for name, default in asdict(Settings()).items():
        made.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help="%(default)s")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, print the table, write the rows."""
    given = parser().parse_args(arguments)
    settings = Settings(**{name: getattr(given, name) for name in asdict(Settings())})
    torch.set_num_threads(settings.threads)
    folder = given.out or cache_home() / "benchmarks" / "end-to-end"
    try:
        methods, rates, seeds = named_methods(given.methods), numbers(given.lrs, float), numbers(given.seeds, int)
        found = measure(lambda: fashion_world(settings), settings, methods, rates, seeds, folder)
        rows = choose(found)
        if given.json:
            write_atomically(given.json, (json.dumps(rows, indent=1, allow_nan=False) + "\n").encode())
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    print(table(rows, chosen=not given.all))


if __name__ == "__main__":
    main()
