import pytest

from benchmarks.results import gap_text, grouped, interval_text, mean_and_gap, mean_text, print_table, where, write_json
from ulfine_fast.metrics.intervals import mean_interval

ROWS = [
    {"method": method, "seed": seed, "accuracy": value, "few": few}
    for method, values in (("probe", [(0.2, None), (0.6, 0.1)]), ("ours", [(0.3, 0.5), (0.7, 0.3)]))
    for seed, (value, few) in enumerate(values)
]
PROBE, OURS = ROWS[:2], ROWS[2:]


def test_rows_are_grouped_in_the_order_they_come_in():
    assert grouped(ROWS, "method") == {("probe",): PROBE, ("ours",): OURS}
    assert list(grouped(ROWS, "seed", "method")) == [(0, "probe"), (1, "probe"), (0, "ours"), (1, "ours")]
    assert where(ROWS, method="ours", seed=1) == [ROWS[3]]


def test_means_are_over_the_rows_that_have_the_metric():
    assert mean_text(PROBE, "accuracy") == "40.0"
    assert mean_text(PROBE, "few", factor=1.0, digits=2) == "0.10"
    assert mean_text(PROBE, "seconds") == "-"
    assert mean_text(OURS, "accuracy", half=True).startswith("50.0 ±2")


def test_gaps_are_paired():
    assert gap_text(OURS, PROBE, "accuracy") == "+10.0 ±0.0"
    assert gap_text(OURS, PROBE, "accuracy", digits=2) == "+10.00 ±0.00"
    assert gap_text(PROBE, PROBE, "accuracy") == gap_text(OURS, [], "accuracy") == ""
    # one seed lacks the metric, and a single pair has no interval
    assert gap_text(OURS, PROBE, "few") == "+20.0"
    assert mean_and_gap(OURS, PROBE, "accuracy") == "50.0 (+10.0 ±0.0)"
    assert mean_and_gap(PROBE, PROBE, "accuracy") == "40.0"
    assert mean_and_gap(OURS, PROBE, "seconds") == "-"


def test_intervals_as_text():
    assert interval_text(None) == "-"
    assert interval_text(mean_interval([0.5]), sign=True) == "+50.0"
    assert interval_text(mean_interval([1.0, 3.0]), factor=1.0, digits=0) == "2 ±13"
    assert interval_text(mean_interval([1.0, 3.0]), factor=1.0, half=False) == "2.0"


def test_numbers_that_json_lacks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "rows.json", [float("nan")])
    assert not (tmp_path / "rows.json").exists()


def test_a_plain_table_has_texts_left_and_numbers_right(capsys):
    print_table(["shape", "who", "rate"], [["S1", "eager", "7"], ["S2", "a longer one", "1200"]], texts=2)
    first, second = [line for line in capsys.readouterr().out.splitlines() if "S" in line]
    assert [cell.strip() for cell in first.strip("|").split("|")] == ["S1", "eager", "7"]
    assert first.split("|")[2].startswith(" eager ")
    assert first.rstrip("|").endswith("   7")
    assert len(first) == len(second)
