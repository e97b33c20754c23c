"""A packed weight in one layout at a time, and what stands in a model for a quantized linear or stack of experts.

O output features, I input features, G groups in a row, E experts, M tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compressor.kernels import ops, ops_experts, ops_tiled  # noqa: F401  (the ops on our tiles)
from compressor.kernels.cuda.experts import ACTIVATIONS, MAX_EXPERTS
from compressor.kernels.ops_experts import activate
from compressor.layers.layouts import (
    CANONICAL,
    CPU,
    CUDA,
    LAYOUTS,
    fits_cpu,
    fits_cuda,
    int4_group,
    to_canonical,
    to_layout,
)
from compressor.quant import QuantizedTensor, QuantSpec, pack_codes, packed_bytes, unpack_codes


class PackedWeight(nn.Module):
    """Codes and scales of one weight `[O, I]` or of a stack `[E, O, I]`; no dense copy is kept.

    In the canonical layout products are exact: the weight is dequantized to the dtype of the activations, and these are
    rounded to int8 first where the spec says so (`rounded_inputs`).
    `relayout("cpu")` and `relayout("cuda")` move to the layout of the fast op where there is one for this spec and
    shape (`fits`). A stack moves to the latter only inside `PackedExperts`, which says whether its kernel fits.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, spec: QuantSpec, shape: tuple[int, ...], scale_dtype: torch.dtype, device: str = "cpu"):
        super().__init__()
        self.spec = spec
        self.shape = tuple(shape)
        self.layout = CANONICAL
        self.stacked_for: str | None = None  # the op of experts that this stack is for: "gate_up", "down", or none
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
        if self.layout != CANONICAL:
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
        """The layout of the fast op for this weight where it lies, or None where only exact arithmetic is possible."""
        layout = CUDA if self.words.is_cuda else CPU
        return layout if self.fits(layout) else None

    def fits(self, layout: str) -> bool:
        """Whether this weight has such a layout, on the device where it lies."""
        if layout == CPU:
            return not self.words.is_cuda and fits_cpu(self.spec, self.shape)
        stands_alone = len(self.shape) == 3 and self.stacked_for is None
        return layout == CANONICAL or (not stands_alone and fits_cuda(self.spec, self.shape, self.file_dtype))

    def relayout(self, layout: str) -> None:
        """Move to another layout in place (`layouts`); nothing changes where this weight does not have it (`fits`)."""
        if layout not in LAYOUTS:
            raise ValueError(f"layout {layout!r}; possible are {', '.join(LAYOUTS)}")
        if layout == self.layout or not self.fits(layout):
            return
        device = self.words.device
        held = self.words, self.scales, self.zeros
        if self.layout == CPU:  # a module that was moved to a GPU as it was: only a CPU can read this layout
            held = self.words.cpu(), self.scales.cpu(), self.zeros if self.zeros is None else self.zeros.cpu()
        gated = self.stacked_for == "gate_up"
        if self.layout != CANONICAL:
            words, scales, zeros = to_canonical(
                self.layout, self.spec, self.shape, held, gated=gated, dtype=self.file_dtype
            )
            held = words.to(device), scales.to(device), zeros if zeros is None else zeros.to(device)
        if layout != CANONICAL:
            held = to_layout(layout, self.spec, self.shape, held, gated=gated)
        self.words, self.scales, self.zeros = held
        self.layout = layout

    def matmul(self, x_MI: Tensor, expert: int | None = None, bias_O: Tensor | None = None) -> Tensor:
        """x times the transposed weight (of one expert), `[M, O]`, and the bias."""
        if self.layout == CANONICAL:
            x = rounded_inputs(x_MI) if self.spec.activation_bits else x_MI
            return nn.functional.linear(x, self.dequantize(x_MI.dtype, expert), bias_O)
        product = self._fast_product(x_MI, expert) if self.layout == CPU else self._tiled_product(x_MI)
        return product if bias_O is None else product + bias_O

    def _fast_product(self, x_MI: Tensor, expert: int | None) -> Tensor:
        words, scales = (self.words, self.scales) if expert is None else (self.words[expert], self.scales[expert])
        # torch's way to an op written in Python costs 12 us, as much as a small product
        call: Any = torch.ops.compressor if torch.compiler.is_compiling() else ops.CPU_OPS
        if self.spec.bits == 4:
            group_size = int4_group(self.spec, self.shape[-1])
            assert group_size is not None
            return call.int4_linear(x_MI, words, scales, group_size)
        if self.spec.activation_bits:
            return call.w8a8_linear(x_MI, words, scales.flatten().float())
        # the op takes bfloat16 only; scales of a float16 or float32 model are kept as they are
        return call.int8_linear(x_MI, words, scales.flatten().to(torch.bfloat16))

    def _tiled_product(self, x_MI: Tensor) -> Tensor:
        """In the dtype of the file's scales, which is what the kernels take; in x's dtype again."""
        assert len(self.shape) == 2
        x, call = x_MI.to(self.file_dtype), torch.ops.compressor
        if self.spec.activation_bits:
            return call.w8a8_tiled_linear(x, self.words, self.scales.float(), None).to(x_MI.dtype)
        group_size = self.spec.group_size or self.shape[-1]
        scales = self.scales.to(self.file_dtype)
        return call.int4_tiled_linear(x, self.words, scales, self.zeros, group_size).to(x_MI.dtype)

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
    In the CUDA layout all experts are one call, which needs nothing from the host.
    """

    def __init__(self, gate_up: PackedWeight, down: PackedWeight, template: Any):
        super().__init__()
        self.gate_up, self.down = gate_up, down
        self.template: Any = template
        self.num_experts = gate_up.shape[0]
        self.activation = _activation(template)
        one_scheme = gate_up.spec == down.spec and gate_up.file_dtype == down.file_dtype
        fit = all(fits_cuda(one.spec, one.shape, one.file_dtype) for one in (gate_up, down))
        if self.activation and one_scheme and fit and self.num_experts <= MAX_EXPERTS:
            gate_up.stacked_for, down.stacked_for = "gate_up", "down"

    @property
    def at_once(self) -> bool:
        """Whether all experts are one call."""
        return self.gate_up.layout == self.down.layout == CUDA

    def forward(self, hidden_MD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if self.at_once:
            return self._at_once(hidden_MD, top_k_index, top_k_weights)
        output = torch.zeros_like(hidden_MD)
        for expert, tokens, slots in routed(top_k_index, self.num_experts):
            gated = self.template._apply_gate(self.gate_up.matmul(hidden_MD[tokens], expert))
            weighted = self.down.matmul(gated, expert) * top_k_weights[tokens, slots, None]
            output.index_add_(0, tokens, weighted.to(output.dtype))
        return output

    def _at_once(self, hidden_MD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        gate_up, down, dtype = self.gate_up, self.down, self.gate_up.file_dtype
        out = torch.ops.compressor.int4_experts(
            hidden_MD.to(dtype),
            top_k_index,
            top_k_weights if top_k_weights.dtype == dtype else top_k_weights.float(),
            gate_up.words,
            gate_up.scales.to(dtype),
            down.words,
            down.scales.to(dtype),
            gate_up.spec.group_size,
            self.activation,
        )
        return out.to(hidden_MD.dtype)


def _activation(template: Any) -> str | None:
    """Which of the kernels' activations gates these experts: tried, since modules may gate as they like."""
    gate, up = torch.linspace(-30, 30, 16, device="cpu"), torch.linspace(20, -30, 16, device="cpu")
    found = template._apply_gate(torch.cat([gate, up])[None])[0]
    return next((name for name in ACTIVATIONS if torch.allclose(found, activate(gate, name) * up, atol=1e-6)), None)


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
