from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from markupsafe import Markup

from ulfine_fast.metrics.calibration import reliability
from ulfine_fast.report.charts import Series, binned, class_chart, legend_mark, line_chart, reliability_chart
from ulfine_fast.report.svg import Frame, clip, line, marker, number_ticks, spread, tag


def parsed(markup: Markup) -> ET.Element:
    """The drawing as XML, which also shows that it is well formed."""
    return ET.fromstring(str(markup))


def texts(root: ET.Element) -> list[str]:
    return ["".join(node.itertext()) for node in root.iter("text")]


def line_of(values: list[float], slot: int = 0, label: str = "ulfine") -> Series:
    return Series(label, slot, np.arange(len(values), dtype=float), np.array(values))


def test_tags_escape_children_and_attributes() -> None:
    made = tag("text", "<script>", tag("b", "&"), x=1.50, class_='"><i>')
    assert made == '<text x="1.5" class="&#34;&gt;&lt;i&gt;">&lt;script&gt;<b>&amp;</b></text>'


def test_braces_in_names_are_text() -> None:
    assert tag("text", "{0} {name}", title="{1}") == '<text title="{1}">{0} {name}</text>'


def test_a_frame_puts_the_range_on_its_edges() -> None:
    frame = Frame(200, 100, 20, 30, 5, 15, 0.0, 10.0)
    assert (frame.x(0), frame.x(10), frame.x(5)) == (20, 170, 95)
    assert (frame.y(0), frame.y(1)) == (85, 5)


def test_a_range_of_one_value_does_not_divide_by_zero() -> None:
    assert Frame(200, 100, 20, 30, 5, 15, 7.0, 7.0).x(7.0) == 20


def test_a_line_breaks_where_it_is_undefined() -> None:
    frame = Frame(100, 100, 0, 0, 0, 0, 0.0, 4.0)
    path = line(frame, np.arange(5.0), np.array([0.0, 1.0, math.nan, 0.5, 0.5]), 2)
    assert path == '<path d="M0.0,100.0L25.0,0.0 M75.0,50.0L100.0,50.0" class="line s2"></path>'
    assert line(frame, np.arange(2.0), np.array([math.nan, math.nan]), 0) == ""


def test_slots_differ_by_shape_and_not_only_by_colour() -> None:
    shapes = {str(marker(10, 10, slot)).replace(f"s{slot}", "") for slot in range(6)}
    assert len(shapes) == 6


@pytest.mark.parametrize("wanted", [[50.0, 51.0, 52.0], [99.0, 99.0, 99.0], [0.0, 0.0, 0.0], [80.0, 10.0, 12.0]])
def test_labels_keep_their_distance_and_order(wanted: list[float]) -> None:
    placed = spread(wanted, 14, 0, 100)
    ordered = [placed[i] for i in sorted(range(3), key=lambda i: wanted[i])]
    assert all(b - a >= 14 - 1e-9 for a, b in itertools.pairwise(ordered))
    assert min(placed) >= 0
    assert max(placed) <= 100


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (50, 500, ["200", "400"]),
        (1, 10, ["5", "10"]),
        (1, 2, ["1", "2"]),
        (0, 15000, ["0", "5,000", "10,000", "15,000"]),
        (5, 5, ["5"]),
    ],
)
def test_ticks_are_round_whole_numbers(low: float, high: float, wanted: list[str]) -> None:
    assert [text for _, text in number_ticks(low, high)] == wanted


def test_clip() -> None:
    assert (clip("shirt", 5), clip("shirts", 5)) == ("shirt", "shir…")


def test_the_class_chart_draws_accuracy_and_counts() -> None:
    chart = parsed(
        class_chart([line_of([0.9, 0.5, math.nan])], np.array([100.0, 10.0, 2.0]), ["a", "b", "<c>"], "sum", "class")
    )
    assert chart.get("role") == "img"
    assert chart.find("title").text == "sum"
    assert {"100", "10", "2"} <= set(texts(chart))
    tips = [node.find("title").text for node in chart.iter("circle")]
    assert tips == ["ulfine: 90.0", "ulfine: 50.0"]
    bars = [float(node.get("height")) for node in chart.iter("rect")]
    heights = [math.log1p(n) / math.log1p(100) * 64 for n in (100, 10, 2)]
    assert bars == pytest.approx(heights, abs=0.01)


def test_untrusted_labels_stay_text_in_a_chart() -> None:
    chart = line_chart("t", [line_of([0.1, 0.2], label="<script>alert(1)</script>")], "step")
    assert "<script" not in chart
    assert any("<script>" in text for text in texts(parsed(chart)))


def test_a_chart_speaks_its_last_values() -> None:
    chart = parsed(line_chart("precision", [line_of([0.1, 0.25, math.nan])], "step"))
    assert chart.find("title").text == "precision: ulfine ends at 25.0 percent"


def test_a_line_chart_of_one_evaluation_is_a_marker() -> None:
    chart = parsed(line_chart("rate", [line_of([0.4])], "step"))
    assert len(list(chart.iter("circle"))) == 1


def test_the_reliability_chart_has_a_dot_per_filled_bin() -> None:
    bins = reliability(np.array([0.21, 0.25, 0.95]), np.array([True, False, True]))
    chart = parsed(reliability_chart("before", bins))
    tips = [group.find("title").text for group in chart.iter("g")]
    assert tips == ["confidence 23.0, accuracy 50.0, 2 rows", "confidence 95.0, accuracy 100.0, 1 rows"]
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in chart.iter("circle")]
    # plotting area: x from 36 to 368, y from 284 (0) to 26 (1)
    assert dots == [pytest.approx((36 + 0.23 * 332, 155), abs=0.01), pytest.approx((36 + 0.95 * 332, 26), abs=0.01)]


def test_neighbouring_ranks_are_averaged_without_undefined_ones() -> None:
    values = np.array([1.0, 3.0, math.nan, 5.0, math.nan, math.nan])
    np.testing.assert_array_equal(binned(values, 3), [2.0, 5.0, math.nan])
    np.testing.assert_array_equal(binned(values, 10), values)


def test_legend_marks_are_decoration() -> None:
    assert parsed(legend_mark(3)).get("aria-hidden") == "true"
