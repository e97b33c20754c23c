"""What a structural rule found: passed, failed (at which tensor or file), or skipped for want of something."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["pass", "fail", "skipped"]
MOST_SHOWN = 20  # failures of one rule that are listed; a broken layer of 128 experts would fill pages


@dataclass(frozen=True)
class Finding:
    """One rule held against an artefact; `where` names the tensor or file that is at fault."""

    rule: str
    status: Status
    where: str | None
    text: str

    def to_json(self) -> dict[str, Any]:
        """The four fields."""
        return {"rule": self.rule, "status": self.status, "where": self.where, "text": self.text}


def failed(rule: str, where: str, text: str) -> Finding:
    """A rule that does not hold at a tensor or file."""
    return Finding(rule, "fail", where, text)


def settled(rules: Mapping[str, str], failures: Iterable[Finding]) -> list[Finding]:
    """Every rule's outcome: its failures, at most MOST_SHOWN of them, or that it holds (the rule's own sentence)."""
    by_rule: dict[str, list[Finding]] = {rule: [] for rule in rules}
    for failure in failures:
        by_rule[failure.rule].append(failure)
    outcomes = []
    for rule, found in by_rule.items():
        outcomes += found[:MOST_SHOWN] or [Finding(rule, "pass", None, rules[rule])]
        if len(found) > MOST_SHOWN:
            rest = len(found) - MOST_SHOWN
            outcomes.append(failed(rule, str(found[MOST_SHOWN].where), f"and {rest} more like the ones before"))
    return outcomes


def skipped(rules: Iterable[str], reason: str) -> list[Finding]:
    """Rules that could not be held against the artefact, with the reason; never a pass."""
    return [Finding(rule, "skipped", None, f"not checked: {reason}") for rule in rules]
