"""Which expert of the baseline each expert of the candidate is: experts may go, but not change places or double.

E experts, H model width.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.gates.structure.finding import Finding, failed
from compressor.gates.structure.history import History
from compressor.gates.structure.layout import Layout, Linear
from compressor.gates.structure.stored import Stored

RULES = {"baseline.experts": "every expert and its row of the router come from one expert of the baseline"}
ALIKE = 0.5  # correlation of a router's row with the row that it was


@dataclass(frozen=True)
class Origins:
    """Numbers in the baseline of the experts of every layer, in our order; layers that nobody can tell are left out."""

    kept: Mapping[int, tuple[int, ...]]
    failures: tuple[Finding, ...]

    def name(self, linear: Linear) -> str | None:
        """The name in the baseline of a linear layer; None where it is not known."""
        if linear.expert is None or linear.block is None:
            return linear.name
        numbers = self.kept.get(linear.block)
        if numbers is None:
            return None
        stack, _, part = linear.name.rsplit(".", 2)
        return f"{stack}.{numbers[linear.expert]}.{part}"


def find_origins(stored: Stored, baseline: Stored, layout: Layout, history: History) -> Origins:
    """From the ledger where it says which experts stayed, else from the rows of the router."""
    kept: dict[int, tuple[int, ...]] = {}
    failures = []
    for router in layout.routers:
        key = f"{router.name}.weight"
        if key not in stored.reader or key not in baseline.reader or stored.reader.shape(key) != router.shape:
            continue
        assert router.block is not None
        ours, theirs = router.shape[0], baseline.reader.shape(key)[0]
        numbers = (history.kept_experts or {}).get(router.block)
        if numbers is None and ours == theirs:
            numbers = tuple(range(ours))
        if numbers is None:
            numbers = _by_rows(stored.reader.tensor(key).float(), baseline.reader.tensor(key).float())
        if numbers is None or len(numbers) != ours or max(numbers) >= theirs:
            text = (
                f"{router.name}: {ours} experts cannot be matched with {ours} different ones of the baseline's {theirs}"
            )
            failures.append(failed("baseline.experts", router.name, text))
        else:
            kept[router.block] = numbers
    return Origins(kept, tuple(failures))


def _by_rows(ours_EH: Tensor, theirs_EH: Tensor) -> tuple[int, ...] | None:
    """For each row of our router the one that it was; None where two would be the same or one is none of them."""
    alike = torch.nn.functional.normalize(ours_EH, dim=1) @ torch.nn.functional.normalize(theirs_EH, dim=1).T
    best = alike.max(dim=1)
    numbers = tuple(best.indices.tolist())
    return numbers if len(set(numbers)) == len(numbers) and bool((best.values > ALIKE).all()) else None
