from __future__ import annotations

import pytest
import torch

from ulfine_fast.ops.prototypes import (
    class_means,
    fit_prototypes,
    fitting_pace,
    move_prior,
    move_visual,
    normalize,
    orthogonality,
)


def test_normalize_gives_unit_rows_and_spares_zero_ones():
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    unit = normalize(rows)
    torch.testing.assert_close(unit, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    unit.sum().backward()
    # x / ||x|| would give NaN here
    assert torch.isfinite(rows.grad).all()


def test_class_means_equal_a_loop():
    torch.manual_seed(0)
    features, labels = torch.randn(2, 7, 3), torch.randint(4, (2, 7))
    means, counts = class_means(features, labels, 5)
    for t in range(2):
        for k in range(5):
            members = features[t][labels[t] == k]
            assert counts[t, k] == len(members)
            wanted = members.mean(0) if len(members) else torch.zeros(3)
            torch.testing.assert_close(means[t, k], wanted)


def test_visual_prototypes_start_at_the_mean_then_move_by_momentum():
    means = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]]])
    counts = torch.tensor([[1.0, 2.0, 0.0]])
    visual = torch.tensor([[[0.0, 1.0], [9.0, 9.0], [0.3, 0.4]]])
    seen = torch.tensor([[True, False, True]])
    result = move_visual(visual, means, counts, seen, torch.tensor([0.5]))
    torch.testing.assert_close(result[0, 0], torch.tensor([0.5, 0.5]) / 0.5**0.5)  # seen: halfway, then unit
    torch.testing.assert_close(result[0, 1], torch.tensor([0.0, 1.0]))  # first sighting: the mean's direction
    torch.testing.assert_close(result[0, 2], visual[0, 2])  # not in the batch: untouched


def test_the_pace_is_mu_for_the_commonest_pseudo_label_and_less_for_others():
    prior = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    result = fitting_pace(prior, torch.tensor([0.1, 0.4]), "pseudo-label")
    torch.testing.assert_close(result, torch.tensor([[0.1, 0.05, 0.05], [0.05, 0.05, 0.4]]))
    constant = fitting_pace(prior, torch.tensor([0.1, 0.4]), "constant")
    torch.testing.assert_close(constant, torch.tensor([[0.1] * 3, [0.4] * 3]))


def test_prototypes_move_by_alpha_and_unseen_classes_keep_theirs():
    textual = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    visual = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    result = fit_prototypes(textual, visual, torch.tensor([[0.5, 0.5]]), torch.tensor([[True, False]]))
    torch.testing.assert_close(result[0, 0], torch.tensor([1.0, 1.0]) / 2**0.5)
    torch.testing.assert_close(result[0, 1], textual[0, 1])


def test_orthogonality_is_zero_for_an_orthogonal_set_and_known_for_equal_ones():
    assert orthogonality(torch.eye(3).unsqueeze(0)).item() == pytest.approx(0, abs=1e-6)
    # two equal unit vectors: off-diagonal ones, 2 of 4 entries
    assert orthogonality(torch.ones(1, 2, 4)).item() == pytest.approx(0.5, abs=1e-6)


def test_orthogonality_gradcheck():
    torch.manual_seed(0)
    prototypes = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(orthogonality, (prototypes,))


def test_the_soft_prior_is_a_running_mean():
    prior = torch.tensor([[0.5, 0.5]])
    probabilities = torch.tensor([[[0.9, 0.1], [0.7, 0.3]]])
    result = move_prior(prior, probabilities, torch.zeros(1, 2), torch.tensor([0.9]), "soft")
    torch.testing.assert_close(result, torch.tensor([[0.9 * 0.5 + 0.1 * 0.8, 0.9 * 0.5 + 0.1 * 0.2]]))


def test_the_hard_prior_counts_kept_labels_and_stands_still_without_any():
    prior = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    probabilities = torch.tensor([[[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]]).repeat(2, 1, 1)
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    result = move_prior(prior, probabilities, mask, torch.tensor([0.9, 0.9]), "hard")
    torch.testing.assert_close(result, torch.tensor([[0.55, 0.45], [0.5, 0.5]]))
