"""How many items a gate needs, and what it can see with those that it has: planning, before anything is measured.

A flip is an item that one of two models gets right and the other wrong; the flip rate is their share, the drop is lost
minus gained. The formulas are the normal approximation for paired proportions (Miettinen 1968; Connor 1987), which the
simulation in benchmarks/gate_power.py checks against the verdict itself.
"""

import math
from statistics import NormalDist


def items_needed(flip_rate: float, drop: float, alpha: float = 0.05, power: float = 0.8) -> int:
    """How many items show a true drop of this size as a significant loss, with this probability.

    One-sided test at `alpha`. ValueError where the drop is larger than the flip rate: every lost item is a flip.
    """
    _check(alpha, power)
    if not 0 < drop <= flip_rate <= 1:
        raise ValueError(
            f"a drop of {drop:g} with {flip_rate:g} flips: 0 < drop <= flip rate <= 1 (every lost item is a flip)"
        )
    z_alpha, z_power = _z(1 - alpha), _z(power)
    return math.ceil(((z_alpha * math.sqrt(flip_rate) + z_power * math.sqrt(flip_rate - drop**2)) / drop) ** 2)


def items_to_pass(flip_rate: float, margin: float, drop: float = 0.0, power: float = 0.8) -> int:
    """How many items show that a candidate keeps the margin, with this probability, if its true drop is this one.

    The upper end of the two-sided 95 % interval has to lie within the margin. Where nothing flips at all, the interval
    still ends at z² / (n + z²), so there is a least number of items for each margin. ValueError where the drop is not
    smaller than the margin, or larger than the flip rate.
    """
    _check(0.05, power)
    if not (abs(drop) <= flip_rate <= 1 and drop < margin < 1 and margin > 0):
        raise ValueError(
            f"margin {margin:g}, drop {drop:g}, {flip_rate:g} flips: needs 0 < margin < 1, drop < margin and "
            "a drop of at most the flip rate"
        )
    z_95, z_power = _z(0.975), _z(power)
    at_margin = variance_at((flip_rate + drop) / 2, (flip_rate - drop) / 2, margin)
    return math.ceil(((z_95 * math.sqrt(at_margin) + z_power * math.sqrt(flip_rate - drop**2)) / (margin - drop)) ** 2)


def minimum_detectable_effect(n: float, flip_rate: float, alpha: float = 0.05, power: float = 0.8) -> float | None:
    """The smallest true drop that n items show as a significant loss with this probability (0.02 is two points).

    The inverse of `items_needed`. A drop larger than the flip rate would bring its own flips, so then all of them are
    taken for losses. None where n is so small that even losing every item would not be significant. `n` need not be a
    whole number: clustered items count for fewer than they are.
    """
    _check(alpha, power)
    if not (n > 0 and 0 <= flip_rate <= 1):
        raise ValueError(f"n = {n:g} items with {flip_rate:g} flips: needs n > 0 and a flip rate from 0 to 1")
    if 0.5**n > alpha:
        return None
    z_alpha, z_power = _z(1 - alpha), _z(power)
    root = math.sqrt(max(0.0, n + z_power**2 - z_alpha**2))
    effect = math.sqrt(flip_rate) * (z_alpha * math.sqrt(n) + z_power * root) / (n + z_power**2)
    if 0 < effect <= flip_rate:
        return effect
    # All flips are losses: n d = (z_alpha + z_power sqrt(1 - d))^2, whose two sides cross once in (0, 1].
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        enough = n * middle >= (z_alpha + z_power * math.sqrt(1 - middle)) ** 2
        low, high = (low, middle) if enough else (middle, high)
    return high


def variance_at(lost_rate: float, gained_rate: float, drop: float) -> float:
    """Variance of one item's drop if the true drop were this one, at the rates that are then most likely (Tango 1998).

    Maximum likelihood of the three rates (lost, gained, neither) under lost - gained = drop: with rate_gained = r the
    derivative is zero at the larger root of 2 r² - (l + g - (2 - l + g) drop) r - g drop (1 - drop) = 0.
    """
    if drop < 0:
        return variance_at(gained_rate, lost_rate, -drop)
    linear = lost_rate + gained_rate - (2 - lost_rate + gained_rate) * drop
    gained = (linear + math.sqrt(linear**2 + 8 * gained_rate * drop * (1 - drop))) / 4
    return 2 * gained + drop * (1 - drop)


def _z(probability: float) -> float:
    return NormalDist().inv_cdf(probability)


def _check(alpha: float, power: float) -> None:
    if not 0 < alpha < 0.5 <= power < 1:
        raise ValueError(f"alpha {alpha:g}, power {power:g}: needs 0 < alpha < 0.5 <= power < 1")
