"""Dense weights into GGUF's K-types, written from the format's definition (ggml-common.h): Q4_K and Q6_K.

N super-blocks of 256 weights, S sub-blocks in each, W weights in a sub-block; d and dmin are float16.
Q4_K: `w = d * scale * q - dmin * min` with 8 sub-blocks of 32, q of 4 bits, scale and min of 6 bits.
Q6_K: `w = d * scale * q` with 16 sub-blocks of 16, q of 6 bits around 0, scale of 8 bits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SUPER = 256
# Float32 weights searched at once: the candidates of a chunk stay in the cache of a core
CHUNK_ELEMENTS = 1 << 18
# Candidate grids of a sub-block reach from 15 - 1 to 15 + 1 steps over its range (Q4_K), from 32 - 0.9 to 32 + 0.9 over
# its largest weight (Q6_K). Source: the searches of llama.cpp, make_qkx2_quants and make_qx_quants.
Q4_STEPS = [14 + 0.1 * step for step in range(21)]
REROUNDINGS = 3  # of the best candidate to the grid that was fitted to it
Q6_STEPS = [32 + 0.1 * step for step in range(-9, 10)]


def quantize_q4_k(weight_RI: Tensor) -> Tensor:
    """Bytes `[R, I / 256 * 144]` of rows whose length is a multiple of 256."""
    return _by_chunks(weight_RI, _q4_k_blocks)


def quantize_q6_k(weight_RI: Tensor) -> Tensor:
    """Bytes `[R, I / 256 * 210]` of rows whose length is a multiple of 256."""
    return _by_chunks(weight_RI, _q6_k_blocks)


def _by_chunks(weight_RI: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
    blocks = weight_RI.float().reshape(-1, SUPER)
    parts = [quantize(part) for part in blocks.split(CHUNK_ELEMENTS // SUPER)]
    return torch.cat(parts).reshape(*weight_RI.shape[:-1], -1)


# -- Q4_K -------------------------------------------------------------------------------------------------------------


def _q4_k_blocks(weight: Tensor) -> Tensor:
    weight_NSW = weight.unflatten(-1, (8, 32))
    importance = weight_NSW.square().mean(-1, keepdim=True).sqrt() + weight_NSW.abs()
    scale_NS, min_NS = _fit_sub_blocks(weight_NSW, importance)
    d, scales = _six_bits(scale_NS)
    dmin, mins = _six_bits(min_NS)
    codes = _nearest_codes(weight_NSW, d, dmin, scales, mins)
    best = _error(weight_NSW, importance, d, dmin, scales, mins, codes)
    # With the codes and small integers known, the two float16 factors can be chosen again; kept only where it helps
    for _ in range(2):
        d_new, dmin_new = _refit_factors(weight_NSW, importance, scales, mins, codes)
        codes_new = _nearest_codes(weight_NSW, d_new, dmin_new, scales, mins)
        error = _error(weight_NSW, importance, d_new, dmin_new, scales, mins, codes_new)
        better = error < best
        best = torch.where(better, error, best)
        d, dmin = torch.where(better, d_new, d), torch.where(better, dmin_new, dmin)
        codes = torch.where(better[:, None, None], codes_new, codes)
    return torch.cat([_half(d), _half(dmin), _pack_six_bits(scales, mins), _pack_q4(codes)], dim=-1)


def _fit_sub_blocks(weight_NSW: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and min (both at least 0) of each sub-block with the least weighted error among the candidate grids."""
    lowest = weight_NSW.amin(-1, keepdim=True).clamp(max=0)
    span = weight_NSW.amax(-1, keepdim=True) - lowest
    reach = torch.where(span > 0, span, 1)
    best = torch.full_like(weight_NSW[..., 0], torch.inf)
    scale, minimum = torch.zeros_like(best), torch.zeros_like(best)
    for steps in Q4_STEPS + [None] * REROUNDINGS:
        if steps is not None:
            codes = ((weight_NSW - lowest) * (steps / reach)).round_().clamp_(0, 15)
        else:  # the best grid so far is not the one that its codes were rounded to
            codes = ((weight_NSW + minimum[..., None]) / torch.where(scale > 0, scale, 1)[..., None]).round_()
            codes.clamp_(0, 15)
        a, b = _fit_grid(weight_NSW, importance, codes)
        error = (importance * (a[..., None] * codes - b[..., None] - weight_NSW).square()).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scale, minimum = torch.where(better, a, scale), torch.where(better, b, minimum)
    # A sub-block of one negative value: no code can be fitted, its min says it all
    flat = span.squeeze(-1) <= 0
    return torch.where(flat, 0, scale), torch.where(flat, -lowest.squeeze(-1), minimum)


def _fit_grid(weight_NSW: Tensor, importance: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and min for given codes by weighted least squares; a min below 0 is not possible in the format."""
    weighted = importance * codes
    sum_w, sum_x = importance.sum(-1), (importance * weight_NSW).sum(-1)
    sum_l, sum_ll, sum_xl = weighted.sum(-1), (weighted * codes).sum(-1), (weighted * weight_NSW).sum(-1)
    determinant = sum_w * sum_ll - sum_l * sum_l
    safe = torch.where(determinant > 0, determinant, 1)
    minimum = (sum_l * sum_xl - sum_ll * sum_x) / safe
    alone = (minimum < 0) | (determinant <= 0)
    scale = torch.where(alone, sum_xl / sum_ll.clamp(min=1e-30), (sum_w * sum_xl - sum_x * sum_l) / safe)
    return scale.clamp(min=0), torch.where(alone, 0, minimum)


def _six_bits(numbers_NS: Tensor) -> tuple[Tensor, Tensor]:
    """A float16 factor for each super-block and integers of 0 .. 63 that multiply it."""
    factor = (numbers_NS.amax(-1) / 63).half().float()
    integers = (numbers_NS / torch.where(factor > 0, factor, 1)[:, None]).round().clamp(0, 63)
    return factor, torch.where(factor[:, None] > 0, integers, 0)


def _nearest_codes(weight_NSW: Tensor, d: Tensor, dmin: Tensor, scales: Tensor, mins: Tensor) -> Tensor:
    step = (d[:, None] * scales)[..., None]
    shift = (dmin[:, None] * mins)[..., None]
    codes = ((weight_NSW + shift) / torch.where(step > 0, step, 1)).round_().clamp_(0, 15)
    return torch.where(step > 0, codes, 0)


def _error(
    weight_NSW: Tensor, importance: Tensor, d: Tensor, dmin: Tensor, scales: Tensor, mins: Tensor, codes: Tensor
) -> Tensor:
    restored = (d[:, None] * scales)[..., None] * codes - (dmin[:, None] * mins)[..., None]
    return (importance * (restored - weight_NSW).square()).sum((-1, -2))


def _refit_factors(
    weight_NSW: Tensor, importance: Tensor, scales: Tensor, mins: Tensor, codes: Tensor
) -> tuple[Tensor, Tensor]:
    """d and dmin by least squares for w = d (scale q) - dmin (min), rounded to float16."""
    u, v = scales[..., None] * codes, mins[..., None].expand_as(codes)
    sums = [(importance * x * y).sum((-1, -2)) for x, y in ((u, u), (v, v), (u, v), (u, weight_NSW), (v, weight_NSW))]
    uu, vv, uv, uw, vw = sums
    determinant = uu * vv - uv * uv
    solvable = determinant > 1e-6 * uu * vv
    safe = torch.where(solvable, determinant, 1)
    d = torch.where(solvable, (vv * uw - uv * vw) / safe, uw / uu.clamp(min=1e-30))
    dmin = torch.where(solvable, (uv * uw - uu * vw) / safe, 0)
    return d.clamp(min=0).half().float(), dmin.clamp(min=0).half().float()


def _pack_six_bits(scales_NS: Tensor, mins_NS: Tensor) -> Tensor:
    """8 scales and 8 mins of 6 bits in 12 bytes: the low four whole, the high four split over two places."""
    s, m = scales_NS.to(torch.uint8), mins_NS.to(torch.uint8)
    low_s, high_s, low_m, high_m = s[:, :4], s[:, 4:], m[:, :4], m[:, 4:]
    return torch.cat(
        [low_s | (high_s >> 4 << 6), low_m | (high_m >> 4 << 6), (high_s & 15) | ((high_m & 15) << 4)], dim=-1
    )


def _pack_q4(codes_NSW: Tensor) -> Tensor:
    """128 bytes: the codes of sub-blocks 2j low and 2j + 1 high."""
    pairs = codes_NSW.to(torch.uint8).unflatten(1, (4, 2))
    return (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).flatten(1)


# -- Q6_K -------------------------------------------------------------------------------------------------------------


def _q6_k_blocks(weight: Tensor) -> Tensor:
    weight_NSW = weight.unflatten(-1, (16, 16))
    scale_NS = _fit_symmetric(weight_NSW)
    largest = scale_NS.gather(-1, scale_NS.abs().argmax(-1, keepdim=True)).squeeze(-1)
    d = (largest / -128).half().float()  # the largest scale takes the code -128, which has no positive counterpart
    scales = (scale_NS / torch.where(d != 0, d, 1)[:, None]).round().clamp(-128, 127)
    scales = torch.where(d[:, None] != 0, scales, 0)
    codes = _nearest_signed(weight_NSW, d, scales)
    u = scales[..., None] * codes
    uu = (u * u).sum((-1, -2))
    refit = torch.where(uu > 0, (u * weight_NSW).sum((-1, -2)) / torch.where(uu > 0, uu, 1), d).half().float()
    refit_codes = _nearest_signed(weight_NSW, refit, scales)
    better = _signed_error(weight_NSW, refit, scales, refit_codes) < _signed_error(weight_NSW, d, scales, codes)
    d = torch.where(better, refit, d)
    codes = torch.where(better[:, None, None], refit_codes, codes)
    low, high = _pack_q6((codes + 32).flatten(1).to(torch.uint8))
    return torch.cat([low, high, scales.to(torch.int8).view(torch.uint8), _half(d)], dim=-1)


def _fit_symmetric(weight_NSW: Tensor) -> Tensor:
    """The signed scale of each sub-block with the least error: its largest weight near code -32."""
    largest = weight_NSW.gather(-1, weight_NSW.abs().argmax(-1, keepdim=True))
    reach = torch.where(largest != 0, largest, 1)
    best = torch.full_like(weight_NSW[..., 0], -1)
    scale = torch.zeros_like(best)
    for steps in Q6_STEPS:
        codes = (weight_NSW * (-steps / reach)).round_().clamp_(-32, 31)
        dot, norm = (codes * weight_NSW).sum(-1), codes.square().sum(-1)
        gain = torch.where(norm > 0, dot.square() / norm.clamp(min=1), 0)  # what the best scale takes off the error
        better = gain > best
        best = torch.where(better, gain, best)
        scale = torch.where(better, dot / norm.clamp(min=1), scale)
    return scale


def _nearest_signed(weight_NSW: Tensor, d: Tensor, scales: Tensor) -> Tensor:
    step = (d[:, None] * scales)[..., None]
    codes = (weight_NSW / torch.where(step != 0, step, 1)).round_().clamp_(-32, 31)
    return torch.where(step != 0, codes, 0)


def _signed_error(weight_NSW: Tensor, d: Tensor, scales: Tensor, codes: Tensor) -> Tensor:
    return ((d[:, None] * scales)[..., None] * codes - weight_NSW).square().sum((-1, -2))


def _pack_q6(codes: Tensor) -> tuple[Tensor, Tensor]:
    """128 bytes of low nibbles and 64 of high pairs; within each half of 128 weights, four runs of 32 share a byte."""
    runs = codes.unflatten(-1, (2, 4, 32))
    low, high = runs & 15, runs >> 4
    nibbles = torch.stack([low[:, :, 0] | (low[:, :, 2] << 4), low[:, :, 1] | (low[:, :, 3] << 4)], dim=2)
    pairs = high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)
    return nibbles.flatten(1), pairs.flatten(1)


def _half(factor_N: Tensor) -> Tensor:
    return factor_N.half().unsqueeze(-1).contiguous().view(torch.uint8)
