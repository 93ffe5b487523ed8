from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.studies import nuisance_swap as bench
from tests.benchmarks.program import run_command
from tests.cache.samples import write_images
from ulfine_fast.cache.sources import open_source
from ulfine_fast.cache.store import FeatureCache

_CLASSES, _DIM = 4, 12


def make_world(overlap=0.0, per_class=150, seed=0):
    """Classes along the first four axes, an attribute along the fifth, or by `overlap` along a line between classes.

    Returns forms (N, 2, D), labels (N,), splits (N,) and the attribute's direction (D,).
    """
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(_CLASSES), per_class)
    plain = 1.2 * np.eye(_DIM)[labels] + 0.35 * random.normal(size=(len(labels), _DIM))
    between = np.array([1, 1, -1, -1, *[0] * (_DIM - 4)]) / 2
    direction = np.sqrt(1 - overlap**2) * np.eye(_DIM)[4] + overlap * between
    forms = np.stack([plain, plain + 2.0 * direction], axis=1)
    return forms, labels, np.where(np.arange(len(labels)) % 3 == 0, "test", "train"), direction


def make_shift(fraction=0.97, seed=0, **world):
    forms, labels, splits, direction = make_world(**world)
    return bench.draw_shift(forms, labels, splits, fraction, seed), direction


def fitted(shift, basis, way):
    features, labels = shift.features(shift.train), shift.labels[shift.train]
    change = {"plain": bench._same, "swap": lambda rows, givers: bench.swapped(rows, givers, basis)}[way]
    return bench.accuracies(bench.probe(features, labels, change, None, 200, 0), shift, shift.forms)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_exactly_that_component_is_exchanged(sign):
    random = np.random.default_rng(1)
    rows, givers = random.normal(size=(7, 9)), random.permutation(7)
    basis = bench.principal(random.normal(size=(5, 9)), 3)
    changed = bench.swapped(rows, givers, basis, sign)
    for i in range(7):
        expected = rows[i].copy()
        for direction in basis.T:
            expected += sign * ((rows[givers[i]] @ direction) - (rows[i] @ direction)) * direction
        assert changed[i] == pytest.approx(expected)
    # nothing outside the span moves, and what moves has its rank
    assert bench.without(changed, basis) == pytest.approx(bench.without(rows, basis))
    assert np.linalg.matrix_rank(changed - rows, tol=1e-9) == 3
    if sign > 0:
        assert changed @ basis == pytest.approx((rows @ basis)[givers])
        back = np.argsort(givers)
        assert bench.swapped(changed, back, basis) == pytest.approx(rows)


def test_principal_directions():
    # not centred: what all differences share comes first
    differences = np.array([[3.0, 0.1, 0.0], [3.0, -0.1, 0.0], [3.0, 0.0, 0.01]])
    basis = bench.principal(differences, 2)
    assert basis.T @ basis == pytest.approx(np.eye(2))
    assert np.abs(basis[:, 0]) == pytest.approx([1, 0, 0], abs=0.01)
    assert np.abs(basis[:, 1]) == pytest.approx([0, 1, 0], abs=0.02)
    assert bench.fraction_within(differences, basis[:, :1]) == pytest.approx(27 / 27.0201, rel=1e-4)
    assert bench.fraction_within(differences, np.eye(3)) == pytest.approx(1)


def test_removing_is_projecting():
    random = np.random.default_rng(2)
    basis, rows = bench.principal(random.normal(size=(4, 6)), 2), random.normal(size=(3, 2, 6))
    left = bench.without(rows, basis)
    assert left @ basis == pytest.approx(np.zeros((3, 2, 2)), abs=1e-12)
    assert bench.without(left, basis) == pytest.approx(left)


def test_images_are_drawn_by_fraction_and_seed():
    shift, _ = make_shift(fraction=0.9)
    labels = shift.labels
    parts = [shift.train, shift.val, shift.paired, shift.test]
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    assert np.bincount(labels[shift.val]).tolist() == [50] * 4
    assert np.bincount(labels[shift.paired]).tolist() == [20] * 4
    assert sorted(shift.usual) == [0, 0, 1, 1]
    assert (shift.seen == shift.usual[labels]).mean() == pytest.approx(0.9, abs=0.04)
    assert np.array_equal(shift.features(shift.val)[3], shift.forms[shift.val[3], shift.seen[shift.val[3]]])
    again, other = make_shift(fraction=0.9)[0], make_shift(fraction=0.9, seed=1)[0]
    assert np.array_equal(again.seen, shift.seen)
    assert not np.array_equal(other.seen, shift.seen)


def test_estimates_find_the_attribute_and_the_classes():
    shift, direction = make_shift(fraction=0.8, per_class=300)
    words = 0.3 * direction + np.zeros((6, _DIM))
    directions = {name: bench.principal(rows, 1)[:, 0] for name, rows in bench.estimates(shift, words, 4).items()}
    for name in ("prompts", "groups", "pairs"):
        assert abs(directions[name] @ direction) > 0.97
    assert abs(directions["classes"] @ direction) < 0.2
    centres = bench.class_differences(shift)
    assert centres.sum(0) == pytest.approx(np.zeros(_DIM), abs=1e-9)
    assert bench.fraction_within(centres, np.eye(_DIM)[:, :4]) > 0.95


def test_a_class_in_one_form_only_is_left_out():
    shift, _ = make_shift(fraction=0.8)
    shift.seen[shift.labels == 2] = 1
    assert bench.group_differences(shift).shape == (3, _DIM)
    assert np.isfinite(bench.class_differences(shift)).all()


def test_the_gradient_is_the_cross_entropys():
    random = np.random.default_rng(3)
    weights, rows, labels = random.normal(size=(3, 5)), random.normal(size=(8, 5)), random.integers(0, 3, 8)
    head = torch.tensor(weights, requires_grad=True)
    torch.nn.functional.cross_entropy(torch.tensor(rows) @ head.T, torch.tensor(labels)).backward()
    assert bench._gradient(weights, rows, labels) == pytest.approx(head.grad.numpy())


def test_the_probe_predicts_from_features_as_they_are():
    # the centre that it subtracts in training is in its last column
    forms, labels, _, _ = make_world()
    weights = bench.probe(forms[:, 0] + 5, labels, bench._same, None, 150, 0)
    right = ((forms[:, 0] + 5) @ weights[:, :-1].T + weights[:, -1]).argmax(1) == labels
    assert right.mean() > 0.9


def test_accuracies_of_each_form():
    shift, direction = make_shift()
    # a classifier that goes by the attribute alone: right half the time on the usual form, never on the other
    wrong = np.zeros((_CLASSES, _DIM + 1))
    first = [int(np.flatnonzero(shift.usual == form)[0]) for form in (0, 1)]
    wrong[first[1], :-1], wrong[first[1], -1], wrong[first[0], -1] = 100 * direction, -100, 0
    wrong[[k for k in range(_CLASSES) if k not in first], -1] = -1e6
    forms = np.broadcast_to(np.stack([0 * direction, 2 * direction]), shift.forms.shape)
    accuracies = bench.accuracies(wrong, shift, forms)
    assert (accuracies["usual"], accuracies["unusual"], accuracies["accuracy"]) == (0.5, 0.0, 0.25)
    assert accuracies["validation"] == pytest.approx(0.25, abs=0.03)


def test_a_swap_of_the_attribute_helps_and_one_of_the_classes_harms():
    shift, direction = make_shift()
    plain = fitted(shift, None, "plain")
    swapped = fitted(shift, direction[:, None], "swap")
    assert swapped["unusual"] > plain["unusual"] + 0.05
    assert swapped["accuracy"] > plain["accuracy"] + 0.02
    classes = fitted(shift, bench.principal(bench.class_differences(shift), 3), "swap")
    assert classes["accuracy"] < plain["accuracy"] - 0.3


def test_an_attribute_along_class_directions_costs_classes():
    apart, _ = make_shift()
    within, direction = make_shift(overlap=1.0)
    basis = direction[:, None]
    assert bench.fraction_within(bench.class_differences(within), basis) > 0.2
    # the exchange takes away what tells two classes from the other two
    assert fitted(within, basis, "swap")["usual"] < fitted(within, None, "plain")["usual"] - 0.05
    assert fitted(within, basis, "swap")["accuracy"] < fitted(apart, np.eye(_DIM)[:, 4:5], "swap")["accuracy"] - 0.05


def test_images_with_an_attribute(tmp_path):
    source = open_source(write_images(tmp_path / "images", {"train/cat": 1, "test/cat": 1}))
    plain = np.asarray(source.read(source.rows[0]).convert("RGB"), dtype=int)
    seen = {name: bench.with_attribute(source, name) for name in bench.ATTRIBUTES}
    pixels = {name: np.asarray(one.read(one.rows[0]).convert("RGB"), dtype=int) for name, one in seen.items()}
    assert np.array_equal(pixels["inverted"], 255 - plain)
    assert np.array_equal(pixels["rotated"], np.rot90(plain))
    assert pixels["red"][..., 1:].max() == 0
    assert pixels["red"][..., 0].max() > 0
    assert np.abs(np.diff(pixels["blurred"], axis=0)).sum() < np.abs(np.diff(plain, axis=0)).sum()
    assert len({json.dumps(one.describe()) for one in (source, *seen.values())}) == 5
    assert isinstance(source.read(source.rows[0]), Image.Image)


def test_texts_come_in_pairs(monkeypatch):
    assert set(bench.PROMPTS) == set(bench.ATTRIBUTES)
    asked = []

    class Tower:
        def encode_texts(self, texts):
            asked.extend(texts)
            return torch.tensor([[float(len(text)), 1.0] for text in texts])

    monkeypatch.setattr("ulfine_fast.cache.models.encoder.load_encoder", lambda name: Tower())
    differences = bench.text_differences_of("red", ["ankle_boot", "bag"])
    assert asked[:2] == ["a photo of a ankle boot.", "a photo of a red ankle boot."]
    assert differences.tolist() == [[4, 0], [4, 0], [7, 0]] * 2


def test_both_forms_come_of_the_same_images(monkeypatch):
    forms, labels, splits, _ = make_world()
    caches = [FeatureCache.from_arrays(forms[:, i].astype(np.float32), labels, splits=splits.tolist()) for i in (0, 1)]
    monkeypatch.setattr(bench, "demo", lambda: caches[0])
    monkeypatch.setattr(bench, "extracted", lambda name, source, views: caches[name == "demo-attribute-red"])
    assert np.array_equal(bench.both_forms("red"), forms.astype(np.float32))


def run(monkeypatch, *words):
    forms, labels, splits, direction = make_world()
    cache = FeatureCache.from_arrays(forms[:, 0].astype(np.float32), labels, splits=splits.tolist())
    monkeypatch.setattr(bench, "demo", lambda: cache)
    monkeypatch.setattr(bench, "both_forms", lambda name: forms)
    monkeypatch.setattr(bench, "text_differences_of", lambda name, classes: direction + np.zeros((8, _DIM)))
    return run_command(bench.nuisance_swap, "--seeds", "0-1", "--steps", "12", *words)


def test_the_command(tmp_path, monkeypatch):
    out = tmp_path / "rows.json"
    done = run(monkeypatch, "--attributes", "red", "--ranks", "1,3", "--json", str(out))
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())
    assert len(rows) == 2 * (3 + 2 * (5 * 2 + 1))
    for seed in (0, 1):
        chosen = [row for row in rows if row["seed"] == seed and row["chosen"]]
        assert len(chosen) == len({row["contender"] for row in chosen}) == 3 + 11
        for row in chosen:
            same = [r["validation"] for r in rows if (r["seed"], r["contender"]) == (seed, row["contender"])]
            assert row["validation"] == max(same)
    assert "rank chosen on validation" in done.output
    assert "rank 3" in done.output
    line = next(line for line in done.output.splitlines() if "swap: prompts" in line)
    swaps, plain = (
        [row["accuracy"] for row in rows if row["chosen"] and row["contender"] == name]
        for name in ("swap: prompts", "plain")
    )
    gap = np.subtract(swaps, plain)
    assert f"{100 * np.mean(gap):+.1f} ±" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--attributes", "red,striped"), "got 'striped'"),
        (("--ranks", "0,2"), "ranks are whole numbers from 1 to 9"),
        (("--ranks", "many"), "ranks are whole numbers from 1 to 9"),
        (("--seeds", "two"), "seeds are numbers"),
    ],
)
def test_refusals(monkeypatch, words, message):
    done = run(monkeypatch, *words)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
