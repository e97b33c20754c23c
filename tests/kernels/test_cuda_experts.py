"""Four-bit experts on a GPU, without one: plans, and the kernels run on the host from their source."""

from dataclasses import replace

import pytest
import torch

from compressor.kernels.cuda import experts, linear
from compressor.kernels.cuda.experts import Experts, decode_plan, grouped_plan, most_blocks, route_plan
from compressor.kernels.cuda.launch import Device
from compressor.kernels.layouts import unpack_t16x64
from tests.kernels.host.simt import needs_gxx, run_on_host

BF16, FP16 = torch.bfloat16, torch.float16
H100 = Device(index=0, arch="sm_90a", sm_count=132, shared_per_block=232448, l2_bytes=50 << 20)
RTX5090 = Device(index=0, arch="sm_120", sm_count=170, shared_per_block=101376, l2_bytes=96 << 20)
TIGHT = Device(index=0, arch="sm_80", sm_count=8, shared_per_block=2048, l2_bytes=1 << 20)
# ||y - reference|| / ||reference||, reference in float64 on the same weights: what lies between the linears is rounded,
# and the output.
TOLERANCE = {BF16: 3e-3, FP16: 5e-4}

QWEN = Experts(128, 2048, 768, 8, 128, "silu", BF16, wide=True, float_weights=False)
MIXTRAL = Experts(8, 4096, 14336, 2, 128, "silu", BF16, wide=True, float_weights=False)
DEEPSEEK = Experts(256, 7168, 256, 8, 128, "silu", BF16, wide=True, float_weights=True)
slow = pytest.mark.slow


# ---- plans ----


@pytest.mark.parametrize("device", [H100, RTX5090], ids=lambda device: device.arch)
@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("shape", [QWEN, MIXTRAL, DEEPSEEK], ids=["qwen", "mixtral", "deepseek"])
def test_decode_plans_are_ones_that_the_device_can_run(shape, tokens, device):
    """Every slice of K belongs to one warp of one block, and x and the sums fit."""
    for gated in (True, False):
        plan = decode_plan(shape, gated, tokens, device)
        at = dict(plan.kernel.constants)
        slices, unit = at["K"] // 64, 2 if at["GROUP"] == 128 else 1
        assert plan.block == 32 * at["WARPS"] <= 256
        assert plan.shared <= device.shared_per_block
        assert plan.grid == at["N"] // 16 * at["SPLITS"] * tokens * shape.slots
        share = -(-slices // at["SPLITS"] // unit) * unit
        own = -(-share // at["WARPS"] // unit) * unit
        assert (at["SPLITS"] - 1) * share < slices <= at["SPLITS"] * share  # nobody is left over
        assert (at["WARPS"] - 1) * own < share <= at["WARPS"] * own
        assert at["DEPTH"] <= 8


def test_long_rows_of_down_are_shared_by_blocks():
    """14,336 columns are four blocks' work; gate and up stay whole, since the activation needs their sums."""
    assert decode_plan(MIXTRAL, False, 1, H100).splits == 4
    assert decode_plan(MIXTRAL, True, 1, H100).splits == 1


def test_where_x_does_not_fit_fewer_tokens_share_a_block():
    """Eight rows of 7,168 do not fit into 99 KB, four do."""
    assert dict(decode_plan(DEEPSEEK, True, 8, H100).kernel.constants)["TOKENS"] == 8
    assert dict(decode_plan(DEEPSEEK, True, 8, RTX5090).kernel.constants)["TOKENS"] == 4
    with pytest.raises(ValueError, match="a row of 4096 does not fit into the shared memory"):
        decode_plan(MIXTRAL, True, 1, TIGHT)


@pytest.mark.parametrize(("tokens", "block"), [(16, 8), (64, 8), (128, 16), (512, 32), (4096, 64)])
def test_blocks_grow_with_what_an_expert_gets(tokens, block):
    """Qwen3-30B-A3B: 16 tokens are one for each expert, 4,096 are 256."""
    assert experts.block_tokens(QWEN, tokens) == block


@pytest.mark.parametrize("pairs", [1, 7, 8, 100, 1000])
def test_blocks_suffice_for_the_worst_routing(pairs):
    """As many experts as there are with one pair more than whole blocks; and everything to one expert."""
    for num_experts, block in ((4, 8), (128, 16)):
        bound = most_blocks(replace(QWEN, num_experts=num_experts), pairs, block)
        singles = min(num_experts, pairs)
        assert bound >= singles + (pairs - singles) // block
        assert bound >= -(-pairs // block)
        assert bound <= pairs


@pytest.mark.parametrize("block", [8, 16, 32, 64])
def test_grouped_plans_cover_all_rows_of_the_weight(block):
    """Rows of a block times blocks; shared memory for four chunks of x."""
    for shape in (QWEN, MIXTRAL, replace(DEEPSEEK, group_size=64)):
        for gated in (True, False):
            plan = grouped_plan(shape, gated, 10, block, RTX5090)
            at = dict(plan.kernel.constants)
            rows = 16 * at["WARPS"] * at["ROW_TILES"]
            assert at["N"] <= plan.grid // 10 * rows < at["N"] + rows
            assert plan.grid % 10 == 0
            assert plan.shared == 4 * block * 272 + 4 * block <= RTX5090.shared_per_block


# ---- the layout ----


def test_gate_and_up_alternate_every_eight_rows():
    """Rows 8..15 of a tile belong to rows 0..7; scales go the same way."""
    codes = torch.randint(-8, 8, (2, 32, 64), dtype=torch.int8)
    scales = torch.arange(64.0).view(2, 32, 1)
    packed, turned = experts.pack_gate_up(codes, scales)
    assert packed.shape == (2, 2, 1, 128)
    order = [*range(8), *range(16, 24), *range(8, 16), *range(24, 32)]
    assert torch.equal(unpack_t16x64(packed[1]), codes[1, order])
    assert turned[1, 0].tolist() == scales[1, order, 0].tolist()
    with pytest.raises(ValueError, match="gate and up have 24 rows together"):
        experts.pack_gate_up(codes[:, :24], scales[:, :24])


# ---- the kernels themselves, on the host ----


@pytest.fixture
def host(monkeypatch):
    """Launches go to the host, for an H100; memory begins as NaN."""

    def on_host(kernel, device, grid, block, args, *, shared, cluster, programmatic):
        run_on_host(kernel, grid, block, args, shared=shared, cluster=cluster)

    empty = torch.Tensor.new_empty

    def poisoned(tensor, *shape, dtype=None):
        found = empty(tensor, *shape, dtype=dtype or tensor.dtype)
        return found.fill_(torch.nan if found.is_floating_point() else -1000)

    monkeypatch.setattr(experts, "device_of", lambda tensor: H100)
    monkeypatch.setattr(linear, "launch", on_host)
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **_: torch.full_like(tensor, torch.nan))


def problem(shape, index, seed=0):
    """Arguments of the op for an index `[M, S]`, and the result in float64 from the definition."""
    generator = torch.Generator().manual_seed(seed)
    E, H, F, dtype = shape.num_experts, shape.hidden, shape.width, shape.dtype
    weights, dense = [], []
    for rows, columns, pack in ((2 * F, H, experts.pack_gate_up), (H, F, experts.pack_experts)):
        group = shape.group_size or columns
        codes = torch.randint(-8, 8, (E, rows, columns), generator=generator, dtype=torch.int8)
        scales = (torch.rand(E, rows, columns // group, generator=generator) / 64 + 0.01).to(dtype)
        weights += pack(codes, scales)
        dense.append(codes.double() * scales.double().repeat_interleave(group, 2))
    x = torch.randn(len(index), H, generator=generator).to(dtype)
    router = torch.rand(index.shape, generator=generator).to(torch.float32 if shape.float_weights else dtype)
    args = (x, index.to(torch.int64 if shape.wide else torch.int32), router, *weights)
    reference = torch.zeros(x.shape, dtype=torch.float64)
    for token, slot in torch.cartesian_prod(*map(torch.arange, index.shape)):
        expert = int(index[token, slot])
        if 0 <= expert < E:
            gate, up = (dense[0][expert] @ x[token].double()).chunk(2)
            gelu = gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) / 2
            inner = (gelu if shape.activation == "gelu_tanh" else gate / (1 + torch.exp(-gate))) * up
            reference[token] += router[token, slot].double() * (dense[1][expert] @ inner)
    return (*args, shape.group_size, shape.activation), reference


def relative_error(y, reference) -> float:
    return float((y.double() - reference).norm() / reference.norm())


def routed(tokens, slots, num_experts, seed=1):
    """Different experts for each token, as a router gives them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(num_experts, generator=generator)[:slots] for _ in range(tokens)])


def check(shape, index):
    """Right, and the same bits again."""
    args, reference = problem(shape, index)
    y = experts.int4_experts_cuda(*args)
    assert relative_error(y, reference) < TOLERANCE[shape.dtype]
    assert torch.equal(experts.int4_experts_cuda(*args), y)


SMALL = Experts(4, 128, 64, 2, 64, "silu", BF16, wide=True, float_weights=False)
G128 = Experts(3, 256, 128, 2, 128, "silu", BF16, wide=False, float_weights=True)
G32 = Experts(5, 192, 128, 3, 32, "gelu_tanh", FP16, wide=False, float_weights=False)
ROWWISE = Experts(4, 64, 192, 4, None, "silu", FP16, wide=True, float_weights=True)


@needs_gxx
@pytest.mark.parametrize(
    ("shape", "tokens"),
    [
        (SMALL, 5),
        pytest.param(SMALL, 1, marks=slow),
        pytest.param(G32, 5, marks=slow),
        pytest.param(G128, 8, marks=slow),
        pytest.param(ROWWISE, 3, marks=slow),
        pytest.param(replace(SMALL, num_experts=9, slots=8), 7, marks=slow),
        pytest.param(replace(SMALL, slots=1), 2, marks=slow),
        pytest.param(Experts(1, 64, 4224, 1, 64, "silu", BF16, True, False), 1, marks=slow),  # down in two blocks
        pytest.param(Experts(2, 4672, 64, 1, 64, "silu", BF16, True, False), 1, marks=slow),  # ragged turns of the ring
    ],
)
def test_few_tokens_equal_the_definition_in_float64(host, shape, tokens):
    """Through the plan and the call that a GPU gets, from the kernels' own source."""
    check(shape, routed(tokens, shape.slots, shape.num_experts))


@needs_gxx
@pytest.mark.parametrize(
    ("shape", "tokens"),
    [
        (SMALL, 11),
        pytest.param(G32, 37, marks=slow),  # blocks of 32
        pytest.param(G128, 9, marks=slow),
        pytest.param(G128, 51, marks=slow),  # blocks of 64 with two row tiles a warp, three tokens of padding
        pytest.param(ROWWISE, 13, marks=slow),
        pytest.param(replace(ROWWISE, num_experts=9, slots=8), 10, marks=slow),
        pytest.param(Experts(2, 1344, 192, 1, 64, "silu", BF16, True, False), 9, marks=slow),  # many turns, half chunks
    ],
)
def test_many_tokens_equal_the_definition_in_float64(host, shape, tokens):
    """Routed, grouped and summed."""
    check(shape, routed(tokens, shape.slots, shape.num_experts))


@needs_gxx
@pytest.mark.parametrize("tokens", [6, pytest.param(20, marks=slow)])
def test_dropped_slots_add_nothing(host, tokens):
    """transformers marks them with E; any index that is no expert's counts as that; a token may lose all its slots."""
    index = routed(tokens, 2, 4)
    index[1], index[3, 0], index[4, 1] = 4, 4000, -1
    args, reference = problem(SMALL, index)
    y = experts.int4_experts_cuda(*args)
    assert relative_error(y, reference) < TOLERANCE[BF16]
    assert torch.equal(y[1], torch.zeros(128, dtype=BF16))


@needs_gxx
@pytest.mark.parametrize("tokens", [7, pytest.param(19, marks=slow)])
def test_all_tokens_may_go_to_one_expert(host, tokens):
    """Twice even: more pairs than a block takes, and experts without any."""
    check(SMALL, torch.full((tokens, 2), 2))


@needs_gxx
def test_no_routing_leaves_a_result_of_zeros(host):
    """All slots dropped: no expert is read, everything is written."""
    args, _ = problem(SMALL, torch.full((5, 2), 4))
    assert torch.equal(experts.int4_experts_cuda(*args), torch.zeros(5, 128, dtype=BF16))


@needs_gxx
@pytest.mark.parametrize("wide", [True, pytest.param(False, marks=slow)])
def test_routing_puts_each_pair_into_a_block_of_its_expert(wide):
    """Every pair once, only pairs of the block's expert, padding behind them, -1 for blocks that are left over."""
    shape = replace(QWEN, num_experts=37, slots=3, wide=wide)
    index = torch.randint(-2, 40, (1500,), generator=torch.Generator().manual_seed(0))
    index[index == 5] = 6  # nobody wants 5
    blocks, block = most_blocks(shape, 1500, 16), 16
    order, owners = torch.full((blocks, block), -1000, dtype=torch.int32), torch.full((blocks,), -1000).int()
    plan = route_plan(shape, block)
    args = [index if wide else index.int(), order, owners, 1500, blocks]
    run_on_host(plan.kernel, plan.grid, plan.block, args, shared=plan.shared)
    used = int((owners >= 0).sum())
    counts = torch.bincount(index[(index >= 0) & (index < 37)], minlength=37)
    assert owners[:used].tolist() == [e for e in range(37) for _ in range(-(-int(counts[e]) // block))]
    assert (owners[used:] == -1).all()
    pairs = [int(pair) for row in order[:used] for pair in row if pair >= 0]
    assert sorted(pairs) == [p for p in range(1500) if 0 <= index[p] < 37]
    for owner, row in zip(owners[:used].tolist(), order[:used].tolist(), strict=True):
        real = [pair for pair in row if pair >= 0]
        assert {int(index[pair]) for pair in real} == {owner}
        assert row == [*real, *[-1] * (block - len(real))]


def test_tensors_that_do_not_fit_together_are_refused():
    """With their shapes and dtypes."""
    (x, index, router, *weights, group, activation), _ = problem(SMALL, routed(2, 2, 4))
    with pytest.raises(ValueError, match=r"hidden is \[2, 64\] torch.bfloat16; .* \[2, 128\] torch.bfloat16"):
        experts.int4_experts_cuda(x[:, :64], index, router, *weights, group, activation)
    with pytest.raises(ValueError, match=r"gate_up_scales is \[4, 2, 128\] .* has to be \[4, 4, 128\]"):
        experts.int4_experts_cuda(x, index, router, *weights, 32, activation)
    with pytest.raises(ValueError, match=r"top_k_index is \[2, 2\] torch.float32; .* torch.int64 or torch.int32"):
        experts.int4_experts_cuda(x, index.float(), router, *weights, group, activation)
    with pytest.raises(ValueError, match="activation is 'relu'; possible are silu, gelu_tanh"):
        experts.int4_experts_cuda(x, index, router, *weights, group, "relu")
