"""What happened to every weight and every expert: a pass accounts for all of them, or it has not finished."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self, get_args

from compressor.errors import IntegrityError
from compressor.reports.measurement import finite

Action = Literal["quantized", "pruned", "trained", "kept"]


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """One weight: what was done to it, and why, if that is not simply what was asked.

    `parameters` counts its elements, `bits` the storage of each without scales, `error` is the relative error of its
    output (or None), `group_size` None means one scale a row or no grid at all. `reason` is empty where the weight was
    treated as asked; a weight that was kept always has one.
    """

    name: str
    action: Action
    reason: str
    parameters: int
    bits: float
    group_size: int | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        if self.action not in get_args(Action):
            raise ValueError(f"{self.name}: unknown action {self.action!r}; it is one of {', '.join(get_args(Action))}")
        if self.action == "kept" and not self.reason:
            raise ValueError(f"{self.name}: a weight that is kept needs a reason")

    def to_json(self) -> dict:
        """Return the row as it stands in a report."""
        return {
            "name": self.name,
            "action": self.action,
            "reason": self.reason,
            "parameters": self.parameters,
            "bits": self.bits,
            "group_size": self.group_size,
            "error": finite(self.error),
        }

    @classmethod
    def from_json(cls, data: dict) -> Self:
        """Read what `to_json` gives."""
        return cls(**data)


@dataclass(frozen=True, kw_only=True)
class ExpertRow:
    """The experts of one layer: tokens that each received in calibration, which of them are starved, and what was done.

    `starved` lists expert numbers; `policy` names for each expert how its statistics were completed, or is None.
    """

    layer: int
    tokens: tuple[int, ...]
    starved: tuple[int, ...]
    policy: tuple[str, ...] | None = None

    def to_json(self) -> dict:
        """Return the row as it stands in a report."""
        return {
            "layer": self.layer,
            "tokens": list(self.tokens),
            "starved": list(self.starved),
            "policy": None if self.policy is None else list(self.policy),
        }

    @classmethod
    def from_json(cls, data: dict) -> Self:
        """Read what `to_json` gives."""
        policy = data["policy"]
        return cls(
            layer=data["layer"],
            tokens=tuple(data["tokens"]),
            starved=tuple(data["starved"]),
            policy=None if policy is None else tuple(policy),
        )


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """All weights and experts that a pass has seen; `blocks` holds what it recorded of each block (JSON values)."""

    weights: tuple[LedgerRow, ...] = ()
    experts: tuple[ExpertRow, ...] = ()
    blocks: tuple[dict, ...] = ()

    def accounted(self) -> tuple[int, dict[str, int]]:
        """Return the parameters that the rows cover, and how many of them by action."""
        by_action = {action: 0 for action in get_args(Action)}
        for row in self.weights:
            by_action[row.action] += row.parameters
        return sum(by_action.values()), by_action

    def merge(self, other: "Ledger") -> "Ledger":
        """Return the rows of both, this one's first: blocks report one by one."""
        return Ledger(
            weights=self.weights + other.weights,
            experts=self.experts + other.experts,
            blocks=self.blocks + other.blocks,
        )

    def to_json(self) -> dict:
        """Return {"weights", "experts", "blocks"}."""
        return {
            "weights": [row.to_json() for row in self.weights],
            "experts": [row.to_json() for row in self.experts],
            "blocks": list(self.blocks),
        }

    @classmethod
    def from_json(cls, data: dict) -> Self:
        """Read what `to_json` gives; raises IntegrityError for anything else."""
        try:
            return cls(
                weights=tuple(map(LedgerRow.from_json, data["weights"])),
                experts=tuple(map(ExpertRow.from_json, data["experts"])),
                blocks=tuple(data.get("blocks", ())),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"not a ledger: {error!r}") from error


def check_complete(ledger: Ledger, total_parameters: int, expected: Mapping[str, int] | None = None) -> None:
    """Make sure that a ledger accounts for every parameter exactly once; raises IntegrityError if it does not.

    `total_parameters` is the model's count before the pass; `expected` (name -> parameters) lets the error name what is
    missing, unknown or of another size.
    """
    counts = Counter(row.name for row in ledger.weights)
    problems = []
    if twice := [name for name, count in counts.items() if count > 1]:
        problems.append(f"listed twice: {_some(twice)}")
    if expected is not None:
        if missing := [name for name in expected if name not in counts]:
            problems.append(f"missing: {_some(missing)}")
        if unknown := [name for name in counts if name not in expected]:
            problems.append(f"not in the model: {_some(unknown)}")
        for row in ledger.weights:
            if expected.get(row.name, row.parameters) != row.parameters:
                problems.append(f"{row.name} has {expected[row.name]:,} parameters, its row says {row.parameters:,}")
    accounted, _ = ledger.accounted()
    if accounted != total_parameters:
        difference = total_parameters - accounted
        problems.append(f"{abs(difference):,} parameters {'missing' if difference > 0 else 'too many'}")
    if problems:
        raise IntegrityError(
            f"the ledger accounts for {accounted:,} of {total_parameters:,} parameters; {'; '.join(problems)}"
        )


def _some(names: list[str], shown: int = 8) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
