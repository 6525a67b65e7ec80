"""Plots as SVG within an HTML page, whose style gives them their colours, light or dark."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 520, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 40
DASHES = ("none", "7 3", "2 3")
"""Dashes of the first six lines of a plot, of the next six, and of those after them."""
MOST_MARKED = 12
"""Points of a line that are marked, so that a reader sees how few they are."""
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line of a plot."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Bar:
    """A value with its interval."""

    label: str
    value: float
    low: float
    high: float
    shown: str
    colour: int


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return about ``about`` round numbers between two values."""
    span = high - low or 1.0
    step = 10 ** math.floor(math.log10(span / about))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= about + 0.5)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Return a tick's or a cell's number, short."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000 or abs(value) < 1e-3:
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")
    return f"{value:.4g}"


def lines(series: Sequence[Series], x_title: str, y_title: str) -> str:
    """Return a plot of lines over a common axis; empty without a finite point."""
    series = [Series(one.name, [p for p in one.points if all(map(math.isfinite, p))]) for one in series]
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    if not xs:
        return ""
    frame = _Frame((min(xs), max(xs)), (min(0.0, *ys) if min(ys) < 0.3 * max(ys) else min(ys), max(ys)))
    parts = [frame.axes(x_title, y_title)]
    for number_, one in enumerate(series):
        points = [frame.place(point) for point in one.points]
        colour, dashes = f"var(--series-{number_ % 6})", DASHES[number_ // 6 % len(DASHES)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        style = f'fill="none" stroke="{colour}" stroke-width="1.8" stroke-dasharray="{dashes}"'
        title = f"<title>{html.escape(one.name)}</title>"
        parts.append(f'<polyline points="{path}" {style}>{title}</polyline>')
        if len(points) <= MOST_MARKED:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in points]
    return _svg(WIDTH, HEIGHT, parts) + legend([one.name for one in series])


class _Frame:
    """The rectangle of a plot, and where values lie in it."""

    def __init__(self, x: Point, y: Point) -> None:
        self.x = x if x[1] > x[0] else (x[0] - 0.5, x[1] + 0.5)
        margin = 0.05 * (y[1] - y[0]) or 0.5
        self.y = (y[0] if y[0] == 0 else y[0] - margin, y[1] + margin)

    def place(self, point: Point) -> Point:
        """Return the place of a value."""
        across = (point[0] - self.x[0]) / (self.x[1] - self.x[0])
        up = (point[1] - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def axes(self, x_title: str, y_title: str) -> str:
        """Return grid, ticks and titles."""
        parts = []
        for value in ticks(*self.y):
            y = self.place((self.x[0], value))[1]
            parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
            parts.append(_text(LEFT - 6, y + 4, number(value), "end"))
        for value in ticks(*self.x):
            x = self.place((value, self.y[0]))[0]
            parts.append(_text(x, HEIGHT - BOTTOM + 16, number(value), "middle"))
        parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_title, "middle"))
        middle = (TOP + HEIGHT - BOTTOM) / 2
        turned = f'transform="rotate(-90 14 {middle:.0f})"'
        parts.append(_text(14, middle, y_title, "middle", turned))
        return "".join(parts)


def bars(values: Sequence[Bar]) -> str:
    """Return a bar for each value from 0, with a whisker for its interval."""
    label, row = 150, 26
    high = max(max(bar.high, bar.value) for bar in values) or 1.0
    scale = (WIDTH - label - 120) / high
    parts = []
    for place, bar in enumerate(values):
        y = 6 + place * row
        parts.append(_text(label - 8, y + 14, _short(bar.label, 22), "end"))
        width = max(bar.value * scale, 1.0)
        colour = f"var(--series-{bar.colour % 6})"
        parts.append(
            f'<rect x="{label}" y="{y + 3}" width="{width:.1f}" height="{row - 10}" fill="{colour}" rx="2"/>'
        )
        left, right = label + bar.low * scale, label + bar.high * scale
        whisker = f"M{left:.1f} {y + 7}v8M{left:.1f} {y + 11}H{right:.1f}M{right:.1f} {y + 7}v8"
        parts.append(f'<path d="{whisker}" class="whisker"/>')
        parts.append(_text(right + 8, y + 14, bar.shown, "start"))
    return _svg(WIDTH, 8 + row * len(values), parts)


def heat(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    row_title: str,
    column_title: str,
    shown: bool = False,
    most: float | None = None,
) -> str:
    """Return a matrix as shades, strongest for ``most`` or the largest value; ``shown`` writes numbers."""
    finite = [value for row in values for value in row if math.isfinite(value)]
    grid = _Grid(rows, columns, (max(finite, default=0.0) if most is None else most) or 1.0, shown)
    parts = [part for r, row in enumerate(values) for part in grid.row(r, row)]
    parts += grid.column_names()
    bottom = grid.TOP + grid.height * len(values)
    parts.append(_text(grid.left, bottom + 16, f"rows: {row_title}; columns: {column_title}", "start"))
    return _svg(grid.plot_width, bottom + 22, parts)


class _Grid:
    """The cells of a matrix: their sizes, and what is drawn in each."""

    TOP = 22

    def __init__(self, rows: Sequence[str], columns: Sequence[str], most: float, shown: bool) -> None:
        self.rows, self.columns, self.most, self.shown = rows, columns, most, shown
        self.left = 24 + 7 * min(18, max(map(len, rows)))
        self.plot_width = max(640, self.left + 12) if len(columns) > 40 else WIDTH
        self.width = min(72.0 if shown else 46.0, (self.plot_width - self.left - 8) / max(1, len(columns)))
        self.height = min(self.width, 26.0) if shown else max(6.0, min(self.width, 16.0))

    def row(self, number_: int, values: Sequence[float]) -> Iterator[str]:
        """Yield a row's name, if there is room for it, and its cells."""
        y = self.TOP + number_ * self.height
        if self.height >= 9 or number_ % 5 == 0:
            yield _text(self.left - 6, y + self.height / 2 + 4, _short(self.rows[number_], 18), "end")
        for place, value in enumerate(values):
            yield from self._cell(y, place, value, f"{self.rows[number_]}, {self.columns[place]}")

    def _cell(self, y: float, place: int, value: float, name: str) -> Iterator[str]:
        share = max(0.0, min(1.0, value / self.most)) if math.isfinite(value) else 0.0
        x = self.left + place * self.width
        size = f'width="{self.width - 1:.1f}" height="{self.height - 1:.1f}"'
        shade = f'fill="var(--heat)" fill-opacity="{0.04 + 0.96 * share:.3f}"'
        title = f"<title>{html.escape(name)}: {number(value)}</title>"
        yield f'<rect x="{x:.1f}" y="{y:.1f}" {size} {shade}>{title}</rect>'
        if self.shown and value:
            tone = f'class="{"on-heat" if share > 0.5 else ""}"'
            yield _text(x + self.width / 2, y + self.height / 2 + 4, number(value), "middle", tone)

    def column_names(self) -> Iterator[str]:
        """Yield the names of as many columns as there is room for."""
        every = 1 if self.shown else max(1, math.ceil(24 / self.width))
        limit = max(3, int(self.width * every / 6.5))
        for place in range(0, len(self.columns), every):
            x = self.left + place * self.width + self.width / 2
            yield _text(x, 15, _short(self.columns[place], limit), "middle")


def legend(names: Sequence[str]) -> str:
    """Return the names of series with their colours."""
    items = (f"<span>{_swatch(place)}{html.escape(name)}</span>" for place, name in enumerate(names))
    return f'<p class="legend">{"".join(items)}</p>'


def _swatch(place: int) -> str:
    """Return a short piece of a line."""
    colour, dashes = f"var(--series-{place % 6})", DASHES[place // 6 % len(DASHES)]
    line = f'<path d="M0 5h22" stroke="{colour}" stroke-width="3" stroke-dasharray="{dashes}"/>'
    return f'<svg width="26" height="10" aria-hidden="true">{line}</svg>'


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "\u2026"


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{html.escape(text)}</text>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    return f'<svg {size} role="img" xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
