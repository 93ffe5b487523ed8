from __future__ import annotations

import numpy as np
import pytest
import torch

from ulfine_fast.ops.philox import Purpose, integers, normals, philox, uniforms, words

# The known-answer vectors published with Random123 for philox4x32-10: counter, key, result.
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
SEEDS = torch.tensor([0, 1, 7, 2**31 - 1])
STEPS = torch.arange(5)


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN)
def test_known_answers(counter, key, wanted):
    assert philox(torch.tensor(counter), torch.tensor(key)).tolist() == wanted


def slow_philox(counter, key):
    """The rounds as published, in Python integers, one word at a time."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ k[0], second % 2**32, (first >> 32) ^ c[3] ^ k[1], first % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def test_words_are_philox_of_block_step_purpose_and_seed():
    result = words(SEEDS, STEPS, Purpose.UNLABELED, 6)
    assert result.shape == (5, 4, 6)
    for s, step in enumerate(STEPS.tolist()):
        for t, seed in enumerate(SEEDS.tolist()):
            blocks = [slow_philox([n, step, int(Purpose.UNLABELED), 0], [seed, 0]) for n in range(2)]
            assert result[s, t].tolist() == (blocks[0] + blocks[1])[:6]


def test_a_trial_draws_the_same_whatever_its_neighbours():
    together = words(SEEDS, STEPS, Purpose.LABELED, 9)
    alone = words(SEEDS[2:3], STEPS[3:4], Purpose.LABELED, 9)
    torch.testing.assert_close(alone[0, 0], together[3, 2], rtol=0, atol=0)


def test_purposes_are_different_streams():
    drawn = {tuple(words(SEEDS[:1], STEPS[:1], purpose, 8).flatten().tolist()) for purpose in Purpose}
    assert len(drawn) == len(Purpose)


def test_integers_stay_below_each_trials_bound_and_are_even():
    below = torch.tensor([1, 2, 10, 1000])
    drawn = integers(SEEDS, torch.arange(200), Purpose.LABELED, 50, below)
    assert (drawn >= 0).all()
    assert (drawn < below.view(1, -1, 1)).all()
    assert set(drawn[:, 2].flatten().tolist()) == set(range(10))
    fractions = np.bincount(drawn[:, 2].flatten().numpy()) / 10_000
    # a binomial fraction of 10,000 draws has deviation 0.003
    np.testing.assert_allclose(fractions, 0.1, atol=0.015)


def test_normals_have_the_right_moments_and_repeat():
    drawn = normals(SEEDS, 3, Purpose.WEIGHTS, 20_000)
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn.mean(1), torch.zeros(4), rtol=0, atol=0.03)
    torch.testing.assert_close(drawn.std(1), torch.ones(4), rtol=0, atol=0.03)
    torch.testing.assert_close(normals(SEEDS[1:2], 3, Purpose.WEIGHTS, 20_000)[0], drawn[1], rtol=0, atol=0)
    assert not torch.equal(drawn, normals(SEEDS, 4, Purpose.WEIGHTS, 20_000))


def test_uniforms_are_the_words_moved_into_the_open_interval():
    drawn = uniforms(SEEDS, 2, Purpose.FOLDS, 7)
    assert drawn.dtype == torch.float64
    wanted = (words(SEEDS, torch.tensor([2]), Purpose.FOLDS, 7)[0].double() + 0.5) / 2**32
    assert torch.equal(drawn, wanted)
    assert torch.equal(uniforms(SEEDS[1:3], 2, Purpose.FOLDS, 5), drawn[1:3, :5])


def test_uniforms_fill_the_interval_and_never_reach_its_ends():
    drawn = uniforms(SEEDS, 0, Purpose.FOLDS, 20_000)
    assert 0 < drawn.min() < 1e-3
    assert 1 - 1e-3 < drawn.max() < 1
    torch.testing.assert_close(drawn.mean(1), torch.full((4,), 0.5, dtype=torch.double), rtol=0, atol=0.01)
    # the smallest and the largest word
    assert (torch.tensor([0, 2**32 - 1]).double() + 0.5).div(2.0**32).tolist() == [2.0**-33, 1 - 2.0**-33]
