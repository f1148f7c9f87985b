"""Plots as SVG for the page: colours are the style sheet's, s0 to s7; nothing needs a script.

Marks of a series differ in shape as well as in colour. Bars are drawn in a box of 100 by 10 that is stretched
to whatever width there is; plots with text come in a width for screens and paper and one for phones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from html import escape

WIDTHS = {"wide": 760, "narrow": 350}
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 44


@dataclasses.dataclass(frozen=True)
class Point:
    """A mark: its place, its series (0 to 7), whether it is hollow, and what a pointer over it reads."""

    x: float
    y: float
    series: int
    title: str
    hollow: bool = False


@dataclasses.dataclass(frozen=True)
class Line:
    """A line through these places, with a text at its right end."""

    points: Sequence[tuple[float, float]]
    label: str


class LogAxis:
    """Values from `low` to `high`, both above 0, as places from `start` to `end`."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = math.log10(low), math.log10(high), start, end

    def __call__(self, value: float) -> float:
        part = (math.log10(value) - self.low) / (self.high - self.low)
        return self.start + min(1.0, max(0.0, part)) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Powers of ten, few enough to be read; with their halves and fifths where they are very few."""
        first, last = math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9)
        step = max(1, math.ceil((last - first + 1) / 7))
        steps = (1,) if last - first >= 2 else (1, 2, 5)
        low, high = 10**self.low * (1 - 1e-9), 10**self.high * (1 + 1e-9)
        powers = range(first - 1, last + 1, step)
        return [m * 10.0**p for p in powers for m in steps if low <= m * 10.0**p <= high]


def span(values: Iterable[float]) -> tuple[float, float]:
    """Bounds a little beyond the values above 0; a decade around 1 where there are none."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    if not positive:
        return 0.3, 3.0
    return min(positive) / 1.6, max(positive) * 1.6


def number(value: float) -> str:
    """Of a tick."""
    if 1e-3 <= value < 1e5:
        return f"{value:g}"
    return f"1e{round(math.log10(value))}"


def scatter(
    points: Sequence[Point],
    lines: Sequence[Line] = (),
    *,
    x_label: str,
    y_label: str,
    label: str,
    floor: float | None = None,
) -> str:
    """Marks and lines on logarithmic axes, in both widths.

    Args:
        label: what the plot shows, for those who do not see it.
        floor: where marks at or below 0 go; None leaves them out.
    """
    if floor is not None:
        points = [p if p.y > 0 else dataclasses.replace(p, y=floor) for p in points]
    points = [p for p in points if p.x > 0 and p.y > 0]
    return "".join(
        f'<div class="{name}">{_scatter(points, lines, width, x_label, y_label, label)}</div>'
        for name, width in WIDTHS.items()
    )


def _scatter(
    points: Sequence[Point], lines: Sequence[Line], width: int, x_label: str, y_label: str, label: str
) -> str:
    height = round(width * 0.58) if width > 500 else width
    bounds = span([p.x for p in points])
    lines = [dataclasses.replace(line, points=_cut(line.points, *bounds)) for line in lines]
    heights = [p.y for p in points] + [y for line in lines for _, y in line.points]
    x_axis = LogAxis(*bounds, _LEFT, width - _RIGHT)
    y_axis = LogAxis(*span(heights), height - _BOTTOM, _TOP)
    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"'
        f' aria-label="{escape(label)}">'
    ]
    bottom, right = height - _BOTTOM, width - _RIGHT
    for x in x_axis.ticks():
        at = f"{x_axis(x):.1f}"
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{at}" y="{bottom + 16}" text-anchor="middle">{number(x)}</text>')
    for y in y_axis.ticks():
        at = f"{y_axis(y):.1f}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at}" dy="0.35em" text-anchor="end">{number(y)}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>')
    half = (_TOP + bottom) / 2
    parts.append(
        f'<text transform="translate(13 {half}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    for line in lines:
        parts.append(_line(line, x_axis, y_axis))
    parts += [mark(x_axis(p.x), y_axis(p.y), p.series, hollow=p.hollow, title=p.title) for p in points]
    return "".join(parts) + "</svg>"


def _cut(points: Sequence[tuple[float, float]], low: float, high: float) -> list[tuple[float, float]]:
    """The part of a line between two x, straight on logarithmic axes."""
    found: list[tuple[float, float]] = []
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        slope = math.log(y1 / y0) / math.log(x1 / x0)
        a, b = max(x0, low), min(x1, high)
        if a < b:
            found += [(x, y0 * (x / x0) ** slope) for x in (a, b)]
    return found


def _line(line: Line, x_axis: LogAxis, y_axis: LogAxis) -> str:
    if not line.points:
        return ""
    places = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in line.points)
    x, y = line.points[-1]
    return (
        f'<polyline class="roof" points="{places}"/>'
        f'<text x="{x_axis(x) - 4:.1f}" y="{y_axis(y) - 6:.1f}" text-anchor="end">{escape(line.label)}</text>'
    )


# A series' outline around (0, 0).
_SHAPES = (
    "M-4.5,0a4.5,4.5 0 1,0 9,0a4.5,4.5 0 1,0 -9,0z",  # circle
    "M-4,-4h8v8h-8z",  # square
    "M0,-5.2L5,3.8H-5z",  # triangle
    "M0,-5.6L5.6,0L0,5.6L-5.6,0z",  # diamond
    "M0,5.2L5,-3.8H-5z",  # triangle on its tip
    "M-1.7,-5h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3z",  # plus
    "M-2.3,-5h4.6L5,0L2.3,5h-4.6L-5,0z",  # hexagon
    "M-5,-2.5h10v5h-10z",  # bar
)


def mark(x: float, y: float, series: int, *, hollow: bool = False, title: str = "") -> str:
    """The mark of a series at a place."""
    hint = f"<title>{escape(title)}</title>" if title else ""
    kind = "hollow" if hollow else "mark"
    index = series % len(_SHAPES)
    return (
        f'<path class="{kind} s{index}" transform="translate({x:.1f} {y:.1f})" d="{_SHAPES[index]}">'
        f"{hint}</path>"
    )


def legend_mark(series: int, *, hollow: bool = False) -> str:
    """The mark alone, to stand in a line of text."""
    return (
        f'<svg class="key" viewBox="-7 -7 14 14" aria-hidden="true">{mark(0, 0, series, hollow=hollow)}</svg>'
    )


def ratio_bar(ratio: float, low: float, high: float, bounds: tuple[float, float], title: str) -> str:
    """A bar from 1 to a ratio on a logarithmic scale, with its interval; to the left where it is below 1."""
    axis = LogAxis(*bounds, 0, 100)
    one, at = axis(1), axis(ratio)
    kind = "gain" if ratio >= 1 else "loss"
    x, width = min(one, at), max(0.3, abs(at - one))
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" role="img"'
        f' aria-label="{escape(title)}"><title>{escape(title)}</title>'
        f'<rect class="{kind}" x="{x:.2f}" y="1.5" width="{width:.2f}" height="7"/>'
        f'<line class="whisker" x1="{axis(low):.2f}" x2="{axis(high):.2f}" y1="5" y2="5"/>'
        f'<line class="one" x1="{one:.2f}" x2="{one:.2f}" y1="0" y2="10"/></svg>'
    )


def scale(bounds: tuple[float, float]) -> str:
    """The ratios under such bars, as HTML."""
    axis = LogAxis(*bounds, 0, 100)
    powers = [2.0**p for p in range(-4, 11)]
    marks = [v for v in powers if 4 < axis(v) < 96 and bounds[0] < v < bounds[1]]  # room for their text
    if len(marks) > 6:
        marks = [v for v in marks if math.log2(v) % 2 == 0]
    spans = "".join(f'<span style="left:{axis(v):.1f}%">{v:g}x</span>' for v in marks)
    return f'<div class="scale" aria-hidden="true">{spans}</div>'


def stacked_bar(segments: Sequence[tuple[float, int, str]], total: float, label: str) -> str:
    """Parts of `total`, side by side: (value, series, what a pointer over it reads)."""
    parts, x = [], 0.0
    for value, series, title in segments:
        width = 100 * value / total if total else 0.0
        parts.append(
            f'<rect class="mark s{series % 8}" x="{x:.2f}" y="0" width="{width:.2f}" height="10">'
            f"<title>{escape(title)}</title></rect>"
        )
        x += width
    return (
        '<svg class="stack" viewBox="0 0 100 10" preserveAspectRatio="none" role="img"'
        f' aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )
