"""The page's charts as inline SVG, drawn from plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

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


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart.

    Attributes:
        label: what the line is.
        slot: number of its colour and marker, 0..5.
        x, y: points (n,); y in 0..1, NaN where not defined.
        low, high: range over the seeds (n,), or None.
    """

    label: str
    slot: int
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = field(default=None)
    high: np.ndarray | None = field(default=None)


def class_chart(series: Sequence[Series], counts: np.ndarray, ticks: Sequence[str], summary: str, axis: str) -> Markup:
    """Accuracy per class above the labelled images of the same class.

    Args:
        series: accuracy at x = 0..n-1, classes from most to least labelled.
        counts: labelled images (n,), the mean where seeds or neighbouring classes are averaged.
        ticks: label of each place, n of them; "" for none.
        summary: read out in place of the image.
        axis: what the places are.
    """
    top = Frame(1080, 400, 44, 150, 26, 112, -0.5, len(counts) - 0.5)
    parts = [percent_axis(top), tag("text", "accuracy, %", x=0, y=11, class_="axis")]
    parts += [_count_bars(counts), _place_labels(top, ticks), *(_class_line(top, one) for one in series)]
    middle = (top.left + top.width - top.right) / 2
    parts += [tag("text", axis, x=middle, y=396, class_="axis middle"), _end_labels(top, series, 20)]
    return drawing(top, summary, *parts)


def line_chart(title: str, series: Sequence[Series], axis: str, x_range: tuple[float, float] | None = None) -> Markup:
    """A small chart of shares over steps or ranks, with its title inside.

    Args:
        title: what is shown.
        series: the lines.
        axis: what x counts.
        x_range: data range of x; None takes it from the series.
    """
    low, high = x_range or (min(s.x.min() for s in series), max(s.x.max() for s in series))
    frame = Frame(380, 236, 32, 100, 26, 40, low, high)
    parts = [tag("text", title, x=0, y=13, class_="heading"), percent_axis(frame)]
    parts += [bottom_axis(frame, number_ticks(low, high), axis)]
    # bands first, so that no line is hidden under another's range
    parts += [band(frame, s.x, s.low, s.high, s.slot) for s in series if s.low is not None and s.high is not None]
    parts += [line(frame, s.x, s.y, s.slot) for s in series]
    parts += [_last_marker(frame, s) for s in series]
    return drawing(frame, _spoken(title, series), *parts, _end_labels(frame, series, 14))


def reliability_chart(title: str, bins: Reliability) -> Markup:
    """Accuracy against confidence in bins, the gap to the diagonal marked, rows per bin below."""
    frame = Frame(380, 380, 36, 12, 26, 96, 0.0, 1.0)
    rows = Frame(380, 380, 36, 12, 300, 36, 0.0, 1.0, 0.0, float(max(1, bins.count.max())))
    parts: list[Markup] = [tag("text", title, x=0, y=13, class_="heading"), percent_axis(frame)]
    ends = {"x1": frame.x(0.0), "y1": frame.y(0.0), "x2": frame.x(1.0), "y2": frame.y(1.0)}
    parts += [
        tag("line", class_="ideal", **ends),
        *(_reliability_bin(frame, rows, bins, i) for i in range(len(bins.count))),
    ]
    parts += [bottom_axis(rows, [(t / 4, f"{25 * t}") for t in range(5)], "confidence, %")]
    parts += [tag("text", f"most rows in a bin: {bins.count.max():,}", x=frame.left, y=296, class_="tick")]
    return drawing(
        frame, f"{title}: expected calibration error {100 * bins.ece:.1f} percent in {len(bins.count)} bins", *parts
    )


def share_bars(title: str, shares: Sequence[tuple[str, float]]) -> Markup:
    """Bars of shares in 0..1, each beside its name, in the order given."""
    frame = Frame(380, 34 + 22 * len(shares), 132, 44, 26, 8, 0.0, max(0.01, *(share for _, share in shares)))
    parts: list[Markup] = [tag("text", title, x=0, y=13, class_="heading")]
    for row, (name, share) in enumerate(shares):
        top, wide = frame.top + 22 * row, frame.x(share) - frame.x(0.0)
        words = tag("title", f"{name}: {100 * share:.1f}%")
        parts.append(tag("rect", words, x=frame.left, y=top, width=max(wide, 1.0), height=15.0, class_="count"))
        parts.append(tag("text", clip(name, 19), x=frame.left - 8, y=top + 12, class_="tick end isolate"))
        parts.append(tag("text", f"{100 * share:.0f}", x=frame.x(share) + 6, y=top + 12, class_="tick"))
    spoken = "; ".join(f"{name} {100 * share:.0f}" for name, share in shares)
    return drawing(frame, f"{title}: {spoken}", *parts)


def map_chart(
    title: str, places: np.ndarray, labels: np.ndarray, predicted: np.ndarray, names: Sequence[str]
) -> Markup:
    """Images in the plane, mistakes marked, each class's name in its middle.

    Args:
        title: how they got their places.
        places: (n, 2).
        labels: true class (n,), -1 where unknown.
        predicted: (n,).
        names: K; written for up to 30 classes.
    """
    (left, low), (right, high) = places.min(0), places.max(0)
    frame = Frame(760, 520, 16, 16, 26, 16, left, right, low, high)
    wrong = (labels >= 0) & (labels != predicted)
    # mistakes last, so that none is hidden
    dots = [
        _map_dot(frame, places[i], int(labels[i]), int(predicted[i]), names) for i in np.argsort(wrong, kind="stable")
    ]
    parts = [tag("text", title, x=0, y=13, class_="heading"), *dots]
    if len(names) <= 30:
        parts += _map_names(frame, places, labels, names)
    spoken = f"{title}: {len(places):,} images, {int(wrong.sum()):,} of them taken for another class"
    return drawing(frame, spoken, *parts)


def _map_dot(frame: Frame, place: np.ndarray, label: int, predicted: int, names: Sequence[str]) -> Markup:
    x, y = frame.x(float(place[0])), frame.y(float(place[1]))
    if label < 0:
        return tag("circle", tag("title", f"unknown, taken for {names[predicted]}"), cx=x, cy=y, r=2.5, class_="count")
    if label == predicted:
        return tag("circle", tag("title", names[label]), cx=x, cy=y, r=2.5, class_="dot")
    # a cross and not only another colour
    words = tag("title", f"{names[label]}, taken for {names[predicted]}")
    return tag("path", words, d=f"M{x - 3:.1f},{y - 3:.1f}l6,6m0,-6l-6,6", class_="miss")


def _map_names(frame: Frame, places: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> list[Markup]:
    """Each class's name at the median of its images, moved apart where two would touch."""
    classes = [k for k in range(len(names)) if (labels == k).any()]
    middles = {k: np.median(places[labels == k], axis=0) for k in classes}
    heights = spread([frame.y(float(middles[k][1])) for k in classes], 13, frame.top + 10, frame.height - 6)
    return [
        tag("text", clip(names[k], 18), x=frame.x(float(middles[k][0])), y=y, class_="name middle halo")
        for k, y in zip(classes, heights, strict=True)
    ]


def legend_mark(slot: int) -> Markup:
    """The line and marker of a slot, for legends and table rows."""
    sample = tag("path", d="M1,7H23", class_=f"line s{slot}") + marker(12, 7, slot)
    return tag("svg", sample, viewBox="0 0 24 14", class_="key", aria_hidden="true")


def binned(values: np.ndarray, limit: int) -> np.ndarray:
    """Mean over neighbouring places so that at most `limit` remain; undefined values are left out.

    Args:
        values: (n,).
        limit: most places.
    """
    parts = np.array_split(values, min(limit, len(values)))
    return np.array([part[np.isfinite(part)].mean() if np.isfinite(part).any() else math.nan for part in parts])


def _class_line(frame: Frame, series: Series) -> Markup:
    marks = [
        marker(frame.x(float(x)), frame.y(float(y)), series.slot, title=f"{series.label}: {100 * y:.1f}")
        for x, y in zip(series.x, series.y, strict=True)
        if math.isfinite(y)
    ]
    return Markup("").join([line(frame, series.x, series.y, series.slot), *marks])


def _count_bars(counts: np.ndarray) -> Markup:
    """Bars of log(1 + count) under the accuracies: on a straight scale the tail would have no height."""
    high = math.log1p(max(1.0, float(np.nan_to_num(counts).max())))
    frame = Frame(1080, 400, 44, 150, 300, 36, -0.5, len(counts) - 0.5, 0.0, high)
    wide = min(34.0, 0.7 * (frame.x(1) - frame.x(0)))
    parts = [tag("text", "labelled (log)", x=frame.width - frame.right + 10, y=352, class_="tick")]
    for i, count in enumerate(np.nan_to_num(counts)):
        top = frame.y(math.log1p(count))
        parts.append(tag("rect", x=frame.x(i) - wide / 2, y=top, width=wide, height=frame.y(0) - top, class_="count"))
        if wide >= 16:
            parts.append(tag("text", _count_text(float(count)), x=frame.x(i), y=top - 3, class_="tick middle"))
    return Markup("").join(parts)


def _count_text(count: float) -> str:
    return f"{count:.0f}" if count >= 10 or count == round(count) else f"{count:.1f}"


def _place_labels(frame: Frame, ticks: Sequence[str]) -> Markup:
    room = (frame.x(1) - frame.x(0)) / 6.4  # characters of about 6.4 units
    return Markup("").join(
        tag(
            "text", tag("title", text), clip(text, max(3, int(room))), x=frame.x(i), y=379, class_="tick middle isolate"
        )
        for i, text in enumerate(ticks)
        if text
    )


def _last_point(series: Series) -> tuple[float, float] | None:
    defined = np.flatnonzero(np.isfinite(series.y))
    return (float(series.x[defined[-1]]), float(series.y[defined[-1]])) if len(defined) else None


def _last_marker(frame: Frame, series: Series) -> Markup:
    point = _last_point(series)
    return marker(frame.x(point[0]), frame.y(point[1]), series.slot, 3.5) if point else Markup("")


def _end_labels(frame: Frame, series: Sequence[Series], length: int) -> Markup:
    """Write each line's name at its right end, moved apart where lines end close together."""
    ends = [(one, point) for one in series if (point := _last_point(one))]
    # names at the lines and not only in a legend: nobody has to match colours
    places = spread([frame.y(p[1]) for _, p in ends], 14, frame.top + 4, frame.height - frame.bottom)
    at = frame.width - frame.right + 10
    return Markup("").join(
        tag("text", tag("title", s.label), clip(s.label, length), x=at, y=y + 4, class_=f"name s{s.slot}")
        for (s, _), y in zip(ends, places, strict=True)
    )


def _spoken(title: str, series: Sequence[Series]) -> str:
    ends = [f"{s.label} ends at {100 * p[1]:.1f} percent" for s in series if (p := _last_point(s))]
    return f"{title}: {'; '.join(ends)}"


def _reliability_bin(frame: Frame, rows: Frame, bins: Reliability, i: int) -> Markup:
    count, accuracy, confidence = int(bins.count[i]), float(bins.accuracy[i]), float(bins.confidence[i])
    if not count:
        return Markup("")
    n = len(bins.count)
    at, left, wide = frame.x(confidence), frame.x(i / n) + 0.7, frame.x(1 / n) - frame.x(0) - 1.4
    words = f"confidence {100 * confidence:.1f}, accuracy {100 * accuracy:.1f}, {count:,} rows"
    gap = tag("line", x1=at, x2=at, y1=frame.y(confidence), y2=frame.y(accuracy), class_="gap")
    dot = tag("circle", cx=at, cy=frame.y(accuracy), r=4.0, class_="dot")
    below = tag("rect", x=left, y=rows.y(count), width=wide, height=rows.y(0) - rows.y(count), class_="count")
    return tag("g", tag("title", words), gap, dot, below)
