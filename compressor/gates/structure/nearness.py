"""How near a stored weight is to the weight that it was made from, and how near it has to be.

Rounding to a grid of b bits moves a weight by at most half a step, so its error is known before it is made: with
`full` the step at which the largest weight of a group just fits, it is `sqrt(sum of full^2 / 12)`. That is the unit
here, from the baseline's weights alone. O output features, I input features, G groups in a row, g inputs in a group.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compressor.gates.structure.stored import Packed, chunks, float_rows
from compressor.quant import QuantSpec


@dataclass(frozen=True)
class Bound:
    """What a healthy weight of so many bits keeps.

    `noise`: error in units of rounding. `correlation` with the baseline. `spread`: by how much the gains of groups (the
    factor that would fit a group best to the baseline) vary, None where healthy weights vary as much as broken ones.
    """

    noise: float
    correlation: float
    spread: float | None


# Worst of healthy exports, RTN and GPTQ at 8, 4, 3, 2 bits (benchmarks/results/2026-11-22-structure.md; also GPTQ with
# 1,024 calibration tokens for 1,536 inputs of SmolLM2): noise 3.2, 1.9, 1.8, 1.2; correlation 1.00, 0.97, 0.91, 0.69;
# spread 0.003, 0.05, 0.09, 0.20. Another weight correlates by about 0. Scales of the next group: noise from 38, 2.4,
# 1.2, 0.6; spread from 0.2 with groups, 0.1 with one scale a row.
BOUNDS = {
    8: Bound(10.0, 0.9, 0.05),
    4: Bound(3.5, 0.9, 0.1),
    3: Bound(3.0, 0.75, 0.14),
    2: Bound(2.2, 0.4, None),
}
# Weights that were trained after the baseline: only that they are still the same weights. Unrelated ones of n elements
# correlate by 1 / sqrt(n), 0.05 for the smallest router of our tests.
TRAINED_CORRELATION = 0.25
# Where training moved a weight little, wrong scales still show. Distilling tiny-moe (60,000 tokens) left a spread of
# 0.024.
TRAINED_LITTLE, TRAINED_SPREAD = 0.93, 0.16
# The mean of (ours - baseline) in steps: 1 where codes are off by one (signedness, zero point), below 0.1 when healthy.
MOST_OFFSET = 0.35
# A grid never needs a step beyond `full`; 8 / 7.5 is what other tools take. Shares of groups; healthy: none at all.
OVER, OVER_SHARE = 1.25, 0.005
FAR = 8.0  # one group alone, in either direction
DEAD = 1e-6  # of the largest step of a weight


@dataclass(frozen=True)
class Complaint:
    """What is not as it should be, the weight or only its scales, and the clause that says so."""

    about: Literal["weight", "scales"]
    text: str


@dataclass(frozen=True)
class Nearness:
    """What was measured between a stored weight and the baseline's; `over` and `far` are shares of groups."""

    correlation: float
    noise: float | None = None
    spread: float | None = None
    offset: float | None = None
    over: float = 0.0
    far: float = 0.0

    def complaint(self, bits: int | None, *, trained: bool) -> Complaint | None:
        """What is wrong, or None; `bits` is None for a dense weight."""
        wanted = TRAINED_CORRELATION if trained or bits is None else BOUNDS[bits].correlation
        after = "after training" if trained else f"at {bits} bits" if bits else "for a dense weight"
        if not self.correlation >= wanted:  # NaN is wrong too
            text = f"its correlation with the baseline's is {self.correlation:.3f}, {wanted} or more is usual {after}"
            return Complaint("weight", text)
        if bits is None:
            return None
        return self._scale_complaint(bits, trained=trained) or self._error_complaint(bits, trained=trained)

    def _scale_complaint(self, bits: int, *, trained: bool) -> Complaint | None:
        if not trained and (self.over > OVER_SHARE or self.far > 0):
            share = max(self.over, self.far)
            return Complaint(
                "scales", f"{share:.1%} of the groups have a scale that does not fit the baseline's weights"
            )
        usual = BOUNDS[bits].spread
        if trained and usual is not None:
            usual = TRAINED_SPREAD if self.correlation >= TRAINED_LITTLE else None
        if usual is not None and self.spread is not None and not self.spread <= usual:
            text = f"the scales fit the baseline's weights only up to {self.spread:.0%}, {usual:.0%} is usual"
            return Complaint("scales", text)
        return None

    def _error_complaint(self, bits: int, *, trained: bool) -> Complaint | None:
        usual = BOUNDS[bits].noise
        if not trained and self.noise is not None and not self.noise <= usual:
            text = f"its error is {self.noise:.3g} times that of rounding to {bits} bits, up to {usual} is usual"
            return Complaint("weight", text)
        if self.offset is not None and not abs(self.offset) <= MOST_OFFSET:
            return Complaint("weight", f"its codes are off by {self.offset:+.2f} steps on average")
        return None


def measure_nearness(ours: Tensor | Packed, baseline: Tensor | Packed, *, pruned: bool = False) -> Nearness:
    """Compare two weights `[O, I]` of the same shape; `pruned` leaves out what is zero in ours."""
    sums = torch.zeros(7, dtype=torch.float64)
    gains, over, far, groups = [], 0, 0, 0
    for rows in chunks(tuple(ours.shape)):
        one, other = float_rows(ours, rows), float_rows(baseline, rows)
        if pruned:
            other = other.masked_fill(one == 0, 0)
        if isinstance(ours, Packed):
            part = _groups(one, other, ours.scales_OG[rows].float(), ours.spec, pruned)
            sums += part.sums
            gains.append(part.gains)
            over, far, groups = over + part.over, far + part.far, groups + part.groups
        else:
            sums[:4] += _moments(one, other)
    product, square, square_base, error, unit, steps, count = sums.tolist()
    norm = (square * square_base) ** 0.5
    correlation = product / norm if norm else float(error == 0)
    if not isinstance(ours, Packed):
        return Nearness(correlation)
    return Nearness(
        correlation,
        noise=(error / unit) ** 0.5 if unit else None,
        spread=_spread(torch.cat(gains)),
        offset=steps / count if count else None,
        over=over / max(1, groups),
        far=far / max(1, groups),
    )


@dataclass(frozen=True)
class _Part:
    sums: Tensor  # products, squares of both, squared error, squared unit of rounding, sum of steps, their number
    gains: Tensor
    over: int
    far: int
    groups: int


def _groups(one_OI: Tensor, other_OI: Tensor, scales_OG: Tensor, spec: QuantSpec, pruned: bool) -> _Part:
    num_groups = scales_OG.shape[-1]
    one, other = one_OI.unflatten(-1, (num_groups, -1)), other_OI.unflatten(-1, (num_groups, -1))
    lowest, highest = other.amin(-1), other.amax(-1)
    if spec.symmetric:
        full_OG = torch.maximum(-lowest / -spec.lowest, highest / spec.highest)
    else:
        full_OG = (highest.clamp(min=0) - lowest.clamp(max=0)) / (spec.highest - spec.lowest)
    counted = (one != 0).sum(-1) if pruned else torch.full_like(full_OG, one.shape[-1])
    moved = one - other
    products, squares = (one * other).sum(-1), one.square().sum(-1)
    # A group of zeros may have any scale; scales of dead weights are at the end of what the dtype can hold
    used = (squares > 0) & (torch.maximum(full_OG, scales_OG) > DEAD * full_OG.max())
    ratio = scales_OG / full_OG
    sums = torch.stack([
        products.double().sum(), squares.double().sum(), other.square().sum(dtype=torch.float64),
        moved.square().sum(dtype=torch.float64), (full_OG.double().square() * counted).sum() / 12,
        (moved.sum(-1) / scales_OG).double()[used].sum(), counted.double()[used].sum(),
    ])  # fmt: skip
    gains = (products / squares)[used]
    return _Part(
        sums, gains, int((used & (ratio > OVER)).sum()), int((used & ((ratio > FAR) | (ratio < 1 / FAR))).sum()),
        int(used.sum()),
    )  # fmt: skip


def _moments(one: Tensor, other: Tensor) -> Tensor:
    return torch.stack([
        (one * other).sum(dtype=torch.float64), one.square().sum(dtype=torch.float64),
        other.square().sum(dtype=torch.float64), (one - other).square().sum(dtype=torch.float64),
    ])  # fmt: skip


def _spread(gains: Tensor) -> float | None:
    """Half the distance of the 16th and 84th percentiles of the gains' logarithms: a deviation without outliers."""
    positive = gains[gains > 0]
    if len(positive) < 8:
        return None
    ordered = positive.log().sort().values
    low, high = ordered[int(0.16 * len(ordered))], ordered[int(0.84 * len(ordered))]
    return float(high - low) / 2
