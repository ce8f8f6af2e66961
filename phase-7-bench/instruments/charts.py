"""Charts as SVG text: lines with intervals, and one dot with its interval per variant. The page's CSS has the colours.

python -c "from instruments.charts import *; print(lines('speed', 'K', 'x', {'model': [(1, 1.2, 1.1, 1.3)]}))"
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Point = tuple[float, float, float | None, float | None]  # x, y, and the ends of y's interval, if it has one
COLOURS = 7  # classes c0 to c6 in the page's CSS; further series differ by their marker as well
WIDTH, HEIGHT = 560, 320
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 44
ROW, LABEL = 22, 210  # of a chart of dots: height of a row, width of its label


def number(value: float) -> str:
    """Write about three digits, without an exponent where that is short."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.1e}"


def tick_labels(places: Sequence[float]) -> list[str]:
    """Write ticks with as many digits as tell neighbours apart."""
    for digits in range(1, 9):
        texts = [f"{place:.{digits}g}" if abs(place) < 10**digits else f"{place:.0f}" for place in places]
        if len(set(texts)) == len(texts):
            break
    return texts


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers that cover the range: multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(at * step, 12) for at in range(first, last + 1)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def _marker(at: int, x: float, y: float, title: str) -> str:
    """Return a marker: circles, then squares, then diamonds, so that more series than colours can be told apart."""
    kind, colour = at // COLOURS % 3, f"c{at % COLOURS}"
    tip = f"<title>{escape(title)}</title>"
    if kind == 0:
        return f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="4">{tip}</circle>'
    turn = "" if kind == 1 else f' transform="rotate(45 {x:.1f} {y:.1f})"'
    return f'<rect class="{colour}" x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7"{turn}>{tip}</rect>'


def lines(
    title: str,
    x_name: str,
    y_name: str,
    series: Mapping[str, Sequence[Point]],
    reference: float | None = None,
    scattered: bool = False,
) -> str:
    """Draw one line per series; `reference` is a horizontal line. Nothing for series without a point.

    scattered: points without lines, and the line on which x equals y.
    """
    series = {name: points for name, points in series.items() if points}
    points = [point for each in series.values() for point in each]
    if not points:
        return ""
    ys = [value for _, y, low, high in points for value in (y, low, high) if value is not None]
    (x0, x1), (y0, y1) = (
        _range([point[0] for point in points]),
        _range([*ys, *([reference] if reference is not None else [])]),
    )

    def px(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    out = []
    places, base, right = ticks(y0, y1), HEIGHT - BOTTOM, WIDTH - RIGHT
    for tick, text in zip(places, tick_labels(places), strict=True):
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>')
        out.append(f'<text class="tick" x="{LEFT - 6}" y="{py(tick) + 4:.1f}" text-anchor="end">{text}</text>')
    given = sorted({point[0] for point in points})
    for tick in given if len(given) <= 12 else ticks(x0, x1):
        out.append(f'<text class="tick" x="{px(tick):.1f}" y="{base + 16}" text-anchor="middle">{number(tick)}</text>')
    if reference is not None:
        out.append(
            f'<line class="reference" x1="{LEFT}" x2="{right}" y1="{py(reference):.1f}" y2="{py(reference):.1f}"/>'
        )
    if scattered:
        first, last = max(x0, y0), min(x1, y1)
        ends = f'x1="{px(first):.1f}" y1="{py(first):.1f}" x2="{px(last):.1f}" y2="{py(last):.1f}"'
        out.append(f'<line class="reference" {ends}/>')
    for at, (name, each) in enumerate(series.items()):
        colour = f"c{at % COLOURS}"
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y, _, _ in each)
        if not scattered:
            out.append(f'<polyline class="{colour}" points="{path}"/>')
        for x, y, low, high in each:
            interval = ""
            if low is not None and high is not None:
                interval = f" [{number(low)}, {number(high)}]"
                out.append(
                    f'<line class="{colour}" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{py(low):.1f}" y2="{py(high):.1f}"/>'
                )
            out.append(_marker(at, px(x), py(y), f"{name or y_name}, {x_name} {number(x)}: {number(y)}{interval}"))
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_name)}</text>')
    out.append(
        f'<text transform="translate(13 {(TOP + base) / 2}) rotate(-90)" text-anchor="middle">{escape(y_name)}</text>'
    )
    legend = "".join(
        f'<span class="key c{at % COLOURS}">{escape(name)}</span>' for at, name in enumerate(series) if name
    )
    return _figure(title, HEIGHT, out, legend)


def dots(
    title: str, axis: str, rows: Sequence[tuple[str, float, float | None, float | None, str]], reference: float = 1.0
) -> str:
    """Draw one row per variant: its value as a dot, and its interval. The last entry of a row is a CSS class."""
    if not rows:
        return ""
    values = [value for _, y, low, high, _ in rows for value in (y, low, high) if value is not None]
    x0, x1 = _range([*values, reference])
    height = TOP + ROW * len(rows) + 34

    def px(x: float) -> float:
        return LABEL + (x - x0) / (x1 - x0) * (WIDTH - LABEL - RIGHT - 8)

    base = height - 30
    out = []
    for tick in ticks(x0, x1):
        out.append(f'<line class="grid" x1="{px(tick):.1f}" x2="{px(tick):.1f}" y1="{TOP}" y2="{base}"/>')
        out.append(f'<text class="tick" x="{px(tick):.1f}" y="{base + 14}" text-anchor="middle">{number(tick)}</text>')
    out.append(f'<line class="reference" x1="{px(reference):.1f}" x2="{px(reference):.1f}" y1="{TOP}" y2="{base}"/>')
    for at, (name, y, low, high, style) in enumerate(rows):
        middle = TOP + ROW * at + ROW / 2
        shown = name if len(name) <= 34 else name[:33] + "…"
        out.append(f'<text class="name" x="{LABEL - 10}" y="{middle + 4:.1f}" text-anchor="end">{escape(shown)}</text>')
        interval = ""
        if low is not None and high is not None:
            interval = f" [{number(low)}, {number(high)}]"
            out.append(
                f'<line class="{style}" x1="{px(low):.1f}" x2="{px(high):.1f}" y1="{middle:.1f}" y2="{middle:.1f}"/>'
            )
        tip = f"<title>{escape(name)}: {number(y)}{interval}</title>"
        out.append(f'<circle class="{style}" cx="{px(y):.1f}" cy="{middle:.1f}" r="4">{tip}</circle>')
    out.append(f'<text x="{(LABEL + WIDTH) / 2}" y="{height - 2}" text-anchor="middle">{escape(axis)}</text>')
    return _figure(title, height, out, "")


def _figure(title: str, height: int, parts: Sequence[str], legend: str) -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title, quote=True)}">{"".join(parts)}</svg><div class="legend">{legend}</div></figure>'
    )
