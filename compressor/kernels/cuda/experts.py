"""Experts with four-bit weights on a GPU: gate and up, the activation, down and the weighted sum, without the host.

M tokens, S slots (experts of a token), E experts, H hidden width, F expert width, G groups in a row. Weights are T16x64
(layouts.py) of each expert; of gate and up the rows are interleaved, eight and eight, so that both of a number meet in
one lane. Plans are pure functions of shapes and device; calls make plans and launch them.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.kernels.cuda.build import Kernel
from compressor.kernels.cuda.launch import Device, device_of
from compressor.kernels.cuda.linear import DTYPES, Plan, aligned, run
from compressor.kernels.layouts import COLUMNS, ROWS, WORDS, check_group, check_t16x64, pack_t16x64

ACTIVATIONS = ("silu", "gelu_tanh")
DECODE_TOKENS = 8  # up to here nothing is sorted: one column block of the tensor core instruction
RING = 8  # loads that a warp has under way, of 512 bytes
SPLIT_SLICES = 64  # of 64 columns: the most of `down` for one block; the sum over slots adds the parts
CHUNK = 128  # columns of x in a stage of the grouped kernel
STAGES = 4
MAX_EXPERTS = 1024
TOKENS_AT_ONCE = 4096  # more go in several passes: what lies between the linears stays small
# The grouped kernel by pairs of a block: 16-row tiles and loads ahead of a warp, warps of a multiprocessor (registers).
# Groups of 32 and 64 have more scales under way.
GROUPED = {8: (1, 8, 16), 16: (1, 4, 16), 32: (1, 4, 16), 64: (2, 2, 8)}
GROUPED_SMALL = {8: (1, 4, 16), 16: (1, 4, 8), 32: (1, 4, 8), 64: (1, 4, 8)}


@dataclass(frozen=True)
class Experts:
    """The shapes of a stack of experts and of what its router gives."""

    num_experts: int
    hidden: int
    width: int
    slots: int
    group_size: int | None  # None: one scale a row
    activation: str
    dtype: torch.dtype
    wide: bool  # the router's indices are int64
    float_weights: bool  # the router's weights are float32

    @property
    def pair_constants(self) -> tuple[tuple[str, int], ...]:
        bf16 = int(self.dtype == torch.bfloat16)
        return ("BF16", bf16), ("WIDE", int(self.wide)), ("EXPERTS", self.num_experts), ("SLOTS", self.slots)

    def constants(self, gated: bool) -> tuple[tuple[str, int], ...]:
        """Of gate and up together, or of down."""
        rows, columns = (2 * self.width, self.hidden) if gated else (self.hidden, self.width)
        return (
            *self.pair_constants,
            ("N", rows),
            ("K", columns),
            ("GROUP", self.group_size or columns),
            ("GATED", int(gated)),
            ("GELU", int(self.activation == "gelu_tanh")),
            ("FLOAT_WEIGHTS", int(self.float_weights)),
        )


def pack_gate_up(codes_EOI: Tensor, scales_EOG: Tensor) -> tuple[Tensor, Tensor]:
    """`[E, 2F, H]`, gate's rows before up's as in transformers, as the kernels read them; see `pack_experts`."""
    return pack_experts(interleave(codes_EOI), interleave(scales_EOG))


def pack_experts(codes_EOI: Tensor, scales_EOG: Tensor) -> tuple[Tensor, Tensor]:
    """Codes from -8 to 7 (int8) as T16x64 of each expert `[E, O / 16, I / 64, 128]`, and scales as `[E, G, O]`."""
    packed = torch.stack([pack_t16x64(codes) for codes in codes_EOI])
    return packed, scales_EOG.transpose(1, 2).contiguous()


def interleave(rows_EOx: Tensor) -> Tensor:
    """Eight rows of the first half, then the same eight of the second."""
    if rows_EOx.shape[1] % ROWS:
        raise ValueError(f"gate and up have {rows_EOx.shape[1]} rows together; they have to be a multiple of {ROWS}")
    return rows_EOx.unflatten(1, (2, -1, 8)).transpose(1, 2).flatten(1, 3).contiguous()


def int4_experts_cuda(
    hidden_MH: Tensor, top_k_index_MS: Tensor, top_k_weights_MS: Tensor, gate_up: Tensor, gate_up_scales: Tensor,
    down: Tensor, down_scales: Tensor, group_size: int | None, activation: str,
) -> Tensor:  # fmt: skip
    """The sum over slots of router weight times `down(act(gate(x)) * up(x))`, `[M, H]`; the same bits each time.

    Sums in float32; between the linears numbers are rounded to x's dtype. Slots whose index is not in 0 .. E - 1 add
    nothing.
    """
    routed = (hidden_MH, top_k_index_MS, top_k_weights_MS)
    experts = experts_of(*routed, gate_up, gate_up_scales, down, down_scales, group_size, activation)
    weights = (gate_up, gate_up_scales, down, down_scales)
    y = torch.empty_like(hidden_MH, memory_format=torch.contiguous_format)
    parts = zip(*(tensor.split(TOKENS_AT_ONCE) for tensor in (*routed, y)), strict=True)
    for hidden, index, router, out in parts:
        forward = decode if len(hidden) <= DECODE_TOKENS else grouped
        if len(hidden):
            forward(experts, aligned(hidden), index.contiguous(), router.contiguous(), weights, out)
    return y


def experts_of(
    hidden_MH: Tensor, top_k_index_MS: Tensor, top_k_weights_MS: Tensor, gate_up: Tensor, gate_up_scales: Tensor,
    down: Tensor, down_scales: Tensor, group_size: int | None, activation: str,
) -> Experts:  # fmt: skip
    """Read the shapes off the tensors, and refuse what does not fit together."""
    E, H, F = len(gate_up), gate_up.shape[2] * COLUMNS, down.shape[2] * COLUMNS
    dtype, index, router = gate_up_scales.dtype, top_k_index_MS, top_k_weights_MS
    check_t16x64(2 * F, H)
    check_t16x64(H, F)
    for columns in (H, F):
        check_group(columns, group_size or columns)
    if dtype not in DTYPES:
        raise ValueError(f"scales are {dtype}; possible are {' and '.join(map(str, DTYPES))}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; possible are {', '.join(ACTIVATIONS)}")
    if E > MAX_EXPERTS:
        raise ValueError(f"{E} experts; at most {MAX_EXPERTS} are possible")
    expected = (
        ("gate_up", gate_up, (E, 2 * F // ROWS, H // COLUMNS, WORDS), (torch.int32,)),
        ("down", down, (E, H // ROWS, F // COLUMNS, WORDS), (torch.int32,)),
        ("gate_up_scales", gate_up_scales, (E, H // (group_size or H), 2 * F), (dtype,)),
        ("down_scales", down_scales, (E, F // (group_size or F), H), (dtype,)),
        ("hidden", hidden_MH, (len(hidden_MH), H), (dtype,)),
        ("top_k_index", index, (len(hidden_MH), index.shape[-1]), (torch.int64, torch.int32)),
        ("top_k_weights", router, index.shape, (dtype, torch.float32)),
    )
    for name, tensor, shape, dtypes in expected:
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype not in dtypes:
            raise ValueError(
                f"{name} is {list(tensor.shape)} {tensor.dtype}; with the others it has to be {list(shape)} "
                f"{' or '.join(map(str, dtypes))}"
            )
    assert all(tensor.is_contiguous() for tensor in (gate_up, gate_up_scales, down, down_scales))
    wide, float_weights = index.dtype == torch.int64, router.dtype == torch.float32
    return Experts(E, H, F, index.shape[-1], group_size, activation, dtype, wide, float_weights)


# ---- M <= 8: moe_decode.cuh ----


def decode(experts: Experts, hidden: Tensor, index: Tensor, router: Tensor, weights: tuple, y: Tensor) -> None:
    """For up to 8 tokens: bound by the weights' bytes, and by what a launch costs."""
    device, tokens = device_of(hidden), len(hidden)
    pairs = tokens * experts.slots
    gate_up, gate_up_scales, down, down_scales = weights
    first, second = (decode_plan(experts, gated, tokens, device) for gated in (True, False))
    between = hidden.new_empty(pairs, experts.width)
    parts = hidden.new_empty(pairs, second.splits, experts.hidden, dtype=torch.float32)
    # Every kernel waits for the one ahead of it before it reads what that one wrote: all may start early.
    early = device.has_clusters
    run(first, device, [hidden, gate_up, gate_up_scales, index, router, between, pairs], programmatic=early)
    run(second, device, [between, down, down_scales, index, router, parts, pairs], programmatic=early)
    run(sum_plan(experts, second.splits, tokens), device, [parts, index, y, tokens], programmatic=early)


@functools.cache
def decode_plan(experts: Experts, gated: bool, tokens: int, device: Device) -> Plan:
    """A block for 16 rows of an expert and, of `down`, for up to 64 slices of 64 columns, which its warps share."""
    constants = experts.constants(gated)
    shape = dict(constants)
    rows, columns = shape["N"], shape["K"]
    unit = 2 if shape["GROUP"] == 128 < columns else 1  # slices in a group
    slices = columns // COLUMNS
    splits = 1 if gated else _ceil(slices, SPLIT_SLICES)
    share = _round_up(_ceil(slices, splits), unit)
    warps = min(8, max(1, _ceil(share, RING), min(4, share // 4)))
    own = _round_up(_ceil(share, warps), unit)
    warps, depth = _ceil(share, own), min(own, RING)
    bucket = 1 << (tokens - 1).bit_length()
    shared = bucket * decode_shared(share, warps)
    while shared > device.shared_per_block and bucket > 1:  # several blocks then share the tokens of an expert
        bucket //= 2
        shared = bucket * decode_shared(share, warps)
    if shared > device.shared_per_block:
        raise ValueError(f"a row of {columns} does not fit into the shared memory of {device}")
    own_constants = (("TOKENS", bucket), ("WARPS", warps), ("DEPTH", depth), ("SPLITS", splits))
    kernel = Kernel("moe_decode.cuh", "moe_decode", constants + own_constants)
    grid = rows // ROWS * splits * tokens * experts.slots
    return Plan(kernel, grid, 32 * warps, shared, splits=splits)


def decode_shared(share: int, warps: int) -> int:
    """Bytes for each token: a row of x, the warps' sums, and which pair it is."""
    return 2 * (share * COLUMNS + 8) + 4 * 20 * warps + 4


def sum_plan(experts: Experts, splits: int, tokens: int) -> Plan:
    """Four columns a thread."""
    constants = (*experts.pair_constants, ("N", experts.hidden), ("SPLITS", splits))
    return Plan(Kernel("moe_sum.cuh", "moe_sum", constants), _ceil(tokens * experts.hidden // 4, 128), 128)


# ---- M > 8: moe_route.cuh, moe_grouped.cuh ----


def grouped(experts: Experts, hidden: Tensor, index: Tensor, router: Tensor, weights: tuple, y: Tensor) -> None:
    """For more tokens: pairs are put in the order of their experts first."""
    device, tokens = device_of(hidden), len(hidden)
    pairs, block = tokens * experts.slots, block_tokens(experts, tokens)
    blocks = most_blocks(experts, pairs, block)
    gate_up, gate_up_scales, down, down_scales = weights
    order = index.new_empty(blocks, block, dtype=torch.int32)
    owners = index.new_empty(blocks, dtype=torch.int32)
    between = hidden.new_empty(pairs, experts.width)
    parts = hidden.new_empty(pairs, experts.hidden, dtype=torch.float32)
    first, second = (grouped_plan(experts, gated, blocks, block, device) for gated in (True, False))
    early = device.has_clusters  # as in `decode`
    run(route_plan(experts, block), device, [index, order, owners, pairs, blocks], programmatic=early)
    args = [gate_up, gate_up_scales, order, owners, router, between, blocks]
    run(first, device, [hidden, *args], programmatic=early)
    args = [down, down_scales, order, owners, router, parts, blocks]
    run(second, device, [between, *args], programmatic=early)
    run(sum_plan(experts, 1, tokens), device, [parts, index, y, tokens], programmatic=early)


def block_tokens(experts: Experts, tokens: int) -> int:
    """Pairs in a block: enough that most experts need one block, few enough that little is computed for nothing."""
    average = tokens * experts.slots / experts.num_experts
    return 8 if average <= 4 else 16 if average <= 12 else 32 if average <= 32 else 64


def most_blocks(experts: Experts, pairs: int, block: int) -> int:
    """Whatever the router says: every expert that has pairs rounds up once."""
    return (pairs + min(experts.num_experts, pairs) * (block - 1)) // block


def route_plan(experts: Experts, block: int) -> Plan:
    constants = (*experts.pair_constants, ("TOKENS", block))
    return Plan(Kernel("moe_route.cuh", "moe_route", constants), 1, 1024, shared=8 * experts.num_experts)


@functools.cache
def grouped_plan(experts: Experts, gated: bool, blocks: int, block: int, device: Device) -> Plan:
    """Eight warps side by side, or four where eight would have more rows than the weight."""
    constants = experts.constants(gated)
    tiles = dict(constants)["N"] // ROWS
    shapes = GROUPED_SMALL if experts.group_size in (32, 64) else GROUPED
    row_tiles, depth, resident = shapes[block]
    warps = min((8, 4), key=lambda warps: _round_up(tiles, warps * row_tiles))
    own = (
        ("TOKENS", block),
        ("WARPS", warps),
        ("ROW_TILES", row_tiles),
        ("DEPTH", depth),
        ("STAGES", STAGES),
        ("RESIDENT", resident // warps),
    )
    shared = block * (STAGES * 2 * (CHUNK + 8) + 4)
    if shared > device.shared_per_block:
        raise ValueError(f"{block} tokens need {shared} bytes of shared memory; {device} has too few")
    grid = blocks * _ceil(tiles, warps * row_tiles)
    return Plan(Kernel("moe_grouped.cuh", "moe_grouped", constants + own), grid, 32 * warps, shared)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _round_up(a: int, b: int) -> int:
    return _ceil(a, b) * b
