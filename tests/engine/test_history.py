from __future__ import annotations

import numpy as np

from ulfine_fast.engine.history import History


def metrics_of(*values):
    return {
        "loss": np.array(values),
        "pseudo_label_rate": np.array(values),
        "by_class": np.outer(values, [1.0, np.nan]),
    }


def test_rows_are_those_that_a_trial_saw():
    history = History([True, False, True])
    history.add(10, [0, 1, 2], metrics_of(1.0, 2.0, 3.0))
    history.add(20, [0, 2], metrics_of(4.0, np.nan))
    assert history.rows_of(0)[1] == {"step": 20, "loss": 4.0, "pseudo_label_rate": 4.0, "by_class": [4.0, None]}
    assert history.rows_of(1) == [{"step": 10, "loss": 2.0}]
    assert history.row(2, -1) == {"step": 20, "loss": None, "pseudo_label_rate": None, "by_class": [None, None]}


def test_a_history_restored_is_the_one_saved():
    history, other = History([True, True]), History([True, True])
    history.add(10, [0, 1], metrics_of(1.0, 2.0))
    history.add(20, [1], metrics_of(5.0))
    other.restore(history.steps, history.rows.tolist(), history.arrays())
    assert [other.rows_of(t) for t in range(2)] == [history.rows_of(t) for t in range(2)]
