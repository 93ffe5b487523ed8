from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks.studies import class_incremental, realign
from benchmarks.studies.class_incremental import Learner, Pace, World, arrive
from tests.benchmarks.program import run_command
from tests.conftest import make_clusters
from ulfine_fast.cache.io.errors import InputError

PACE = Pace(0.03, 0.03, 20)


@pytest.fixture
def clusters(monkeypatch):
    """Any name opens six classes of features."""
    cache = make_clusters(classes=6, dim=16, train=30, test=8, noise=0.8, text_noise=1.5)
    for module in (realign, class_incremental):
        monkeypatch.setattr(module, "open_features", lambda name: cache)
    return cache


def test_every_way_is_in_the_table(clusters, tmp_path):
    done = run_command(realign.realigned, "--n1", 20, "--gamma", 5, "--seeds", "0,1", "--json", tmp_path / "rows.json")
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "rows.json").read_text())
    # before, adjust, and four kappas and the chosen one by two ways; two heads, two seeds
    assert len(rows) == (2 + 2 * 5) * 2 * 2
    for head in realign.HEADS:
        for seed in (0, 1):
            own = [row for row in rows if (row["head"], row["seed"], row["by"]) == (head, seed, "lda")]
            best = max(row["val"] for row in own if row["kappa"] != "chosen")
            assert own[-1]["val"] == best
    lines = realign.table(rows)
    gain = np.mean([b["few"] - a["few"] for a, b in zip(rows[:2], rows[2:4], strict=True)])
    assert lines[1][:2] == ["cross_entropy", "adjust"]
    assert lines[1][-1].startswith(f"{100 * gain:+.1f} ")


def test_joined_classes_do_not_share_labels(clusters):
    world = World.join(["one", "two"], train_images=10)
    assert torch.bincount(world.train_labels).tolist() == [10] * 12
    assert torch.bincount(world.test_labels).tolist() == [8] * 12
    assert torch.equal(world.text[:6], world.text[6:])
    with pytest.raises(InputError, match="30 training images, fewer than the 40"):
        World.join(["one"], train_images=40)


def test_a_task_moves_its_own_classes_alone(clusters):
    world = World.join(["one"], train_images=10)
    learner = Learner(world, torch.tensor([[3, 1, 0, 2, 4, 5]]), torch.tensor([0]))
    learner.train(0, 2, PACE, 0)
    moved = (learner.head[0] != world.text).any(1)
    assert moved.nonzero().squeeze(1).tolist() == [1, 3]
    learner.remember(0, 2)
    assert (learner.means[0] != 0).any(1).nonzero().squeeze(1).tolist() == [1, 3]
    rows = learner._adapted(world.train[world.train_labels == 3][None])[0]
    np.testing.assert_allclose(learner.means[0, 3], rows.mean(0), atol=1e-6)


def test_only_classes_seen_are_tested_and_predicted(clusters):
    world = World.join(["one"], train_images=10)
    learner = Learner(world, torch.tensor([[3, 1, 0, 2, 4, 5]]), torch.tensor([0]))
    known = torch.isin(world.test_labels, torch.tensor([1, 3]))
    scores = world.test[known] @ world.text[[1, 3]].T
    wanted = (torch.tensor([1, 3])[scores.argmax(1)] == world.test_labels[known]).float().mean()
    assert learner.accuracy(2, learner.head)[0].item() == pytest.approx(wanted.item())


def test_seeds_do_not_influence_each_other(clusters):
    world = World.join(["one"], train_images=10)
    rows = arrive(world, [0, 1], 3, PACE, 0.0)
    alone = arrive(world, [1], 3, PACE, 0.0)
    assert [row for row in rows if row["seed"] == 1] == alone
    assert {row["arm"] for row in rows} == set(class_incremental.ARMS)
    for row in rows:
        assert row["average"] == pytest.approx(np.mean(row["stages"]))
        assert row["last"] == row["stages"][-1]


def test_tasks_that_do_not_divide_are_refused(clusters):
    done = run_command(class_incremental.class_incremental, "--data", "one", "--tasks", 4, "--each", 10)
    assert done.exit_code == 2
    assert "6 classes do not make 4 tasks" in done.stderr
