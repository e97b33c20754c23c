"""Faults in experts and their router, as fused kernels, converters and savers have made them."""

from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

from compressor.gates.faults.artefact import CONFIG, Artefact, DoesNotApply, Injected
from compressor.quant import QuantizedTensor

Inject = Callable[[Artefact, Random], Injected]


def _pick(artefact: Artefact, random: Random) -> tuple[int, int, list[str]]:
    """A block, an expert of it, and the expert's linear layers."""
    experts = artefact.experts()
    block = random.choice(sorted(experts))
    expert = random.choice(sorted(experts[block]))
    return block, expert, experts[block][expert]


def _packed_expert(artefact: Artefact, random: Random) -> str:
    *_, names = _pick(artefact, random)
    packed = [name for name in names if name in artefact.packed()]
    if not packed:
        raise DoesNotApply("the experts of this artefact are not packed")
    return random.choice(packed)


def missing_scale(artefact: Artefact, random: Random) -> Injected:
    """vllm#45212: a scale that is not there loads as whatever memory held."""
    name = f"{_packed_expert(artefact, random)}.weight_scale"
    artefact.write({name: None})
    return Injected(f"removed {name}", (name,))


def spoilt_scale(what: str, spoil: Callable[[Tensor], Tensor]) -> Inject:
    """A fault that changes all scales of one expert's weight."""

    def inject(artefact: Artefact, random: Random) -> Injected:
        linear = _packed_expert(artefact, random)
        name = f"{linear}.weight_scale"
        artefact.write({name: spoil(artefact.read(name))})
        return Injected(f"{what} in {name}", (linear,))

    return inject


def one_scale(value: float) -> Callable[[Tensor], Tensor]:
    """Only the first scale becomes this value."""

    def spoil(scales: Tensor) -> Tensor:
        spoilt = scales.clone()
        spoilt[0, 0] = value
        return spoilt

    return spoil


def dropped(artefact: Artefact, random: Random) -> Injected:
    """Megatron-LM#5844: an expert that the converter forgot stays as it was allocated, zero."""
    block, expert, names = _pick(artefact, random)
    changes: dict[str, Tensor | None] = {}
    for name in names:
        if f"{name}.weight_packed" in artefact.files:
            zeros = artefact.quantized(name)
            artefact.write_quantized(
                {name: QuantizedTensor(torch.zeros_like(zeros.codes), zeros.scales, None, zeros.spec)}
            )
        else:
            changes[f"{name}.weight"] = torch.zeros_like(artefact.read(f"{name}.weight"))
    artefact.write(changes)
    return Injected(f"expert {expert} of block {block} is zero", tuple(names))


def duplicated(artefact: Artefact, random: Random) -> Injected:
    """One expert holds another one's weights."""
    block, expert, names = _pick(artefact, random)
    other = random.choice(sorted(set(artefact.experts()[block]) - {expert}))
    artefact.move(zip(artefact.experts()[block][other], names, strict=True))
    return Injected(f"expert {expert} of block {block} holds expert {other}", tuple(names))


def permuted(artefact: Artefact, random: Random) -> Injected:
    """All experts of a block move on by one place; the router's rows do not."""
    experts = artefact.experts()
    block = random.choice(sorted(experts))
    numbers = sorted(experts[block])
    pairs = [
        pair
        for a, b in zip(numbers, numbers[1:] + numbers[:1], strict=True)
        for pair in zip(experts[block][a], experts[block][b], strict=True)
    ]
    artefact.move(pairs)
    named = tuple(name for names in experts[block].values() for name in names)
    return Injected(f"experts of block {block} moved on by one place, the router did not", named)


def randomised(artefact: Artefact, random: Random) -> Injected:
    """transformers#47407: experts that a loader did not find are initialised, then saved."""
    experts = artefact.experts()
    block = random.choice(sorted(experts))
    generator = torch.Generator().manual_seed(random.randrange(1 << 30))
    changes: dict[str, Tensor | None] = {}
    weights = {}
    for name in [name for names in experts[block].values() for name in names]:
        if f"{name}.weight_packed" in artefact.files:
            old = artefact.quantized(name)
            weights[name] = artefact.round(0.02 * torch.randn(old.codes.shape, generator=generator), old)
        else:
            shape = artefact.read(f"{name}.weight")
            changes[f"{name}.weight"] = (0.02 * torch.randn(shape.shape, generator=generator)).to(shape.dtype)
    artefact.write_quantized(weights)
    artefact.write(changes)
    return Injected(f"experts of block {block} are freshly initialised", (*weights, *changes))


def lost(artefact: Artefact, random: Random) -> Injected:
    """All experts of a block are missing from the files."""
    block = random.choice(sorted(artefact.experts()))
    prefix = f"{artefact.block(block)}.{artefact.family.experts_on_disk}"
    artefact.write({name: None for name in artefact.names(f"{prefix}.")})
    return Injected(f"removed {prefix}", (prefix,))


def other_bits(artefact: Artefact, random: Random) -> Injected:
    """One weight in other bits than config.json says."""
    name = _packed_expert(artefact, random)
    old = artefact.quantized(name)
    bits = 8 if old.spec.bits != 8 else 4
    artefact.write_quantized({name: artefact.round(old.dequantize(), old, bits=bits)})
    return Injected(f"{name} has {bits} bits, the others {old.spec.bits}", (name,))


def mixed_schemes(artefact: Artefact, random: Random) -> Injected:
    """Experts of one block in other bits, declared: stock loaders read all of them in one scheme, without a word."""
    experts = artefact.experts()
    if len(experts) < 2:
        raise DoesNotApply("the model has experts in one block only")
    block = sorted(experts)[-1]
    names = [name for names in experts[block].values() for name in names]
    if not set(names) <= set(artefact.packed()):
        raise DoesNotApply("the experts of this artefact are not packed")
    weights = {}
    for name in names:
        old = artefact.quantized(name)
        bits = 8 if old.spec.bits != 8 else 4
        weights[name] = artefact.round(old.dequantize(), old, bits=bits)
    artefact.write_quantized(weights)
    config = artefact.config
    groups = config["quantization_config"]["config_groups"]
    usual = next(iter(groups.values()))
    special = usual | {"targets": [f"re:.*\\.{block}\\..*experts.*"], "weights": usual["weights"] | {"num_bits": bits}}
    config["quantization_config"]["config_groups"] = {"group_special": special, **groups}
    artefact.write_json(CONFIG, config)
    return Injected(f"experts of block {block} have {bits} bits, and config.json says so", tuple(names))


def rounded_router(artefact: Artefact, random: Random) -> Injected:
    """A router that was quantized along with the rest and dequantized again."""
    name = artefact.router(random.choice(sorted(artefact.experts())))
    router = artefact.read(name)
    step = router.float().abs().amax(1, keepdim=True) / 7
    artefact.write({name: ((router.float() / step).round() * step).to(router.dtype)})
    return Injected(f"{name} is rounded to 4 bits", (name,))


def perturbed_router(artefact: Artefact, random: Random) -> Injected:
    """One element of a router moves by its smallest step: no score would ever show it."""
    name = artefact.router(random.choice(sorted(artefact.experts())))
    router = artefact.read(name)
    router[0, 0] = router[0, 0] * 1.01 + 1e-3
    artefact.write({name: router})
    return Injected(f"one element of {name} changed", (name,))


EXPERT_FAULTS: dict[str, tuple[Inject, str]] = {
    "missing_expert_scale": (missing_scale, "an expert's scale is missing"),
    "zero_expert_scale": (spoilt_scale("zeros", torch.zeros_like), "an expert's scales are zero"),
    "nan_expert_scale": (spoilt_scale("a NaN", one_scale(float("nan"))), "one scale of an expert is NaN"),
    "inf_expert_scale": (spoilt_scale("an infinity", one_scale(float("inf"))), "one scale of an expert is infinite"),
    "absurd_expert_scale": (
        spoilt_scale("4,096-fold scales", lambda s: s * 4096),
        "an expert's scales are far too big",
    ),
    "dropped_expert": (dropped, "an expert is all zeros"),
    "duplicated_expert": (duplicated, "an expert holds another one's weights"),
    "permuted_experts": (permuted, "experts changed places, the router did not"),
    "random_experts": (randomised, "a block's experts are freshly initialised"),
    "lost_experts": (lost, "a block's experts are missing"),
    "other_bits_expert": (other_bits, "an expert has other bits than config.json says"),
    "mixed_expert_schemes": (mixed_schemes, "experts of one block have other bits, and config.json says so"),
    "rounded_router": (rounded_router, "a router was rounded to 4 bits"),
    "perturbed_router": (perturbed_router, "one element of a router changed"),
}
