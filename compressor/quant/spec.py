"""What a quantized weight may look like: bits, group, symmetry, and what happens to the inputs that it meets."""

from dataclasses import dataclass

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class QuantSpec:
    """Integer codes of `bits` bits with one scale for each `group_size` neighbours in a row (None: one for the row).

    Symmetric weights are `codes * scale`, asymmetric ones `(codes - zero) * scale`; codes are signed in both cases,
    from -2^(bits-1) to 2^(bits-1) - 1, as in the compressed-tensors layout (docs/format.md).
    `activation_bits` 8: inputs are rounded to int8 when they arrive, with one scale a token (W8A8).
    """

    bits: int
    group_size: int | None
    symmetric: bool = True
    activation_bits: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits is {self.bits}; possible are {', '.join(map(str, BITS))}")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"group_size is {self.group_size}; possible are {', '.join(map(str, GROUP_SIZES))} or None"
            )
        if self.activation_bits is None:
            return
        if self.activation_bits != 8:
            raise ValueError(f"activation_bits is {self.activation_bits}; possible are 8 or None")
        if self.bits != 8 or self.group_size is not None or not self.symmetric:
            weights = f"bits {self.bits}, group_size {self.group_size}, symmetric {self.symmetric}"
            raise ValueError(
                f"activation_bits 8 needs weights of bits 8, group_size None, symmetric True; they are {weights}"
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
        weights = f"int{self.bits} {'symmetric' if self.symmetric else 'asymmetric'} {group}"
        return weights if self.activation_bits is None else f"{weights}, int{self.activation_bits} activations"
