"""Figures as inline SVG, drawn so that they need neither colour nor a wide window.

A chart is about as wide as a telephone (its units are then pixels) and grows to half a page. Series differ in shape and
filling, every mark has its number beside it or in a table below, and each chart says in `<title>` and `<desc>` what it
shows. Colours are classes of style.css.
"""

import math
from collections.abc import Sequence

from markupsafe import Markup

from compressor.reports.estimate import Estimate
from compressor.reports.html.reliability import Bin
from compressor.reports.markdown import estimate_text, number

WIDTH = 420
ROW = 38
LABEL_CHARACTERS = 24
LONGEST_TITLE = 200


def interval_bars(ident: str, title: str, rows: Sequence[tuple[str, Estimate]], origin: float) -> Markup:
    """Draw a bar from `origin` to each value with its 95 % interval, the label and the numbers above the bar."""
    ends = [origin, *(end for _, one in rows for end in (one.value, *(one.ci95 or ())))]
    marks = ticks(min(ends), max(ends))
    low, high = min(marks[0], *ends), max(marks[-1], *ends)

    def x(value: float) -> float:
        return round(2 + (value - low) / (high - low) * (WIDTH - 4), 1)

    # Lines stand behind the bars only, so that no number is crossed out.
    bands = "".join(f"v20m0 {ROW - 20}" for _ in rows)
    line = Markup('<path class="{}" d="M{} 18{}"/>')
    drawn = [line.format("grid", x(mark), bands) for mark in marks]
    bottom = ROW * len(rows) + 4
    drawn += [_text(x(mark), bottom + 14, number(mark), "tick", _anchor(x(mark))) for mark in marks]
    bar = Markup('<rect class="bar" x="{}" y="{}" width="{}" height="10"/>')
    for place, (label, one) in enumerate(rows):
        top = ROW * place
        left, right = sorted((x(origin), x(one.value)))
        drawn.append(_text(0, top + 13, _cut(label), "label"))
        drawn.append(_text(WIDTH, top + 13, estimate_text(one), "value", "end"))
        drawn.append(bar.format(left, top + 23, round(max(right - left, 0.5), 1)))
        if one.ci95:
            drawn.append(_whisker(x(one.ci95[0]), x(one.ci95[1]), top + 28))
    drawn.append(line.format("origin", x(origin), bands))
    described = "; ".join(f"{_cut(label)}: {estimate_text(one)}" for label, one in rows)
    return _svg(ident, title, f"Value and 95 % interval. {described}", bottom + 20, drawn)


def reliability_diagram(ident: str, title: str, before: Sequence[Bin], after: Sequence[Bin]) -> Markup:
    """Draw accuracy over confidence: the baseline hollow and dashed, the candidate filled and solid."""
    left, top, side = 46, 10, 340

    def x(share: float) -> float:
        return round(left + share * side, 1)

    def y(share: float) -> float:
        return round(top + (1 - share) * side, 1)

    drawn = []
    for mark in (0, 0.25, 0.5, 0.75, 1):
        drawn += [_line(x(mark), y(0), x(mark), y(1), "grid"), _line(x(0), y(mark), x(1), y(mark), "grid")]
        drawn.append(_text(x(mark), y(0) + 18, f"{mark:g}", "tick", "middle"))
        drawn.append(_text(x(0) - 6, y(mark) + 4, f"{mark:g}", "tick", "end"))
    drawn.append(_line(x(0), y(0), x(1), y(1), "diagonal"))
    for name, bins, shift in (("before", before, -2.0), ("after", after, 2.0)):
        points = " ".join(f"{x(one.confidence)},{y(one.accuracy)}" for one in bins)
        drawn.append(Markup('<polyline class="curve {}" points="{}"/>').format(name, points))
        for one in bins:
            at = round(x(one.confidence) + shift, 1)  # whiskers of the two models stand beside each other
            drawn.append(_line(at, y(one.ci95[0]), at, y(one.ci95[1]), f"whisker {name}"))
            drawn.append(_mark(name, x(one.confidence), y(one.accuracy)))
    drawn.append(_text(x(0.5), y(0) + 36, "confidence in the answer", "axis", "middle"))
    turned = Markup('<text class="axis" text-anchor="middle" transform="translate(12 {}) rotate(-90)">{}</text>')
    drawn.append(turned.format(y(0.5), "share that is right"))
    described = "; ".join(
        f"{name}: " + ", ".join(f"{number(one.confidence)} sure, {number(one.accuracy)} right" for one in bins)
        for name, bins in (("baseline", before), ("candidate", after))
    )
    return _svg(ident, title, described, y(0) + 46, drawn)


def legend_mark(name: str) -> Markup:
    """Return the mark of the baseline ("before") or of the candidate ("after") for a legend."""
    svg = '<svg class="mark" viewBox="0 0 24 14" width="24" height="14" aria-hidden="true">{}{}</svg>'
    line = Markup('<polyline class="curve {}" points="0,7 24,7"/>').format(name)
    return Markup(svg).format(line, _mark(name, 12, 7))


def token_bars(title: str, tokens: Sequence[int]) -> Markup:
    """Draw the tokens of each expert of a layer as a row of thin bars, the equal share as a line."""
    height, most = 30, max(*tokens, 1)
    path = "".join(
        f"M{4 * place} {height}v{-round(count / most * height, 1)}h3V{height}z" for place, count in enumerate(tokens)
    )
    fair = round(height * (1 - sum(tokens) / len(tokens) / most), 1)
    svg = Markup(
        '<svg class="tokens" role="img" aria-label="{}" viewBox="0 0 {} {}" preserveAspectRatio="none">'
        '<path class="bar" d="{}"/>{}</svg>'
    )
    width = 4 * len(tokens)
    return svg.format(title, width, height, path, _line(0, fair, width, fair, "origin"))


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten) from at or below `low` to at or above `high`."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * nice for nice in (1, 2, 5, 10) if span / (power * nice) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * place, 12) for place in range(first, max(last, first + 1) + 1)]


def _svg(ident: str, title: str, description: str, height: float, drawn: Sequence[Markup]) -> Markup:
    svg = Markup(
        '<svg class="chart" role="img" aria-labelledby="{0}-t {0}-d" viewBox="0 0 {1} {2}">'
        '<title id="{0}-t">{3}</title><desc id="{0}-d">{4}</desc>{5}</svg>'
    )
    return svg.format(ident, WIDTH, height, title[:LONGEST_TITLE], description, Markup("").join(drawn))


def _mark(name: str, x: float, y: float) -> Markup:
    if name == "before":
        return Markup('<circle class="before" cx="{}" cy="{}" r="4.5"/>').format(x, y)
    return Markup('<rect class="after" x="{}" y="{}" width="8" height="8"/>').format(round(x - 4, 1), round(y - 4, 1))


def _whisker(low: float, high: float, y: float) -> Markup:
    path = Markup('<path class="whisker" d="M{0} {2}v10M{0} {3}H{1}M{1} {2}v10"/>')
    return path.format(low, high, y - 5, y)


def _line(x1: float, y1: float, x2: float, y2: float, name: str) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(name, x1, y1, x2, y2)


def _text(x: float, y: float, text: str, name: str, anchor: str = "start") -> Markup:
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(name, x, y, anchor, text)


def _anchor(x: float) -> str:
    """Labels at the edges stay inside the drawing."""
    return "start" if x < 20 else "end" if x > WIDTH - 20 else "middle"


def _cut(label: str) -> str:
    return label if len(label) <= LABEL_CHARACTERS else label[: LABEL_CHARACTERS - 1] + "…"
