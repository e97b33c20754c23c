"""Linear layers on int8 tensor cores: activations quantized per token at run time, weights per output feature.

M tokens, N output features, K input features. Both operands are held as "K128": `[K/128, rows, 128]` int8, K padded
with zeros to whole blocks of 128, the eight 16-byte chunks of a row XORed with row % 8. Any 8 rows of a block are then
1024 contiguous bytes that go to shared memory as they are, without tensor maps (csrc/w8a8.cuh). Sums are exact; an
output is `sum * column scale * row scale + bias`, each step rounded to float32, so that every kernel and the definition
in torch give the same bits.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.kernels.cuda.build import Kernel
from compressor.kernels.cuda.launch import Device, device_of
from compressor.kernels.cuda.linear import Plan, aligned, run
from compressor.kernels.ops import token_codes

BLOCK = 128  # codes of K in a row of the layout
CHUNK = 16
STREAM_TOKENS = 32  # up to here the weights' bytes decide, beyond it a tile of tokens shares them
MAX_FEATURES = 65536  # of a row that `quantize_tokens.cuh` keeps in registers
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tile:
    """What one block computes, how many blocks a multiprocessor holds, and speed beside the largest tile (a model)."""

    rows: int
    columns: int
    stages: int
    blocks: int
    speed: float
    warps: tuple[int, int] = (0, 0)  # mma.sync only: along rows and columns

    @property
    def operand_bytes(self) -> int:
        return self.stages * (self.rows + self.columns) * BLOCK


WGMMA_TILES = (
    Tile(128, 256, 4, 1, 1.0),
    Tile(128, 128, 3, 2, 0.85),
    Tile(64, 128, 4, 2, 0.6),
    Tile(64, 64, 6, 2, 0.45),
)
MMA_TILES = (
    Tile(128, 256, 3, 1, 1.0, (2, 4)),
    Tile(128, 128, 3, 1, 0.85, (2, 2)),
    Tile(64, 64, 3, 2, 0.5, (2, 2)),
)


def tile_codes(codes_NK: Tensor) -> Tensor:
    """Codes `[N, K]` (int8) in the layout K128, `[K/128, N, 128]` with K rounded up to whole blocks."""
    n, k = codes_NK.shape
    if codes_NK.dtype != torch.int8 or n % 8 or k % CHUNK:
        raise ValueError(
            f"codes are {codes_NK.dtype} {n} x {k}; K128 takes int8, output features in eights and input features in "
            f"sixteens (csrc/w8a8.cuh)"
        )
    padded = torch.nn.functional.pad(codes_NK, (0, -k % BLOCK))
    chunks = padded.view(n, -1, BLOCK // CHUNK, CHUNK).transpose(0, 1)
    return chunks.gather(2, _chunk_order(chunks)).reshape(-1, n, BLOCK)


def untile_codes(tiles: Tensor, in_features: int) -> Tensor:
    """The codes `[rows, in_features]` back out of K128."""
    chunks = tiles.view(*tiles.shape[:2], BLOCK // CHUNK, CHUNK)
    rows = chunks.gather(2, _chunk_order(chunks)).transpose(0, 1).reshape(tiles.shape[1], -1)
    return rows[:, :in_features].contiguous()


def _chunk_order(chunks: Tensor) -> Tensor:
    """For each row the chunk that lies at each place; the XOR is its own inverse."""
    rows = torch.arange(chunks.shape[1], device=chunks.device)[:, None] % 8
    order = torch.arange(BLOCK // CHUNK, device=chunks.device) ^ rows
    return order[None, :, :, None].expand_as(chunks)


def w8a8_linear(x_MK: Tensor, tiles: Tensor, scales_N: Tensor, bias_N: Tensor | None) -> Tensor:
    """Tokens as `ops.token_codes` rounds them times the weight: the definition, which the kernels give bit by bit."""
    codes, row_scales = token_codes(x_MK)
    sums = (codes.double() @ untile_codes(tiles, x_MK.shape[-1]).double().T).float()  # whole numbers: exact in float64
    result = sums * scales_N * row_scales
    if bias_N is not None:
        result = result + bias_N.float()
    return result.to(x_MK.dtype)


def w8a8_linear_cuda(x: Tensor, tiles: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """x `[..., K]` (bfloat16 or float16) times the transposed int8 weight, plus bias, in x's dtype.

    `tiles` from `tile_codes`, scales `[N]` float32, bias `[N]` in x's dtype. Two launches on the current stream: the
    tokens' codes, then the product, which starts to fetch weights while the first still runs.
    """
    _check(x, tiles, scales, bias)
    rows = aligned(x.reshape(-1, x.shape[-1]))
    out = x.new_empty(*x.shape[:-1], tiles.shape[1])
    if rows.shape[0] == 0:
        return out
    product_cuda(*quantize_tokens_cuda(rows), tiles, scales, bias, out.view(-1, tiles.shape[1]))
    return out


def product_cuda(
    codes: Tensor, row_scales: Tensor, tiles: Tensor, scales: Tensor, bias: Tensor | None, out_MN: Tensor
) -> None:
    """Of tokens that are quantized already, into `out_MN`."""
    (m, n), device = out_MN.shape, device_of(out_MN)
    plan = linear_plan(m, n, tiles.shape[0] * BLOCK, out_MN.dtype, bias is not None, device)
    args = [codes, row_scales, tiles, scales, 0 if bias is None else bias, out_MN, m]
    run(plan, device, args, programmatic=device.has_clusters)


def quantize_tokens_cuda(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (K128, M rounded up to 8; added rows are not set) and scales `[M]` of contiguous, aligned rows."""
    m, k = x_MK.shape
    codes = x_MK.new_empty(-(-k // BLOCK), -(-m // 8) * 8, BLOCK, dtype=torch.int8)
    scales = x_MK.new_empty(m, dtype=torch.float32)
    plan = quantize_plan(m, k, x_MK.dtype)
    run(plan, device_of(x_MK), [x_MK, codes, scales, m])
    return codes, scales


@functools.cache
def quantize_plan(tokens: int, features: int, dtype: torch.dtype) -> Plan:
    """One block a token; a thread keeps 32 numbers of the row where 1024 threads suffice for that."""
    threads = min(1024, -(-features // (32 * 32)) * 32)
    constants = (("COLUMNS", features), ("THREADS", threads), ("BF16", int(dtype == torch.bfloat16)))
    return Plan(Kernel("quantize_tokens.cuh", "quantize_tokens", constants), tokens, threads, shared=threads // 8)


@functools.cache
def linear_plan(tokens: int, n: int, k: int, dtype: torch.dtype, bias: bool, device: Device) -> Plan:
    """The kernel and tile for M tokens; k is the padded one."""
    constants = (("K", k), ("N", n), ("BF16", int(dtype == torch.bfloat16)), ("BIAS", int(bias)))
    if tokens <= STREAM_TOKENS:
        return _stream_plan(tokens, n, k, constants, device)
    if device.arch == "sm_90a":
        return _wgmma_plan(tokens, n, constants, device)
    return _mma_plan(tokens, n, constants, device)


def _stream_plan(tokens: int, n: int, k: int, constants: tuple, device: Device) -> Plan:
    """Few tokens: 32 weight rows a block where that still fills the device and tokens are worth sharing, else 16."""
    padded = -(-tokens // 8) * 8
    rows = 32 if padded > 8 and n >= 32 * device.sm_count else 16
    warps = min(8, k // BLOCK)
    unroll = {8: 4, 16: 32 // rows}.get(padded, 1)  # loads in flight; more do not fit 128 registers
    own = (("ROWS", rows), ("TOKENS", padded), ("WARPS", warps), ("UNROLL", unroll))
    shared = 4 * warps * padded * rows
    return Plan(Kernel("w8a8_stream.cuh", "w8a8_stream", constants + own), -(-n // rows), 32 * warps, shared)


def _wgmma_plan(tokens: int, n: int, constants: tuple, device: Device) -> Plan:
    """Hopper: two blocks, one below the other, share the weights' copies unless that computes many rows for nothing."""
    tile = best_tile(WGMMA_TILES, tokens, n, device)
    tiles_m, tiles_n = -(-tokens // tile.rows), -(-n // tile.columns)
    cluster = 2 if tiles_m % 2 == 0 or tiles_m > 8 else 1
    own = (
        ("BM", tile.rows),
        ("BN", tile.columns),
        ("STAGES", tile.stages),
        ("CLUSTER", cluster),
        ("BLOCKS", tile.blocks),
    )
    # 1024: the operands start at a multiple of it; 8 a column: scale and bias; 16 a stage: two barriers
    shared = 1024 + tile.operand_bytes + 8 * tile.columns + 16 * tile.stages
    grid = -(-tiles_m // cluster) * cluster * tiles_n
    return Plan(Kernel("w8a8_wgmma.cuh", "w8a8_wgmma", constants + own), grid, 2 * tile.rows + 32, shared, cluster)


def _mma_plan(tokens: int, n: int, constants: tuple, device: Device) -> Plan:
    fitting = [tile for tile in MMA_TILES if tile.operand_bytes + 8 * tile.columns <= device.shared_per_block]
    tile = best_tile(fitting, tokens, n, device)
    down, across = tile.warps
    own = (
        ("WARP_M", tile.rows // down),
        ("WARP_N", tile.columns // across),
        ("WARPS_M", down),
        ("WARPS_N", across),
        ("STAGES", tile.stages),
        ("BLOCKS", tile.blocks),
    )
    grid = -(-tokens // tile.rows) * -(-n // tile.columns)
    shared = tile.operand_bytes + 8 * tile.columns
    return Plan(Kernel("w8a8_mma.cuh", "w8a8_mma", constants + own), grid, 32 * down * across, shared)


def best_tile(tiles: tuple[Tile, ...] | list[Tile], tokens: int, n: int, device: Device) -> Tile:
    """The tile with the most useful outputs per wave of the device, weighted with its speed."""

    def worth(tile: Tile) -> float:
        count = -(-tokens // tile.rows) * -(-n // tile.columns)
        at_once = device.sm_count * tile.blocks
        return tokens * n * tile.speed / (-(-count // at_once) * at_once * tile.rows * tile.columns)

    return max(tiles, key=worth)


def _check(x: Tensor, tiles: Tensor, scales: Tensor, bias: Tensor | None) -> None:
    k, n = x.shape[-1], tiles.shape[1]
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}; the W8A8 kernels take bfloat16 and float16")
    if k % CHUNK or k > MAX_FEATURES:
        raise ValueError(f"x has {k} features; the W8A8 kernels take multiples of {CHUNK} up to {MAX_FEATURES}")
    if tiles.dtype != torch.int8 or tiles.shape != (-(-k // BLOCK), n, BLOCK) or n % 8:
        raise ValueError(
            f"weight codes are {tiles.dtype} {tuple(tiles.shape)}; for {k} features they are int8 "
            f"[{-(-k // BLOCK)}, N, {BLOCK}] with N in eights, as `tile_codes` gives them"
        )
    if scales.dtype != torch.float32 or scales.shape != (n,):
        raise ValueError(f"scales are {scales.dtype} {tuple(scales.shape)}; they are float32 [{n}]")
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (n,)):
        raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}; it is {x.dtype} [{n}]")
    for name, tensor in (("weight codes", tiles), ("scales", scales), ("bias", bias)):
        if tensor is not None and (tensor.device != x.device or not tensor.is_contiguous()):
            raise ValueError(f"{name} must be contiguous and on {x.device}, where x is")
    if tiles.data_ptr() % CHUNK:
        raise ValueError(f"weight codes begin at an address that is not a multiple of {CHUNK} bytes; clone them")
