"""Rules about what tensors hold, without anything to compare them with: finite, on their grid, each its own.

O output features, I input features, G groups in a row.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.gates.structure.finding import Finding, failed
from compressor.gates.structure.history import Sparsity
from compressor.gates.structure.stored import Packed, chunks, float_rows

RULES = {
    "values.finite": "no tensor holds NaN or infinity",
    "values.zero": "no weight is all zeros",
    "values.scales": "every scale is finite and positive",
    "values.scale_size": "no scale is orders of magnitude off the others",
    "values.codes": "codes use their grid",
    "values.shape": "every weight_shape is the weight's",
    "values.repeated": "no two weights are the same",
}
LEDGER_RULES = {"pruned.sparsity": "what the run's ledger says was pruned is zero"}
# A weight's median scale beside that of the same weight in other layers and experts, and a scale beside its own
# weight's median: at most 2.3 and 23 times in SmolLM2, 1.2 and 3.5 times in demo/tiny-moe.
ABSURD = 1000.0
# A grid is chosen by the largest weight of a group, so every group reaches its end (all of them in both models); codes
# that were made for fewer bits never do.
REACHED = 0.75
REACHING_GROUPS = 0.5
HALF_PERCENT = 0.005  # ledgers give whole per cents


@dataclass(frozen=True)
class Seen:
    """What is remembered of a weight to hold it against others: a digest of its bytes, the median of its scales."""

    digest: bytes
    median_scale: float | None


def dense_failures(name: str, tensor: Tensor) -> Iterator[Finding]:
    """A floating-point tensor by its full name."""
    if not tensor.is_floating_point():
        return
    bad, zero = 0, True
    for rows in chunks(tuple(tensor.shape)) if tensor.dim() else [slice(None)]:
        part = tensor[rows] if tensor.dim() else tensor
        bad += int((~torch.isfinite(part)).sum())
        zero = zero and not bool(part.any())
    if bad:
        yield failed("values.finite", name, f"{name} holds NaN or infinity in {bad:,} of {tensor.numel():,} places")
    if zero and tensor.dim() >= 2:
        yield failed("values.zero", name, f"{name} is all zeros")


def packed_failures(name: str, packed: Packed, stored_shape: Tensor | None) -> Iterator[Finding]:
    """A packed weight by the name of its linear layer; plain int8 codes have no shape beside them."""
    if stored_shape is not None and tuple(stored_shape.tolist()) != packed.shape:
        text = f"{name}.weight_shape says {stored_shape.tolist()}, the weight is {list(packed.shape)}"
        yield failed("values.shape", f"{name}.weight_shape", text)
        return
    yield from _scale_failures(name, packed)
    yield from _code_failures(name, packed)


def sparsity_failures(name: str, weight: Tensor | Packed, promised: Sparsity) -> Iterator[Finding]:
    """A weight that was pruned holds the zeros that pruning promised."""
    zeros = crowded = 0
    for rows in chunks(tuple(weight.shape)):
        part = float_rows(weight, rows) == 0
        zeros += int(part.sum())
        if promised.kept is not None and promised.group is not None:
            crowded += int(((~part).unflatten(-1, (-1, promised.group)).sum(-1) > promised.kept).sum())
    count, width = weight.shape[0] * weight.shape[1], weight.shape[1]
    if crowded:
        text = (
            f"{name}: {crowded:,} groups of {promised.group} hold more than the {promised.kept} weights that were kept"
        )
        yield failed("pruned.sparsity", name, text)
    elif promised.share is not None and zeros < weight.shape[0] * int((promised.share - HALF_PERCENT) * width):
        text = f"{name}: {zeros / count:.1%} of the weights are zero, {promised.share:.0%} of each row were pruned"
        yield failed("pruned.sparsity", name, text)
    elif zeros == 0:
        yield failed("pruned.sparsity", name, f"{name} was pruned and holds no zero")


def remember(weight: Tensor | Packed) -> Seen:
    """What `siblings_failures` needs of a weight."""
    if not isinstance(weight, Packed):
        return Seen(_digest(weight), None)
    scales = weight.scales_OG.float()
    sound = scales[scales.isfinite() & (scales > 0)]
    median = float(sound.median()) if len(sound) else None
    return Seen(_digest(weight.words) + _digest(weight.scales_OG), median)


def size_failures(seen: Mapping[str, Seen], roles: Mapping[str, str]) -> Iterator[Finding]:
    """Weights whose scales are orders of magnitude off those of the same weight in other layers and experts."""
    by_role: dict[str, list[float]] = {}
    for name, one in seen.items():
        if one.median_scale is not None:
            by_role.setdefault(roles[name], []).append(one.median_scale)
    middle = {role: float(torch.tensor(medians).median()) for role, medians in by_role.items()}
    for name, one in seen.items():
        if one.median_scale is None:
            continue
        ratio = one.median_scale / middle[roles[name]]
        if not 1 / ABSURD < ratio < ABSURD:
            key = f"{name}.weight_scale"
            text = f"{key}: the scales are {ratio:.3g} times those of other {roles[name]}"
            yield failed("values.scale_size", key, text)


def repeats(seen: Mapping[str, Seen]) -> Iterator[tuple[str, str]]:
    """Pairs of weights that are the same to the byte: the later one, and the first that looks like it."""
    first: dict[bytes, str] = {}
    for name, one in seen.items():
        original = first.setdefault(one.digest, name)
        if original != name:
            yield name, original


def _scale_failures(name: str, packed: Packed) -> Iterator[Finding]:
    key = f"{name}.weight_scale"
    scales = packed.scales_OG.float()
    kinds = {"NaN": scales.isnan(), "infinite": scales.isinf(), "zero": scales == 0, "negative": scales < 0}
    counts = [f"{int(mask.sum()):,} {kind}" for kind, mask in kinds.items() if bool(mask.any())]
    if counts:
        text = f"{key}: of {scales.numel():,} scales {', '.join(counts)}; all must be finite and positive"
        yield failed("values.scales", key, text)


def _code_failures(name: str, packed: Packed) -> Iterator[Finding]:
    key = f"{name}.{packed.key}"
    highest = packed.spec.highest
    reaching = used = large = 0
    lowest_code, highest_code = highest, packed.spec.lowest
    median = float(packed.scales_OG.float().median())
    for rows in chunks(packed.shape):
        part = packed.rows(rows)
        centred = part.codes.unflatten(-1, (part.scales.shape[-1], -1))
        if part.zeros is not None:
            centred = centred.to(torch.int16) - part.zeros.unsqueeze(-1)
        low, high = centred.amin(-1).to(torch.int16), centred.amax(-1).to(torch.int16)
        reach = torch.maximum(-low, high) if part.zeros is None else high - low
        some = reach > 0
        used += int(some.sum())
        reaching += int((reach >= REACHED * highest * (1 if part.zeros is None else 2)).sum())
        large += int((some & (part.scales.float() > ABSURD * median)).sum())
        lowest_code, highest_code = min(lowest_code, int(low.min())), max(highest_code, int(high.max()))
    if lowest_code == highest_code:
        what = "the weight is all zeros" if lowest_code == 0 else f"every code is {lowest_code}"
        yield failed("values.codes", key, f"{key}: {what}")
    elif reaching < REACHING_GROUPS * used:
        text = (
            f"{key}: only {reaching:,} of {used:,} groups use more than {REACHED:.0%} of the grid of "
            f"{packed.spec.bits} bits: these codes were made for fewer"
        )
        yield failed("values.codes", key, text)
    if large:
        text = f"{name}.weight_scale: {large:,} scales are more than {ABSURD:g} times the median of the weight"
        yield failed("values.scale_size", f"{name}.weight_scale", text)
    unused = 32 - packed.shape[1] * packed.spec.bits % 32
    if packed.key == "weight_packed" and unused < 32 and bool((packed.words[:, -1] >> (32 - unused)).any()):
        yield failed("values.codes", key, f"{key}: unused bits of a row's last word are set")


def _digest(tensor: Tensor) -> bytes:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return hashlib.blake2b(data, digest_size=16).digest()
