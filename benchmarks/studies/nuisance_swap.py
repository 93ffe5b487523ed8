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
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from scipy.special import softmax

from benchmarks.data import MODEL, NO_VIEWS, ChangedImages, demo, demo_source, extracted
from benchmarks.options import JsonOption, SeedsOption, parse_names, parse_numbers, parse_seeds
from benchmarks.results import Row, gap_text, grouped, mean_text, print_table, where, write_rows
from ulfine_fast.cache.models.prompts import readable
from ulfine_fast.cli.main import guarded

if TYPE_CHECKING:
    from ulfine_fast.cache.sources import Source

_SCALE = 10.0
_RATE = 0.05
_MOMENTUM = 0.9
_BATCH = 256
_PAIRED = 20  # images of each class known in both forms, without labels
_VALIDATION = 50  # images of each class that the rank is chosen on

Rows = NDArray[Any]
Change = Callable[[Rows, Rows], Rows]  # features (B, D), rows that give (B,) -> features (B, D)

ATTRIBUTES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "red": lambda image: ImageOps.colorize(image.convert("L"), "black", "red"),
    "inverted": lambda image: ImageOps.invert(image.convert("RGB")),
    "rotated": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(1.5)),
}
# without and with the attribute, {} being the class; written once, before any of their results was seen
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


def with_attribute(source: Source, attribute: str) -> ChangedImages:
    """A source whose images all have an attribute."""
    return ChangedImages(source, lambda image, _: ATTRIBUTES[attribute](image), {"attribute": attribute})


@dataclass(frozen=True)
class Shift:
    """Images in two forms, and the form that each has in training and validation.

    Attributes:
        forms: (N, 2, D) features, plain and with the attribute.
        labels: (N,).
        seen: (N,) 0 or 1, the form in training and validation.
        usual: (K,) the form that most images of a class have.
        train: training rows.
        val: rows that the rank is chosen on.
        paired: rows that are known in both forms and have no label.
        test: rows of the results, in both forms.
    """

    forms: Rows
    labels: Rows
    seen: Rows
    usual: Rows
    train: Rows
    val: Rows
    paired: Rows
    test: Rows

    def features(self, rows: Rows) -> Rows:
        """Features (n, D) of rows in their form of training and validation."""
        return self.forms[rows, self.seen[rows]]


def draw_shift(forms: Rows, labels: Rows, splits: Rows, fraction: float, seed: int) -> Shift:
    """Draw each class's usual form, and for each image, with probability `fraction`, that form.

    Args:
        forms: (N, 2, D).
        labels: (N,).
        splits: (N,) train or test.
        fraction: of images in their class's usual form.
        seed: of all draws.
    """
    random = np.random.default_rng([seed, 0x5A9])
    classes = int(labels.max()) + 1
    usual = random.permutation(np.arange(classes) % 2)
    seen = np.where(random.random(len(labels)) < fraction, usual[labels], 1 - usual[labels])
    train_rows = [random.permutation(np.flatnonzero((splits == "train") & (labels == k))) for k in range(classes)]
    held_out = _PAIRED + _VALIDATION
    return Shift(
        forms=forms,
        labels=labels,
        seen=seen,
        usual=usual,
        train=np.sort(np.concatenate([rows[held_out:] for rows in train_rows])),
        val=np.sort(np.concatenate([rows[_PAIRED:held_out] for rows in train_rows])),
        paired=np.sort(np.concatenate([rows[:_PAIRED] for rows in train_rows])),
        test=np.flatnonzero(splits == "test"),
    )


def principal(differences: Rows, rank: int) -> Rows:
    """An orthonormal basis (D, rank) of the directions in which differences (m, D), not centred, are largest."""
    basis: Rows = np.linalg.svd(differences, full_matrices=False)[2][:rank].T
    return basis


def swapped(rows: Rows, givers: Rows, basis: Rows, sign: float = 1.0) -> Rows:
    """Features (B, D) whose component in the span of an orthonormal basis (D, r) is that of other rows `givers` (B,).

    With `sign` -1 the difference is subtracted where it should be added.
    """
    components = rows @ basis  # (B, r)
    changed: Rows = rows + sign * (components[givers] - components) @ basis.T
    return changed


def without(rows: Rows, basis: Rows) -> Rows:
    """Features (..., D) less their component in the span of an orthonormal basis (D, r)."""
    remaining: Rows = rows - rows @ basis @ basis.T
    return remaining


def group_differences(shift: Shift) -> Rows:
    """Of each class, the mean of training images with the attribute less that of those without: at most (K, D)."""
    means = _group_means(shift)
    in_both_forms = np.isfinite(means).all((1, 2))
    return (means[:, 1] - means[:, 0])[in_both_forms]


def class_differences(shift: Shift) -> Rows:
    """Class means of training images, both forms with the same weight, less their mean: (K, D)."""
    means = np.nanmean(_group_means(shift), axis=1)
    centred: Rows = means - means.mean(0)
    return centred


def _group_means(shift: Shift) -> Rows:
    """Mean training features (K, 2, D) by class and form; NaN for a form that no training image of a class has."""
    features = shift.features(shift.train)
    labels = shift.labels[shift.train]
    seen = shift.seen[shift.train]
    means = np.full((len(shift.usual), *shift.forms.shape[1:]), np.nan, dtype=shift.forms.dtype)
    for k, form in np.ndindex(means.shape[:2]):
        of_group = (labels == k) & (seen == form)
        if of_group.any():
            means[k, form] = features[of_group].mean(0)
    return means


def probe(features: Rows, labels: Rows, change: Change, chances: Rows | None, steps: int, seed: int) -> Rows:
    """A linear classifier (K, D + 1) by softmax regression on centred features, with momentum, from zero.

    Args:
        features: (N, D).
        labels: (N,).
        change: what is done to each mini-batch.
        chances: (N,) with which rows are drawn, evenly by default.
        steps: mini-batches.
        seed: of mini-batches and of which image gives to which; the same for all contenders.

    Returns:
        Weights, and a bias in the last column.
    """
    random = np.random.default_rng([seed, 0x9B0])
    center = features.mean(0)
    scaled = _SCALE * (features - center)
    weights = np.zeros((int(labels.max()) + 1, features.shape[1]), dtype=features.dtype)
    velocity = np.zeros_like(weights)
    for _ in range(steps):
        batch = random.choice(len(scaled), _BATCH, p=chances)
        givers = random.permutation(_BATCH)
        velocity = _MOMENTUM * velocity - _RATE * _gradient(weights, change(scaled[batch], givers), labels[batch])
        weights += velocity
    # logits of features that are neither scaled nor centred
    return np.column_stack([_SCALE * weights, -_SCALE * weights @ center])


def _gradient(weights: Rows, rows: Rows, labels: Rows) -> Rows:
    """Of the mean cross-entropy of softmax(rows weights'), (K, D)."""
    errors = softmax(rows @ weights.T, axis=1)  # (B, K)
    errors[np.arange(len(labels)), labels] -= 1
    gradient: Rows = errors.T @ rows / len(rows)
    return gradient


def accuracies(weights: Rows, shift: Shift, forms: Rows) -> Row:
    """Accuracy on test images, also of those in their class's usual and unusual form alone, and on validation.

    Args:
        weights: (K, D + 1).
        shift: labels, forms, and rows.
        forms: (N, 2, D) features to predict from.
    """
    right = (forms @ weights[:, :-1].T + weights[:, -1]).argmax(2) == shift.labels[:, None]  # (N, 2)
    usual = np.arange(2) == shift.usual[shift.labels][:, None]  # (N, 2)
    test = np.zeros_like(right)
    test[shift.test] = True
    val = np.zeros_like(right)
    val[shift.val, shift.seen[shift.val]] = True
    return {
        "accuracy": float(right[test].mean()),
        "usual": float(right[test & usual].mean()),
        "unusual": float(right[test & ~usual].mean()),
        "validation": float((right[val & usual].mean() + right[val & ~usual].mean()) / 2),
    }


def fraction_within(differences: Rows, basis: Rows) -> float:
    """Fraction of the squared length of differences (m, D) in the span of an orthonormal basis (D, r)."""
    return float(((differences @ basis) ** 2).sum() / (differences**2).sum())


def estimates(shift: Shift, text_differences: Rows, largest_rank: int) -> dict[str, Rows]:
    """Differences (m, D) that subspaces are spanned by, by name.

    Args:
        shift: images.
        text_differences: of texts with and without the attribute (m, D).
        largest_rank: of the random subspace, which is the same for all ranks up to it.
    """
    random = np.random.default_rng(0xD1CE).normal(size=(largest_rank, shift.forms.shape[2]))
    return {
        "prompts": text_differences,
        "groups": group_differences(shift),
        "pairs": shift.forms[shift.paired, 1] - shift.forms[shift.paired, 0],
        "random": random.astype(shift.forms.dtype),
        "classes": class_differences(shift),
    }


def measure(shift: Shift, text_differences: Rows, ranks: Sequence[int], steps: int, seed: int) -> list[Row]:
    """One row for each contender and rank; `chosen` is the first rank that is best on validation."""
    rows = [
        {"contender": name, "rank": 0, "chosen": True, **accuracies(weights, shift, shift.forms)}
        for name, weights in _without_subspace(shift, steps, seed)
    ]
    for source, differences in estimates(shift, text_differences, max(ranks)).items():
        of_source = [
            row for rank in ranks for row in _in_subspace(shift, source, principal(differences, rank), steps, seed)
        ]
        for of_contender in grouped(of_source, "contender").values():
            best = max(of_contender, key=lambda row: row["validation"])
            rows += [{**row, "chosen": row is best} for row in of_contender]
    return rows


def _without_subspace(shift: Shift, steps: int, seed: int) -> Iterator[tuple[str, Rows]]:
    """Plain training; batches with as many images of each class and form; and forms independent of classes."""
    features = shift.features(shift.train)
    labels = shift.labels[shift.train]
    groups = 2 * labels + shift.seen[shift.train]
    chances = 1 / np.bincount(groups)[groups]
    yield "plain", probe(features, labels, _same, None, steps, seed)
    yield "groups drawn evenly", probe(features, labels, _same, chances / chances.sum(), steps, seed)
    even = np.random.default_rng([seed, 0xE7E]).integers(0, 2, len(labels))
    yield "uncorrelated training", probe(shift.forms[shift.train, even], labels, _same, None, steps, seed)


def _same(rows: Rows, givers: Rows) -> Rows:
    return rows


def _in_subspace(shift: Shift, source: str, basis: Rows, steps: int, seed: int) -> list[Row]:
    """Swapped, removed, and, where the directions are right, swapped with the wrong sign."""
    features = shift.features(shift.train)
    labels = shift.labels[shift.train]
    test_differences = shift.forms[shift.test, 1] - shift.forms[shift.test, 0]
    about = {
        "rank": basis.shape[1],
        "attribute_within": fraction_within(test_differences, basis),
        "classes_within": fraction_within(class_differences(shift), basis),
    }
    signs = {"swap": 1.0, "swap, opposite sign": -1.0} if source == "groups" else {"swap": 1.0}
    rows = []
    for name, sign in signs.items():
        weights = probe(features, labels, partial(swapped, basis=basis, sign=sign), None, steps, seed)
        rows.append({"contender": f"{name}: {source}", **about, **accuracies(weights, shift, shift.forms)})
    weights = probe(without(features, basis), labels, _same, None, steps, seed)
    remaining = without(shift.forms, basis)
    rows.append({"contender": f"removed: {source}", **about, **accuracies(weights, shift, remaining)})
    return rows


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each attribute and contender: means over seeds, and gaps paired by seed, in percent.

    Args:
        rows: one for each attribute, contender and seed.
    """
    lines = []
    for (attribute, contender), own in grouped(rows, "attribute", "contender").items():
        others = where(rows, attribute=attribute)
        plain = where(others, contender="plain")
        removed = where(others, contender=contender.replace("swap", "removed"))
        even = where(others, contender="groups drawn evenly")
        lines.append(
            [
                attribute,
                contender,
                ",".join(str(row["rank"]) for row in own) if own[0]["rank"] else "",
                mean_text(own, "accuracy"),
                *(gap_text(own, other, "accuracy") for other in (plain, removed, even)),
                mean_text(own, "unusual"),
                gap_text(own, plain, "unusual"),
                mean_text(own, "usual"),
                mean_text(own, "attribute_within"),
                mean_text(own, "classes_within"),
            ]
        )
    return lines


def both_forms(attribute: str) -> Rows:
    """The demo's features without and with an attribute, (N, 2, D); extracted on the first call."""
    changed = extracted(f"demo-attribute-{attribute}", lambda: with_attribute(demo_source(), attribute), views=NO_VIEWS)
    return np.stack([demo().plain, changed.plain], axis=1).astype(np.float32)


def text_differences_of(attribute: str, classes: Sequence[str]) -> Rows:
    """Of each class and pair of prompts, the text with the attribute less that without: (K P, D)."""
    # takes seconds to import
    from ulfine_fast.cache.models.encoder import load_encoder

    texts = [prompt.format(readable(name)) for name in classes for pair in PROMPTS[attribute] for prompt in pair]
    features: Rows = load_encoder(MODEL).encode_texts(texts).numpy().reshape(len(texts) // 2, 2, -1)
    return features[:, 1] - features[:, 0]


def nuisance_swap(
    attributes: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(ATTRIBUTES),
    fraction: Annotated[
        float, typer.Option("--share", help="Fraction of training images in the usual form.", min=0.5, max=0.99)
    ] = 0.95,
    ranks: Annotated[str, typer.Option(help="What validation chooses from.")] = "1,2,4,8",
    seeds: SeedsOption = "0-4",
    steps: Annotated[int, typer.Option(help="Mini-batches of 256 images.", min=1)] = 500,
    as_json: JsonOption = None,
) -> None:
    """Train on features whose nuisance was exchanged; print accuracies where the attribute says nothing of classes."""
    names = parse_names(attributes, ATTRIBUTES, "attributes")
    # ten classes span no more
    tried = sorted(parse_numbers(ranks, "ranks", 1, 9, kind=int))
    seed_numbers = parse_seeds(seeds)
    cache = demo()
    rows: list[Row] = []
    for name in names:
        forms = both_forms(name)
        text_differences = text_differences_of(name, cache.class_names)
        for seed in seed_numbers:
            shift = draw_shift(forms, cache.labels, cache.splits, fraction, seed)
            results = measure(shift, text_differences, tried, steps, seed)
            rows += [{"attribute": name, "seed": seed, **row} for row in results]
    write_rows(as_json, rows)

    # the ranks that validation chose, and the largest for all
    titles = ["attribute", "training", "ranks", "accuracy", "above plain", "above removed", "above evenly"]
    titles += ["unusual", "above plain", "usual", "attribute within", "classes within"]
    typer.echo("\nrank chosen on validation")
    print_table(titles, table(where(rows, chosen=True)), texts=3)
    typer.echo(f"\nrank {max(tried)}")
    print_table(titles, table([row for row in rows if row["rank"] in (0, max(tried))]), texts=3)


if __name__ == "__main__":
    typer.run(guarded(nuisance_swap))
