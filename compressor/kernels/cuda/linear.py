"""Linear layers with four-bit weights on a GPU: which kernel for which number of tokens, and how it is launched.

M tokens, N output features, K input features. Weights are T16x64 (layouts.py), scales `[K / group, N]` in x's dtype,
zeros `[K / group, N]` int8 or None; a group as long as the row is one scale a row. Plans are pure functions of shapes
and device; calls make a plan and launch it.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.kernels.cuda.build import Kernel
from compressor.kernels.cuda.launch import Device, device_of, launch
from compressor.kernels.layouts import COLUMNS, ROWS, WORDS, check_group, check_t16x64

GEMV_TOKENS = 8  # one column block of the tensor core instruction
DTYPES = (torch.bfloat16, torch.float16)
MAX_SPLITS = 8  # blocks of a cluster
RING = 8  # loads that a warp has under way, of 512 bytes
FULL_RING = 8 * RING  # on a multiprocessor: the 32 KB that hide the memory's latency (kernels.md, 7)


@dataclass(frozen=True)
class Weight:
    """The shape of a four-bit weight, and how it is scaled; `dtype` is also that of activations."""

    rows: int
    columns: int
    group_size: int
    zeros: bool
    dtype: torch.dtype

    @property
    def constants(self) -> tuple[tuple[str, int], ...]:
        bf16 = int(self.dtype == torch.bfloat16)
        return (
            ("BF16", bf16),
            ("N", self.rows),
            ("K", self.columns),
            ("GROUP", self.group_size),
            ("ZEROS", int(self.zeros)),
        )


@dataclass(frozen=True)
class Plan:
    """A launch: `grid` in blocks, `shared` in bytes. `splits` > 1 without a cluster: float32 parts to be summed."""

    kernel: Kernel
    grid: int
    block: int
    shared: int = 0
    cluster: int = 1
    splits: int = 1


def int4_linear_cuda(x_MK: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int) -> Tensor:
    """x times the transposed four-bit weight, `[M, N]` in x's dtype; sums in float32, the same bits each time."""
    weight = weight_of(packed, scales, zeros, group_size)
    if x_MK.dtype != weight.dtype or x_MK.shape[1:] != (weight.columns,):
        raise ValueError(
            f"x is {list(x_MK.shape)} {x_MK.dtype}; "
            f"this weight takes [M, {weight.columns}] {weight.dtype}, the dtype of its scales"
        )
    if not x_MK.device == packed.device == scales.device:
        raise ValueError(f"x is on {x_MK.device}, the weight on {packed.device}, its scales on {scales.device}")
    x_MK = aligned(x_MK)
    if 0 < len(x_MK) <= GEMV_TOKENS:
        return gemv(x_MK, packed, scales, zeros, weight)
    from compressor.kernels.cuda import gemm  # which stands on this module

    if len(x_MK) and gemm.takes(len(x_MK), device_of(x_MK)):
        return gemm.gemm(x_MK, packed, scales, zeros, weight)
    return dense_linear(x_MK, packed, scales, zeros, weight)


def int4_dequantize_cuda(packed: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int) -> Tensor:
    """The dense weight `[N, K]` in the scales' dtype, each number rounded once."""
    weight = weight_of(packed, scales, zeros, group_size)
    dense = scales.new_empty(weight.rows, weight.columns)
    dequantize_rows(packed, scales, zeros, weight, dense, 0)
    return dense


def int4_pack_cuda(codes_NK: Tensor) -> Tensor:
    """Codes from -8 to 7 (int8) `[N, K]` to T16x64: `pack_t16x64` in one pass."""
    rows, columns = codes_NK.shape
    check_t16x64(rows, columns)
    assert codes_NK.dtype == torch.int8, codes_NK.dtype
    packed = codes_NK.new_empty(rows // ROWS, columns // COLUMNS, WORDS, dtype=torch.int32)
    device = device_of(codes_NK)
    run(pack_plan("pack", rows, columns, device), device, [aligned(codes_NK), packed])
    return packed


def int4_unpack_cuda(packed: Tensor) -> Tensor:
    """T16x64 back to codes (int8) `[N, K]`: `unpack_t16x64` in one pass."""
    rows, columns = packed.shape[0] * ROWS, packed.shape[1] * COLUMNS
    codes = packed.new_empty(rows, columns, dtype=torch.int8)
    device = device_of(packed)
    run(pack_plan("unpack", rows, columns, device), device, [packed, codes])
    return codes


def weight_of(packed: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int) -> Weight:
    """Read the shape off the tensors, and refuse what no kernel takes."""
    assert all(tensor.is_contiguous() for tensor in (packed, scales, zeros) if tensor is not None)
    zeros_shape = None if zeros is None else zeros.shape
    return _weight(packed.shape, scales.shape, zeros_shape, scales.dtype, group_size)


@functools.cache
def _weight(packed: torch.Size, scales: torch.Size, zeros: torch.Size | None, dtype, group_size: int) -> Weight:
    """From shapes alone, so that it is worked out once for each."""
    rows, columns = packed[0] * ROWS, packed[1] * COLUMNS
    check_t16x64(rows, columns)
    check_group(columns, group_size)
    if dtype not in DTYPES:
        raise ValueError(f"scales are {dtype}; possible are {' and '.join(map(str, DTYPES))}")
    expected = (columns // group_size, rows)
    for name, shape in (("scales", scales), ("zeros", zeros)):
        if shape is not None and shape != expected:
            raise ValueError(f"{name} are {list(shape)}; groups of {group_size} need {list(expected)}")
    return Weight(rows, columns, group_size, zeros is not None, dtype)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that is contiguous and begins at a multiple of 16 bytes, as 16-byte loads need."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def run(plan: Plan, device: Device, args: list, *, programmatic: bool = False) -> None:
    """Launch a plan."""
    launch(
        plan.kernel,
        device,
        plan.grid,
        plan.block,
        args,
        shared=plan.shared,
        cluster=plan.cluster,
        programmatic=programmatic,
    )


# ---- M <= 8: w4a16_gemv.cuh ----


def gemv(x_MK: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, weight: Weight) -> Tensor:
    """For up to 8 tokens: bound by the weight's bytes."""
    device, tokens = device_of(x_MK), len(x_MK)
    plan = gemv_plan(weight, tokens, device)
    y = x_MK.new_empty(tokens, weight.rows)
    parts = y
    if plan.splits > 1 and plan.cluster == 1:
        parts = y.new_empty(plan.splits, *y.shape, dtype=torch.float32)
    # The kernel waits for the one ahead of it before it reads or writes anything: it may start early.
    args = [x_MK, packed, scales, 0 if zeros is None else zeros, parts, tokens]
    run(plan, device, args, programmatic=device.has_clusters)
    if parts is not y:
        run(sum_plan(weight.dtype, plan.splits, y.numel()), device, [parts, y, y.numel()])
    return y


@functools.cache
def gemv_plan(weight: Weight, tokens: int, device: Device) -> Plan:
    """Rows of the weight to blocks, K to warps, and to blocks as well where rows are few or x is long."""
    bucket = 1 << (tokens - 1).bit_length()
    splits, shape = 1, _gemv_shape(weight, bucket, 1, device)
    while splits < MAX_SPLITS:
        finer = _gemv_shape(weight, bucket, splits * 2, device)
        starved = shape is None or (shape.in_flight < FULL_RING and finer and finer.in_flight > shape.in_flight)
        # Blocks for idle multiprocessors, if each warp still has a whole ring of loads.
        idle = weight.rows // ROWS * splits * 2 <= device.sm_count and finer and finer.own >= RING
        if not starved and not idle:
            break
        splits, shape = splits * 2, finer
    if shape is None:
        raise ValueError(f"{bucket} rows of {weight.columns} do not fit into the shared memory of {device}")
    cluster = device.has_clusters and splits > 1
    constants = (
        *weight.constants,
        ("TOKENS", bucket),
        ("WARPS", shape.warps),
        ("DEPTH", shape.depth),
        ("SPLITS", splits),
        ("CLUSTER", int(cluster)),
    )
    slots = max(1, device.sm_count * shape.resident // splits)
    return Plan(
        kernel=Kernel("w4a16_gemv.cuh", "w4a16_gemv", constants),
        grid=min(weight.rows // ROWS, slots) * splits,
        block=32 * shape.warps,
        shared=shape.shared,
        cluster=splits if cluster else 1,
        splits=splits,
    )


@dataclass(frozen=True)
class _GemvShape:
    warps: int
    own: int  # slices of 64 columns that a warp sums
    depth: int  # slices that a warp loads ahead
    shared: int
    resident: int  # blocks that fit on a multiprocessor

    @property
    def in_flight(self) -> int:
        """Loads of 512 bytes under way on a multiprocessor."""
        return self.resident * self.warps * self.depth


def _gemv_shape(weight: Weight, bucket: int, splits: int, device: Device) -> _GemvShape | None:
    """The number of warps that keeps most loads under way; None if x does not fit into shared memory."""
    unit = 2 if weight.group_size == 128 < weight.columns else 1  # slices in a group
    share = _round_up(_ceil(weight.columns // COLUMNS, splits), unit)
    clustered = device.has_clusters and splits > 1
    blocks = _ceil(weight.rows // ROWS * splits, device.sm_count)  # there are for each multiprocessor
    shapes = []
    for most in (8, 4, 2, 1, 16):
        own = _round_up(_ceil(share, most), unit)
        warps = _ceil(share, own)
        sums = warps * bucket * 20 + (splits * bucket * 16 if clustered else 0)
        shared = bucket * (share * COLUMNS + 8) * 2 + 4 * 2 * sums
        if shared > device.shared_per_block:
            continue
        fit = (device.shared_per_block + 1024) // (shared + 1024)
        shapes.append(_GemvShape(warps, own, _depth(own, unit), shared, max(1, min(16 // warps, fit, blocks))))
    return max(shapes, key=lambda shape: shape.in_flight, default=None)


def _depth(own: int, unit: int) -> int:
    """Loads ahead: a ring or nearly, such that whole turns of it waste least."""
    depths = [depth for depth in (RING, RING - 1, RING - 2) if depth % unit == 0]
    return own if own <= RING else min(depths, key=lambda depth: _round_up(own, depth))


def sum_plan(dtype: torch.dtype, splits: int, count: int) -> Plan:
    """Sums of float32 parts."""
    constants = (("BF16", int(dtype == torch.bfloat16)), ("SPLITS", splits))
    return Plan(Kernel("sum_splits.cuh", "sum_splits", constants), grid=_ceil(count, 256), block=256)


# ---- many tokens: dequantize.cuh, and the product of dense matrices ----


def dense_linear(x_MK: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, weight: Weight) -> Tensor:
    """For many tokens: dequantized rows, as many as stay in L2, times x, until all are done."""
    y = x_MK.new_empty(len(x_MK), weight.rows)
    rows = chunk_rows(weight, device_of(x_MK))
    scratch = x_MK.new_empty(rows, weight.columns)
    for begin in range(0, weight.rows, rows):
        dense = scratch[: weight.rows - begin]
        dequantize_rows(packed, scales, zeros, weight, dense, begin)
        torch.mm(x_MK, dense.T, out=y[:, begin : begin + len(dense)])
    return y


def chunk_rows(weight: Weight, device: Device) -> int:
    """Rows that are dequantized at a time: half of L2, in whole tiles of the matrix product."""
    fitting = device.l2_bytes // 2 // (2 * weight.columns) // 256 * 256
    return min(weight.rows, max(256, fitting))


def dequantize_rows(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, weight: Weight, dense: Tensor, begin: int
) -> None:
    """Write the rows from `begin` on into `dense`."""
    device = device_of(packed)
    args = [packed, scales, 0 if zeros is None else zeros, dense, begin, len(dense)]
    run(dequantize_plan(weight, len(dense), device), device, args)


def dequantize_plan(weight: Weight, rows: int, device: Device) -> Plan:
    kernel = Kernel("dequantize.cuh", "dequantize_rows", weight.constants)
    return Plan(kernel, grid=_tile_blocks(rows, weight.columns, device), block=256)


def pack_plan(name: str, rows: int, columns: int, device: Device) -> Plan:
    kernel = Kernel("pack.cuh", name, (("BF16", 1), ("N", rows), ("K", columns)))
    return Plan(kernel, grid=_tile_blocks(rows, columns, device), block=256)


def _tile_blocks(rows: int, columns: int, device: Device) -> int:
    """Eight tiles at a time in each block, and as many blocks as run at once."""
    return min(_ceil(rows // ROWS * (columns // COLUMNS), 8), device.sm_count * 8)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _round_up(a: int, b: int) -> int:
    return _ceil(a, b) * b
