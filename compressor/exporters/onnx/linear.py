"""Linear layers in a graph; those that read the same input are one.

Packed ones are MatMulNBits, those that round their inputs to int8 MatMulInteger, dense ones MatMul. O output features,
I input features.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.exporters.onnx.graph import MICROSOFT, Graph
from compressor.exporters.onnx.weights import NBits, to_nbits
from compressor.layers import PackedLinear
from compressor.quant import QuantizedTensor, concatenate


class Linears:
    """Writes linear layers; `accuracy_level` 4 lets onnxruntime round activations to int8, 0 keeps them exact."""

    def __init__(self, graph: Graph, dtype: torch.dtype, accuracy_level: int):
        self.graph, self.dtype, self.accuracy_level = graph, dtype, accuracy_level

    def write(self, name: str, modules: Sequence[Any], x: str, *, splits: Sequence[int] | None = None) -> list[str]:
        """The outputs of some linear layers on one input, or of one layer in parts of `splits` columns."""
        out = self.joined(name, modules, x)
        if out is None:
            return [self.write(f"{name}.{k}", [module], x)[0] for k, module in enumerate(modules)]
        widths = list(splits or [module.out_features for module in modules])
        if len(widths) == 1:
            return [out]
        sizes = self.graph.constant(widths)
        return self.graph.nodes_of("Split", [out, sizes], len(widths), name=f"{name}/split", axis=-1)

    def joined(self, name: str, modules: Sequence[Any], x: str) -> str | None:
        """The outputs beside each other, from one product: fewer and larger kernels. None for layers of two kinds."""
        if len({_kind(module) for module in modules}) > 1:
            return None
        if isinstance(modules[0], PackedLinear):
            quantized = concatenate([module.packed.quantized() for module in modules])
            if quantized.spec.activation_bits:
                out = self.integers(name, quantized, x)
            else:
                out = self.nbits(name, to_nbits(quantized, self.dtype, name), x)
        else:
            out = self.dense(name, torch.cat([module.weight.detach() for module in modules]), x)
        biases = [getattr(module, "bias", None) for module in modules]
        if all(bias is None for bias in biases):
            return out
        parts = [
            torch.zeros(module.out_features) if bias is None else bias.detach()
            for module, bias in zip(modules, biases, strict=True)
        ]
        stored = self.graph.weight(f"{name}.bias", torch.cat(parts).to(self.dtype))
        return self.graph.node("Add", [out, stored], name=f"{name}/bias")

    def dense(self, name: str, weight_OI: Tensor, x: str) -> str:
        """x times the transposed weight."""
        stored = self.graph.weight(f"{name}.weight", weight_OI.T, self.dtype)
        return self.graph.node("MatMul", [x, stored], name=name)

    def integers(self, name: str, quantized: QuantizedTensor, x: str) -> str:
        """x, rounded to int8 with one scale a token, times the transposed int8 weight: a product of integers.

        Codes of x are written with 128 added, which the product takes off again: onnxruntime is fast for unsigned ones,
        and 5 to 60 times slower for signed ones or for QuantizeLinear and DequantizeLinear around a float product.
        """
        graph, single = self.graph, torch.float32
        x = x if self.dtype == single else graph.node("Cast", [x], name=f"{name}/single", to=graph.type_of(single))
        size = graph.node("ReduceMax", [graph.node("Abs", [x], name=f"{name}/abs"), graph.constant([-1])], keepdims=1)
        scale = graph.node("Div", [size, graph.constant(127.5, np.float32)], name=f"{name}/scale")
        smallest = graph.constant(torch.finfo(single).tiny, np.float32)  # a token of zeros
        scale = graph.node("Max", [scale, smallest], name=f"{name}/scale_above_0")
        middle = graph.constant(128, np.uint8)
        steps = graph.node("Div", [x, scale], name=f"{name}/steps")
        codes = graph.node("QuantizeLinear", [steps, graph.constant(1, np.float32), middle], name=f"{name}/inputs")
        weight = graph.weight(f"{name}.codes", quantized.codes.T)
        sums = graph.node("MatMulInteger", [codes, weight, middle], name=name)
        out = graph.node("Cast", [sums], name=f"{name}/sums", to=graph.type_of(single))
        out = graph.node("Mul", [out, graph.weight(f"{name}.scales", quantized.scales.flatten().to(single))])
        out = graph.node("Mul", [out, scale], name=f"{name}/scaled")
        return out if self.dtype == single else graph.node("Cast", [out], to=graph.type_of(self.dtype))

    def nbits(self, name: str, packed: NBits, x: str) -> str:
        """x times the transposed weight that some codes stand for."""
        out_features, in_features = packed.shape
        blob = packed.block_size * packed.bits // 8
        inputs = [
            x,
            self.graph.weight(f"{name}.codes", packed.codes.reshape(out_features, packed.num_blocks, blob)),
            self.graph.weight(f"{name}.scales", packed.scales),
        ]
        if packed.zeros is not None:
            inputs.append(self.graph.weight(f"{name}.zeros", packed.zeros))
        return self.graph.node(
            "MatMulNBits", inputs, name=name, domain=MICROSOFT, K=in_features, N=out_features, bits=packed.bits,
            block_size=packed.block_size, accuracy_level=self.accuracy_level,
        )  # fmt: skip


def _kind(module: nn.Module) -> object:
    return module.packed.spec if isinstance(module, PackedLinear) else "dense"
