"""A writer of run folders, so that the report is tested against files and not against the code that trains."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
TEMPERATURE = 1.5  # of every written run: saved probabilities are softmax(logits / TEMPERATURE)
# mean accuracy at the head, how much the tail loses, confidence sharpness, pseudo-label precision
METHODS = {
    "zero_shot": (0.55, 0.02, 1.0, None),
    "linear_probe": (0.80, 0.40, 1.6, 0.62),
    "lightweight": (0.83, 0.30, 2.6, 0.71),
    "ulfine": (0.84, 0.14, 1.4, 0.79),
}


@dataclass
class RunSpec:
    """What to write; the defaults are a small long-tailed run."""

    method: str = "ulfine"
    seed: int = 0
    classes: int = 10
    rows: int = 500
    names: tuple[str, ...] | None = None
    permute: bool = True
    config: dict[str, Any] | None = None
    ids: Callable[[int], str] = "test/{:05d}.png".format
    cache: str | None = None


def class_names(classes: int) -> list[str]:
    return list(FASHION) if classes == 10 else [f"class {k:03d}" for k in range(classes)]


def softmax(logits: np.ndarray) -> np.ndarray:
    high = np.exp(logits - logits.max(axis=1, keepdims=True))
    return high / high.sum(axis=1, keepdims=True)


def slow_ece(confidence: list[float], right: list[bool], bins: int = 15) -> float:
    """The definition, row by row: bins (i/B, (i+1)/B], gaps weighted by rows."""
    total = 0.0
    for i in range(bins):
        inside = [j for j, c in enumerate(confidence) if i / bins < c <= (i + 1) / bins]
        if inside:
            accuracy = sum(right[j] for j in inside) / len(inside)
            total += len(inside) * abs(accuracy - sum(confidence[j] for j in inside) / len(inside))
    return total / len(confidence)


def draw_logits(spec: RunSpec, order: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,) and logits (n, K) whose accuracy falls from head to tail as the method's numbers say."""
    head, loss, margin_scale, _ = METHODS[spec.method]
    k = spec.classes
    rank = np.empty(k, dtype=int)
    rank[order] = np.arange(k)
    labels = np.arange(spec.rows) % k
    chance = head - loss * rank / max(1, k - 1) + rng.normal(0, 0.03, k)
    shift = rng.random(spec.rows) > chance[labels]
    # wrong rows go to the neighbour class, or to a random one
    other = np.where(rng.random(spec.rows) < 0.6, (labels + 1) % k, rng.integers(0, k, spec.rows))
    winner = np.where(shift, other, labels)
    logits = rng.normal(0, 1, (spec.rows, k))
    # wrong rows win by less, as real ones do
    margin = rng.gamma(2.0, margin_scale, spec.rows) * np.where(winner == labels, 1.0, 0.55)
    logits[np.arange(spec.rows), winner] = logits.max(axis=1) + margin
    return labels, TEMPERATURE * logits


def write_history(file: Path, spec: RunSpec, order: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """History over ten evaluations; returns the last pseudo-label metrics for metrics.json."""
    final = METHODS[spec.method][3]
    k = spec.classes
    head = ["step", "loss", "loss_labeled", "loss_unlabeled", "val_accuracy", "val_balanced_accuracy"]
    head += ["pseudo_label_rate", "pseudo_label_precision", "confidence_on_false"]
    head += [f"{name}_{c}" for name in ("rate", "precision", "recall") for c in range(k)]
    rank = np.argsort(order)
    last: dict[str, Any] = {}
    with file.open("w", newline="", encoding="utf-8") as stream:
        out = csv.writer(stream)
        out.writerow(head)
        for i in range(1, 11) if final is not None else ():
            grown = 1 - math.exp(-i / 3)
            precision = final - 0.1 * (1 - grown) + rng.normal(0, 0.01)
            per_precision = np.clip(precision + 0.1 - 0.2 * rank / k + rng.normal(0, 0.03, k), 0, 1)
            per_recall = np.clip(grown * (0.8 - 0.6 * rank / k) + rng.normal(0, 0.03, k), 0, 1)
            row = [
                50 * i,
                1.2 / i,
                0.7 / i,
                0.5 / i,
                0.7 * grown,
                0.66 * grown,
                0.7 * grown,
                precision,
                0.9 - 0.1 * grown,
            ]
            blank = [f"{v:.4f}" if i > 1 or c else "" for c, v in enumerate(per_precision)]
            out.writerow([*row, *[f"{0.07 * grown:.4f}"] * k, *blank, *(f"{v:.4f}" for v in per_recall)])
            last = {
                "pseudo_label_rate": 0.7 * grown,
                "pseudo_label_precision": float(precision),
                "confidence_on_false": 0.9 - 0.1 * grown,
                "per_class_pseudo_label_precision": [None, *per_precision.tolist()[1:]],
                "per_class_pseudo_label_recall": per_recall.tolist(),
            }
    return last


def metrics_of(spec: RunSpec, labels: np.ndarray, logits: np.ndarray, order: np.ndarray) -> dict[str, Any]:
    probabilities = softmax(logits)
    predicted, k = logits.argmax(axis=1), spec.classes
    right = predicted == labels
    recall = np.array([right[labels == c].mean() for c in range(k)])
    many, medium, few = np.array_split(order, 3)
    tempered = softmax(logits / TEMPERATURE).max(axis=1)
    counts = np.empty(k, dtype=int)
    counts[order] = [max(2, int(100 * 50 ** (-i / max(1, k - 1)))) for i in range(k)]
    return {
        "method": spec.method,
        "seed": spec.seed,
        "steps": 0 if spec.method == "zero_shot" else 500,
        "seconds": 0.1 if spec.method == "zero_shot" else 2.0 + 0.1 * spec.seed,
        "accuracy": float(right.mean()),
        "balanced_accuracy": float(recall.mean()),
        "many": float(recall[many].mean()),
        "medium": float(recall[medium].mean()) if len(medium) else None,
        "few": float(recall[few].mean()) if len(few) else None,
        "worst_class": float(recall.min()),
        "macro_f1": float(recall.mean()),
        "ece": slow_ece(probabilities.max(axis=1).tolist(), right.tolist()),
        "ece_temperature_scaled": slow_ece(tempered.tolist(), right.tolist()),
        "temperature": TEMPERATURE,
        "per_class_accuracy": recall.tolist(),
        "class_counts": counts.tolist(),
        "pseudo_label_rate": None,
        "pseudo_label_precision": None,
        "confidence_on_false": None,
        "val": {"accuracy": float(right.mean()), "balanced_accuracy": float(recall.mean()) - 0.01},
        "test_rows": spec.rows,
    }


def write_run(folder: Path, spec: RunSpec | None = None) -> Path:
    """Write one run folder in the format that `ulfine-fast fit` writes, without the heads."""
    spec = spec or RunSpec()
    folder.mkdir(parents=True)
    split_rng = np.random.default_rng(spec.seed)
    order = split_rng.permutation(spec.classes) if spec.permute else np.arange(spec.classes)
    rng = np.random.default_rng([spec.seed, sorted(METHODS).index(spec.method)])
    labels, logits = draw_logits(spec, order, rng)
    metrics = metrics_of(spec, labels, logits, order)
    metrics |= write_history(folder / "history.csv", spec, order, rng)
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "config.json", config_of(spec))
    ids = [spec.ids(i) for i in range(spec.rows)]
    labeled = [f"train/{spec.seed}-{i}" for i in range(sum(metrics["class_counts"]))]
    write_json(
        folder / "split.json",
        {
            "format": "ulfine-fast-split", "version": 1, "rule": "count of rank k = int(N1 * gamma ** (-k / (K - 1)))",
            "class_order": order.tolist(), "labeled": labeled[20:], "unlabeled": [f"train/u{i}" for i in range(900)],
            "val": labeled[:20], "test": ids,
        },
    )  # fmt: skip
    write_predictions(folder / "predictions.parquet", ids, labels, softmax(logits / TEMPERATURE))
    return folder


def config_of(spec: RunSpec) -> dict[str, Any]:
    fields = {"method": spec.method, "seed": spec.seed, "split_seed": None, "n1": 100, "m1": 250, "gamma_l": 50.0}
    fields |= {"shape": "consistent", "steps": 500, "lr": 0.03, "mu": 0.01, "paf": True} | (spec.config or {})
    return {
        "format": "ulfine-fast-run", "version": 1, "config": fields, "cache": spec.cache,
        "encoder": {
            "name": "lite0-minilm", "pretrained": None, "sha256": "ab" * 32, "image_size": 224, "dim": 384,
            "logit_scale": 100.0, "preprocessing": "Compose(Resize(224), CenterCrop(224))", "mean": [0.5, 0.5, 0.5],
        },
        "class_names": list(spec.names or class_names(spec.classes)), "created_by": "ulfine-fast 0.1.0",
    }  # fmt: skip


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_predictions(file: Path, ids: list[str], labels: np.ndarray, probabilities: np.ndarray) -> None:
    columns = {
        "id": ids,
        "split": ["test"] * len(ids),
        "label": pa.array(labels, pa.int32()),
        "predicted": pa.array(probabilities.argmax(axis=1), pa.int32()),
        "confidence": pa.array(probabilities.max(axis=1), pa.float32()),
        "probabilities": pa.array(probabilities.tolist(), pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(columns), file)


def write_study(root: Path, methods: tuple[str, ...] = tuple(METHODS), seeds: int = 5, **options: Any) -> Path:
    """Several methods and seeds: ROOT/METHOD/seed-N."""
    for method in methods:
        for seed in range(seeds):
            write_run(root / method / f"seed-{seed}", RunSpec(method=method, seed=seed, **options))
    return root


def edit_json(file: Path, **changes: Any) -> None:
    write_json(file, json.loads(file.read_text(encoding="utf-8")) | changes)


def stripes(row_id: str) -> Image.Image:
    """An image that is a function of its id."""
    rng = np.random.default_rng(list(row_id.encode()))
    return Image.fromarray(rng.integers(0, 255, (28, 28, 3), dtype=np.uint8)).resize((200, 150))


class PageTables(HTMLParser):
    """The tables of a page as rows of cell texts, white space folded, and the elements met."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.headings: list[tuple[int, str]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._into: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th", "h1", "h2", "h3"):
            self._into = []

    def handle_data(self, data: str) -> None:
        if self._into is not None:
            self._into.append(data)

    def handle_endtag(self, tag: str) -> None:
        if self._into is None or tag not in ("td", "th", "h1", "h2", "h3"):
            return
        text = " ".join("".join(self._into).split())
        if tag in ("td", "th"):
            self.tables[-1][-1].append(text)
        else:
            self.headings.append((int(tag[1]), text))
        self._into = None
