import math

import pytest

from benchmarks.comparison.cells import parse_cell
from benchmarks.comparison.tables import Rows, print_tables
from ulfine_fast.metrics.intervals import mean_interval

CELL = parse_cell("fashion_mnist:150:uniform")
OTHER = parse_cell("digits:40:reversed")

ACCURACY = {
    "linear_probe": [0.60, 0.62, 0.64],
    "fixmatch": [0.66, 0.70, 0.62],
    "ulfine": [0.70, 0.72, 0.71],
    "oracle": [0.80, 0.82, 0.81],
}


def made(cell=CELL):
    return [
        {
            "cell": cell.name,
            "method": method,
            "seed": seed,
            "balanced_accuracy": value,
            "tail_accuracy": value - 0.1,
            "ece": 0.05 if method == "ulfine" else 0.08,
            "confidence_on_false": None if method == "oracle" else 0.5,
            "seconds": 1.5,
        }
        for method, values in ACCURACY.items()
        for seed, value in enumerate(values)
    ]


@pytest.fixture
def rows():
    return Rows(made())


def test_means_are_over_seeds(rows):
    assert rows.mean(CELL, "linear_probe") == pytest.approx(0.62)
    assert math.isnan(rows.mean(CELL, "oracle", "confidence_on_false"))
    assert math.isnan(rows.mean(OTHER, "ulfine"))


def test_the_best_other_is_by_mean(rows):
    assert rows.best(CELL, ["linear_probe", "fixmatch"]) == "fixmatch"
    assert rows.best(OTHER, ["linear_probe"]) is None


def test_differences_are_paired_over_seeds(rows):
    gap = rows.difference(CELL, "ulfine", "fixmatch")
    by_hand = mean_interval([0.04, 0.02, 0.09])
    assert (gap.mean, gap.half) == pytest.approx((by_hand.mean, by_hand.half))


def test_the_way_from_the_probe_to_the_oracle(rows):
    assert rows.recovered(CELL, "linear_probe") == 0
    assert rows.recovered(CELL, "oracle") == 1
    assert rows.recovered(CELL, "ulfine") == pytest.approx(0.09 / 0.19)
    assert math.isnan(rows.recovered(OTHER, "ulfine"))


def printed(capsys, rows, cells, methods, against):
    print_tables(rows, cells, methods, against)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]


def test_the_tables_hold_the_metrics(rows, capsys):
    lines = printed(capsys, rows, [CELL], list(ACCURACY), "ulfine")
    assert ["method", "150 uniform"] in lines
    assert ["linear_probe", "62.0 ±5.0"] in lines
    [line] = [line for line in lines if line[0] == "150 uniform"]
    assert line[1:7] == ["71.0 ±2.5", "fixmatch", "66.0", "+5.0 ±9.0", "no", "47%"]
    assert line[7:] == ["+9.0", "50.0", "5.0", "8.0", "1.5"]


def test_each_data_set_has_its_tables(capsys):
    lines = printed(capsys, Rows(made() + made(OTHER)), [CELL, OTHER], list(ACCURACY), "ulfine")
    titles = [line[0] for line in lines if line[0].startswith(("digits", "fashion"))]
    assert [title.split(":")[0] for title in titles] == ["fashion_mnist"] * 2 + ["digits"] * 2


def test_one_method_is_compared_with_no_other(rows, capsys):
    lines = printed(capsys, rows, [CELL], ["ulfine"], "ulfine")
    assert ["ulfine", "71.0 ±2.5"] in lines
    assert not any("best other" in line for line in lines)


def test_a_single_seed_has_no_interval(capsys):
    one = Rows([row for row in made() if row["seed"] == 0])
    lines = printed(capsys, one, [CELL], list(ACCURACY), "ulfine")
    assert ["ulfine", "70.0"] in lines
    [line] = [line for line in lines if line[0] == "150 uniform"]
    assert line[4:6] == ["+4.0", "-"]


def test_without_probe_and_oracle_there_is_no_way_to_measure(capsys):
    few = Rows([row for row in made() if row["method"] in ("ulfine", "fixmatch")])
    [line] = [
        line for line in printed(capsys, few, [CELL], ["fixmatch", "ulfine"], "ulfine") if line[0] == "150 uniform"
    ]
    assert line[6:8] == ["-", "-"]
