"""The page as text: the view through the template, with as many flips as fit."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from compressor.errors import IntegrityError
from compressor.reports.estimate import Estimate
from compressor.reports.html import charts
from compressor.reports.html.flips import Browser, answer_text, brief, browse
from compressor.reports.html.steps import shown
from compressor.reports.html.view import Caps, view
from compressor.reports.markdown import REPRODUCE, estimate_text, megabytes, number
from compressor.reports.report import Report

MAX_BYTES = 1_500_000
LONGEST_FIGURE = 200
SPARE_BYTES = 2_000  # for the sentences that change once it is known how many flips fit
# The first that gives a page within MAX_BYTES is taken: a usual report never needs the second.
CAPS = (Caps(400, 12, 4000), Caps(60, 6, 500), Caps(10, 2, 120))
SYMBOLS = {"pass": "✓", "fail": "✗", "regression": "✗", "waived": "○"}  # beside the word, never instead of it
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def to_html(report: Report, items: Mapping[str, list[dict[str, Any]]], *, reproduce: str = REPRODUCE) -> str:
    """Return the report as one self-contained page of at most 1.5 MB.

    `items` holds the lines of items/*.jsonl by name ("baseline" and the steps' ids), `reproduce` the command that gives
    the report again. Flips that do not fit are left out and counted; so are rows of overlong tables.
    """
    problem, browser = "", None
    try:
        browser = browse(items, [step.id for step in report.steps])
    except IntegrityError as error:  # the figures are as true as before, and the page says what is missing
        problem = str(error)
    size = 0
    for caps in CAPS:
        shows = view(report, browser, caps) | {"problem": problem, "reproduce": reproduce}
        page = _with_flips(_environment(caps), shows, browser, caps)
        size = len(page.encode())
        if size <= MAX_BYTES:
            return page
    raise ValueError(f"as HTML the report takes {size:,} bytes, with its tables cut to {CAPS[-1].rows} rows")


def _environment(caps: Caps) -> Environment:
    def finalize(value: Any) -> Any:
        """No text that comes from outside is longer than a cell may be."""
        if isinstance(value, Markup) or not isinstance(value, str) or len(value) <= caps.characters:
            return value
        return value[: caps.characters - 1] + "…"

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=finalize,
    )
    environment.globals |= {"symbols": SYMBOLS, "charts": charts}
    environment.filters |= {"estimate": estimate_text, "megabytes": megabytes, "number": number, "shown": shown}
    environment.filters |= {"figure": _figure, "points": _points, "percent": "{:.1%}".format}
    environment.filters |= {"brief": brief, "answer": answer_text}
    return environment


def _rendered(template: Template, shows: dict[str, Any]) -> str:
    """The page or a part of it, without what no file can hold and what would turn the text around."""
    return _UNPRINTABLE.sub("", template.render(shows))


def _figure(text: str) -> Markup:
    """A number, and its interval as one piece that moves to the next line where the column is narrow."""
    value, bracket, interval = text[:LONGEST_FIGURE].partition(" [")
    return escape(value) + (Markup(' <span class="ci">[{}</span>').format(interval) if bracket else "")


def _points(difference: Estimate) -> str:
    """A difference of shares in percentage points, signed."""
    assert difference.ci95 is not None
    low, high = (100 * end for end in difference.ci95)
    return f"{100 * difference.value:+.1f} [{low:+.1f}, {high:+.1f}]".replace("-", "−")


def _with_flips(environment: Environment, shows: dict[str, Any], browser: Browser | None, caps: Caps) -> str:
    template, card = environment.get_template("template.html"), environment.get_template("flip.html")
    flips = browser.flips() if browser else []
    tasks = list(dict.fromkeys(flip.before.task for flip in flips))[: caps.rows]
    slices = list(dict.fromkeys(flip.before.slice for flip in flips if flip.before.slice is not None))[: caps.rows]
    cards: dict[str, list[Markup]] = {task: [] for task in tasks}
    shows |= {"slices_of_flips": slices, "flips_shown": 0, "flips_total": len(flips), "cards": cards}
    room = MAX_BYTES - SPARE_BYTES - len(_rendered(template, shows).encode())
    for flip in flips:
        if flip.before.task not in cards:
            continue
        place = slices.index(flip.before.slice) if flip.before.slice in slices else None
        drawn = Markup(_rendered(card, {"flip": flip, "place": place}))
        room -= len(drawn.encode())
        if room < 0:
            break
        cards[flip.before.task].append(drawn)
    shows["cards"] = {task: drawn for task, drawn in cards.items() if drawn}
    return _rendered(template, shows | {"flips_shown": sum(map(len, cards.values()))})
