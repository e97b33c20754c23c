"""The graph of a decoder with a KV cache, block by block; docs/onnx.md says what is written for each part.

B sequences, S new tokens, P tokens in the cache, T = P + S, D model width, V vocabulary, R rotary frequencies.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from compressor.exporters.onnx.architecture import Decoder, attention_scale, norm_weight
from compressor.exporters.onnx.experts import write_experts
from compressor.exporters.onnx.graph import MICROSOFT, Graph
from compressor.exporters.onnx.linear import Linears
from compressor.models import Block

# Added to the scores of padding: large, but finite, since a row that is padding itself sees nothing else.
PADDED = {torch.float32: -1e9, torch.float16: -6e4, torch.bfloat16: -1e9}


@dataclass(frozen=True)
class Stream:
    """The residual stream `[B, S, D]` and what is still to be added to it: the next norm does both at once."""

    sum: str
    added: str | None = None


class DecoderWriter:
    """Writes blocks of one decoder into a graph; `write_block` takes and gives the residual stream."""

    def __init__(self, graph: Graph, decoder: Decoder, linears: Linears, dtype: torch.dtype):
        self.graph, self.decoder, self.linears, self.dtype = graph, decoder, linears, dtype
        self.input_ids = graph.input("input_ids", torch.int64, ["batch", "sequence"])
        self.mask = graph.input("attention_mask", torch.int64, ["batch", "total"])
        # Runtimes feed it. Attention turns queries and keys by their places in the cache instead, which is the same:
        # only distances count.
        graph.input("position_ids", torch.int64, ["batch", "sequence"])
        self._write_shared()

    def write_block(self, block: Block, stream: Stream) -> Stream:
        """Attention and feed-forward, each added to the stream."""
        module: Any = block.module
        name = block.name
        normed, residual = self.add_and_norm(f"{name}.input_layernorm", module.input_layernorm, stream)
        attended = self._attention(block, normed)
        if hasattr(module, "pre_feedforward_layernorm"):  # Gemma 2 and 3: norms around both parts
            attended = self.norm(f"{name}.post_attention_layernorm", module.post_attention_layernorm, attended)
            second = ("pre_feedforward_layernorm", module.pre_feedforward_layernorm)
        else:
            second = ("post_attention_layernorm", module.post_attention_layernorm)
        normed, residual = self.add_and_norm(f"{name}.{second[0]}", second[1], Stream(residual, attended))
        out = self._feed_forward(block, normed)
        if hasattr(module, "post_feedforward_layernorm"):
            out = self.norm(f"{name}.post_feedforward_layernorm", module.post_feedforward_layernorm, out)
        return Stream(residual, out)

    def norm(self, name: str, norm: Any, x: str) -> str:
        """RMS norm over the last axis."""
        weight = self.graph.weight(f"{name}.weight", norm_weight(norm).to(self.dtype))
        return self.graph.node(
            "SimplifiedLayerNormalization", [x, weight], name=name, axis=-1, epsilon=self.decoder.eps, stash_type=1
        )

    def add_and_norm(self, name: str, norm: Any, stream: Stream) -> tuple[str, str]:
        """The norm of the stream, and the stream as one sum."""
        if stream.added is None:
            return self.norm(name, norm, stream.sum), stream.sum
        weight = self.graph.weight(f"{name}.weight", norm_weight(norm).to(self.dtype))
        normed, _, _, total = self.graph.nodes_of(
            "SkipSimplifiedLayerNormalization", [stream.added, stream.sum, weight], 4, name=name, domain=MICROSOFT,
            epsilon=self.decoder.eps,
        )  # fmt: skip
        return normed, total

    # -- what all blocks share --------------------------------------------------------------------------------------

    def _write_shared(self) -> None:
        """Lengths, the bias of the padding, cos and sin of the positions."""
        graph, one = self.graph, self.graph.constant([1])
        shape_2 = graph.node("Shape", [self.input_ids], name="shape")
        batch = graph.node("Gather", [shape_2, graph.constant([0])], name="batch")
        sequence = graph.node("Gather", [shape_2, one], name="sequence")
        total = graph.node("Gather", [graph.node("Shape", [self.mask], name="mask/shape"), one], name="total")
        int32 = graph.type_of(torch.int32)
        self.total = graph.node(
            "Cast", [graph.node("Squeeze", [total], name="total/scalar")], name="total/int32", to=int32
        )
        # What is cached is as long for every row: padding is a matter of the bias, not of lengths.
        last = graph.node("Cast", [graph.node("Sub", [total, one], name="last")], name="last/int32", to=int32)
        self.lengths = graph.node("Expand", [last, batch], name="lengths")
        self.bias = self._padding_bias(batch, sequence, total)
        self.rotary = {kind: self._cos_sin(kind) for kind in self.decoder.rotary}

    def _padding_bias(self, batch: str, sequence: str, total: str) -> str:
        """`[B, 1, S, T]`: 0 where the mask is 1, very negative where it is 0."""
        graph = self.graph
        mask = graph.node("Cast", [self.mask], name="mask/float", to=graph.type_of(self.dtype))
        absent = graph.node("Sub", [self._number(1.0), mask], name="mask/absent")
        bias = graph.node("Mul", [absent, self._number(PADDED[self.dtype])], name="mask/bias")
        bias = graph.node("Unsqueeze", [bias, graph.constant([1, 2])], name="mask/unsqueeze")
        shape = graph.node("Concat", [batch, graph.constant([1]), sequence, total], name="mask/bias_shape", axis=0)
        return graph.node("Expand", [bias, shape], name="attention_bias")

    def _cos_sin(self, kind: str) -> list[str]:
        """Tables of cos and sin `[longest context, R]`."""
        rotary = self.decoder.rotary[kind]
        places = torch.arange(self.decoder.longest, dtype=torch.float32).unsqueeze(1)
        angles = places * rotary.frequencies_R
        tables = {"cos": angles.cos() * rotary.scaling, "sin": angles.sin() * rotary.scaling}
        return [self.graph.weight(f"rotary.{kind}.{name}", table.to(self.dtype)) for name, table in tables.items()]

    def _number(self, value: float) -> str:
        if self.dtype == torch.bfloat16:
            return self.graph.weight(f"number/{value}", torch.tensor(value, dtype=self.dtype))
        return self.graph.constant(value, np.float16 if self.dtype == torch.float16 else np.float32)

    # -- the parts of a block ---------------------------------------------------------------------------------------

    def _attention(self, block: Block, x: str) -> str:
        graph, decoder, k = self.graph, self.decoder, block.index
        attention: Any = block.module.self_attn
        name = f"{block.name}.self_attn"
        query, key, value = self._queries_keys_values(f"{name}.qkv_proj", attention, x)
        cache_shape: list[int | str] = ["batch", decoder.kv_heads, "past", decoder.head_dim]
        past = [graph.input(f"past_key_values.{k}.{part}", self.dtype, cache_shape) for part in ("key", "value")]
        output, *present = graph.nodes_of(
            "GroupQueryAttention",
            [query, key, value, *past, self.lengths, self.total, *self.rotary[decoder.layer_types[k]], "", self.bias],
            3,
            name=f"{name}.attention",
            domain=MICROSOFT,
            num_heads=decoder.heads,
            kv_num_heads=decoder.kv_heads,
            scale=attention_scale(block, decoder),
            softcap=decoder.softcap,
            local_window_size=decoder.window_of(k),
            do_rotary=1,
        )
        for value_name, part in zip(present, ("key", "value"), strict=True):
            graph.output(
                value_name, f"present.{k}.{part}", self.dtype, ["batch", decoder.kv_heads, "total", decoder.head_dim]
            )
        return self.linears.write(f"{name}.o_proj", [attention.o_proj], output)[0]

    def _queries_keys_values(self, name: str, attention: Any, x: str) -> list[str]:
        """Three inputs of attention, or all in the first one where nothing comes between product and attention."""
        decoder, graph = self.decoder, self.graph
        fused = [attention.qkv_proj] if hasattr(attention, "qkv_proj") else None
        modules = fused or [attention.q_proj, attention.k_proj, attention.v_proj]
        norms = [getattr(attention, f"{label}_norm", None) for label in "qk"]
        is_plain = norms == [None, None] and decoder.clip_qkv is None
        if is_plain and (packed := self.linears.joined(name, modules, x)) is not None:
            return [packed, "", ""]
        heads = [decoder.heads, decoder.kv_heads]
        widths = [decoder.head_dim * count for count in (*heads, decoder.kv_heads)]
        parts = self.linears.write(name, modules, x, splits=widths if fused else None)
        for position, (norm, count) in enumerate(zip(norms, heads, strict=True)):
            if norm is not None:
                parts[position] = self._head_norm(f"{name}/{'qk'[position]}_norm", norm, parts[position], count)
        if decoder.clip_qkv is not None:
            low, high = self._number(-decoder.clip_qkv), self._number(decoder.clip_qkv)
            parts = [graph.node("Clip", [part, low, high]) for part in parts]
        return parts

    def _head_norm(self, name: str, norm: Any, x: str, heads: int) -> str:
        """RMS norm of each head (Qwen 3, Gemma 3), or of all of them together (OLMoE)."""
        if norm.weight.numel() == heads * self.decoder.head_dim:
            return self.norm(name, norm, x)
        split = self.graph.node(
            "Reshape", [x, self.graph.constant([0, 0, heads, self.decoder.head_dim])], name=f"{name}/split"
        )
        normed = self.norm(name, norm, split)
        return self.graph.node(
            "Reshape", [normed, self.graph.constant([0, 0, heads * self.decoder.head_dim])], name=f"{name}/join"
        )

    def _feed_forward(self, block: Block, x: str) -> str:
        mlp: Any = block.module.mlp
        stack = block.experts
        if stack is None:
            return self.gated(f"{block.name}.mlp", mlp, x)
        routed = write_experts(self.graph, block, x, self.linears, self.dtype)
        if stack.shared_path is None or stack.shared_gate_path is None:
            return routed
        name = f"{block.name}.{stack.shared_path}"
        shared = self.gated(name, block.module.get_submodule(stack.shared_path), x)
        gate = self.linears.write(f"{name}_gate", [block.module.get_submodule(stack.shared_gate_path)], x)[0]
        gate = self.graph.node("Sigmoid", [gate], name=f"{name}_gate/sigmoid")
        shared = self.graph.node("Mul", [gate, shared], name=f"{name}/gated")
        return self.graph.node("Add", [routed, shared], name=f"{block.name}.mlp/add")

    def gated(self, name: str, mlp: Any, x: str) -> str:
        """`down(activation(gate(x)) * up(x))`."""
        if hasattr(mlp, "gate_up_proj"):  # Phi-3 has both in one weight
            half = mlp.gate_up_proj.out_features // 2
            gate, up = self.linears.write(f"{name}.gate_up_proj", [mlp.gate_up_proj], x, splits=[half, half])
        else:
            gate, up = self.linears.write(f"{name}.gate_up_proj", [mlp.gate_proj, mlp.up_proj], x)
        product = self.graph.node("Mul", [self._activated(f"{name}.act", gate), up], name=f"{name}.mul")
        return self.linears.write(f"{name}.down_proj", [mlp.down_proj], product)[0]

    def _activated(self, name: str, x: str) -> str:
        match self.decoder.activation:
            case "silu":  # x * sigmoid(1 * x)
                return self.graph.node("QuickGelu", [x], name=name, domain=MICROSOFT, alpha=1.0)
            case "gelu_tanh":
                return self.graph.node("Gelu", [x], name=name, approximate="tanh")
            case _:
                return self.graph.node("Gelu", [x], name=name)
