"""A layer of experts in a graph: MoE for dense experts, QMoE for int4. Only routed tokens are computed.

E experts, D model width, F expert width, M tokens, K experts of a token.
"""

import torch
from torch import Tensor

from compressor.errors import UnsupportedModel
from compressor.exporters.onnx.graph import MICROSOFT, Graph
from compressor.exporters.onnx.linear import Linears
from compressor.exporters.onnx.weights import NBits, interleaved, interleaved_codes, to_nbits
from compressor.models import Block, ExpertStack

# silu(gate) * up, with rows of gate and up in turns; the gates of a token's experts divided by their sum.
KERNEL = {
    "activation_type": "swiglu",
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
    "swiglu_fusion": 1,
    "normalize_routing_weights": 1,
}


def write_experts(graph: Graph, block: Block, x: str, linears: Linears, dtype: torch.dtype) -> str:
    """Router and experts of a block on `x [B, S, D]`; the result has the same shape.

    onnxruntime's CPU kernel divides the gates of the chosen experts by their sum whatever it is told (reference,
    finding 2). Where the model does not, the result is multiplied by that sum again, which is the same. QMoE of 8-bit
    experts rounds activations to int8 whatever it is told (1e-2 of the result, onnxruntime 1.31): those experts are
    written one by one.
    """
    stack = block.experts
    assert stack is not None
    name = stack.name
    if getattr(stack.router, "bias", None) is not None:
        raise UnsupportedModel(f"{name}: a router with a bias cannot be written as ONNX")
    _check_gate(stack)
    hidden_size = stack.shapes()["down_proj"][1]
    flat = graph.node("Reshape", [x, graph.constant([-1, hidden_size])], name=f"{name}/flat")
    logits = linears.dense(f"{block.name}.{stack.router_path}", stack.router.weight, flat)
    if stack.is_packed and stack.module.gate_up.spec.bits == 8:
        out = _one_by_one(graph, stack, flat, logits, linears)
    else:
        out = _fused(graph, stack, flat, logits, dtype)
        if not stack.normalises_gates:
            gates, _ = _chosen(graph, stack, logits)
            mass = graph.node("ReduceSum", [gates, graph.constant([-1])], name=f"{name}/mass", keepdims=1)
            out = graph.node("Mul", [out, mass], name=f"{name}/unnormalised")
    return graph.node("Reshape", [out, graph.node("Shape", [x], name=f"{name}/shape")], name=f"{name}/unflat")


def _chosen(graph: Graph, stack: ExpertStack, logits: str) -> list[str]:
    """The probabilities `[M, K]` of the experts that each token goes to, not normalised, and their numbers."""
    probabilities = graph.node("Softmax", [logits], name=f"{stack.name}/softmax", axis=-1)
    return graph.nodes_of("TopK", [probabilities, graph.constant([stack.top_k])], 2, name=f"{stack.name}/top", axis=-1)


def _fused(graph: Graph, stack: ExpertStack, flat: str, logits: str, dtype: torch.dtype) -> str:
    """All experts as one node, which routes by itself."""
    if stack.is_packed:
        inputs, bits = _packed(graph, stack, dtype)
        settings = KERNEL | {"k": stack.top_k} | bits
        return graph.node("QMoE", [flat, logits, *inputs], name=stack.name, domain=MICROSOFT, **settings)
    gate_up, down = stack.read()
    weights = {"gate_up": interleaved(gate_up), "down": down}
    first, second = (graph.weight(f"{stack.name}.{part}", weight, dtype) for part, weight in weights.items())
    settings = KERNEL | {"k": stack.top_k}
    return graph.node("MoE", [flat, logits, first, "", second], name=stack.name, domain=MICROSOFT, **settings)


def _one_by_one(graph: Graph, stack: ExpertStack, flat: str, logits: str, linears: Linears) -> str:
    """A few nodes for each expert: find its tokens, compute them, add them where they belong."""
    name, experts = stack.name, stack.module
    gates, numbers = _chosen(graph, stack, logits)
    if stack.normalises_gates:
        total = graph.node("ReduceSum", [gates, graph.constant([-1])], name=f"{name}/mass", keepdims=1)
        gates = graph.node("Div", [gates, total], name=f"{name}/gates")
    shape = graph.node("Shape", [flat], name=f"{name}/flat_shape")
    zero = graph.weight("zero", torch.zeros(1, dtype=linears.dtype))
    out = graph.node("Expand", [zero, shape], name=f"{name}/zeros")
    both, downs = experts.gate_up.quantized(), experts.down.quantized()
    for expert in range(stack.num_experts):
        own = f"{name}.{expert}"
        hits = graph.node("Equal", [numbers, graph.constant(expert)], name=f"{own}/hits")
        places = graph.node("Transpose", [graph.node("NonZero", [hits], name=f"{own}/nonzero")], name=f"{own}/places")
        rows = graph.node(
            "Slice", [places, graph.constant([0]), graph.constant([1]), graph.constant([1])], name=f"{own}/rows"
        )
        tokens = graph.node("GatherND", [flat, rows], name=f"{own}/tokens")
        gated = linears.nbits(f"{own}.gate_up", to_nbits(both[expert], linears.dtype, f"{own}.gate_up"), tokens)
        gate, up = graph.nodes_of("Split", [gated], 2, name=f"{own}/split", axis=-1, num_outputs=2)
        silu = graph.node("QuickGelu", [gate], name=f"{own}/act", domain=MICROSOFT, alpha=1.0)
        product = graph.node("Mul", [silu, up], name=f"{own}/mul")
        result = linears.nbits(f"{own}.down", to_nbits(downs[expert], linears.dtype, f"{own}.down"), product)
        gate = graph.node("GatherND", [gates, places], name=f"{own}/gate")
        gate = graph.node("Unsqueeze", [gate, graph.constant([1])], name=f"{own}/gate_column")
        weighted = graph.node("Mul", [result, gate], name=f"{own}/weighted")
        out = graph.node("ScatterND", [out, rows, weighted], name=f"{own}/add", reduction="add")
    return out


def _packed(graph: Graph, stack: ExpertStack, dtype: torch.dtype) -> tuple[list[str], dict[str, int]]:
    """QMoE's inputs from the codes on, and the attributes that say how they are packed."""
    experts = stack.module
    fc1 = to_nbits(interleaved_codes(experts.gate_up.quantized()), dtype, f"{stack.name}.gate_up")
    fc2 = to_nbits(experts.down.quantized(), dtype, f"{stack.name}.down")
    if (fc1.bits, fc1.zeros is None) != (fc2.bits, fc2.zeros is None):
        raise UnsupportedModel(f"{stack.name}: gate_up and down are of two schemes, which QMoE does not take")
    block = min(fc1.block_size, fc2.block_size)
    fc1, fc2 = _finer(fc1, block, stack.name), _finer(fc2, block, stack.name)

    def stored(part: str, tensor: Tensor | None) -> str:
        return "" if tensor is None else graph.weight(f"{stack.name}.{part}", tensor)

    inputs = [stored("gate_up.codes", fc1.codes), stored("gate_up.scales", fc1.scales), ""]
    inputs += [stored("down.codes", fc2.codes), stored("down.scales", fc2.scales), ""]
    if fc1.zeros is not None:
        inputs += ["", "", "", stored("gate_up.zeros", fc1.zeros), stored("down.zeros", fc2.zeros)]
    return inputs, {"expert_weight_bits": fc1.bits, "block_size": block}


def _finer(packed: NBits, block: int, where: str) -> NBits:
    """The same weights with scales for smaller blocks: QMoE takes one block size for both products."""
    repeat = packed.block_size // block
    if repeat == 1:
        return packed
    if packed.zeros is not None:
        raise UnsupportedModel(f"{where}: experts with zero points and two block sizes cannot be written as QMoE")
    scales = packed.scales.repeat_interleave(repeat, dim=-1)
    return NBits(packed.codes, scales, None, packed.bits, block, packed.shape)


def _check_gate(stack: ExpertStack) -> None:
    """The kernel computes silu(gate) * up; experts that do something else between are refused."""
    template = stack.module.template if stack.is_packed else stack.module
    probe = torch.linspace(-3, 3, 8).reshape(1, -1)
    gate, up = probe.chunk(2, dim=-1)
    if not torch.allclose(template._apply_gate(probe), torch.nn.functional.silu(gate) * up, atol=1e-6):
        raise UnsupportedModel(
            f"{stack.name}: these experts are not gated by silu, which is all that MoE computes here"
        )
