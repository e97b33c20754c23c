"""A packed weight in one layout at a time, and what stands in a model for a quantized linear or stack of experts.

O output features, I input features, G groups in a row, E experts, M tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compressor.kernels import ops
from compressor.quant import QuantizedTensor, QuantSpec, pack_codes, packed_bytes, unpack_codes

CANONICAL = "canonical"  # docs/format.md: the layout of files; computes by dequantizing, exactly
CPU = "cpu"  # ATen's int4pack, or plain int8 codes with one scale a row


class PackedWeight(nn.Module):
    """Codes and scales of one weight `[O, I]` or of a stack `[E, O, I]`; no dense copy is kept.

    In the canonical layout products are exact: the weight is dequantized to the dtype of the activations, and these are
    rounded to int8 first where the spec says so (`rounded_inputs`).
    `relayout("cpu")` moves to the layout of the fast op where there is one for this spec and shape (`fast_layout`).
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, spec: QuantSpec, shape: tuple[int, ...], scale_dtype: torch.dtype, device: str = "cpu"):
        super().__init__()
        self.spec = spec
        self.shape = tuple(shape)
        self.layout = CANONICAL
        self.file_dtype = scale_dtype  # survives `module.float()`, which widens the scales
        *rows, in_features = self.shape
        groups = (*rows, spec.num_groups(in_features))
        num_words = packed_bytes(in_features, spec.bits) // 4
        self.register_buffer("words", torch.empty((*rows, num_words), dtype=torch.int32, device=device))
        self.register_buffer("scales", torch.empty(groups, dtype=scale_dtype, device=device))
        self.register_buffer("zeros", None if spec.symmetric else torch.empty(groups, dtype=torch.int8, device=device))

    @classmethod
    def of(cls, quantized: QuantizedTensor) -> "PackedWeight":
        """Pack a quantized weight."""
        shape = tuple(quantized.codes.shape)
        packed = cls(quantized.spec, shape, quantized.scales.dtype, device="meta")
        packed.words = pack_codes(quantized.codes, quantized.spec.bits)
        packed.scales = quantized.scales.contiguous()
        packed.zeros = None if quantized.zeros is None else quantized.zeros.contiguous()
        return packed

    def quantized(self) -> QuantizedTensor:
        """The codes, scales and zeros again, as before packing."""
        if self.layout == CPU:
            raise RuntimeError("codes are read from the canonical layout: call relayout('canonical') first")
        codes = unpack_codes(self.words, self.spec.bits, self.shape[-1])
        return QuantizedTensor(codes, self.scales, self.zeros, self.spec)

    def dequantize(self, dtype: torch.dtype, expert: int | None = None) -> Tensor:
        """The dense weight `[O, I]` (of one expert), or the whole stack, as stock loaders compute it.

        They form experts in the dtype of the file's scales whatever dtype the model is loaded in, other weights in the
        latter (transformers' `CompressedTensorsDequantize`): leaving this out moved a model's float32 logits by 2.6 %.
        """
        quantized = self.quantized() if expert is None else self._expert(expert)
        formed = self.file_dtype if len(self.shape) == 3 else dtype
        return quantized.dequantize(formed).to(dtype)

    def _expert(self, expert: int) -> QuantizedTensor:
        zeros = None if self.zeros is None else self.zeros[expert]
        codes = unpack_codes(self.words[expert], self.spec.bits, self.shape[-1])
        return QuantizedTensor(codes, self.scales[expert], zeros, self.spec)

    def fast_layout(self) -> str | None:
        """The layout of the fast CPU op for this weight, or None where only exact arithmetic is possible."""
        *_, out_features, in_features = self.shape
        if self.spec.bits == 4 and self._int4_group() and out_features % ops.INT4_ROW_MULTIPLE == 0:
            return CPU
        if self.spec.activation_bits and not ops.adds_bytes_exactly():
            return None
        if self.spec.bits == 8 and self.spec.symmetric and self.spec.group_size is None and in_features % 4 == 0:
            return CPU
        return None

    def relayout(self, layout: str) -> None:
        """Move to another layout in place; to `cpu` only where `fast_layout` says so (otherwise nothing changes)."""
        if layout == self.layout or (layout == CPU and self.fast_layout() is None):
            return
        if self.spec.bits == 4:
            self._relayout_int4(layout)
        else:
            in_features = self.shape[-1]
            self.words = unpack_codes(self.words, 8, in_features) if layout == CPU else pack_codes(self.words, 8)
        self.layout = layout

    def matmul(self, x_MI: Tensor, expert: int | None = None, bias_O: Tensor | None = None) -> Tensor:
        """x times the transposed weight (of one expert), `[M, O]`, and the bias."""
        if self.layout == CANONICAL:
            x = rounded_inputs(x_MI) if self.spec.activation_bits else x_MI
            return nn.functional.linear(x, self.dequantize(x_MI.dtype, expert), bias_O)
        product = self._fast_product(x_MI, expert)
        return product if bias_O is None else product + bias_O

    def _fast_product(self, x_MI: Tensor, expert: int | None) -> Tensor:
        words, scales = (self.words, self.scales) if expert is None else (self.words[expert], self.scales[expert])
        # torch's way to an op written in Python costs 12 us, as much as a small product
        call: Any = torch.ops.compressor if torch.compiler.is_compiling() else ops.CPU_OPS
        if self.spec.bits == 4:
            group_size = self._int4_group()
            assert group_size is not None
            return call.int4_linear(x_MI, words, scales, group_size)
        if self.spec.activation_bits:
            return call.w8a8_linear(x_MI, words, scales.flatten().float())
        # the op takes bfloat16 only; scales of a float16 or float32 model are kept as they are
        return call.int8_linear(x_MI, words, scales.flatten().to(torch.bfloat16))

    def _int4_group(self) -> int | None:
        """The group that the int4 op is told: ours, or for one scale a row the largest that divides the row."""
        if self.spec.group_size is not None:
            return self.spec.group_size
        return next((g for g in reversed(ops.INT4_GROUPS) if self.shape[-1] % g == 0), None)

    def _relayout_int4(self, layout: str) -> None:
        stacked = self.words if len(self.shape) == 3 else self.words.unsqueeze(0)
        scales = self.scales if len(self.shape) == 3 else self.scales.unsqueeze(0)
        in_features = self.shape[-1]
        if layout == CPU:
            zeros = [None] * len(stacked) if self.zeros is None else self.zeros.reshape(-1, *scales.shape[1:])
            repeat = in_features // self._int4_group() // scales.shape[-1]  # type: ignore[operator]
            parts = [
                ops.pack_int4_cpu(
                    unpack_codes(words, 4, in_features),
                    scale.repeat_interleave(repeat, dim=-1),
                    None if zero is None else zero.repeat_interleave(repeat, dim=-1),
                )
                for words, scale, zero in zip(stacked, scales, zeros, strict=True)
            ]
            words, scales = torch.stack([p for p, _ in parts]), torch.stack([s for _, s in parts])
        else:
            words = torch.stack([pack_codes(ops.unpack_int4_cpu(part, in_features), 4) for part in stacked])
            grouped = scales[:, :: scales.shape[1] // self.spec.num_groups(in_features), :, :].transpose(1, 2)
            scale, shift = grouped[..., 0].float(), grouped[..., 1].float()
            self.zeros = (
                None if self.spec.symmetric else (-shift / scale).round().to(torch.int8).reshape(*self.shape[:-1], -1)
            )
            scales = grouped[..., 0]
        one = len(self.shape) == 2
        self.words = words[0].contiguous() if one else words
        self.scales = scales[0].contiguous() if one else scales.contiguous()
        if layout == CPU:
            self.zeros = None  # they live in the shift beside each scale

    def extra_repr(self) -> str:
        return f"{self.spec}, shape={self.shape}, layout={self.layout}"


class PackedLinear(nn.Module):
    """Stands where an `nn.Linear` was quantized."""

    def __init__(self, weight: PackedWeight, bias: Tensor | None):
        super().__init__()
        self.packed = weight
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        product = self.packed.matmul(x.reshape(-1, self.in_features), bias_O=self.bias)
        return product.view(*x.shape[:-1], self.out_features)

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """A linear layer that computes the same with a dense weight, exactly."""
        kind = RoundingLinear if self.packed.spec.activation_bits else nn.Linear
        dense = kind(self.in_features, self.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(self.packed.dequantize(dtype), requires_grad=False)
        dense.bias = self.bias  # type: ignore[assignment]
        return dense


class RoundingLinear(nn.Linear):
    """A linear layer that rounds its inputs to int8, one scale a token: the exact form of W8A8."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(rounded_inputs(x), self.weight, self.bias)


def rounded_inputs(x: Tensor) -> Tensor:
    """The values that int8 codes with one scale a token stand for, in x's dtype; in float32 as stock loaders do it."""
    codes, scales = ops.token_codes(x)
    return (codes * scales).to(x.dtype)


class PackedExperts(nn.Module):
    """Stands where the stacked experts of a layer were quantized: same call, same routing, packed weights.

    `template` is the experts module that it replaces, without its weights: it still knows its activation and gating.
    """

    def __init__(self, gate_up: PackedWeight, down: PackedWeight, template: Any):
        super().__init__()
        self.gate_up, self.down = gate_up, down
        self.template: Any = template
        self.num_experts = gate_up.shape[0]

    def forward(self, hidden_MD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_MD)
        for expert, tokens, slots in routed(top_k_index, self.num_experts):
            gated = self.template._apply_gate(self.gate_up.matmul(hidden_MD[tokens], expert))
            weighted = self.down.matmul(gated, expert) * top_k_weights[tokens, slots, None]
            output.index_add_(0, tokens, weighted.to(output.dtype))
        return output


def routed(top_k_index: Tensor, num_experts: int) -> list[tuple[int, Tensor, Tensor]]:
    """For each expert that got tokens: its number, the tokens' rows and the slots of their top-k."""
    order = top_k_index.flatten().argsort(stable=True)
    counts = torch.bincount(top_k_index.flatten(), minlength=num_experts).tolist()
    top_k = top_k_index.shape[-1]
    return [
        (expert, part // top_k, part % top_k)
        for expert, part in enumerate(order.split([*counts[:num_experts], sum(counts[num_experts:])])[:num_experts])
        if len(part)
    ]


def packed_weights(module: nn.Module) -> dict[str, PackedWeight]:
    """Every packed weight below a module, by its path."""
    return {name: child for name, child in module.named_modules() if isinstance(child, PackedWeight)}


def relayout(module: nn.Module, layout: str, allow: Callable[[PackedWeight], bool] = lambda _: True) -> None:
    """Move every packed weight below a module to a layout."""
    for weight in packed_weights(module).values():
        if allow(weight):
            weight.relayout(layout)
