"""The table of predictions: its columns, and files that cannot be written."""

from __future__ import annotations

import csv

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.cli.program import refused
from ulfine_fast.cache.io.errors import InputError
from ulfine_fast.runs.predict import Predictions, mean_of_logits, refuse_output, write_predictions

PREDICTIONS = Predictions(
    ids=["a.png", "b.png"],
    probabilities=np.array([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4]], dtype=np.float32),
    class_names=["cat", "dog", "eel"],
    skipped=[],
)


def test_both_formats_hold_the_same_table(tmp_path):
    for suffix in (".csv", ".parquet"):
        write_predictions(PREDICTIONS, tmp_path / "new" / f"table{suffix}")
    table = pq.read_table(tmp_path / "new" / "table.parquet").to_pydict()
    assert table["id"] == ["a.png", "b.png"]
    # of equals the first class
    assert (table["class"], table["class_2"], table["class_3"]) == (["dog", "cat"], ["eel", "eel"], ["cat", "dog"])
    assert table["probability"] == [0.5, 0.4]
    with (tmp_path / "new" / "table.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {name: [row[name] for row in rows] for name in rows[0]} == {
        name: [str(value) for value in values] for name, values in table.items()
    }


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.csv").mkdir()
    for path, sentence in (
        (tmp_path / "table.tsv", "out must end in .csv or .parquet, got 'table.tsv'"),
        (tmp_path / "folder.csv", "is a folder; name a file"),
        (tmp_path / "file" / "table.csv", "is no folder that can be written"),
        (tmp_path / "file" / "deeper" / "table.csv", "is no folder that can be written"),
    ):
        with pytest.raises(InputError, match=sentence):
            refuse_output(path)
        with pytest.raises(InputError, match=sentence):
            write_predictions(PREDICTIONS, path)
    refuse_output(tmp_path / "new" / "deeper" / "table.csv")
    assert not (tmp_path / "new").exists()


def test_the_command_refuses_it_before_it_reads_the_run(tmp_path):
    sentence = refused("predict", tmp_path / "no run", tmp_path / "no images", "--out", tmp_path / "table.tsv")
    assert "out must end in .csv or .parquet" in sentence


def test_mean_of_logits_by_hand():
    logits = np.random.default_rng(0).normal(size=(3, 4, 5))
    probabilities = [np.exp(each) / np.exp(each).sum(1, keepdims=True) for each in logits]
    expected = np.exp(logits.mean(0)) / np.exp(logits.mean(0)).sum(1, keepdims=True)
    np.testing.assert_allclose(mean_of_logits(probabilities), expected, atol=1e-6)
    assert mean_of_logits(probabilities[:1]) is probabilities[0]
