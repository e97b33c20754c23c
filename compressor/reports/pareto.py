"""Which models are worth their bytes: dominance, the front as a Markdown table, and as a picture without colour.

A point is dominated where another has no more bytes and no more loss, and less of one of them.
"""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from compressor.reports.estimate import Estimate
from compressor.reports.markdown import estimate_text, megabytes, number

WIDTH, HEIGHT = 860, 480
LEFT, RIGHT, TOP, BOTTOM = 80, 30, 52, 60
FONT, LETTER = 12, 6.4  # pixels; the second is the width of a letter on average
LABEL = 40  # letters of a name that are drawn; the table has all of them
LOG_SPAN = 20  # losses further apart than this are drawn on a logarithmic scale


@dataclass(frozen=True)
class Point:
    """A model: its bytes, and its loss with the interval (nats a token); `loss.value` is finite."""

    name: str
    bytes: float
    loss: Estimate


def dominators(points: Sequence[Point]) -> dict[str, tuple[str, ...]]:
    """For each point the members of the front that dominate it, lowest loss first; none for the front itself."""
    beaten = {point.name: [other for other in points if _dominates(other, point)] for point in points}
    return {
        name: tuple(
            other.name for other in sorted(others, key=lambda p: (p.loss.value, p.bytes)) if not beaten[other.name]
        )
        for name, others in beaten.items()
    }


def front_table(points: Sequence[Point], alike: Callable[[str, str], bool] = lambda one, other: False) -> str:
    """The points by size as a Markdown table: on the front, or dominated, by whom, and by how much.

    `alike(one, other)` says whether two losses cannot be told apart; a point that only such others dominate is marked.
    """
    by_name = {point.name: point for point in points}
    beaten = dominators(points)
    rows = []
    for point in sorted(points, key=lambda p: (p.bytes, p.loss.value)):
        verdict = "on the front"
        if beaten[point.name]:
            first, *others = beaten[point.name]
            more = f"; {len(others)} more do" if others else ""
            verdict = f"dominated by {first}: {_gain(by_name[first], point)}{more}"
            if all(alike(point.name, name) for name in beaten[point.name]):
                verdict += " (the losses cannot be told apart)"
        rows.append([point.name, megabytes(round(point.bytes)), estimate_text(point.loss), verdict])
    return markdown_table(["variant", "weights", "KL", "front"], rows)


def pareto_svg(points: Sequence[Point], *, title: str, x_label: str, y_label: str) -> str:
    """The points as an SVG drawing: filled on the front, which is joined, hollow where dominated; bars are intervals.

    Shapes and greys only, text beside each point, nothing outside the file; the description lists all values.
    """
    beaten = dominators(points)
    drawing = _Drawing(points)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-labelledby="pareto-title pareto-description" font-family="sans-serif" font-size="{FONT}">',
        f'<title id="pareto-title">{_escaped(title)}</title>',
        f'<desc id="pareto-description">{_escaped(_described(points, beaten))}</desc>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="20" font-size="15" font-weight="bold">{_escaped(title)}</text>',
        f'<text x="{LEFT}" y="38" fill="#444444">filled: on the front; hollow: dominated; bars: 95 % intervals</text>',
        *drawing.axes(x_label, y_label),
    ]
    if not points:
        parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle">nothing was measured</text>')
    front = sorted((p for p in points if not beaten[p.name]), key=lambda p: (p.bytes, p.loss.value))
    parts.append(drawing.staircase(front))
    parts += [drawing.bar(point) for point in points if point.loss.ci95 is not None]
    drawn = sorted(points, key=lambda p: not beaten[p.name])  # the front on top, where points lie on each other
    parts += [drawing.mark(point, filled=not beaten[point.name]) for point in drawn]
    parts += drawing.labels(sorted(points, key=lambda p: (bool(beaten[p.name]), p.loss.value)))
    return "\n".join(part for part in [*parts, "</svg>"] if part) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table; a bar inside a cell does not end it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _dominates(one: Point, other: Point) -> bool:
    no_worse = one.bytes <= other.bytes and one.loss.value <= other.loss.value
    return no_worse and (one.bytes < other.bytes or one.loss.value < other.loss.value)


def _gain(better: Point, worse: Point) -> str:
    """`12 % smaller, KL 0.01 lower`"""
    parts = []
    if better.bytes < worse.bytes:
        parts.append(f"{number(100 * (1 - better.bytes / worse.bytes))} % smaller")
    if better.loss.value < worse.loss.value:
        parts.append(f"KL {number(worse.loss.value - better.loss.value)} lower")
    return ", ".join(parts)


def _described(points: Sequence[Point], beaten: Mapping[str, tuple[str, ...]]) -> str:
    """What the drawing shows, for those who do not see it."""
    lines = []
    for point in sorted(points, key=lambda p: p.bytes):
        place = f"dominated by {', '.join(beaten[point.name])}" if beaten[point.name] else "on the front"
        lines.append(f"{point.name}: {megabytes(round(point.bytes))}, KL {estimate_text(point.loss)}, {place}.")
    return " ".join(lines)


class _Drawing:
    """Where values lie on the page."""

    def __init__(self, points: Sequence[Point]) -> None:
        sizes = [point.bytes / 1e6 for point in points] or [0.0, 1.0]
        ends = [end for p in points for end in (p.loss.value, *(p.loss.ci95 or ()))] or [0.0, 1.0]
        values = [point.loss.value for point in points] or [0.0, 1.0]
        self.log = min(values) > 0 and max(values) / min(values) > LOG_SPAN
        if self.log:  # an interval that reaches zero ends at the bottom of the drawing
            low = math.log10(max(min(end for end in ends if end > 0), min(values) / 10))
            self.y_range = _padded(low, math.log10(max(ends)))
        else:
            self.y_range = _padded(min(0.0, *ends), max(ends))
        self.x_range = _padded(min(sizes), max(sizes))
        self.points = points

    def x(self, count: float) -> float:
        low, high = self.x_range
        return LEFT + (count / 1e6 - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, loss: float) -> float:
        low, high = self.y_range
        value = loss if not self.log else math.log10(loss) if loss > 0 else low
        return HEIGHT - BOTTOM - (max(low, value) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def axes(self, x_label: str, y_label: str) -> list[str]:
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        parts = [f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#000000"/>']
        for tick in _ticks(*self.x_range):
            x = self.x(tick * 1e6)
            parts.append(f'<path d="M{x:.1f} {bottom}v5" stroke="#000000"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 19}" text-anchor="middle">{number(tick)}</text>')
        for tick in self._y_ticks():
            y = self.y(tick)
            parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#dddddd"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
        middle = (TOP + bottom) / 2
        scale = f"{y_label} (logarithmic)" if self.log else y_label
        turned = f'transform="rotate(-90 18 {middle})"'
        centred = 'text-anchor="middle"'
        parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 16}" {centred}>{_escaped(x_label)}</text>')
        parts.append(f'<text x="18" y="{middle}" {centred} {turned}>{_escaped(scale)}</text>')
        return parts

    def _y_ticks(self) -> list[float]:
        if not self.log:
            return _ticks(*self.y_range)
        low, high = self.y_range
        powers = [10.0**k * step for k in range(math.floor(low), math.ceil(high) + 1) for step in (1, 2, 5)]
        return [tick for tick in powers if low <= math.log10(tick) <= high]

    def staircase(self, front: Sequence[Point]) -> str:
        """What is dominated lies above and to the right of this line."""
        if len(front) < 2:
            return ""
        path = f"M{self.x(front[0].bytes):.1f} {self.y(front[0].loss.value):.1f}"
        for point in front[1:]:
            path += f"H{self.x(point.bytes):.1f}V{self.y(point.loss.value):.1f}"
        return f'<path d="{path}" fill="none" stroke="#777777" stroke-dasharray="5 4"/>'

    def bar(self, point: Point) -> str:
        assert point.loss.ci95 is not None
        x, low, high = self.x(point.bytes), self.y(point.loss.ci95[0]), self.y(point.loss.ci95[1])
        return (
            f'<path d="M{x:.1f} {low:.1f}V{high:.1f}M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8" '
            'stroke="#555555"/>'
        )

    def mark(self, point: Point, *, filled: bool) -> str:
        fill = "#000000" if filled else "#ffffff"
        return (
            f'<circle cx="{self.x(point.bytes):.1f}" cy="{self.y(point.loss.value):.1f}" r="5" fill="{fill}" '
            'stroke="#000000" stroke-width="1.5"/>'
        )

    def labels(self, points: Sequence[Point]) -> list[str]:
        """A name beside each point, at the first place that is free; a line leads to those that had to go further."""
        taken = [(self.x(p.bytes) - 6, self.y(p.loss.value) - 6, 12.0, 12.0) for p in self.points]
        parts = []
        for point in points:
            name = _shortened(point.name)
            x, y, width = self.x(point.bytes), self.y(point.loss.value), LETTER * len(name)
            box = self._free_place(x, y, width, taken)
            taken.append(box)
            middle = box[1] + FONT / 2
            if abs(middle - y) > 2 * FONT or min(abs(box[0] - x), abs(box[0] + width - x)) > 3 * FONT:
                near = box[0] if box[0] > x else box[0] + width
                parts.append(f'<path d="M{x:.1f} {y:.1f}L{near:.1f} {middle:.1f}" stroke="#aaaaaa"/>')
            halo = 'paint-order="stroke" stroke="#ffffff" stroke-width="3"'  # lines stay readable behind names
            parts.append(f'<text x="{box[0]:.1f}" y="{box[1] + FONT - 2:.1f}" {halo}>{_escaped(name)}</text>')
        return parts

    def _free_place(
        self, x: float, y: float, width: float, taken: Sequence[tuple[float, float, float, float]]
    ) -> tuple[float, float, float, float]:
        sides = [side for far in (9, 60, 120) for side in (x + far, x - far - width)]
        lines = sorted(range(-24, 25), key=abs)
        boxes = [
            (side, y + (1.2 * line - 0.5) * FONT, width, float(FONT))
            for far in (sides[:2], sides[2:])
            for line in lines
            for side in far
            if side >= LEFT and side + width <= WIDTH and TOP <= y + 1.2 * line * FONT <= HEIGHT - BOTTOM - FONT / 2
        ]
        free = [box for box in boxes if not any(_overlap(box, other) for other in taken)]
        fallback = (min(max(float(LEFT), x + 9), WIDTH - width), y - FONT / 2, width, float(FONT))
        return (free or boxes or [fallback])[0]


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return (
        one[0] < other[0] + other[2]
        and other[0] < one[0] + one[2]
        and one[1] < other[1] + other[3]
        and other[1] < one[1] + one[3]
    )


def _padded(low: float, high: float) -> tuple[float, float]:
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return (0.0 if low == 0 else low - room), high + room


def _ticks(low: float, high: float) -> list[float]:
    """Four to ten round numbers of a range."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step)
    return [round(k * step, 12) for k in range(first, math.floor(high / step) + 1)]


def _shortened(name: str) -> str:
    half = LABEL // 2
    return name if len(name) <= LABEL else f"{name[:half]}…{name[1 - half :]}"


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)
