"""What a step did not treat as asked: weights kept, weights treated otherwise, experts without enough tokens."""

from collections.abc import Iterable
from dataclasses import dataclass

from compressor.reports.ledger import ExpertRow, LedgerRow
from compressor.reports.report import Step

SHOWN_NAMES = 4
SHOWN_EXPERTS = 12


@dataclass(frozen=True)
class Exceptional:
    """Weights that share a reason."""

    reason: str
    weights: int
    parameters: int
    names: tuple[str, ...]

    @property
    def more(self) -> int:
        return self.weights - len(self.names)


@dataclass(frozen=True)
class Exceptions:
    """One step's exceptions, and the parameters by action that they are to be seen against."""

    step: str
    accounted: tuple[tuple[str, int, float], ...]  # action, parameters, share
    kept: tuple[Exceptional, ...]
    otherwise: tuple[Exceptional, ...]
    starved: tuple[str, ...]


def exceptions(step: Step) -> Exceptions | None:
    """Return the exceptions of a step; None if its pass keeps no ledger."""
    if step.ledger is None:
        return None
    total, by_action = step.ledger.accounted()
    rows = step.ledger.weights
    asked = step.options.get("group_size")
    changed = [(row, _unasked(row, asked)) for row in rows if row.action != "kept"]
    return Exceptions(
        step=step.id,
        accounted=tuple((action, count, count / total) for action, count in by_action.items() if count),
        kept=_grouped((row, row.reason) for row in rows if row.action == "kept"),
        otherwise=_grouped((row, reason) for row, reason in changed if reason),
        starved=tuple(_starved(row) for row in step.ledger.experts if row.starved),
    )


def _unasked(row: LedgerRow, asked: object) -> str:
    if row.action != "quantized" or not isinstance(asked, int) or row.group_size == asked:
        return row.reason
    group = "one scale a row" if row.group_size is None else f"group size {row.group_size}"
    return f"{group} instead of {asked}" + (f": {row.reason}" if row.reason else "")


def _grouped(rows: Iterable[tuple[LedgerRow, str]]) -> tuple[Exceptional, ...]:
    groups: dict[str, list[LedgerRow]] = {}
    for row, reason in rows:
        groups.setdefault(reason, []).append(row)
    return tuple(
        Exceptional(
            reason,
            len(members),
            sum(row.parameters for row in members),
            tuple(row.name for row in members[:SHOWN_NAMES]),
        )
        for reason, members in groups.items()
    )


def _starved(row: ExpertRow) -> str:
    described = [
        f"{expert} ({row.tokens[expert]:,} tokens" + (f", {row.policy[expert]})" if row.policy else ")")
        for expert in row.starved[:SHOWN_EXPERTS]
    ]
    more = len(row.starved) - len(described)
    return f"layer {row.layer}: expert {', '.join(described)}" + (f" and {more} more" if more else "")
