"""Charts as inline SVG: no script, no fonts, colours from the page's style sheet.

Each function gives markup with every name escaped. Shapes carry the class `c-NAME` of their
colour; the style sheet sets it for light, dark and print.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

WIDTH, NARROW = 420, 330  # of the drawing; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 34, WIDTH - 108, 10, 220  # the plane of `lines`
LINE = 24  # height of one row of a chart with rows


class Series(NamedTuple):
    """One line: points are (x, y, half-width of the interval or None), y a fraction."""

    name: str
    colour: str
    points: list[tuple[float, float, float | None]]


class Whisker(NamedTuple):
    """One row of a dot-and-whisker chart, in points of per cent."""

    name: str
    colour: str
    mean: float
    half: float | None
    text: str


def ticks(low: float, high: float, number: int = 4) -> list[float]:
    """Gives about `number` round values that cover low..high from inside."""
    step = (high - low) / number or 1.0
    power = 10 ** math.floor(math.log10(step))
    step = power * min((1, 2, 5, 10), key=lambda factor: abs(factor * power - step))
    first = math.ceil(low / step - 1e-9)
    return [round(step * i, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def whiskers(rows: Sequence[Whisker], tie: float, about: str) -> Markup:
    """Draws differences against zero, with the band in which one seed proves nothing.

    Args:
        rows: One for each control.
        tie: Half-width of the band.
        about: What the chart shows, for those who cannot see it.
    """
    low = min(0.0, -tie, *(row.mean - (row.half or 0) for row in rows))
    high = max(0.0, tie, *(row.mean + (row.half or 0) for row in rows))
    left, right, height = 78, NARROW - 74, 12 + LINE * len(rows)
    x = _scale(low, high, left + 6, right - 6)
    parts = [_rect(x(-tie), 4, x(tie) - x(-tie), height - 4, "band")]
    parts += [_line(x(t), 4, x(t), height, "zero" if t == 0 else "grid") for t in ticks(low, high)]
    parts += _dots(rows, x, NARROW)
    parts += [
        _text(x(t), height + 15, _number(t, signed=True), "middle", "tick")
        for t in ticks(low, high)
    ]
    return _svg(height + 20, about, parts, NARROW)


def dots(rows: Sequence[Whisker], about: str, left: float) -> Markup:
    """Draws values with their intervals, one below the other, on an axis that need not hold zero.

    Args:
        rows: One for each model.
        about: What the chart shows, for those who cannot see it.
        left: Room for the names.
    """
    low = min(row.mean - (row.half or 0) for row in rows)
    high = max(row.mean + (row.half or 0) for row in rows)
    width, height = left + NARROW, 12 + LINE * len(rows)
    x = _scale(low, high, left + 6, width - 90)
    parts = [_line(x(t), 4, x(t), height, "grid") for t in ticks(low, high)]
    parts += _dots(rows, x, width)
    parts += [_text(x(t), height + 15, _number(t), "middle", "tick") for t in ticks(low, high)]
    return _svg(height + 20, about, parts, width)


def _dots(rows: Sequence[Whisker], x, width: float) -> list[Markup]:
    """Draws a dot with its interval for each row, its name on the left, its text on the right."""
    parts = []
    for number, row in enumerate(rows):
        y = 8 + LINE * (number + 0.5)
        parts.append(_text(0, y + 4, row.name))
        if row.half is not None:
            parts.append(
                _line(x(row.mean - row.half), y, x(row.mean + row.half), y, f"c-{row.colour} bar")
            )
        parts.append(_circle(x(row.mean), y, 5, f"c-{row.colour}"))
        parts.append(_text(width, y + 4, row.text, "end", "value"))
    return parts


def lines(
    series: Sequence[Series],
    about: str,
    x_name: str,
    logarithmic: bool = False,
    level: tuple[str, float] | None = None,
) -> Markup:
    """Draws accuracies over x, named at the end of each line.

    Args:
        series: The lines; all points together span the axes.
        about: What the chart shows, for those who cannot see it.
        x_name: What x is.
        logarithmic: Whether x is; its ticks are then the very values of x.
        level: Name and height of a dashed level, such as chance.
    """
    points = [point for one in series for point in one.points]
    values = [y + sign * (half or 0) for _, y, half in points for sign in (-1, 1)]
    values += [level[1]] if level else []
    xs = sorted({point[0] for point in points})
    low, high = 100 * max(0.0, min(values)), 100 * max(values)
    margin = 0.06 * (high - low) or 1.0
    y = _scale(max(0.0, low - margin), high + margin, BOTTOM, TOP)
    place = math.log if logarithmic else float
    x = _scale(place(xs[0]), place(xs[-1]), LEFT + 8, RIGHT - 6)
    marks = xs if logarithmic or len(xs) < 4 else _whole(ticks(xs[0], xs[-1]))
    parts = _axes([(x(place(t)), t) for t in marks], [(y(t), t) for t in ticks(low, high)], x_name)
    if level:
        parts.append(_line(LEFT, y(100 * level[1]), RIGHT, y(100 * level[1]), "level"))
    ends = [(level[0], "muted", y(100 * level[1]))] if level else []
    for one in series:
        places = [(x(place(a)), y(100 * b), half) for a, b, half in one.points]
        scale = abs(y(0) - y(100))
        parts += _curve(one.colour, places, scale)
        ends.append((one.name, one.colour, places[-1][1]))
    parts += _end_names(ends, RIGHT + 4, TOP, BOTTOM)
    return _svg(BOTTOM + 40, about, parts)


def _axes(across: list[tuple], up: list[tuple], x_name: str) -> list[Markup]:
    """Draws grid and ticks from (place, value) of each tick."""
    parts = [_line(LEFT, py, RIGHT, py, "grid") for py, _ in up]
    parts += [_text(LEFT - 6, py + 4, _number(value), "end", "tick") for py, value in up]
    parts += [_text(px, BOTTOM + 16, _number(value), "middle", "tick") for px, value in across]
    return [*parts, _text((LEFT + RIGHT) / 2, BOTTOM + 34, x_name, "middle", "tick")]


def _curve(colour: str, places: list[tuple], scale: float) -> list[Markup]:
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _ in places)
    parts = [Markup('<polyline class="c-{} curve" points="{}"/>').format(colour, path)]
    for px, py, half in places if len(places) <= 12 else places[-1:]:
        if half is not None:
            parts.append(_line(px, py - half * scale, px, py + half * scale, f"c-{colour} bar"))
        parts.append(_circle(px, py, 3.5, f"c-{colour}"))
    return parts


def _end_names(
    ends: list[tuple[str, str, float]], x: float, top: float, bottom: float
) -> list[Markup]:
    """Writes the names beside the ends of the lines, moved apart where they would overlap."""
    gap = min(15.0, (bottom - top) / max(1, len(ends) - 1))  # closer where there are very many
    parts, limit = [], top
    placed = []
    for name, colour, y in sorted(ends, key=lambda end: end[2]):
        limit = max(y, limit)
        placed.append([name, colour, y, limit])
        limit += gap
    limit = bottom
    for end in reversed(placed):
        end[3] = min(end[3], limit)
        limit = end[3] - gap
    for name, colour, y, moved in placed:
        parts.append(_line(x, y, x + 9, moved, f"c-{colour} leader"))
        parts.append(_text(x + 13, moved + 4, _short(name), "start", f"t-{colour}"))
    return parts


def bars(rows: Sequence[tuple[str, float, str]], about: str) -> Markup:
    """Draws horizontal bars from zero: rows are (name, value, text)."""
    left, right = 170, WIDTH - 62
    x = _scale(0, max(value for _, value, _ in rows) or 1.0, left, right)
    parts = []
    for number, (name, value, text) in enumerate(rows):
        y = LINE * number + 6
        parts.append(_text(0, y + 12, _short(name, 26)))
        parts.append(_rect(left, y, max(x(value) - left, 1), 15, "c-plain"))
        parts.append(_text(x(value) + 6, y + 12, text, "start", "value"))
    return _svg(LINE * len(rows) + 6, about, parts)


def _scale(low: float, high: float, first: float, last: float):
    return lambda value: first + (value - low) / ((high - low) or 1.0) * (last - first)


def _whole(values: Sequence[float]) -> list[float]:
    return [value for value in values if value == int(value)] or list(values)


def _number(value: float, signed: bool = False) -> str:
    sign = "+" if signed and value > 0 else ""
    return sign + f"{value:,.6g}".replace("-", "−")


def _short(name: str, length: int = 15) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _svg(height: float, about: str, parts: Sequence[Markup], width: int = WIDTH) -> Markup:
    head = '<svg viewBox="0 0 {} {}" role="img" aria-label="{}"><title>{}</title>'
    inner = Markup("").join(parts)
    return Markup(head).format(width, round(height), about, about) + inner + Markup("</svg>")


def _text(x: float, y: float, text: str, anchor: str = "start", look: str = "") -> Markup:
    form = '<text x="{}" y="{}" text-anchor="{}" class="{}">{}</text>'
    return Markup(form).format(round(x, 1), round(y, 1), anchor, look, text)


def _line(x: float, y: float, to_x: float, to_y: float, look: str) -> Markup:
    form = '<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>'
    return Markup(form).format(x, y, to_x, to_y, look)


def _rect(x: float, y: float, width: float, height: float, look: str) -> Markup:
    form = '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" class="{}"/>'
    return Markup(form).format(x, y, width, height, look)


def _circle(x: float, y: float, radius: float, look: str) -> Markup:
    return Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{}" class="{}"/>').format(x, y, radius, look)
