"""Quantizing stacked experts: a chunk of experts at a time, each by its own tokens, starved ones by a tiered policy.

E experts, H model width, F expert width, M tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.calibration import GatheredInputs, Hessian
from compressor.models import ExpertStack
from compressor.quant import QuantizedTensor, QuantSpec, concatenate

# The pass's solver: weights, Hessian or None, scheme, dtype of the scales, mask or None; and why it had to round, if so
Solve = Callable[[Tensor, Tensor | None, QuantSpec, torch.dtype, Tensor | None], tuple[QuantizedTensor, str]]

# From about two tokens for each input on, an expert's own Hessian beats rounding (the rule that Olive uses).
TOKENS_PER_INPUT = 2
# Weight of the layer's pooled Hessian, in tokens for each input, in every expert's gate/up statistics.
POOLED_TOKENS_PER_INPUT = 0.25
DEFAULT_MEMORY = 1 << 30


@dataclass(frozen=True)
class ExpertOutcome:
    """What the ledger says of a layer's experts."""

    errors: dict[str, float]
    counts: tuple[int, ...] | None
    starved: tuple[int, ...]
    policy: tuple[str, ...] | None
    reason: str


def quantize_experts(
    stack: ExpertStack,
    inputs: GatheredInputs | None,
    solve: Solve,
    spec: QuantSpec,
    dtype: torch.dtype,
    memory_bytes: int | None,
    *,
    pruned: bool = False,
) -> ExpertOutcome:
    """Quantize and install all experts of a layer in one scheme.

    Gate and up read the layer's input; down reads what the quantized gate and up make of it. Tiers: an expert with at
    least two tokens for each input uses its own; a starved one also borrows the tokens that its router would send next,
    weighted by affinity; all lean a little on the layer's pooled Hessian; where even that cannot be factorised,
    rounding in the same format. `pruned`: zeros are a mask and stay zero.
    """
    gate_up, down = stack.read()
    if inputs is None:
        gate_up_q, _ = solve(gate_up, None, spec, dtype, None)
        down_q, _ = solve(down, None, spec, dtype, None)
        errors = {"gate_up_proj": _weight_error(gate_up, gate_up_q), "down_proj": _weight_error(down, down_q)}
        stack.install(gate_up_q, down_q)
        return ExpertOutcome(errors, None, (), None, "")
    counts = inputs.counts()
    enough = TOKENS_PER_INPUT * gate_up.shape[-1]
    pooled = Hessian(gate_up.shape[-1])
    pooled.add(inputs.hidden)
    mean_HH = pooled.value / max(1, pooled.tokens)
    width = max(gate_up.shape[-1], down.shape[-1])
    budget = (memory_bytes or DEFAULT_MEMORY) // 4
    chunk = max(1, budget // (3 * 4 * width * width))  # Hessian, its permuted copy and its factor, float32
    solved: list[tuple[QuantizedTensor, QuantizedTensor]] = []
    sums = {"gate_up_proj": [0.0, 0.0], "down_proj": [0.0, 0.0]}
    policy, problems = [], set()
    for start in range(0, stack.num_experts, chunk):
        experts = range(start, min(start + chunk, stack.num_experts))
        policy += [_tier(counts[e], gate_up.shape[-1]) for e in experts]
        hessians = torch.stack([_gate_up_hessian(*inputs.inputs_of(e, enough), mean_HH) for e in experts])
        part = gate_up[start : experts.stop]
        gate_up_q, problem = solve(part, hessians, spec, dtype, part != 0 if pruned else None)
        _add_error(sums["gate_up_proj"], part, gate_up_q, hessians)
        problems.add(problem)
        quantized = [gate_up_q[i].dequantize(dtype) for i in range(len(experts))]
        down_hessians = torch.stack(
            [_down_hessian(stack, *inputs.inputs_of(e, enough), quantized[e - start]) for e in experts]
        )
        part = down[start : experts.stop]
        down_q, problem = solve(part, down_hessians, spec, dtype, part != 0 if pruned else None)
        _add_error(sums["down_proj"], part, down_q, down_hessians)
        problems.add(problem)
        solved.append((gate_up_q, down_q))
    stack.install(concatenate([g for g, _ in solved]), concatenate([d for _, d in solved]))
    return ExpertOutcome(
        {name: (moved / total) ** 0.5 if total else 0.0 for name, (moved, total) in sums.items()},
        tuple(counts),
        tuple(e for e, tier in enumerate(policy) if tier != "own tokens"),
        tuple(policy),
        "; ".join(sorted(filter(None, problems))),
    )


def _tier(count: int, width: int) -> str:
    if count >= TOKENS_PER_INPUT * width:
        return "own tokens"
    return "own and borrowed tokens" if count else "borrowed tokens"


def _gate_up_hessian(x_MH: Tensor, affinity_M: Tensor | None, pooled_HH: Tensor) -> Tensor:
    """The expert's own statistics, leaning on those of the whole layer: with few tokens the pooled ones decide."""
    hessian = Hessian(x_MH.shape[-1])
    hessian.add(x_MH, affinity_M)
    return hessian.value + POOLED_TOKENS_PER_INPUT * x_MH.shape[-1] * pooled_HH


def _down_hessian(stack: ExpertStack, x_MH: Tensor, affinity_M: Tensor | None, gate_up: Tensor) -> Tensor:
    """Statistics of what the quantized gate and up hand to down; neurons of different experts are not pooled."""
    hessian = Hessian(gate_up.shape[0] // 2)
    for start in range(0, len(x_MH), 8192):
        rows = slice(start, start + 8192)
        gated = stack.gate(torch.nn.functional.linear(x_MH[rows], gate_up))
        hessian.add(gated, None if affinity_M is None else affinity_M[rows])
    return hessian.value


def _add_error(sums: list[float], weight: Tensor, quantized: QuantizedTensor, hessians: Tensor) -> None:
    dense = weight.float()
    moved = quantized.dequantize() - dense
    sums[0] += float(((moved @ hessians) * moved).sum().clamp(min=0))
    sums[1] += float(((dense @ hessians) * dense).sum())


def _weight_error(weight: Tensor, quantized: QuantizedTensor) -> float:
    return float((quantized.dequantize() - weight.float()).norm() / weight.float().norm())
