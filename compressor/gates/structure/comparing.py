"""Rules that hold every tensor against the baseline's: untouched ones exactly, others up to what rounding costs."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compressor.gates.structure.diagnosis import describe
from compressor.gates.structure.experts import Origins
from compressor.gates.structure.finding import MOST_SHOWN, Finding, failed
from compressor.gates.structure.history import History
from compressor.gates.structure.layout import Layout, Linear
from compressor.gates.structure.nearness import measure_nearness
from compressor.gates.structure.stored import Packed, Stored, chunks, float_rows

RULES = {
    "baseline.equal": "every tensor that no pass touched is the baseline's exactly",
    "baseline.near": "every compressed weight is as near to the baseline's as its bits allow",
    "baseline.scales": "every scale fits the baseline's weights",
}
# A dense weight of a baseline that is packed itself is rounded to the model's dtype once more
ROUNDED_AGAIN = 0.01


@dataclass
class Comparison:
    """Holds tensors against the baseline's one by one; only the first broken ones are diagnosed."""

    baseline: Stored
    layout: Layout
    history: History
    origins: Origins
    diagnosed: int = field(default=0, init=False)  # workers may count one too few: a diagnosis more

    def tensor(self, name: str, ours: Tensor) -> Iterator[Finding]:
        """A tensor that is no linear layer, by its full name: norms, embeddings, biases."""
        ledger = name.removesuffix(".weight")
        if name not in self.baseline.reader:
            yield failed("baseline.equal", name, f"the baseline has no {name}")
            return
        theirs = self.baseline.reader.tensor(name)
        if theirs.shape != ours.shape:
            text = f"{name} has shape {list(ours.shape)}, the baseline's has {list(theirs.shape)}"
            yield failed("baseline.equal", name, text)
        elif ledger in self.history.trained:
            yield from self._trained(name, ours, theirs)
        elif difference := _difference(ours, theirs):
            yield failed("baseline.equal", name, f"{name} {difference}{_constant(ours)}")

    def linear(self, linear: Linear, ours: Tensor | Packed) -> Iterator[Finding]:
        """A linear layer, dense or packed."""
        origin = self.origins.name(linear)
        if origin is None:
            return  # `baseline.experts` says that nobody knows which one it was
        if not self.baseline.holds(origin):
            yield failed("baseline.near", linear.name, f"the baseline has no {origin}")
            return
        theirs = self.baseline.weight(origin)
        if linear.kind == "router" and isinstance(theirs, Tensor):
            numbers = self.origins.kept.get(linear.block if linear.block is not None else -1)
            if numbers is None:
                return
            theirs = theirs[list(numbers)]
        if tuple(theirs.shape) != tuple(ours.shape):
            text = f"{linear.name} has shape {list(ours.shape)}, the baseline's {origin} has {list(theirs.shape)}"
            yield failed("baseline.near", linear.name, text)
            return
        trained = linear.ledger in self.history.trained
        if isinstance(ours, Packed):
            yield from self._packed(linear, origin, ours, theirs, trained=trained)
        elif trained:
            yield from self._dense_trained(linear, origin, ours, theirs)
        else:
            yield from self._dense(linear, origin, ours, theirs)

    def _packed(
        self, linear: Linear, origin: str, ours: Packed, theirs: Tensor | Packed, *, trained: bool
    ) -> Iterator[Finding]:
        if not bool((torch.isfinite(ours.scales_OG) & (ours.scales_OG > 0)).all()):
            return  # `values.scales` names it
        pruned = self.history.sparsity(linear.ledger) is not None
        complaint = measure_nearness(ours, theirs, pruned=pruned).complaint(ours.spec.bits, trained=trained)
        if complaint is not None and complaint.about == "scales":
            key = f"{linear.name}.weight_scale"
            yield failed("baseline.scales", key, f"{key}: {complaint.text}")
        elif complaint is not None:
            key = f"{linear.name}.{ours.key}"
            text = f"{linear.name}: {complaint.text}{self._diagnose(linear, origin, ours)}"
            yield failed("baseline.near", key, text)

    def _dense(self, linear: Linear, origin: str, ours: Tensor, theirs: Tensor | Packed) -> Iterator[Finding]:
        name = f"{linear.name}.weight"
        if isinstance(theirs, Packed):
            moved = _relative(ours, theirs)
            if not moved <= ROUNDED_AGAIN:
                yield failed("baseline.equal", name, f"{name} differs from the baseline's by {moved:.2%} (relative)")
            return
        masked = self.history.sparsity(linear.ledger) is not None
        if text := _difference(ours, theirs, masked=masked):
            clause = self._diagnose(linear, origin, ours) if linear.kind != "router" else ""
            yield failed("baseline.equal", name, f"{name} {text}{clause}")

    def _dense_trained(self, linear: Linear, origin: str, ours: Tensor, theirs: Tensor | Packed) -> Iterator[Finding]:
        name = f"{linear.name}.weight"
        near = measure_nearness(ours, theirs, pruned=self.history.sparsity(linear.ledger) is not None)
        if complaint := near.complaint(None, trained=True):
            text = f"{name}: {complaint.text}{self._diagnose(linear, origin, ours)}"
            yield failed("baseline.near", name, text)

    def _trained(self, name: str, ours: Tensor, theirs: Tensor) -> Iterator[Finding]:
        """Norms and embeddings after training: still the same ones, and not what a fresh module starts with."""
        if ours.dim() >= 2:
            near = measure_nearness(ours.flatten(1), theirs.flatten(1))
            if complaint := near.complaint(None, trained=True):
                yield failed("baseline.near", name, f"{name}: {complaint.text}")
        elif ours.numel() > 1 and _constant(ours) and not _constant(theirs):
            yield failed("baseline.near", name, f"{name} was trained{_constant(ours)}; the baseline's is not constant")

    def _diagnose(self, linear: Linear, origin: str, ours: Tensor | Packed) -> str:
        self.diagnosed += 1
        if self.diagnosed > MOST_SHOWN:
            return ""
        return describe(linear, origin, ours, self.baseline, self.layout)


def _difference(ours: Tensor, theirs: Tensor, *, masked: bool = False) -> str | None:
    """How two tensors of one shape differ, the baseline's rounded to our dtype; `masked` allows ours to be zero."""
    count, largest = 0, 0.0
    for rows in chunks(tuple(ours.shape)) if ours.dim() else [slice(None)]:
        one, other = (ours[rows], theirs[rows]) if ours.dim() else (ours, theirs)
        other = other.to(one.dtype)
        if torch.equal(one, other):
            continue
        differs = one != other
        if masked:
            differs &= one != 0
        count += int(differs.sum())
        if bool(differs.any()):
            largest = max(largest, float((one.double() - other.double())[differs].abs().nan_to_num(torch.inf).max()))
    if not count:
        return None
    return f"differs from the baseline's in {count:,} of {ours.numel():,} places, by up to {largest:.3g}"


def _relative(ours: Tensor, theirs: Tensor | Packed) -> float:
    moved = total = 0.0
    for rows in chunks(tuple(ours.shape)):
        other = float_rows(theirs, rows)
        moved += float((ours[rows].float() - other).square().sum(dtype=torch.float64))
        total += float(other.square().sum(dtype=torch.float64))
    return (moved / total) ** 0.5 if total else moved


def _constant(tensor: Tensor) -> str:
    """A clause for a tensor with one value, nothing otherwise."""
    first = tensor.flatten()[0]
    return f"; it is {float(first):g} everywhere" if bool((tensor == first).all()) else ""
