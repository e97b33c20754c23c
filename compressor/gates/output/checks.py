"""What every output says of a check: which comes first, what it is called, what its numbers are.

Names come from checkpoints and task files, that is, from strangers: `plain` is applied to all of them.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]
Check = Mapping[str, Any]

# Worst first: what has to be looked at before anything else. Structure goes first among equals: where the file is
# wrong, the figures measured on it mean nothing.
STATUSES = ("fail", "inconclusive", "unmeasured", "waived", "skipped", "pass")
GROUPS = ("structure", "fidelity", "tasks", "slices", "cost")
UNDECIDED = ("inconclusive", "unmeasured")
NOTHING = "–"
MOST_NOTES = 10

# Control characters (a terminal obeys them, XML forbids them), marks that turn the direction of the text around them,
# and halves of surrogate pairs, which no file can hold.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def is_let_through(check: Check, result: Result) -> bool:
    """Whether a check could not be decided and the caller has said that this shall not fail the gate."""
    return check["status"] in UNDECIDED and result.get("on_inconclusive", "fail") != "fail"


def notes(result: Result) -> list[str]:
    """Return what the gate noticed beside its checks, such as a waiver that covers nothing."""
    every = result.get("notes") or ()
    more = len(every) - MOST_NOTES
    return [plain(note, 300) for note in every[:MOST_NOTES]] + (
        [f"{more} more notes are in the JSON output"] * (more > 0)
    )


def plain(value: object, longest: int = 2000) -> str:
    """Return a value as one line of text that any terminal, file and XML reader takes, cut where it is too long."""
    line = " ".join(_UNPRINTABLE.sub("", str(value).replace("\r", "\n")).split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def worst_first(result: Result) -> list[Check]:
    """Return the checks by severity, then by group, then by how far they lie beyond their limit."""
    return sorted(
        result["checks"],
        key=lambda check: (STATUSES.index(check["status"]), GROUPS.index(check["group"]), -_excess(check)),
    )


def counts(checks: Sequence[Check]) -> str:
    """Return how many checks there are of each status, worst first: `2 fail, 30 pass`."""
    found = Counter(check["status"] for check in checks)
    return ", ".join(f"{found[status]} {status}" for status in STATUSES if found[status]) or "no checks"


def label(check: Check, result: Result) -> str:
    """Return what a check is called: its rule, its metric where that says more, its baseline if there are more."""
    rule, metric, baseline = plain(check["rule"]), plain(check.get("metric") or ""), check.get("baseline")
    name = rule if not metric or metric in rule else metric if rule in metric else f"{rule} {metric}"
    return f"{name} against {plain(baseline, 200)}" if baseline and len(result["baselines"]) > 1 else name


def against(result: Result, longest: int = 200) -> str:
    """Return the baselines in a row."""
    return ", ".join(plain(name, longest) for name in result["baselines"][:8]) or "no baseline"


def value_text(check: Check) -> str:
    """Return the value with its 95 % interval, a dash if there is none."""
    value, interval = check.get("value"), check.get("ci95")
    if value is None:
        return NOTHING
    if not interval or None in interval or interval[0] == interval[1]:
        return number(value)
    return f"{number(value)} [{number(interval[0])}, {number(interval[1])}]"


def limit_text(check: Check) -> str:
    """Return the limit as words: `at most 1.05`; what is neither max nor min is named."""
    limit = check.get("limit") or {}
    words = {"max": "at most", "min": "at least"}
    parts = [f"{words.get(key, key)} {number(bound)}" for key, bound in limit.items() if bound is not None]
    return plain(", ".join(parts)) or NOTHING


def remarks(check: Check) -> list[str]:
    """Return what a person needs to know beyond the sentence: where, how much more evidence, who let it pass.

    What the sentence says already is not said again.
    """
    text, found = check["text"], []
    where, needed, effect = (check.get(key) for key in ("where", "items_needed", "minimum_detectable_effect"))
    if where and where not in text:
        found.append(f"where: {plain(where)}")
    if needed is not None and not {f"{needed:,}", str(needed)} & set(text.split()):
        found.append(f"about {needed:,} items would settle it (now {number(check.get('n'))})")
    if effect is not None and not {f"{effect:.4f}", number(effect)} & set(text.split()):
        found.append(f"smallest effect that this many items can show: {number(effect)}")
    waiver = check.get("waiver") or {}
    if waiver and not all(str(part) in text for part in waiver.values()):
        owner, expires, reason = (plain(waiver.get(key) or NOTHING) for key in ("owner", "expires", "reason"))
        found.append(f"waived by {owner} until {expires}: {reason}")
    return found


def number(value: object) -> str:
    """Return four significant digits of a number, other values as they are, a dash for None."""
    if value is None:
        return NOTHING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _excess(check: Check) -> float:
    """How far the outer end of the interval lies beyond the limit, as a share of the limit; no number: infinitely."""
    limit, value = check.get("limit") or {}, check.get("value")
    if value is None or not math.isfinite(value):
        return math.inf
    low, high = check.get("ci95") or (value, value)
    if low is None or high is None:
        return math.inf
    if limit.get("max") is not None:
        return (high - limit["max"]) / (abs(limit["max"]) or 1.0)
    if limit.get("min") is not None:
        return (limit["min"] - low) / (abs(limit["min"]) or 1.0)
    return 0.0
