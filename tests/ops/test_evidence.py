from __future__ import annotations

import math

import pytest
import torch

from tests.methods.slow import softmax
from ulfine_fast.ops.evidence import balanced_gain, fold_numbers, held_out_scores, label_likelihoods, starting_priors

SEEDS = torch.tensor([3, 4])
K = 4
# counts 9, 4, 2 and 1, then padding; the second trial has other classes
LABELS = torch.tensor([[0] * 9 + [1] * 4 + [2] * 2 + [3] + [-1] * 3, [3] * 5 + [0] * 8 + [1, 2] * 3])


def test_folds_split_every_class_evenly():
    folds = fold_numbers(SEEDS, LABELS, K, 3)
    for t in range(2):
        for k in range(K):
            own_folds = folds[t, LABELS[t] == k].tolist()
            if len(own_folds) < 2:
                continue
            counts = [own_folds.count(j) for j in (1, 2, 3)]
            assert sum(counts) == len(own_folds)
            assert max(counts) - min(counts) <= 1


def test_padding_and_a_class_only_row_are_never_held_out():
    folds = fold_numbers(SEEDS, LABELS, K, 3)
    assert (folds[LABELS < 0] == 0).all()
    assert folds[0, LABELS[0] == 3].tolist() == [0]
    assert sorted(folds[0, LABELS[0] == 2].tolist()) == [1, 2]


def test_every_fold_leaves_each_class_a_row():
    folds = fold_numbers(SEEDS, LABELS, K, 3)
    for t in range(2):
        for j in (1, 2, 3):
            assert set(LABELS[t, folds[t] != j].tolist()) - {-1} == set(range(K))


def test_the_same_seed_the_same_folds_another_seed_others():
    folds = fold_numbers(SEEDS, LABELS, K, 3)
    assert torch.equal(folds, fold_numbers(SEEDS, LABELS, K, 3))
    assert not torch.equal(folds, fold_numbers(SEEDS + 5, LABELS, K, 3))


def test_a_trial_alone_without_its_padding_has_the_same_folds():
    folds = fold_numbers(SEEDS, LABELS, K, 3)
    alone = fold_numbers(SEEDS[:1], LABELS[:1, :16], K, 3)
    assert torch.equal(alone[0], folds[0, :16])


def test_the_order_within_a_class_is_drawn():
    labels = torch.zeros(1, 40, dtype=torch.int64)
    result = fold_numbers(SEEDS[:1], labels, 1, 4)[0].tolist()
    assert result != [1 + i % 4 for i in range(40)]


def test_starting_priors_by_hand():
    result = starting_priors(torch.tensor([[50.0, 5.0, 20.0]]), gamma=100.0)[0]
    # ranks 0, 2, 1: by exponent of 10, the largest first
    wanted = {
        "falling": [100.0, 1.0, 10.0],
        "even": [1.0, 1.0, 1.0],
        "rising": [1.0, 100.0, 10.0],
        "peaked": [1.0, 1.0, 100.0],
        "hollow": [100.0, 100.0, 1.0],
    }
    for row, sizes in zip(result.tolist(), wanted.values(), strict=True):
        assert row == pytest.approx([size / sum(sizes) for size in sizes], rel=1e-4)


def test_starting_priors_sum_to_one_and_keep_to_gamma():
    result = starting_priors(torch.tensor([[9.0, 3.0, 1.0, 4.0], [1.0, 1.0, 1.0, 1.0]]))
    assert result.shape == (2, 5, 4)
    torch.testing.assert_close(result.sum(-1), torch.ones(2, 5))
    ratio = result.amax(-1) / result.amin(-1)
    torch.testing.assert_close(ratio[:, [0, 2]], torch.full((2, 2), 30.0), rtol=1e-4, atol=0)
    assert ratio.max() < 30.01


def test_classes_of_equal_count_keep_their_order():
    falling = starting_priors(torch.tensor([[2.0, 2.0, 2.0]]))[0, 0].tolist()
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("classes", [1, 2])
def test_starting_priors_of_few_classes(classes):
    result = starting_priors(torch.ones(1, classes))
    assert torch.isfinite(result).all()
    torch.testing.assert_close(result[:, 1], torch.full((1, classes), 1 / classes))


def slow_score(logits, labels, judged, temperature):
    """Mean over classes of the mean log-likelihood of their held-out rows, one row at a time."""
    by_class = {}
    for row, label, counts in zip(logits, labels, judged, strict=True):
        if counts:
            likelihood = math.log(softmax([z / temperature for z in row])[label])
            by_class.setdefault(label, []).append(likelihood)
    return sum(sum(rows) / len(rows) for rows in by_class.values()) / len(by_class)


def scores_of(logits, labels, judged, classes=K):
    """Scores and temperatures of logits (T, L, S, K)."""
    return held_out_scores(label_likelihoods(logits, labels), labels, judged, classes)


def judged_logits(length=3.0):
    torch.manual_seed(0)
    logits = length * torch.randn(2, LABELS.shape[1], 3, K)
    folds = fold_numbers(SEEDS, LABELS, K, 3)
    # the second candidate knows more, the third one is sure of it
    logits[:, :, 1:] += length * torch.nn.functional.one_hot(LABELS.clamp(min=0), K).unsqueeze(2)
    logits[:, :, 2] *= 10
    return logits, folds > 0


def test_scores_are_the_best_of_a_loop_over_temperatures():
    logits, judged = judged_logits()
    scores, temperatures = scores_of(logits, LABELS, judged, K)
    grid = [2.0 ** (i / 2) for i in range(-2, 9)]
    for t in range(2):
        for s in range(3):
            by_hand = [slow_score(logits[t, :, s].tolist(), LABELS[t].tolist(), judged[t].tolist(), g) for g in grid]
            assert float(scores[t, s]) == pytest.approx(max(by_hand), rel=1e-4)
            assert float(temperatures[t, s]) == pytest.approx(grid[by_hand.index(max(by_hand))])
    assert (scores[:, 1] > scores[:, 0]).all()
    assert (temperatures[:, 2] > temperatures[:, 1]).all()


def test_rows_not_held_out_and_padding_do_not_count():
    logits, judged = judged_logits()
    loud = torch.where(judged[:, :, None, None], logits, torch.full_like(logits, 50.0).cumsum(-1))
    for result, wanted in zip(scores_of(loud, LABELS, judged, K), scores_of(logits, LABELS, judged, K), strict=True):
        assert torch.equal(result, wanted)


def test_every_class_counts_the_same():
    labels = torch.tensor([[0] * 9 + [1]])
    logits = torch.zeros(1, 10, 1, 2)
    logits[:, :9, :, 0] = 100.0  # sure and right nine times
    score, _ = scores_of(logits, labels, torch.ones(1, 10, dtype=torch.bool), 2)
    assert float(score) == pytest.approx(-0.5 * math.log(2), rel=1e-3)


def test_without_held_out_rows_all_candidates_score_the_same():
    logits, judged = judged_logits()
    scores, temperatures = scores_of(logits, LABELS, torch.zeros_like(judged), K)
    assert (scores == 0).all()
    assert (temperatures == 1).all()
    judged[1] = False
    mixed = scores_of(logits, LABELS, judged, K)[1]
    assert (mixed[1] == 1).all()
    assert (mixed[0] != 1).any()


def test_the_gain_is_the_difference_in_balanced_accuracy():
    torch.manual_seed(5)
    first, second = torch.rand(2, LABELS.shape[1]) < 0.8, torch.rand(2, LABELS.shape[1]) < 0.5
    judged = fold_numbers(SEEDS, LABELS, K, 3) > 0
    result = balanced_gain(first.float() - second.float(), LABELS, judged, K)
    for t in range(2):
        by_class = [
            [int(first[t, i]) - int(second[t, i]) for i in range(LABELS.shape[1]) if judged[t, i] and LABELS[t, i] == k]
            for k in range(K)
        ]
        by_class = [values for values in by_class if values]
        means = [sum(values) / len(values) for values in by_class]
        spread = sum((v - m) ** 2 for values, m in zip(by_class, means, strict=True) for v in values)
        variance = spread / (sum(map(len, by_class)) - len(by_class))
        half = 1.96 * math.sqrt(sum(variance / len(values) for values in by_class)) / len(by_class)
        mean = sum(means) / len(means)
        assert result[t].tolist() == pytest.approx([mean, mean - half, mean + half], abs=1e-6)


def test_a_gain_from_too_few_rows_is_not_a_number():
    labels = torch.tensor([[0, 1, 2]])
    judged = torch.tensor([[True, True, False]])
    assert balanced_gain(torch.ones(1, 3), labels, judged, 3).isnan().all()
    assert balanced_gain(torch.ones(1, 3), labels, torch.zeros_like(judged), 3).isnan().all()
