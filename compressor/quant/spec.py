"""What a quantized weight may look like: bits, group and symmetry."""

from dataclasses import dataclass

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class QuantSpec:
    """Integer codes of `bits` bits with one scale for each `group_size` neighbours in a row (None: one for the row).

    Symmetric weights are `codes * scale`, asymmetric ones `(codes - zero) * scale`; codes are signed in both cases,
    from -2^(bits-1) to 2^(bits-1) - 1, as in the compressed-tensors layout (docs/format.md).
    """

    bits: int
    group_size: int | None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits is {self.bits}; possible are {', '.join(map(str, BITS))}")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"group_size is {self.group_size}; possible are {', '.join(map(str, GROUP_SIZES))} or None"
            )

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def num_groups(self, in_features: int) -> int:
        """Scales in a row of `in_features` weights; ValueError if the groups do not fill the row."""
        if self.group_size is None:
            return 1
        if in_features % self.group_size:
            raise ValueError(f"rows of {in_features} weights do not divide into groups of {self.group_size}")
        return in_features // self.group_size

    def __str__(self) -> str:
        group = "channel" if self.group_size is None else f"group {self.group_size}"
        return f"int{self.bits} {'symmetric' if self.symmetric else 'asymmetric'} {group}"
