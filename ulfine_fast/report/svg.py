"""Parts of an SVG chart: escaped tags, a frame with axes, markers, labels that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """One element; children and attribute values are escaped, `_` in attribute names becomes `-`."""
    texts = []
    for key, value in attributes.items():
        if isinstance(value, (float, np.floating)):
            value = f"{value:.2f}".rstrip("0").rstrip(".")
        texts.append(Markup(' {}="{}"').format(Markup(key.rstrip("_").replace("_", "-")), value))
    content = Markup("").join(map(escape, children))
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), Markup("").join(texts), content)


@dataclass(frozen=True, slots=True)
class Frame:
    """The plotting area of a chart, in user units, and the data range it shows.

    Attributes:
        width: of the whole drawing.
        height: of the whole drawing.
        left: margin.
        right: margin.
        top: margin.
        bottom: margin.
        x0: data value at the left edge.
        x1: data value at the right edge.
        y0: data value at the bottom edge.
        y1: data value at the top edge.
    """

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x0: float
    x1: float
    y0: float = 0.0
    y1: float = 1.0

    def x(self, value: float) -> float:
        """Horizontal position of a data value."""
        fraction = (value - self.x0) / (self.x1 - self.x0 or 1.0)
        return self.left + fraction * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        """Vertical position of a data value."""
        fraction = (value - self.y0) / (self.y1 - self.y0 or 1.0)
        return self.height - self.bottom - fraction * (self.height - self.top - self.bottom)


def drawing(frame: Frame, summary: str, *children: object) -> Markup:
    """An SVG of the given parts that scales with its box; a screen reader reads `summary`."""
    box = f"0 0 {frame.width:g} {frame.height:g}"
    return tag("svg", tag("title", summary), *children, viewBox=box, role="img", class_="chart")


def percent_axis(frame: Frame, step: float = 0.25) -> Markup:
    """Horizontal grid lines with percent labels at the left."""
    ticks = [i * step for i in range(round(1 / step) + 1)]
    return Markup("").join(
        tag("line", x1=frame.left, x2=frame.width - frame.right, y1=frame.y(t), y2=frame.y(t), class_="grid")
        + tag("text", f"{100 * t:.0f}", x=frame.left - 6, y=frame.y(t) + 4, class_="tick end")
        for t in ticks
    )


def bottom_axis(frame: Frame, ticks: Sequence[tuple[float, str]], title: str) -> Markup:
    """Tick labels below the plotting area, and the title of the axis."""
    base = frame.height - frame.bottom
    labels = [tag("text", text, x=frame.x(value), y=base + 15, class_="tick middle") for value, text in ticks]
    middle = (frame.left + frame.width - frame.right) / 2
    return Markup("").join([*labels, tag("text", title, x=middle, y=base + 31, class_="axis middle")])


def number_ticks(low: float, high: float, count: int = 4) -> list[tuple[float, str]]:
    """About `count` round whole numbers between low and high, with their text."""
    if not high > low:
        return [(low, f"{low:,.0f}")]
    raw = max(1.0, (high - low) / count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step)
    return [(i * step, f"{i * step:,.0f}") for i in range(first, math.floor(high / step * 1.0001) + 1)]


def line(frame: Frame, x: np.ndarray, y: np.ndarray, slot: int) -> Markup:
    """A line in the colour and dash of `slot`, broken where y is not defined."""
    paths = [f"M{_points(frame, x[part], y[part])}" for part in _defined_parts(y)]
    return tag("path", d=" ".join(paths), class_=f"line s{slot}") if paths else Markup("")


def band(frame: Frame, x: np.ndarray, low: np.ndarray, high: np.ndarray, slot: int) -> Markup:
    """The area between two lines, where both are defined."""
    paths = []
    for part in _defined_parts(low + high):
        forward = _points(frame, x[part], low[part])
        backward = _points(frame, x[part][::-1], high[part][::-1])
        paths.append(f"M{forward}L{backward}Z")
    return tag("path", d=" ".join(paths), class_=f"band s{slot}") if paths else Markup("")


def marker(x: float, y: float, slot: int, size: float = 4.0, title: str | None = None) -> Markup:
    """A mark at (x, y) whose shape tells slots apart as well as its colour does."""
    tooltip = [] if title is None else [tag("title", title)]
    style = f"mark s{slot}"
    shape = slot % 6
    if shape == 0:  # circle
        return tag("circle", *tooltip, cx=x, cy=y, r=size, class_=style)
    if shape == 1:  # square
        half = size * 0.9
        return tag("rect", *tooltip, x=x - half, y=y - half, width=2 * half, height=2 * half, class_=style)
    if shape == 4:  # plus sign
        arm, thick = 1.2 * size, 0.45 * size
        path = (
            f"M{x - arm:.1f},{y - thick:.1f}H{x - thick:.1f}V{y - arm:.1f}H{x + thick:.1f}V{y - thick:.1f}"
            f"H{x + arm:.1f}V{y + thick:.1f}H{x + thick:.1f}V{y + arm:.1f}H{x - thick:.1f}V{y + thick:.1f}"
            f"H{x - arm:.1f}Z"
        )
        return tag("path", *tooltip, d=path, class_=style)
    reach = 1.3 * size
    corners = {
        2: [(x, y - 1.2 * size), (x + 1.1 * size, y + 0.8 * size), (x - 1.1 * size, y + 0.8 * size)],  # triangle
        3: [(x, y - reach), (x + reach, y), (x, y + reach), (x - reach, y)],  # diamond
        5: [(x, y + 1.2 * size), (x + 1.1 * size, y - 0.8 * size), (x - 1.1 * size, y - 0.8 * size)],  # upside down
    }
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners[shape])
    return tag("polygon", *tooltip, points=points, class_=style)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move label positions apart to at least `gap` within low..high, keeping their order."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    positions = [0.0] * len(wanted)
    least = low
    for i in order:
        positions[i] = max(wanted[i], least)
        least = positions[i] + gap
    most = high
    for i in reversed(order):
        positions[i] = min(positions[i], most)
        most = positions[i] - gap
    return positions


def clip(text: str, length: int) -> str:
    """Shorten a text to at most `length` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _points(frame: Frame, x: np.ndarray, y: np.ndarray) -> str:
    return "L".join(f"{frame.x(float(a)):.1f},{frame.y(float(b)):.1f}" for a, b in zip(x, y, strict=True))


def _defined_parts(y: np.ndarray) -> list[np.ndarray]:
    """Index ranges without an undefined value in between."""
    defined = np.flatnonzero(np.isfinite(y))
    parts = np.split(defined, np.flatnonzero(np.diff(defined) > 1) + 1)
    return [part for part in parts if len(part)]
