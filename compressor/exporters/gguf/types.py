"""Which of GGUF's types each tensor of a file gets: the model's own codes as they are, or the type that was asked for.

A GGUF type packs a row in blocks of 32 (or 256) weights, each with a scale of its own in float16.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from compressor.errors import RecipeError, UnsupportedModel
from compressor.quant import QuantSpec

# What a user may ask for. `auto` rounds nothing: codes are carried over, other weights keep their dtype.
AUTO = "auto"
TYPES = (AUTO, "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q4_k_m", "q6_k")

# Weights and bytes of a block, by the type's name in ggml
BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22),
    "Q8_0": (32, 34), "Q4_K": (256, 144), "Q6_K": (256, 210),
}  # fmt: skip
# What llama.cpp takes where rows do not divide into a type's blocks; the last step always fits
FALLBACKS = {"Q4_K": "Q5_0", "Q6_K": "Q8_0", "Q5_0": "F16", "Q8_0": "F16", "Q4_0": "F16", "Q4_1": "F16"}
LINEAR = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0", "q4_1": "Q4_1",
          "q4_k_m": "Q4_K", "q6_k": "Q6_K"}  # fmt: skip
BLOCK = 32


@dataclass(frozen=True)
class Chosen:
    """A tensor's type, and why it is not the expected one (empty where it is)."""

    type: str
    reason: str = ""


def check_type(type: str) -> None:
    """RecipeError where there is no such type."""
    if type not in TYPES:
        raise RecipeError(f"export.gguf: there is no type {type!r}; possible are {', '.join(TYPES)}")


def refuse_schemes(schemes: Mapping[str, QuantSpec], type: str) -> None:
    """RecipeError or UnsupportedModel, naming a weight, where its codes would have to be rounded again."""
    for name, spec in schemes.items():
        refuse_scheme(name, spec, type)


def refuse_scheme(name: str, spec: QuantSpec, type: str) -> None:
    """The same for one weight; UnsupportedModel also where its inputs are to be rounded."""
    if spec.activation_bits is not None:
        raise UnsupportedModel(
            f"export.gguf: {name} is {spec}, and GGUF says nothing of activations: its runtimes round them their own "
            "way; quantize without `activations`, or export to safetensors"
        )
    if type in ("f32", "f16", "bf16"):
        return
    if type in ("q4_k_m", "q6_k"):
        raise RecipeError(
            f"export.gguf: {type} would round {name} again, which is {spec} already; use type auto, which keeps its "
            "codes, or export the model before `quantize`"
        )
    if spec.bits == 8 and not spec.symmetric:
        raise UnsupportedModel(
            f"{name} is {spec}: GGUF's Q8_0 has no zero points; quantize with symmetric: true, or export as f16"
        )
    if type in ("q4_0", "q4_1"):
        if spec.bits == 8 or (type == "q4_0" and spec.bits == 4 and not spec.symmetric):
            raise RecipeError(
                f"export.gguf: {type} would round {name} again, which is {spec}; use type auto, which keeps its codes"
            )
        if spec.group_size != BLOCK:
            raise RecipeError(
                f"export.gguf: {type} has a scale for each {BLOCK} weights, {name} is {spec}: the file would be as "
                f"large as that of groups of {BLOCK}, which lose less; quantize with group_size: {BLOCK}, or use type "
                "auto, which repeats the scales"
            )


def carried_type(spec: QuantSpec, width: int, type: str, *, minima_round: bool) -> Chosen:
    """The type that holds the codes of a quantized weight with rows of `width`, bit by bit.

    `minima_round`: whether scale times zero point is no float16 number somewhere in the weight, which Q4_1 asks.
    """
    if width % BLOCK:
        return Chosen("F32", f"rows of {width} weights do not divide into blocks of {BLOCK}: written dequantized")
    if type != AUTO:
        return Chosen(LINEAR[type])
    reasons = []
    if spec.group_size is None:
        reasons.append(f"one scale a row, written for each {BLOCK}")
    elif spec.group_size > BLOCK:
        reasons.append(f"groups of {spec.group_size}, whose scale is written for each {BLOCK}")
    if spec.bits < 4:
        reasons.append(f"{spec.bits}-bit codes in 4 bits: GGUF has no smaller type that holds them")
    if spec.bits == 8:
        chosen = "Q8_0"
    elif spec.symmetric or spec.bits < 4:  # (code - zero) of 3 bits is within -7 .. 7
        chosen = "Q4_0"
    elif minima_round:  # (code - zero) of 4 bits is within -15 .. 15
        chosen = "Q5_0"
        reasons.append("Q4_1 would round scale x zero point to float16; Q5_0 holds (code - zero point) exactly")
    else:
        chosen = "Q4_1"
    return Chosen(chosen, "; ".join(reasons))


def dense_type(kind: str, width: int, type: str, dtype: str, *, more_bits: bool) -> Chosen:
    """The type of a weight that holds no codes.

    `kind` is `vector` (norms, biases), `router`, `embedding`, `output` (or an embedding that is the output too),
    `attn_v`, `ffn_down` or `linear`. `dtype` is the weight's own, as a GGUF type. `more_bits`: see `use_more_bits`.
    """
    if kind in ("vector", "router"):  # few, and what llama.cpp expects them to be
        return Chosen("F32")
    if type == AUTO:
        return Chosen(dtype)
    wanted = LINEAR[type]
    if kind == "output" and type in ("q4_0", "q4_1", "q4_k_m"):
        wanted = "Q6_K"
    if type == "q4_k_m" and kind in ("attn_v", "ffn_down") and more_bits:
        wanted = "Q6_K"
    return fitting(wanted, width)


def fitting(type: str, width: int) -> Chosen:
    """The type itself, or what llama.cpp takes in its place where rows do not divide into its blocks."""
    reason = ""
    while width % BLOCKS[type][0]:
        reason = reason or f"rows of {width} weights do not divide into the blocks of {BLOCKS[type][0]} of {type}"
        type = FALLBACKS[type]
    return Chosen(type, reason)


def use_more_bits(layer: int, num_layers: int) -> bool:
    """Whether the mix Q4_K_M spends six bits on this layer: the first and last eighth, and each third between.

    Source: llama.cpp, `use_more_bits` in its quantizer (the rule for dense models; its extra rules for eight experts
    and for 70B are not followed).
    """
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def row_bytes(type: str, width: int) -> int:
    """Bytes of one row."""
    weights, size = BLOCKS[type]
    assert width % weights == 0
    return width // weights * size
