"""A number with its uncertainty."""

import math
from dataclasses import dataclass

from compressor.errors import IntegrityError


@dataclass(frozen=True)
class Estimate:
    """A value, the 95 % interval around it, and how many observations it rests on.

    `ci95` is None where no interval is known; a number that was counted, not sampled, is `Estimate.exact`.
    """

    value: float
    ci95: tuple[float, float] | None
    n: int

    @classmethod
    def exact(cls, value: float) -> "Estimate":
        """Return a number without uncertainty, such as bytes: the interval is the number itself."""
        return cls(value, (value, value), 1)

    @property
    def is_finite(self) -> bool:
        """Whether the value and the interval can be written down in JSON."""
        return math.isfinite(self.value) and (self.ci95 is None or all(map(math.isfinite, self.ci95)))

    def to_json(self) -> dict:
        """Return {"value", "ci95", "n"}."""
        return {"value": self.value, "ci95": None if self.ci95 is None else list(self.ci95), "n": self.n}

    @classmethod
    def from_json(cls, data: dict) -> "Estimate":
        """Read what `to_json` gives; raises IntegrityError for anything else."""
        try:
            ci95 = data["ci95"]
            return cls(data["value"], None if ci95 is None else (ci95[0], ci95[1]), data["n"])
        except (KeyError, TypeError, IndexError) as error:
            raise IntegrityError(f'not an estimate {{"value", "ci95", "n"}}: {data!r}') from error
