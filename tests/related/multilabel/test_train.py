from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.related.multilabel.worlds import NAMES, hidden, make_images
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.related.multilabel.labels import LabelTable
from ulfine_fast.related.multilabel.run import MultiLabelRun
from ulfine_fast.related.multilabel.settings import METHODS, MultiLabelConfig
from ulfine_fast.related.multilabel.train import fit_labels


@pytest.fixture(scope="module")
def world():
    cache, truth = make_images()
    return cache, truth, hidden(cache, truth)


def config(**values):
    return MultiLabelConfig(**{"steps": 60, "batch": 32, "lr": 0.3, "start": "random", **values})


@pytest.mark.parametrize("values", [*({"method": name} for name in METHODS), {"balance": False}], ids=str)
def test_every_method_learns(world, values):
    cache, truth, table = world
    [run] = fit_labels(cache, table, [config(**values)], progress=False)
    chance = truth[120:].mean(0).mean()
    assert run.metrics["map"] > chance + 0.3
    assert run.metrics["class_counts"] == (table.values[:120] == 1).sum(0).tolist()
    assert run.metrics["rows"] == {"train": 120, "val": 0, "test": 120}
    assert run.metrics["val"] is None
    assert run.roles[0] == "train"
    assert run.roles[-1] == "test"


@pytest.mark.parametrize("method", METHODS)
def test_trials_do_not_see_their_neighbours(world, method):
    cache, _, table = world
    configs = [config(method=method, seed=3, steps=12), config(method=method, seed=4, steps=12, lr=0.1, scale=8.0)]
    both = fit_labels(cache, table, configs, progress=False)
    alone = [fit_labels(cache, table, [one], progress=False)[0] for one in configs]
    for together, single in zip(both, alone, strict=True):
        for name, tensor in single.tensors.items():
            assert torch.equal(together.tensors[name], tensor)
    assert not torch.equal(both[0].tensors["weights"], both[1].tensors["weights"])


def test_structural_settings_make_groups_of_their_own(world):
    cache, _, table = world
    configs = [config(method=name, steps=5) for name in ("bce", "comic", "bce")]
    runs = fit_labels(cache, table, configs, progress=False)
    assert [run.config.method for run in runs] == ["bce", "comic", "bce"]
    assert torch.equal(runs[0].tensors["weights"], runs[2].tensors["weights"])


def test_restored_labels_are_right_more_often_than_not(world):
    cache, truth, table = world
    [run] = fit_labels(cache, table, [config(steps=300)], progress=False)
    assert len(run.restored) == run.metrics["restored"] > 10
    rows = {name: row for row, name in enumerate(cache.ids)}
    right = [truth[rows[one.id], NAMES.index(one.class_name)] for one in run.restored]
    unknown = truth[:120][table.values[:120] < 0]
    assert np.mean(right) > 0.5 > 2 * unknown.mean()
    assert all(table.values[rows[one.id], NAMES.index(one.class_name)] == -1 for one in run.restored)
    assert fit_labels(cache, table, [config(correction=0.0, steps=5)], progress=False)[0].restored == []


def test_unknown_labels_can_be_ignored(world):
    cache, truth, _ = world
    labels = truth.copy()
    labels[60:120, 0] = -1  # no one looked
    table = LabelTable(NAMES, list(cache.ids), labels)
    negative, ignored = fit_labels(
        cache, table, [config(method="bce", unknown=how) for how in ("negative", "ignore")], progress=False
    )
    shown = [run.predictions[120:, 0].mean() for run in (negative, ignored)]
    assert abs(shown[1] - truth[120:, 0].mean()) < abs(shown[0] - truth[120:, 0].mean())
    assert negative.metrics["unknown_share"] == ignored.metrics["unknown_share"] == 0.1


def test_where_it_starts(world):
    cache, _, table = world
    [run] = fit_labels(cache, table, [config(start="auto", lr=0.0, steps=1)], progress=False)
    torch.testing.assert_close(run.tensors["weights"], torch.from_numpy(cache.prototypes), atol=1e-6, rtol=1e-5)
    assert run.tensors["bias"].tolist() == [-3.0] * 5
    other = LabelTable([*NAMES[:4], "unnamed"], table.ids, table.values)
    with pytest.raises(InputError, match="no text for 'unnamed'"):
        fit_labels(cache, other, [config(start="text")], progress=False)
    one, two = fit_labels(cache, other, [config(start="auto", lr=0.0, steps=1, seed=s) for s in (0, 1)], progress=False)
    assert not torch.equal(one.tensors["weights"], two.tensors["weights"])
    assert float(one.tensors["weights"].norm(dim=1).mean()) == pytest.approx(1, abs=0.2)


def test_divergence_is_refused(world):
    cache, _, table = world
    with pytest.raises(InputError, match="seed 0 of bce diverged; lower lr"):
        fit_labels(cache, table, [config(method="bce", lr=1e38, weight_decay=1e5, steps=4)], progress=False)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_run_folder(world, tmp_path, suffix):
    cache, _, table = world
    [run] = fit_labels(cache, table, [config(steps=5)], progress=False)
    run.save(tmp_path / "run", table=suffix)
    again = MultiLabelRun.load(tmp_path / "run")
    assert again.config == run.config
    assert again.metrics == run.metrics
    np.testing.assert_array_equal(again.probabilities(cache.plain), run.predictions)
    with pytest.raises(InputError, match="shape"):
        again.probabilities(cache.plain[:, :3])
    with pytest.raises(InputError, match="finite"):
        again.probabilities(cache.plain * np.float32(np.nan))
    with pytest.raises(InputError, match="no multi-label run"):
        MultiLabelRun.load(tmp_path)
