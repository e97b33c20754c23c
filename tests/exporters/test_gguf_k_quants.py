"""Q4_K and Q6_K, written from the format's definition and read by gguf's own dequantizer."""

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import Q4_K, dequantize, quantize

from compressor.exporters.gguf.k_quants import _fit_sub_blocks, _pack_six_bits, quantize_q4_k, quantize_q6_k


def restored(data: torch.Tensor, type: str) -> torch.Tensor:
    return torch.from_numpy(dequantize(data.numpy(), GGMLQuantizationType[type]))


def sample(kind: str, rows: int = 64, width: int = 512) -> torch.Tensor:
    """Weights as models have them, and kinds that a search can trip over."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(rows, width, generator=generator)
    return {
        "normal": normal * 0.02,
        "heavy tails": normal / torch.rand(rows, width, generator=generator).sqrt() * 0.02,
        "positive": normal.abs() + 0.1,
        "negative": -normal.abs() - 0.1,
        "sparse": normal * (torch.rand(rows, width, generator=generator) < 0.1),
        "small": normal * 1e-3,
    }[kind]


KINDS = ["normal", "heavy tails", "positive", "negative", "sparse", "small"]


def test_q4_k_keeps_a_grid_that_it_can_hold():
    """Codes 0 .. 15, scales and mins of all sizes with a 63 among them: every value comes back exactly."""
    generator = torch.Generator().manual_seed(3)
    scales = torch.randint(8, 64, (5, 8), generator=generator).float()
    mins = torch.randint(1, 64, (5, 8), generator=generator).float()
    scales[:, 2] = mins[:, 6] = 63
    # every sub-block spans its grid, and reaches to both sides of 0, so that the grid can be told from the values
    codes = torch.stack([torch.randperm(32, generator=generator) % 16 for _ in range(40)]).reshape(5, 8, 32)
    weight = (0.5 * scales[..., None] * codes - 0.25 * mins[..., None]).reshape(5, 256)
    assert torch.equal(restored(quantize_q4_k(weight), "Q4_K"), weight)


def test_q6_k_keeps_a_grid_that_it_can_hold():
    """Codes -32 .. 31 under scales of both signs with a -128 among them: every value comes back exactly."""
    generator = torch.Generator().manual_seed(4)
    scales = torch.randint(-127, 128, (7, 16), generator=generator).float()
    scales[scales.abs() < 16] = 77
    scales[:, 5] = -128
    codes = torch.randint(-31, 32, (7, 16, 16), generator=generator)
    codes[..., 3] = -32
    weight = (0.125 * scales[..., None] * codes).reshape(7, 256)
    assert torch.equal(restored(quantize_q6_k(weight), "Q6_K"), weight)


def test_all_six_bit_pairs_are_packed():
    """Each value 0 .. 63 in each of the 16 places, as gguf unpacks them."""
    values = torch.arange(64)
    scales = torch.stack([(values * 5 + place * 11) % 64 for place in range(8)], dim=1)
    mins = torch.stack([(values * 7 + place * 3) % 64 for place in range(8)], dim=1)
    found_scales, found_mins = Q4_K.get_scale_min(_pack_six_bits(scales, mins).numpy())
    assert (found_scales == scales.numpy()).all()
    assert (found_mins == mins.numpy()).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("function", "type"), [(quantize_q4_k, "Q4_K"), (quantize_q6_k, "Q6_K")])
def test_errors_are_no_larger_than_those_of_largest_weight_scales(kind, function, type):
    """The search beats the grid from smallest to largest weight with float32 scales, which cost nothing there."""
    weight = sample(kind)
    if type == "Q4_K":
        grouped = weight.unflatten(-1, (-1, 32))
        low = grouped.amin(-1, keepdim=True).clamp(max=0)
        step = (grouped.amax(-1, keepdim=True) - low) / 15
        step[step == 0] = 1
        plain = ((grouped - low) / step).round().clamp(0, 15) * step + low
    else:
        grouped = weight.unflatten(-1, (-1, 16))
        step = grouped.abs().amax(-1, keepdim=True) / 31
        step[step == 0] = 1
        plain = (grouped / step).round() * step
    error = (restored(function(weight), type) - weight).norm()
    assert error <= (plain.flatten(-2) - weight).norm()


def test_q4_k_beats_q4_0_at_the_same_size():
    """144 bytes for 256 weights, as eight blocks of Q4_0: the error of normal weights falls by a sixth."""
    weight = sample("normal")
    q4_0 = quantize(weight.numpy(), GGMLQuantizationType.Q4_0)
    q4_k = quantize_q4_k(weight)
    assert q4_k.numel() == q4_0.size
    error = (restored(q4_k, "Q4_K") - weight).norm() / (restored(torch.from_numpy(q4_0), "Q4_0") - weight).norm()
    assert error < 0.85


def test_the_search_of_a_sub_block_is_near_the_best_there_is():
    """Against all scales and mins of a fine grid, on 20 sub-blocks: on average at most 3 % more weighted error."""
    weight = sample("normal", rows=20, width=32)[:, None]
    importance = weight.square().mean(-1, keepdim=True).sqrt() + weight.abs()
    scale, minimum = _fit_sub_blocks(weight, importance)

    def error(scales: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
        codes = ((weight + minima) / scales).round().clamp(0, 15)
        return (importance * (codes * scales - minima - weight).square()).sum(-1).squeeze(-1)

    found = error(scale[..., None], minimum[..., None])
    span, low = weight.amax(-1, keepdim=True) - weight.amin(-1, keepdim=True), weight.amin(-1, keepdim=True)
    best = torch.full_like(found, torch.inf)
    for fraction in torch.linspace(0.6, 1.1, 101):
        for shift in torch.linspace(0.6, 1.1, 101):
            best = torch.minimum(best, error(span / 15 * fraction, -low * shift))
    assert (found / best).mean() < 1.03


@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1e-9])
def test_constant_weights_come_back(value):
    """No range to divide: nothing becomes NaN, and the value is kept to the format's bits."""
    weight = torch.full((2, 256), value)
    for function, type in ((quantize_q4_k, "Q4_K"), (quantize_q6_k, "Q6_K")):
        assert (restored(function(weight), type) - weight).abs().max() <= abs(value) / 63 + 1e-8
