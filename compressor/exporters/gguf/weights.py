"""Every tensor of a model under its name in a GGUF file, dense or with its codes, rows in the file's order.

O output features, I input features, E experts, F expert width, H heads, K head width.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compressor.errors import UnsupportedModel
from compressor.exporters.gguf.architectures import Architecture, head_dim, rope
from compressor.layers import CANONICAL, PackedExperts, PackedLinear, PackedWeight
from compressor.models import Block, Model
from compressor.quant import QuantizedTensor, QuantSpec, unpack_codes

# Weights that a mix of types may treat better, by the last part of their name
ROLES = {"attn_v": "attn_v", "attn_qkv": "attn_v", "ffn_down": "ffn_down", "ffn_down_shexp": "ffn_down"}
TORCH_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Codes:
    """Words, scales and zeros of a packed weight in the canonical layout, or of one expert of a stack."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    shape: tuple[int, ...]
    spec: QuantSpec

    @classmethod
    def of(cls, packed: PackedWeight) -> "Codes":
        if packed.layout != CANONICAL:
            raise RuntimeError("codes are read from the canonical layout: call relayout('canonical') first")
        return cls(packed.words, packed.scales, packed.zeros, tuple(packed.shape), packed.spec)

    def __getitem__(self, expert: int) -> "Codes":
        zeros = None if self.zeros is None else self.zeros[expert]
        return Codes(self.words[expert], self.scales[expert], zeros, self.shape[1:], self.spec)


@dataclass(frozen=True)
class Weight:
    """One tensor of the file: where it comes from, and what has to be done to its rows."""

    name: str  # in the file: "blk.3.attn_q.weight"
    source: str  # in the model: "model.layers.3.self_attn.q_proj.weight"
    kind: str  # see types.dense_type
    tensor: Tensor | None = None
    packed: Codes | None = None
    rows: slice | None = None  # of the outputs of a stack: gate or up
    interleaved_heads: int | None = None
    offset: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """As it stands in the file, outputs first."""
        full = tuple(self.packed.shape if self.packed is not None else self.tensor.shape)  # type: ignore[union-attr]
        if self.rows is not None:
            return (*full[:-2], self.rows.stop - self.rows.start, full[-1])
        return full[1:] if self.kind == "router" and full[0] == 1 else full  # the gate of a shared expert is a vector

    @property
    def spec(self) -> QuantSpec | None:
        return None if self.packed is None else self.packed.spec

    @property
    def dtype(self) -> str:
        """The model's own type of a dense weight, in GGUF's words."""
        assert self.tensor is not None
        return TORCH_TYPES[self.tensor.dtype]

    def parts(self) -> Iterator["Weight"]:
        """The weight itself, or of a stack one expert after the other: no more than one need be unpacked."""
        if len(self.shape) < 3:
            yield self
            return
        for expert in range(self.shape[0]):
            tensor = None if self.tensor is None else self.tensor[expert]
            yield replace(self, tensor=tensor, packed=None if self.packed is None else self.packed[expert])

    def dense(self) -> Tensor:
        """The values, `[..., O, I]`; what codes stand for in float32, without another rounding."""
        if self.packed is not None:
            return self.quantized().dequantize(torch.float32)
        assert self.tensor is not None
        values = self._ordered(self.tensor.detach()).reshape(self.shape)
        return values.float() + self.offset if self.offset else values

    def quantized(self) -> QuantizedTensor:
        """Codes, scales and zeros of the rows that belong here."""
        assert self.packed is not None
        codes = unpack_codes(self.packed.words, self.packed.spec.bits, self.shape[-1])
        scales, zeros = self.grid()
        return QuantizedTensor(self._ordered(codes), scales, zeros, self.packed.spec)

    def grid(self) -> tuple[Tensor, Tensor | None]:
        """Scales and zeros alone."""
        assert self.packed is not None
        zeros = self.packed.zeros
        return self._ordered(self.packed.scales), None if zeros is None else self._ordered(zeros)

    def _ordered(self, rows: Tensor) -> Tensor:
        if self.rows is not None:
            return rows[..., self.rows, :]
        return rows if self.interleaved_heads is None else interleave(rows, self.interleaved_heads)


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Rows `[H * K, ...]` with the two halves of each head taken in turn: 0, K/2, 1, K/2 + 1 ...

    llama.cpp rotates neighbouring rows of the families that need this, transformers a row of each half. A whole row
    moves, with its codes and scales, so nothing is rounded.
    """
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def names_of(model: Model, architecture: Architecture) -> Any:
    """`gguf`'s map from a module's path to its name in the file."""
    import gguf

    number = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture.name]
    return gguf.get_tensor_name_map(number, model.num_blocks)


def rest_weights(model: Model, architecture: Architecture, names: Any) -> Iterator[Weight]:
    """Embedding, final norm and output; an output tied to the embedding is not written."""
    rest = model.rest()
    tied = f"{model.family.head}.weight" not in rest
    for source, tensor in rest.items():
        module = source.rpartition(".")[0]
        kind = "vector"
        if module == model.family.embedding:
            kind = "output" if tied else "embedding"
        elif module == model.family.head and tensor.dim() > 1:
            kind = "output"
        offset = architecture.norm_offset if module == model.family.norm else 0.0
        yield Weight(_named(names, source), source, kind, tensor, offset=offset)
    settings = rope(model.config)
    if settings.get("rope_type") == "llama3":
        yield Weight("rope_freqs.weight", "", "vector", llama3_divisors(settings, head_dim(model.config)))


def block_weights(model: Model, block: Block, architecture: Architecture, names: Any) -> Iterator[Weight]:
    """The tensors of one block; of an empty block (shapes only) they are on the meta device."""
    stack = block.experts
    router = () if stack is None else (stack.router_path, stack.shared_gate_path)
    for path, module in block.module.named_modules():
        source = f"{block.name}.{path}"
        if stack is not None and path == stack.path:
            yield from _expert_weights(source, module, block.index)
        elif isinstance(module, PackedLinear):
            heads = _heads(path, model.config, architecture)
            name = _named(names, f"{source}.weight")
            yield Weight(name, f"{source}.weight", _kind(name), packed=Codes.of(module.packed), interleaved_heads=heads)
        if stack is not None and f"{path}.".startswith(f"{stack.path}."):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            name = _named(names, f"{source}.{leaf}")
            kind = "router" if path in router else "vector" if parameter.dim() == 1 else _kind(name)
            is_norm = parameter.dim() == 1 and leaf == "weight"
            yield Weight(
                name, f"{source}.{leaf}", kind, parameter.detach(),
                interleaved_heads=_heads(path, model.config, architecture),
                offset=architecture.norm_offset if is_norm else 0.0,
            )  # fmt: skip


def llama3_divisors(settings: dict[str, Any], width: int) -> Tensor:
    """What llama.cpp divides each rotary frequency by: 1 for short waves, `factor` for long ones, between smoothly.

    Source: transformers, `_compute_llama3_parameters`.
    """
    frequency = 1.0 / settings["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    wavelength = 2 * torch.pi / frequency
    factor, low, high = settings["factor"], settings["low_freq_factor"], settings["high_freq_factor"]
    context = settings["original_max_position_embeddings"]
    smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def _expert_weights(source: str, module: Any, layer: int) -> Iterator[Weight]:
    """Stacks `[E, F, I]`: gate and up, which transformers holds as one, come apart."""
    packed = isinstance(module, PackedExperts)
    both = module.gate_up if packed else module.gate_up_proj
    half = both.shape[1] // 2
    for part, rows in (("gate", slice(0, half)), ("up", slice(half, 2 * half)), ("down", None)):
        whole = both if rows else module.down if packed else module.down_proj
        name, where = f"blk.{layer}.ffn_{part}_exps.weight", f"{source}.{'gate_up' if rows else 'down'}_proj"
        kind = "ffn_down" if part == "down" else "linear"
        if packed:
            yield Weight(name, where, kind, packed=Codes.of(whole), rows=rows)
        else:
            yield Weight(name, where, kind, tensor=whole.detach(), rows=rows)


def _heads(path: str, config: Any, architecture: Architecture) -> int | None:
    if not architecture.interleaved:
        return None
    counts = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    return counts.get(path)


def _kind(name: str) -> str:
    role = name.split(".")[-2]
    return ROLES.get(role, "linear")


def _named(names: Any, source: str) -> str:
    path, _, leaf = source.rpartition(".")
    found = names.get_name(path)
    if found is None:
        raise UnsupportedModel(f"export.gguf: {source} has no name in this GGUF architecture")
    return f"{found}.{leaf}"
