"""Four-bit experts: are they right, and how fast beside torch's bf16 experts as transformers runs them?

`python -m benchmarks.gpu.experts --out FILE.json`. E experts, k of them a token, H hidden width, F expert width, M
tokens; groups of 128 in the timings. Calls rotate through routings, and so through the weights.
"""

import random
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

from benchmarks.gpu.harness import (
    TOLERANCE,
    Report,
    copy_bandwidth,
    differing,
    guards_hold,
    poisoned,
    relative_error,
    replayed,
    run,
    seconds,
)
from compressor.kernels import ops_experts
from compressor.kernels.cuda import experts as kernels

QWEN = ("Qwen3-30B-A3B", 128, 8, 2048, 768)
MIXTRAL = ("Mixtral-8x7B", 8, 2, 4096, 14336)
TOKENS = (1, 4, 16, 64, 256, 2048)
GROUP = 128
BF16, FP16 = torch.bfloat16, torch.float16
ROUTINGS = 16  # at most; for one token they are different experts each time


# ---- is it right? ----


def check(report: Report) -> None:
    """Against float64 on the dequantized weights, on fresh random data each time."""
    pick = random.Random(0)
    for tokens in (1, 2, 3, 5, 7, 8, 9, 11, 13, 15, 16, 17, 33, 65, 129, 257):
        num_experts = pick.choice((2, 8, 9, 60))
        slots = min(num_experts, pick.randint(1, 8))
        hidden, width = 64 * pick.choice((1, 3, 8, 16)), 64 * pick.choice((1, 2, 3, 12))
        groups = [group for group in (32, 64, 128) if hidden % group == 0 and width % group == 0]
        shape = (num_experts, slots, hidden, width, pick.choice([*groups, None]))
        index = torch.rand(tokens, num_experts, device=report.device).argsort(-1)[:, :slots]
        if tokens % 3 == 0:  # dropped slots, as transformers marks them
            index[torch.rand(index.shape, device=report.device) < 0.3] = num_experts
        check_experts(report, shape, index, pick.choice((BF16, FP16)), pick)
    for tokens in (1, 8, 9, 300):  # everything to one expert; the others have no token
        index = torch.full((tokens, 2), 3, device=report.device)
        check_experts(report, (8, 2, 256, 128, 128), index, BF16, pick)
    for tokens in (1, 5):  # rows of down that several blocks share
        index = torch.randint(4, (tokens, 2), device=report.device)
        check_experts(report, (4, 2, 4096, 4224, 64), index, FP16, pick)


def check_experts(report: Report, shape: tuple, index: Tensor, dtype: torch.dtype, pick: random.Random) -> None:
    num_experts, slots, hidden, width, group = shape
    tokens, device = len(index), report.device
    activation, wide, float_weights = pick.choice(kernels.ACTIVATIONS), pick.random() < 0.5, pick.random() < 0.5
    case = {
        "e": num_experts, "k": slots, "h": hidden, "f": width, "m": tokens, "group": group or 0,
        "activation": activation, "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    weights, dense = [], []
    for rows, columns, pack in (
        (2 * width, hidden, kernels.pack_gate_up), (hidden, width, kernels.pack_experts)
    ):  # fmt: skip
        codes = torch.randint(-8, 8, (num_experts, rows, columns), dtype=torch.int8, device=device)
        scales = torch.rand(num_experts, rows, columns // (group or columns), device=device) / 64 + 0.01
        weights += pack(codes, scales.to(dtype))
        dense.append((codes, scales.to(dtype)))
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    router = torch.rand(index.shape, device=device).to(torch.float32 if float_weights else dtype)
    args = (x, index if wide else index.int(), router, *weights, group, activation)
    reference = float64_experts(x, index, router, *dense, activation)
    if not reference.any():  # all slots dropped
        report.checked("int4_experts zeros", differing(ours(*args), torch.zeros_like(x)), 0, **case)
        return
    y = ours(*args)
    report.checked("int4_experts", relative_error(y, reference), TOLERANCE[dtype], **case)
    report.checked("int4_experts again", differing(ours(*args), y), 0, **case)
    if report.on_gpu:
        report.checked("int4_experts replayed", differing(replayed(lambda: ours(*args)), y), 0, **case)
        buffer, out = poisoned(tuple(y.shape), dtype, device)
        forward = kernels.decode if tokens <= kernels.DECODE_TOKENS else kernels.grouped
        forward(kernels.experts_of(*args), x, args[1], router, tuple(weights), out)
        report.checked("int4_experts poisoned", differing(out, y), 0, **case)
        report.checked("int4_experts guards", int(not guards_hold(buffer, out)), 0, **case)


def float64_experts(x: Tensor, index: Tensor, router: Tensor, gate_up: tuple, down: tuple, activation: str) -> Tensor:
    """The definition, a dense expert at a time."""
    y = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert in range(len(gate_up[0])):
        token, slot = torch.where(index == expert)
        first, second = (
            codes[expert].double() * scales[expert].double().repeat_interleave(codes.shape[2] // scales.shape[2], 1)
            for codes, scales in (gate_up, down)
        )
        gate, up = linear(x[token].double(), first).chunk(2, dim=-1)
        inner = (silu(gate) if activation == "silu" else gelu(gate, approximate="tanh")) * up
        y.index_add_(0, token, linear(inner, second) * router[token, slot, None].double())
    return y


def ours(*args) -> Tensor:
    """The kernels; on the CPU their definition."""
    return kernels.int4_experts_cuda(*args) if args[0].is_cuda else ops_experts.int4_experts_cpu(*args)


# ---- how fast is it? ----


def time(report: Report) -> None:
    """Each contender at each shape and M, in one run on the same device; routings rotate."""
    bandwidth = copy_bandwidth(report)
    report.timed("copy", 1 / bandwidth, bytes_per_s=bandwidth)
    shapes, tokens = ((QWEN, MIXTRAL), TOKENS) if report.on_gpu else ((("tiny", 4, 2, 128, 128),), (1, 9))
    for model, *shape in shapes:
        for name, prepare in CONTENDERS:
            forward, expert_bytes = prepare(*shape, report)
            for m in tokens:
                if prepare is torch_batched and m * shape[1] > 32:  # it copies the weights of every pair
                    continue
                routings = [routing(shape, m, i, report) for i in range(ROUTINGS if m < 16 else 4)]
                took = seconds([partial(forward, *routed) for routed in routings], report)
                hit = sum(len(index.unique()) for _, index, _ in routings) / len(routings)
                share = hit * expert_bytes / took / bandwidth
                report.timed(name, took, model=model, m=m, experts=hit, weight_bytes=hit * expert_bytes, of_copy=share)
            del forward  # the weights, before the next contender's


def routing(shape: list[int], m: int, i: int, report: Report) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the experts of each, and their weights; neighbouring routings of one token share no expert."""
    num_experts, slots, hidden, _ = shape
    order = torch.rand(m, num_experts, device=report.device).argsort(-1)
    if m == 1:
        order = torch.arange(num_experts, device=report.device).roll(-i * slots)[None]
    x = torch.randn(m, hidden, device=report.device).to(BF16)
    return x, order[:, :slots].contiguous(), torch.rand(m, slots, device=report.device).to(BF16)


Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours_int4(num_experts: int, slots: int, hidden: int, width: int, report: Report) -> tuple[Forward, int]:
    weights = []
    for rows, columns in ((2 * width, hidden), (hidden, width)):
        words = (num_experts, rows // 16, columns // 64, 128)
        weights.append(torch.randint(-(1 << 31), 1 << 31, words, dtype=torch.int32, device=report.device))
        weights.append((torch.rand(num_experts, columns // GROUP, rows, device=report.device) / 64).to(BF16))
    expert_bytes = sum(tensor[0].nbytes for tensor in weights)
    return lambda x, index, router: ours(x, index, router, *weights, GROUP, "silu"), expert_bytes


def dense_weights(num_experts: int, hidden: int, width: int, report: Report) -> tuple[Tensor, Tensor, int]:
    gate_up = torch.randn(num_experts, 2 * width, hidden, dtype=BF16, device=report.device)
    down = torch.randn(num_experts, hidden, width, dtype=BF16, device=report.device)
    return gate_up, down, gate_up[0].nbytes + down[0].nbytes


def torch_grouped(num_experts: int, slots: int, hidden: int, width: int, report: Report) -> tuple[Forward, int]:
    """`grouped_mm_experts_forward` of transformers 5: sort, two grouped products, sum."""
    gate_up, down, expert_bytes = dense_weights(num_experts, hidden, width, report)
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm

    def forward(x: Tensor, index: Tensor, router: Tensor) -> Tensor:
        experts, order = index.reshape(-1).sort()
        counts = torch.histc(experts.int() if x.is_cuda else experts.float(), num_experts, 0, num_experts - 1)
        ends = counts.cumsum(0, dtype=torch.int32)
        gate, up = grouped_mm(x[order // slots], gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        out = grouped_mm(silu(gate) * up, down.transpose(1, 2), offs=ends) * router.reshape(-1)[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return out[back].view(len(x), slots, -1).sum(1)

    return forward, expert_bytes


def torch_batched(num_experts: int, slots: int, hidden: int, width: int, report: Report) -> tuple[Forward, int]:
    """`batched_mm_experts_forward` of transformers 5: the weights of every pair are gathered."""
    gate_up, down, expert_bytes = dense_weights(num_experts, hidden, width, report)

    def forward(x: Tensor, index: Tensor, router: Tensor) -> Tensor:
        experts = index.reshape(-1)
        pairs = x.repeat_interleave(slots, 0).unsqueeze(-1)
        gate, up = torch.bmm(gate_up[experts], pairs).squeeze(-1).chunk(2, dim=-1)
        out = torch.bmm(down[experts], (silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (out * router.reshape(-1, 1)).view(len(x), slots, -1).sum(1)

    return forward, expert_bytes


CONTENDERS = (("ours int4", ours_int4), ("torch bf16 grouped_mm", torch_grouped), ("torch bf16 bmm", torch_batched))

if __name__ == "__main__":
    sys.exit(run(check, time))
