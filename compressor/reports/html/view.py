"""What the page says, as plain values for the template: each section's rows, cut to a length that can be read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from compressor.reports.estimate import Estimate
from compressor.reports.html.charts import interval_bars, token_bars
from compressor.reports.html.exceptions import exceptions
from compressor.reports.html.flips import Browser, Change
from compressor.reports.html.reliability import reliabilities
from compressor.reports.html.steps import (
    BEHAVIOUR,
    Document,
    behaviour_rows,
    columns,
    estimate,
    parts,
    section_rows,
    shown,
    unmeasured,
)
from compressor.reports.markdown import estimate_text, megabytes, number
from compressor.reports.measurement import LayerRouting
from compressor.reports.report import Report

STATUSES = ("fail", "inconclusive", "unmeasured", "waived", "skipped", "pass")  # worst first
NOT_A_NUMBER = "is not a finite number"  # how a report ends the reason for a value that JSON cannot hold
SECTIONS = {"Accuracy": "accuracy", "Memory": "memory", "Latency": "latency"}


@dataclass(frozen=True)
class Caps:
    """How long tables and cells may become, and how many diagrams are drawn. Flips fill what room is left."""

    rows: int
    figures: int
    characters: int


@dataclass(frozen=True)
class Listed:
    """The rows of a table that are shown, and how many are not."""

    shown: Sequence[Any]
    left_out: int


@dataclass(frozen=True)
class Tile:
    """One figure to see at a glance."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Domain:
    """How one evaluation text fared in the last step."""

    text: str
    ratio: Estimate | None
    kl: Estimate | None
    agreement: Estimate | None
    reason: str


@dataclass(frozen=True)
class Layer:
    """The tokens that the experts of a layer received."""

    layer: int
    bars: Markup
    fewest: str
    most: str
    shift: float | None


def view(report: Report, browser: Browser | None, caps: Caps) -> dict[str, Any]:
    """Return all that the template shows except the flips themselves."""

    def listed(rows: Sequence[Any], most: int = caps.rows) -> Listed:
        return Listed(rows[:most], max(0, len(rows) - most))

    document = report.to_json()
    checks = _checks(report.gate)
    behaviour = behaviour_rows(document)
    beside = ("calibration", "slices", "flips") if browser else ("calibration",)  # these have sections of their own
    domains = _domains(document)
    return {
        "title": report.baseline.name,
        "recipe_sha256": report.recipe_sha256,
        "verdict": None if report.gate is None else report.gate["verdict"],
        "problems": listed([check for check in checks if check["status"] != "pass"]),
        "passed": listed([check for check in checks if check["status"] == "pass"]),
        "tiles": list(_tiles(document, browser)),
        "slower": _slower(document),
        "columns": columns(document),
        "steps": document["steps"],
        "sections": {name: listed(section_rows(document, section)) for name, section in SECTIONS.items()},
        "unmeasured": listed(unmeasured(document)),
        "domains": listed(domains),
        "domain_charts": _domain_charts(domains[: caps.figures * 4]),
        "domains_not_drawn": max(0, len(domains) - caps.figures * 4),
        "browser": browser,
        "changes": listed(browser.changes() if browser else ()),
        "slices": listed(_slices(browser, checks) if browser else ()),
        "reliability": listed(reliabilities(browser.pairs) if browser else (), caps.figures),
        "calibration": listed(behaviour.get("calibration", ())),
        "behaviour": {
            BEHAVIOUR.get(kind, kind): listed(rows) for kind, rows in behaviour.items() if kind not in beside
        },
        "routing": listed(_routing(report)),
        "ledgers": [
            {
                "step": found.step,
                "accounted": found.accounted,
                "groups": {"Not treated as asked": listed(found.otherwise), "Kept as they were": listed(found.kept)},
                "starved": listed(found.starved),
            }
            for step in report.steps
            if (found := exceptions(step))
        ],
        "exports": document["exports"],
        "environment": listed(list(_flat(document["environment"]))),
    }


def _checks(gate: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The gate's checks, worst first. Those of older reports have no `where`."""
    checks = [{"where": None, **check} for check in (gate or {}).get("checks", ())]
    return sorted(checks, key=lambda check: STATUSES.index(check["status"]))


def _tiles(document: Document, browser: Browser | None) -> Iterator[Tile]:
    """Size, the worst text, the distance, the speed, the flips: each only where it was measured."""
    if not document["steps"]:
        return
    step, before = document["steps"][-1], document["baseline"]["measurement"]
    after, delta = step["measurement"], step["delta"]["from_baseline"]
    if (ratio := delta.get("weight_bytes_ratio")) is not None:
        sizes = [megabytes(measurement["memory"]["weight_bytes"]) for measurement in (before, after)]
        yield Tile("Weights", f"×{number(ratio)}", " → ".join(sizes))
    if worst := _worst_text(delta.get("perplexity_ratio") or {}):
        yield Tile("Perplexity, worst text", *worst)
    if (kl := estimate(after["accuracy"].get("kl_mean"))) is not None:
        yield Tile("KL to the baseline", number(kl.value), _with_interval("nats a token", kl))
    for batch, value in parts(delta.get("decode_latency_ratio"))[:1]:
        if (one := estimate(value)) is not None:
            yield Tile("Decode time", f"×{number(one.value)}", _with_interval(f"batch {batch}", one))
    if browser and (plain := [change for change in browser.changes() if change.is_plain]):
        items, gained = sum(change.n for change in plain), sum(change.wrong_to_right for change in plain)
        lost = sum(change.right_to_wrong for change in plain)
        yield Tile("Right → wrong", f"{lost:,}", f"of {items:,} items; {gained:,} wrong → right")


def _worst_text(ratios: Mapping[str, Any]) -> tuple[str, str] | None:
    """The largest ratio and its text; a text whose perplexity is no number any more is worse than all others."""
    known = {str(text): estimate(value) for text, value in parts(ratios or None)}
    broken = [text for text, one in known.items() if one is None and ratios[f"{text}_reason"].endswith(NOT_A_NUMBER)]
    if broken:
        return "no number", ", ".join(broken)
    measured = {text: one for text, one in known.items() if one is not None}
    if not measured:
        return None
    worst = max(measured, key=lambda text: measured[text].value)
    return f"×{number(measured[worst].value)}", _with_interval(worst, measured[worst])


def _slower(document: Document) -> list[str]:
    """What takes longer than in the baseline, beyond doubt: said, not left to be found in the table."""
    found = []
    for step in document["steps"][-1:]:
        for name in ("decode", "prefill"):
            for batch, value in parts(step["delta"]["from_baseline"].get(f"{name}_latency_ratio")):
                one = estimate(value)
                if one is not None and (one.ci95[0] if one.ci95 else one.value) > 1:
                    found.append(f"{name} at batch {batch} (×{estimate_text(one)})")
    return found


def _with_interval(words: str, one: Estimate) -> str:
    interval = estimate_text(one).removeprefix(number(one.value)).strip()
    return f"{words}, {interval}" if interval else words


def _domains(document: Document) -> list[Domain]:
    """The texts of the last step, the one whose perplexity grew most first."""
    if not document["steps"]:
        return []
    step = document["steps"][-1]
    accuracy, ratios = step["measurement"]["accuracy"], step["delta"]["from_baseline"].get("perplexity_ratio") or {}
    by_text = [
        {part: estimate(value) for part, value in parts(accuracy.get(key)) if part}
        for key in ("kl", "top1_agreement_by_text")
    ]
    texts = dict.fromkeys([*(part for part, _ in parts(ratios or None) if part), *by_text[0]])
    domains = [
        Domain(
            text,
            estimate(ratios.get(text)),
            by_text[0].get(text),
            by_text[1].get(text),
            ratios.get(f"{text}_reason", ""),
        )
        for text in texts
    ]
    return sorted(
        domains, key=lambda domain: (domain.ratio is not None, -(domain.ratio.value if domain.ratio else 0.0))
    )


def _domain_charts(domains: Sequence[Domain]) -> list[tuple[str, Markup]]:
    ratios = [(domain.text, domain.ratio) for domain in domains if domain.ratio]
    distances = sorted(((domain.text, domain.kl) for domain in domains if domain.kl), key=lambda pair: -pair[1].value)
    charts = []
    if ratios:
        title = "Perplexity, after / before, by text"
        charts.append(
            (f"{title}. Left of 1 is better than the baseline.", interval_bars("chart-ratio", title, ratios, 1.0))
        )
    if distances:
        title = "KL to the baseline, nats a token, by text"
        charts.append((f"{title}. 0 is the baseline.", interval_bars("chart-kl", title, distances, 0.0)))
    return charts


def _slices(browser: Browser, checks: Sequence[Mapping[str, Any]]) -> list[tuple[Change, str | None]]:
    """The slices with what the gate says of each, which corrects for how many there are; None if it says nothing."""
    judged = {check.get("rule"): check["status"] for check in checks if check.get("group") == "slices"}
    return [(change, judged.get(f"slices.{change.task}/{change.slice}")) for change in browser.slices()]


def _routing(report: Report) -> list[Layer]:
    return [_layer(routing) for routing in report.latest.routing or ()]


def _layer(routing: LayerRouting) -> Layer:
    tokens = routing.tokens
    fewest, most = min(tokens), max(tokens)
    title = f"Layer {routing.layer}: tokens of each of {len(tokens)} experts, from {fewest:,} to {most:,}"
    return Layer(
        routing.layer,
        token_bars(title, tokens),
        f"{fewest:,} (expert {tokens.index(fewest)})",
        f"{most:,} (expert {tokens.index(most)})",
        routing.shift,
    )


def _flat(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    for key, part in value.items():
        where = f"{path} {key}" if path else str(key)
        if isinstance(part, Mapping):
            yield from _flat(part, where)
        else:
            yield where, shown(part)
