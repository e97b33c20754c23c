"""Four-bit weights times more than eight tokens: which tile, how K is split, and the launches.

Up to 64 tokens csrc/w4a16_skinny.cuh, beyond, on Hopper, csrc/w4a16_gemm.cuh; both copy slices of 64 columns through
shared memory (csrc/w4a16_tile.cuh). Plans are pure functions of shapes and device. What they choose by is a model, in
cycles of a multiprocessor: the weight's bytes from memory, a step's bytes from L2, its products, and what a block costs
before its first product and after its last.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.kernels.cuda.build import Kernel
from compressor.kernels.cuda.launch import Device, device_of
from compressor.kernels.cuda.linear import MAX_SPLITS, Plan, Weight, aligned, run, sum_plan
from compressor.kernels.layouts import COLUMNS

SKINNY_TOKENS = 64
GEMM_TOKENS = 1024  # from here on dequantizing costs less than a slower product
MEMORY_BYTES = 13.0  # a cycle, of each multiprocessor: 3.0 TB/s of an H100 at 1.755 GHz
L2_BYTES = 30.0
BLOCK_CYCLES = 1500  # the first copies' latency, and the writing of sums
CLUSTER_CYCLES = 1500  # two barriers and the others' sums
PARTS_CYCLES = 6000  # without clusters: float32 parts, and a launch that sums them


@dataclass(frozen=True)
class Tile:
    """What a block computes, and how."""

    name: str
    tokens: int
    rows: int
    ways: int  # warps that share K: slices of a step
    threads: int
    stages: tuple[int, int]  # fewest, most
    rate: int  # products a cycle
    constants: tuple[tuple[str, int], ...]

    def slice_bytes(self, weight: Weight) -> int:
        """Operands of 64 columns: x, weights, scales and zeros."""
        parts = 2 if weight.group_size == 32 else 1
        grid = self.rows * parts * (2 * (weight.group_size < weight.columns) + weight.zeros)
        return _ceil(self.tokens * 128 + self.rows * 32 + grid, 1024) * 1024

    def shared(self, weight: Weight, stages: int) -> int:
        """Stages or sums, whichever is more, and two barriers a stage for wgmma."""
        sums = self.ways * self.tokens * (self.rows + 4) * 4
        barriers = 16 * stages if self.name == "w4a16_gemm" else 0
        return max(stages * self.ways * self.slice_bytes(weight), sums) + barriers

    def fitting_stages(self, weight: Weight, device: Device) -> int | None:
        fewest, most = self.stages
        fits = (n for n in range(most, fewest - 1, -1) if self.shared(weight, n) <= device.shared_per_block)
        return next(fits, None)

    def count(self, weight: Weight, tokens: int) -> int:
        """Tiles that make up the result."""
        return _ceil(weight.rows, self.rows) * _ceil(tokens, self.tokens)

    def cycles(self, weight: Weight, tokens: int, splits: int, device: Device) -> float:
        """What a product takes, as a model."""
        memory = weight.rows * weight.columns / 2 / (MEMORY_BYTES * device.sm_count)
        copied = self.ways * (self.tokens * 128 + self.rows * 32)
        products = self.ways * COLUMNS * self.rows * self.tokens
        steps = _ceil(_ceil(weight.columns // COLUMNS, splits), self.ways)
        waves = _ceil(self.count(weight, tokens) * splits, device.sm_count)
        working = waves * steps * max(copied / L2_BYTES, products / self.rate)
        meeting = 0 if splits == 1 else CLUSTER_CYCLES if device.has_clusters else PARTS_CYCLES
        return max(memory, working) + waves * BLOCK_CYCLES + meeting


def _skinny(tokens: int, warps_n: int) -> Tile:
    """Eight warps of 32 rows each; mma.sync gives 62 % of the tensor cores' 2048 products a cycle."""
    ways = 8 // warps_n
    constants = (("TOKENS", tokens), ("WARPS_N", warps_n), ("WARPS_K", ways))
    return Tile("w4a16_skinny", tokens, 32 * warps_n, ways, 256, (2, 5), 1280, constants)


def _gemm(tokens: int, height: int) -> Tile:
    """Two warpgroups, each `height` times 64 rows; wgmma at 80 %."""
    constants = (("TOKENS", tokens), ("HEIGHT", height))
    return Tile("w4a16_gemm", tokens, 128 * height, 1, 256, (4, 8), 1640, constants)


SKINNY_TILES = tuple(_skinny(tokens, warps_n) for tokens in (16, 32, 64) for warps_n in (8, 4, 2, 1))
GEMM_TILES = tuple(_gemm(tokens, height) for tokens in (128, 64) for height in (2, 1))


def takes(tokens: int, device: Device) -> bool:
    """Whether there is a kernel here for so many tokens, more than eight."""
    return tokens <= SKINNY_TOKENS or (tokens <= GEMM_TOKENS and device.arch == "sm_90a")


def gemm(x_MK: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, weight: Weight) -> Tensor:
    """x (aligned) times the transposed weight, `[M, N]`: the same bits each time."""
    device, tokens = device_of(x_MK), len(x_MK)
    return launch_plan(gemm_plan(weight, tokens, device), x_MK, packed, scales, zeros, weight)


def launch_plan(
    plan: Plan, x_MK: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, weight: Weight
) -> Tensor:
    """Run a plan, and the sum of its parts where it leaves them."""
    device, tokens = device_of(x_MK), len(x_MK)
    y = x_MK.new_empty(tokens, weight.rows)
    parts = y
    if plan.splits > 1 and plan.cluster == 1:
        parts = y.new_empty(plan.splits, *y.shape, dtype=torch.float32)
    # The kernel waits for the one ahead of it before it reads or writes anything: it may start early.
    args = [x_MK, packed, aligned(scales), 0 if zeros is None else aligned(zeros), parts, tokens]
    run(plan, device, args, programmatic=device.has_clusters)
    if parts is not y:
        run(sum_plan(weight.dtype, plan.splits, y.numel()), device, [parts, y, y.numel()])
    return y


@functools.cache
def gemm_plan(weight: Weight, tokens: int, device: Device) -> Plan:
    """The tile and the split of K that the model finds fastest."""
    tiles = gemm_tiles(tokens) if tokens > SKINNY_TOKENS else skinny_tiles(tokens)
    return min(plans(tiles, weight, tokens, device), key=lambda found: found[0])[1]


def skinny_tiles(tokens: int) -> list[Tile]:
    """Those of the smallest number of tokens that holds all."""
    bucket = max(16, 1 << (tokens - 1).bit_length())
    return [tile for tile in SKINNY_TILES if tile.tokens == bucket]


def gemm_tiles(tokens: int) -> list[Tile]:
    return list(GEMM_TILES)


def plans(tiles: list[Tile], weight: Weight, tokens: int, device: Device) -> Iterator[tuple[float, Plan]]:
    """All that fit, with the cycles that the model gives them."""
    for tile in tiles:
        stages = tile.fitting_stages(weight, device)
        if stages is None:
            continue
        for splits in (1, 2, 4, MAX_SPLITS):
            if splits * tile.ways > max(1, weight.columns // COLUMNS):
                continue
            plan = plan_of(tile, weight, tokens, splits, stages, device)
            yield tile.cycles(weight, tokens, splits, device), plan


def plan_of(tile: Tile, weight: Weight, tokens: int, splits: int, stages: int, device: Device) -> Plan:
    cluster = splits if device.has_clusters else 1
    own = (*tile.constants, ("STAGES", stages), ("SPLITS", splits), ("CLUSTER", int(cluster > 1)))
    return Plan(
        kernel=Kernel(f"{tile.name}.cuh", tile.name, weight.constants + own),
        grid=tile.count(weight, tokens) * splits,
        block=tile.threads,
        shared=tile.shared(weight, stages),
        cluster=cluster,
        splits=splits,
    )


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
