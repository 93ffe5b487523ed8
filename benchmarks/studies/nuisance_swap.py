"""Features whose nuisance component comes from another image: what training on them is worth under a shift.

    python -m benchmarks.studies.nuisance_swap --json nuisance_swap.json

Demo images, plain or with an attribute (red, inverted, rotated, blurred). In training and validation most images of
a class share its attribute, drawn by the seed; test images come in both forms. A probe is trained on
x' = x + (x_other - x) B B', where B spans the nuisance, estimated from prompts, from groups of training images, or
from pairs of unlabelled images in both forms. The rank of B is chosen on validation, by the mean of the accuracies of
images with their class's usual and unusual form; mini-batches and exchanges of a seed are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from scipy.special import softmax

from benchmarks.comparison.parts import write_json
from benchmarks.data import MODEL, _named, demo, extracted
from benchmarks.options import parse_seeds
from benchmarks.studies.adapt import Corrupted, _none
from benchmarks.tables import print_table
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.cache.io.home import cache_home
from ulfine_fast.cache.models.prompts import readable
from ulfine_fast.cli.main import guarded
from ulfine_fast.demo import unpack_images
from ulfine_fast.metrics.intervals import mean_interval

if TYPE_CHECKING:
    from ulfine_fast.cache.sources import Row as ImageRow
    from ulfine_fast.cache.sources import Source

_SCALE, _RATE, _MOMENTUM, _BATCH = 10.0, 0.05, 0.9, 256
_WITHIN = ("attribute", "classes")
_APART, _VALIDATION = 20, 50  # images of each class in both forms, without labels; and those that choose the rank

Row = dict[str, Any]
Rows = NDArray[Any]
Change = Callable[[Rows, Rows], Rows]  # features (B, D), rows that give (B,) -> features (B, D)

ATTRIBUTES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "red": lambda image: ImageOps.colorize(image.convert("L"), "black", "red"),
    "inverted": lambda image: ImageOps.invert(image.convert("RGB")),
    "rotated": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(1.5)),
}
# without and with the attribute, {} being the class; written once, before any of their figures was seen
PROMPTS = {
    "red": [("a photo of a {}.", "a photo of a red {}."), ("a {}", "a red {}"), ("a {}", "a {} in red")],
    "inverted": [
        ("a photo of a {}.", "a photo negative of a {}."),
        ("a black image of a {}", "a white image of a {}"),
        ("a {}", "an inverted image of a {}"),
    ],
    "rotated": [
        ("a photo of a {}.", "a rotated photo of a {}."),
        ("an upright {}", "a {} lying on its side"),
        ("a {}", "a sideways {}"),
    ],
    "blurred": [
        ("a photo of a {}.", "a blurry photo of a {}."),
        ("a sharp image of a {}", "a blurred image of a {}"),
        ("a {}", "a {} out of focus"),
    ],
}


class Changed(Corrupted):
    """A source whose images all have an attribute; ids, labels and splits are the source's."""

    def read(self, row: ImageRow) -> Image.Image:
        """The image of `row` with the attribute."""
        return ATTRIBUTES[self._corruption](self._source.read(row))

    def describe(self) -> dict[str, Any]:
        """The source's description, and the attribute."""
        return {**self._source.describe(), "attribute": self._corruption}


@dataclass(frozen=True)
class Shift:
    """Images in two forms, and the form in which each is seen.

    Attributes:
        forms: (N, 2, D) features, plain and with the attribute.
        labels: (N,).
        seen: (N,) 0 or 1, the form in training and validation.
        usual: (K,) the form that most images of a class have.
        train: rows to learn from.
        val: rows the rank is chosen on.
        apart: rows that are known in both forms and have no label.
        test: rows to judge on, in both forms.
    """

    forms: Rows
    labels: Rows
    seen: Rows
    usual: Rows
    train: Rows
    val: Rows
    apart: Rows
    test: Rows

    def of(self, rows: Rows) -> Rows:
        """Features (n, D) of rows in the form they are seen in."""
        return self.forms[rows, self.seen[rows]]


def drawn(forms: Rows, labels: Rows, splits: Rows, share: float, seed: int) -> Shift:
    """Draw each class's usual form, and for each image, with probability `share`, that form.

    Args:
        forms: (N, 2, D).
        labels: (N,).
        splits: (N,) train or test.
        share: of images in their class's usual form.
        seed: of all draws.
    """
    random, classes = np.random.default_rng([seed, 0x5A9]), int(labels.max()) + 1
    usual = random.permutation(np.arange(classes) % 2)
    seen = np.where(random.random(len(labels)) < share, usual[labels], 1 - usual[labels])
    theirs = [random.permutation(np.flatnonzero((splits == "train") & (labels == k))) for k in range(classes)]
    apart, val, train = (
        np.sort(np.concatenate([rows[cut] for rows in theirs]))
        for cut in (slice(_APART), slice(_APART, _APART + _VALIDATION), slice(_APART + _VALIDATION, None))
    )
    return Shift(forms, labels, seen, usual, train, val, apart, np.flatnonzero(splits == "test"))


def principal(differences: Rows, rank: int) -> Rows:
    """An orthonormal basis (D, rank) of the directions in which differences (m, D), not centred, are largest."""
    basis: Rows = np.linalg.svd(differences, full_matrices=False)[2][:rank].T
    return basis


def swapped(rows: Rows, givers: Rows, basis: Rows, sign: float = 1.0) -> Rows:
    """Features (B, D) whose component in the span of an orthonormal basis (D, r) is that of other rows `givers` (B,).

    With `sign` -1 the difference is subtracted where it should be added.
    """
    own = rows @ basis  # (B, r)
    changed: Rows = rows + sign * (own[givers] - own) @ basis.T
    return changed


def without(rows: Rows, basis: Rows) -> Rows:
    """Features (..., D) less their component in the span of an orthonormal basis (D, r)."""
    left: Rows = rows - rows @ basis @ basis.T
    return left


def group_differences(shift: Shift) -> Rows:
    """Of each class, the mean of training images with the attribute less that of those without: at most (K, D)."""
    means = _group_means(shift)
    return (means[:, 1] - means[:, 0])[np.isfinite(means).all((1, 2))]


def class_differences(shift: Shift) -> Rows:
    """Class means of training images, both forms counted the same, less their mean: (K, D)."""
    means = np.nanmean(_group_means(shift), axis=1)
    centred: Rows = means - means.mean(0)
    return centred


def _group_means(shift: Shift) -> Rows:
    """Mean training features (K, 2, D) by class and form; NaN for a form that a class was never seen in."""
    features, labels, seen = shift.of(shift.train), shift.labels[shift.train], shift.seen[shift.train]
    means = np.full((len(shift.usual), *shift.forms.shape[1:]), np.nan, dtype=shift.forms.dtype)
    for k, form in np.ndindex(means.shape[:2]):
        if (own := (labels == k) & (seen == form)).any():
            means[k, form] = features[own].mean(0)
    return means


def probe(features: Rows, labels: Rows, change: Change, chances: Rows | None, steps: int, seed: int) -> Rows:
    """A linear classifier (K, D + 1) by softmax regression on centred features, with momentum, from zero.

    Args:
        features: (N, D).
        labels: (N,).
        change: what is done to each mini-batch.
        chances: (N,) with which rows are drawn, evenly by default.
        steps: mini-batches.
        seed: of mini-batches and of who gives to whom; the same for all contenders.

    Returns:
        Weights, and in the last column what they make of the centre, with the sign of a bias.
    """
    random, centre = np.random.default_rng([seed, 0x9B0]), features.mean(0)
    ready = _SCALE * (features - centre)
    weights = np.zeros((int(labels.max()) + 1, features.shape[1]), dtype=features.dtype)
    speed = np.zeros_like(weights)
    for _ in range(steps):
        picked, givers = random.choice(len(ready), _BATCH, p=chances), random.permutation(_BATCH)
        speed = _MOMENTUM * speed - _RATE * _gradient(weights, change(ready[picked], givers), labels[picked])
        weights += speed
    return np.column_stack([_SCALE * weights, -_SCALE * weights @ centre])


def _gradient(weights: Rows, rows: Rows, labels: Rows) -> Rows:
    """Of the mean cross-entropy of softmax(rows weights'), (K, D)."""
    errors = softmax(rows @ weights.T, axis=1)  # (B, K)
    errors[np.arange(len(labels)), labels] -= 1
    gradient: Rows = errors.T @ rows / len(rows)
    return gradient


def accuracies(weights: Rows, shift: Shift, forms: Rows) -> Row:
    """Shares of right predictions, apart for images in their class's usual and unusual form.

    Args:
        weights: (K, D + 1).
        shift: labels, forms seen, and rows.
        forms: (N, 2, D) features to predict from.
    """
    right = (forms @ weights[:, :-1].T + weights[:, -1]).argmax(2) == shift.labels[:, None]  # (N, 2)
    usual = np.arange(2) == shift.usual[shift.labels][:, None]  # (N, 2)
    test, chosen = np.zeros_like(right), np.zeros_like(right)
    test[shift.test], chosen[shift.val, shift.seen[shift.val]] = True, True
    return {
        "accuracy": float(right[test].mean()),
        "usual": float(right[test & usual].mean()),
        "unusual": float(right[test & ~usual].mean()),
        "validation": float((right[chosen & usual].mean() + right[chosen & ~usual].mean()) / 2),
    }


def share_within(differences: Rows, basis: Rows) -> float:
    """Which share of the squared length of differences (m, D) lies in the span of an orthonormal basis (D, r)."""
    return float(((differences @ basis) ** 2).sum() / (differences**2).sum())


def estimates(shift: Shift, words: Rows, most: int) -> dict[str, Rows]:
    """What the subspaces are spanned by, by name.

    Args:
        shift: images.
        words: (m, D) differences of texts with and without the attribute.
        most: rows of the random subspace, which is the same for all ranks up to it.
    """
    return {
        "prompts": words,
        "groups": group_differences(shift),
        "pairs": shift.forms[shift.apart, 1] - shift.forms[shift.apart, 0],
        "random": np.random.default_rng(0xD1CE).normal(size=(most, shift.forms.shape[2])).astype(shift.forms.dtype),
        "classes": class_differences(shift),
    }


def measure(shift: Shift, words: Rows, ranks: Sequence[int], steps: int, seed: int) -> list[Row]:
    """One row for each contender and rank; `chosen` is the rank that validation prefers, the smallest among equals."""
    rows = [
        {"contender": name, "rank": 0, "chosen": True, **accuracies(weights, shift, shift.forms)}
        for name, weights in _without_subspace(shift, steps, seed)
    ]
    for source, differences in estimates(shift, words, max(ranks)).items():
        bases = [principal(differences, rank) for rank in ranks]
        found = [_in_subspace(shift, source, basis, steps, seed) for basis in bases]
        for same in zip(*found, strict=True):
            best = max(range(len(ranks)), key=lambda i: same[i]["validation"])
            rows += [{**row, "chosen": i == best} for i, row in enumerate(same)]
    return rows


def _without_subspace(shift: Shift, steps: int, seed: int) -> Iterator[tuple[str, Rows]]:
    """Plain training; batches with as many images of each class and form; and forms that tell nothing of classes."""
    features, labels, seen = shift.of(shift.train), shift.labels[shift.train], shift.seen[shift.train]
    groups = 2 * labels + seen
    chances = 1 / np.bincount(groups)[groups]
    yield "plain", probe(features, labels, _same, None, steps, seed)
    yield "groups drawn evenly", probe(features, labels, _same, chances / chances.sum(), steps, seed)
    even = np.random.default_rng([seed, 0xE7E]).integers(0, 2, len(labels))
    yield "uncorrelated training", probe(shift.forms[shift.train, even], labels, _same, None, steps, seed)


def _same(rows: Rows, givers: Rows) -> Rows:
    return rows


def _in_subspace(shift: Shift, source: str, basis: Rows, steps: int, seed: int) -> list[Row]:
    """Swapped, removed, and, where the directions are right, swapped with the wrong sign."""
    features, labels = shift.of(shift.train), shift.labels[shift.train]
    about = {
        "rank": basis.shape[1],
        "attribute_within": share_within(shift.forms[shift.test, 1] - shift.forms[shift.test, 0], basis),
        "classes_within": share_within(class_differences(shift), basis),
    }
    rows = []
    for name, sign in [("swap", 1.0), ("swap, opposite sign", -1.0)][: 1 + (source == "groups")]:
        weights = probe(features, labels, partial(swapped, basis=basis, sign=sign), None, steps, seed)
        rows.append({"contender": f"{name}: {source}", **about, **accuracies(weights, shift, shift.forms)})
    weights = probe(without(features, basis), labels, _same, None, steps, seed)
    left = without(shift.forms, basis)
    return [*rows, {"contender": f"removed: {source}", **about, **accuracies(weights, shift, left)}]


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each attribute and contender: means over seeds, and gaps paired by seed, in percent.

    Args:
        rows: one for each attribute, contender and seed.
    """
    lines = []
    for attribute, contender in dict.fromkeys((row["attribute"], row["contender"]) for row in rows):
        there = [row for row in rows if row["attribute"] == attribute]
        own, plain = _of(there, contender), _of(there, "plain")
        removed = _of(there, contender.replace("swap", "removed"))
        cells = [_mean(own, "accuracy")]
        cells += [_gap(own, other, "accuracy") for other in (plain, removed, _of(there, "groups drawn evenly"))]
        cells += [_mean(own, "unusual"), _gap(own, plain, "unusual"), _mean(own, "usual")]
        ranks = ",".join(str(row["rank"]) for row in own) if own[0]["rank"] else ""
        lines.append([attribute, contender, ranks, *cells, *(_mean(own, f"{name}_within") for name in _WITHIN)])
    return lines


def _of(rows: Sequence[Row], contender: str) -> list[Row]:
    return [row for row in rows if row["contender"] == contender]


def _gap(own: Sequence[Row], other: Sequence[Row], name: str) -> str:
    """How far a figure is above another contender's, seed by seed; empty beside none, and beside itself."""
    if not other or own[0]["contender"] == other[0]["contender"]:
        return ""
    gap = mean_interval(a[name] - b[name] for a, b in zip(own, other, strict=True))
    return "-" if gap is None else f"{100 * gap.mean:+.1f} ±{100 * gap.half:.1f}"


def _mean(rows: Sequence[Row], name: str) -> str:
    found = mean_interval(row[name] for row in rows if name in row)
    return "" if found is None else f"{100 * found.mean:.1f}"


def both_forms(attribute: str) -> Rows:
    """The demo's features without and with an attribute, (N, 2, D); extracted on the first call."""

    def source() -> Source:
        return Changed(_named(unpack_images(cache_home() / "datasets" / "demo")), attribute)

    changed = extracted(f"demo-attribute-{attribute}", source, views=_none)
    return np.stack([demo().plain, changed.plain], axis=1).astype(np.float32)


def word_differences(attribute: str, classes: Sequence[str]) -> Rows:
    """Of each class and pair of prompts, the text with the attribute less that without: (K P, D)."""
    from ulfine_fast.cache.models.encoder import load_encoder

    texts = [prompt.format(readable(name)) for name in classes for pair in PROMPTS[attribute] for prompt in pair]
    features: Rows = load_encoder(MODEL).encode_texts(texts).numpy().reshape(len(texts) // 2, 2, -1)
    return features[:, 1] - features[:, 0]


def nuisance_swap(
    attributes: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(ATTRIBUTES),
    share: Annotated[
        float, typer.Option(help="Of training images, those in the usual form.", min=0.5, max=0.99)
    ] = 0.95,
    ranks: Annotated[str, typer.Option(help="What validation chooses from.")] = "1,2,4,8",
    seeds: Annotated[str, typer.Option(help="Such as 0-4.")] = "0-4",
    steps: Annotated[int, typer.Option(help="Mini-batches of 256 images.", min=1)] = 500,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write all rows to this file.")] = None,
) -> None:
    """Train on features whose nuisance was exchanged; print accuracies where the attribute tells nothing of classes."""
    names, sizes, draws = attributes.split(","), _parse_ranks(ranks), parse_seeds(seeds)
    if unknown := set(names) - set(ATTRIBUTES):
        raise InputError(f"attributes are {', '.join(ATTRIBUTES)}, got {', '.join(sorted(unknown))}")
    rows: list[Row] = []
    for name in names:
        forms, words, cache = both_forms(name), word_differences(name, demo().class_names), demo()
        for seed in draws:
            shift = drawn(forms, cache.labels, cache.splits, share, seed)
            rows += [{"attribute": name, "seed": seed, **row} for row in measure(shift, words, sizes, steps, seed)]
    if as_json is not None:
        write_json(as_json, rows)
    print_tables(rows, max(sizes))


def print_tables(rows: Sequence[Row], most: int) -> None:
    """What comes of the ranks that validation chose, and of the largest for all."""
    titles = ["attribute", "training", "ranks", "accuracy", "above plain", "above removed", "above evenly"]
    titles += ["unusual", "above plain", "usual", "attribute within", "classes within"]
    typer.echo("\nrank chosen on validation")
    print_table(titles, table([row for row in rows if row["chosen"]]), texts=3)
    typer.echo(f"\nrank {most}")
    print_table(titles, table([row for row in rows if row["rank"] in (0, most)]), texts=3)


def _parse_ranks(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and 0 < int(part) <= 9 for part in parts):
        raise InputError(f"--ranks must be numbers from 1 to 9, as ten classes span no more, got {text!r}")
    return sorted({int(part) for part in parts})


if __name__ == "__main__":
    typer.run(guarded(nuisance_swap))
