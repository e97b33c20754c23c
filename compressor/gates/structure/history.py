"""What a run's ledgers say was done to each weight: trained, pruned, quantized to how many bits, which experts stayed.

It decides how strictly a weight is compared with the baseline's; what the weight holds is always read from the file.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

N_OF_M = re.compile(r"\b(\d+) of (\d+) kept")
SHARE = re.compile(r"\b(\d+)% of each row zero")


@dataclass(frozen=True)
class Sparsity:
    """Zeros that pruning promised: `kept` of every `group` neighbours stay, or a `share` of each row is zero."""

    kept: int | None = None
    group: int | None = None
    share: float | None = None


@dataclass(frozen=True)
class History:
    """Names are those of ledgers: `…q_proj` for a site, `…experts.gate_up_proj` for a stack, without `.weight`.

    `known` is False where no ledger was given: then nothing counts as trained or pruned, and what was asked is unknown.
    """

    known: bool
    trained: frozenset[str] = frozenset()
    pruned: Mapping[str, Sparsity] | None = None
    quantized: Mapping[str, tuple[int, int | None]] | None = None  # bits, group
    kept_experts: Mapping[int, tuple[int, ...]] | None = None  # layer -> numbers in the source

    def sparsity(self, name: str) -> Sparsity | None:
        return (self.pruned or {}).get(name)


def read_history(ledgers: Sequence[Mapping[str, Any]] | None) -> History:
    """The ledgers of a run's steps, in order (`report["steps"][i]["ledger"]`), as one history."""
    if ledgers is None:
        return History(known=False)
    trained: set[str] = set()
    pruned: dict[str, Sparsity] = {}
    quantized: dict[str, tuple[int, int | None]] = {}
    kept: dict[int, tuple[int, ...]] = {}
    for ledger in ledgers:
        cuts = {block["index"]: block["kept_experts"] for block in ledger.get("blocks", ()) if "kept_experts" in block}
        for layer, numbers in cuts.items():
            before = kept.get(layer)
            kept[layer] = tuple(before[n] if before else n for n in numbers)
        for row in ledger["weights"]:
            name = row["name"].removesuffix(".weight")
            if row["action"] == "trained":
                trained.add(name)
            elif row["action"] == "quantized":
                quantized[name] = (int(row["bits"]), row["group_size"])
            elif row["action"] == "pruned" and not cuts:
                pruned[name] = _sparsity(row["reason"])
    return History(True, frozenset(trained), pruned, quantized, kept)


def _sparsity(reason: str) -> Sparsity:
    if match := N_OF_M.search(reason):
        return Sparsity(kept=int(match[1]), group=int(match[2]))
    if match := SHARE.search(reason):
        return Sparsity(share=int(match[1]) / 100)
    return Sparsity()
