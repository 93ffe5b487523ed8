"""Trial batches on Ray: two nodes started here, one of them killed while it works."""

from __future__ import annotations

import sys
import threading

import pytest

from tests.conftest import make_clusters
from ulfine_fast import InputError, sweep
from ulfine_fast.search.on_ray import RayWorkers
from ulfine_fast.search.study import SweepStudy


def count_checkpoints(folder):
    """Batches that have saved a checkpoint and are not finished."""
    return len(list(folder.glob(".checkpoint/*/batch-*.safetensors")))


def test_a_batch_of_a_killed_node_is_redone_by_the_other(cluster, tmp_path):
    nodes, second = cluster
    outcome = {}
    settings = {"method": "linear_probe", "n1": 30, "gamma_l": 10.0, "steps": 1500, "eval_every": 75}
    options = {"out": tmp_path / "sweep", "trials": 5, "batch": 1, "sampler": "random", "refit": 0}

    def work():
        workers = RayWorkers(nodes.address, cpus=1)
        outcome["result"] = sweep(
            make_clusters(), {**settings, "lr": {"low": 0.01, "high": 0.1}}, ray=workers, **options
        )

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive() and count_checkpoints(tmp_path / "sweep") < 2:
        thread.join(0.05)
    assert thread.is_alive(), "the sweep ended before both nodes worked"
    nodes.remove_node(second, allow_graceful=False)
    thread.join()
    result = outcome["result"]
    assert result.counts == {"complete": 5}
    numbers = [trial.user_attrs["share"]["number"] for trial in result.study.trials]
    assert sorted(numbers) == list(range(5))


def test_a_cluster_that_cannot_be_reached(monkeypatch, clusters, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed (extra ray)")
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setitem(sys.modules, "ray", Unreachable())
    with pytest.raises(InputError, match=r"cannot reach Ray at .auto. .no one answers.; start it with `ray start`"):
        sweep(clusters, out=tmp_path / "sweep", trials=2, ray=RayWorkers("auto"))


class Unreachable:
    """Ray without a cluster."""

    def is_initialized(self):
        return False

    def init(self, **_options):
        raise ConnectionError("no one answers")


def test_without_ray_the_extra_is_named(monkeypatch, clusters, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(InputError, match=r'pip install "ulfine-fast\[ray\]"'):
        sweep(clusters, out=tmp_path / "sweep", trials=2, ray=RayWorkers())


def test_a_trial_finished_twice_keeps_its_first_values(clusters, tmp_path, monkeypatch):
    real = SweepStudy.finish

    def twice(study, number, records):
        real(study, number, records)
        real(study, number, [{**record, "seconds": 0.0, "val": {"balanced_accuracy": 0.0}} for record in records])

    monkeypatch.setattr(SweepStudy, "finish", twice)
    options = {"out": tmp_path / "sweep", "trials": 2, "sampler": "random", "refit": 0}
    result = sweep(clusters, {"method": "linear_probe", "steps": 5, "lr": {"low": 0.01, "high": 0.1}}, **options)
    assert all(trial.values != [0.0] for trial in result.study.trials)
    assert all(trial.user_attrs["seeds"][0]["seconds"] > 0 for trial in result.study.trials)
