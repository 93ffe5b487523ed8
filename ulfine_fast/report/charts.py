"""The page's charts as inline SVG, drawn from plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from ulfine_fast.metrics.calibration import Reliability
from ulfine_fast.report.svg import (
    Frame,
    band,
    bottom_axis,
    clip,
    drawing,
    line,
    marker,
    number_ticks,
    percent_axis,
    spread,
    tag,
)

SLOTS = 6
"""Colours and markers that every reader can tell apart: the most lines in a chart."""

_NAMED_CLASSES = 30  # classes up to which a map has their names
_CHARACTER = 6.4  # mean width of a character


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart.

    Attributes:
        label: name of the line.
        slot: number of its colour and marker, 0..5.
        x: positions (n,).
        y: values (n,) in 0..1, NaN where not defined.
        low: least value over the seeds (n,), None without a range.
        high: largest value over the seeds (n,), None without a range.
    """

    label: str
    slot: int
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None

    @property
    def last(self) -> tuple[float, float] | None:
        """The last defined point; None without any."""
        defined = np.flatnonzero(np.isfinite(self.y))
        return (float(self.x[defined[-1]]), float(self.y[defined[-1]])) if len(defined) else None


def class_chart(series: Sequence[Series], counts: np.ndarray, ticks: Sequence[str], summary: str, axis: str) -> Markup:
    """Accuracy per class above the labelled images of the same class.

    Args:
        series: accuracy at x = 0..n-1, classes from most to fewest labelled images.
        counts: labelled images (n,), the mean where seeds or neighbouring classes are averaged.
        ticks: label of each position, n of them; "" for none.
        summary: read out instead of the chart.
        axis: meaning of the positions.
    """
    n = len(counts)
    frame = Frame(width=1080, height=400, left=44, right=150, top=26, bottom=112, x0=-0.5, x1=n - 0.5)
    column = frame.x(1) - frame.x(0)
    parts = [percent_axis(frame), tag("text", "accuracy, %", x=0, y=11, class_="axis")]

    # bars of log(1 + count): on a linear scale those of the tail would have no height
    counts = np.nan_to_num(counts)
    largest = math.log1p(max(1.0, float(counts.max())))
    below = Frame(width=1080, height=400, left=44, right=150, top=300, bottom=36, x0=-0.5, x1=n - 0.5, y1=largest)
    bar = min(34.0, 0.7 * column)
    parts.append(tag("text", "labelled (log)", x=below.width - below.right + 10, y=352, class_="tick"))
    for i, count in enumerate(counts.tolist()):
        top = below.y(math.log1p(count))
        parts.append(tag("rect", x=below.x(i) - bar / 2, y=top, width=bar, height=below.y(0) - top, class_="count"))
        if bar >= 16:
            text = f"{count:.0f}" if count >= 10 or count == round(count) else f"{count:.1f}"
            parts.append(tag("text", text, x=below.x(i), y=top - 3, class_="tick middle"))

    # labels of the positions
    length = max(3, int(column / _CHARACTER))
    for i, text in enumerate(ticks):
        if text:
            tooltip = tag("title", text)
            parts.append(tag("text", tooltip, clip(text, length), x=frame.x(i), y=379, class_="tick middle isolate"))

    # lines, with a marker at every defined point
    for s in series:
        parts.append(line(frame, s.x, s.y, s.slot))
        for x, y in zip(s.x.tolist(), s.y.tolist(), strict=True):
            if math.isfinite(y):
                parts.append(marker(frame.x(x), frame.y(y), s.slot, title=f"{s.label}: {100 * y:.1f}"))

    middle = (frame.left + frame.width - frame.right) / 2
    parts += [tag("text", axis, x=middle, y=396, class_="axis middle"), _end_labels(frame, series, 20)]
    return drawing(frame, summary, *parts)


def line_chart(title: str, series: Sequence[Series], axis: str) -> Markup:
    """A small chart of fractions over steps or ranks.

    Args:
        title: shown inside the chart.
        series: the lines.
        axis: meaning of x.
    """
    low, high = min(s.x.min() for s in series), max(s.x.max() for s in series)
    frame = Frame(width=380, height=236, left=32, right=100, top=26, bottom=40, x0=low, x1=high)
    parts = [tag("text", title, x=0, y=13, class_="heading"), percent_axis(frame)]
    parts += [bottom_axis(frame, number_ticks(low, high), axis)]
    # bands first, so that no line is hidden below another's range
    parts += [band(frame, s.x, s.low, s.high, s.slot) for s in series if s.low is not None and s.high is not None]
    parts += [line(frame, s.x, s.y, s.slot) for s in series]
    parts += [marker(frame.x(s.last[0]), frame.y(s.last[1]), s.slot, 3.5) for s in series if s.last]
    ends = [f"{s.label} ends at {100 * s.last[1]:.1f} percent" for s in series if s.last]
    return drawing(frame, f"{title}: {'; '.join(ends)}", *parts, _end_labels(frame, series, 14))


def reliability_chart(title: str, bins: Reliability) -> Markup:
    """Accuracy against confidence in bins, the gap to the diagonal marked, rows per bin below."""
    n, most = len(bins.count), int(bins.count.max())
    frame = Frame(width=380, height=380, left=36, right=12, top=26, bottom=96, x0=0.0, x1=1.0)
    below = Frame(width=380, height=380, left=36, right=12, top=300, bottom=36, x0=0.0, x1=1.0, y1=float(max(1, most)))
    parts = [tag("text", title, x=0, y=13, class_="heading"), percent_axis(frame)]
    parts += [tag("line", class_="ideal", x1=frame.x(0.0), y1=frame.y(0.0), x2=frame.x(1.0), y2=frame.y(1.0))]

    bar = frame.x(1 / n) - frame.x(0) - 1.4
    for i in np.flatnonzero(bins.count).tolist():
        count, accuracy, confidence = int(bins.count[i]), float(bins.accuracy[i]), float(bins.confidence[i])
        tooltip = tag("title", f"confidence {100 * confidence:.1f}, accuracy {100 * accuracy:.1f}, {count:,} rows")
        x, top = frame.x(confidence), below.y(count)
        gap = tag("line", x1=x, x2=x, y1=frame.y(confidence), y2=frame.y(accuracy), class_="gap")
        dot = tag("circle", cx=x, cy=frame.y(accuracy), r=4.0, class_="dot")
        left = frame.x(i / n) + 0.7
        rows = tag("rect", x=left, y=top, width=bar, height=below.y(0) - top, class_="count")
        parts.append(tag("g", tooltip, gap, dot, rows))

    parts += [bottom_axis(below, [(quarter / 4, f"{25 * quarter}") for quarter in range(5)], "confidence, %")]
    parts += [tag("text", f"most rows in a bin: {most:,}", x=frame.left, y=296, class_="tick")]
    return drawing(frame, f"{title}: expected calibration error {100 * bins.ece:.1f} percent in {n} bins", *parts)


def bar_chart(title: str, fractions: Sequence[tuple[str, float]]) -> Markup:
    """Horizontal bars in the order given.

    Args:
        title: shown inside the chart.
        fractions: name and value, 0..1, of each bar.
    """
    largest = max(0.01, *(fraction for _, fraction in fractions))
    height = 34 + 22 * len(fractions)
    frame = Frame(width=380, height=height, left=132, right=44, top=26, bottom=8, x0=0.0, x1=largest)
    parts: list[Markup] = [tag("text", title, x=0, y=13, class_="heading")]
    for i, (name, fraction) in enumerate(fractions):
        top, end = frame.top + 22 * i, frame.x(fraction)
        bar = max(end - frame.x(0.0), 1.0)
        tooltip = tag("title", f"{name}: {100 * fraction:.1f}%")
        parts.append(tag("rect", tooltip, x=frame.left, y=top, width=bar, height=15.0, class_="count"))
        parts.append(tag("text", clip(name, 19), x=frame.left - 8, y=top + 12, class_="tick end isolate"))
        parts.append(tag("text", f"{100 * fraction:.0f}", x=end + 6, y=top + 12, class_="tick"))
    spoken = "; ".join(f"{name} {100 * fraction:.0f}" for name, fraction in fractions)
    return drawing(frame, f"{title}: {spoken}", *parts)


def map_chart(
    title: str, positions: np.ndarray, labels: np.ndarray, predicted: np.ndarray, names: Sequence[str]
) -> Markup:
    """Images in the plane, mistakes marked, each class's name in the middle of its images.

    Args:
        title: name of the projection.
        positions: (n, 2).
        labels: true class (n,), -1 where unknown.
        predicted: (n,).
        names: K class names; written for up to 30 classes.
    """
    (left, low), (right, high) = positions.min(0), positions.max(0)
    frame = Frame(width=760, height=520, left=16, right=16, top=26, bottom=16, x0=left, x1=right, y0=low, y1=high)
    wrong = (labels >= 0) & (labels != predicted)
    parts = [tag("text", title, x=0, y=13, class_="heading")]

    # one mark per image; mistakes last, so that none is hidden
    for i in np.argsort(wrong, kind="stable").tolist():
        x, y = frame.x(float(positions[i, 0])), frame.y(float(positions[i, 1]))
        if wrong[i]:
            tooltip = tag("title", f"{names[labels[i]]}, predicted as {names[predicted[i]]}")
            # a cross, so that shape tells mistakes apart as well as colour
            parts.append(tag("path", tooltip, d=f"M{x - 3:.1f},{y - 3:.1f}l6,6m0,-6l-6,6", class_="miss"))
        elif labels[i] < 0:
            tooltip = tag("title", f"unknown, predicted as {names[predicted[i]]}")
            parts.append(tag("circle", tooltip, cx=x, cy=y, r=2.5, class_="count"))
        else:
            parts.append(tag("circle", tag("title", names[labels[i]]), cx=x, cy=y, r=2.5, class_="dot"))

    # names at the median of their images, moved apart where two would overlap
    if len(names) <= _NAMED_CLASSES:
        medians = {k: np.median(positions[labels == k], axis=0) for k in range(len(names)) if (labels == k).any()}
        wanted = [frame.y(float(median[1])) for median in medians.values()]
        heights = spread(wanted, 13, frame.top + 10, frame.height - 6)
        for (k, median), y in zip(medians.items(), heights, strict=True):
            x = frame.x(float(median[0]))
            parts.append(tag("text", clip(names[k], 18), x=x, y=y, class_="name middle halo"))

    spoken = f"{title}: {len(positions):,} images, {int(wrong.sum()):,} of them classified wrongly"
    return drawing(frame, spoken, *parts)


def legend_mark(slot: int) -> Markup:
    """The line and marker of a slot, for legends and table rows."""
    sample = tag("path", d="M1,7H23", class_=f"line s{slot}") + marker(12, 7, slot)
    return tag("svg", sample, viewBox="0 0 24 14", class_="key", aria_hidden="true")


def binned(values: np.ndarray, limit: int) -> np.ndarray:
    """Means of neighbouring values, so that at most `limit` remain; undefined values are left out.

    Args:
        values: (n,).
        limit: most values returned.
    """
    parts = np.array_split(values, min(limit, len(values)))
    return np.array([part[np.isfinite(part)].mean() if np.isfinite(part).any() else math.nan for part in parts])


def _end_labels(frame: Frame, series: Sequence[Series], length: int) -> Markup:
    """Each line's name at its right end, moved apart where lines end close together.

    The names are at the lines and not only in a legend, so that a reader need not compare colours.
    """
    ends = [(s, s.last[1]) for s in series if s.last]
    heights = spread([frame.y(y) for _, y in ends], 14, frame.top + 4, frame.height - frame.bottom)
    left = frame.width - frame.right + 10
    return Markup("").join(
        tag("text", tag("title", s.label), clip(s.label, length), x=left, y=y + 4, class_=f"name s{s.slot}")
        for (s, _), y in zip(ends, heights, strict=True)
    )
