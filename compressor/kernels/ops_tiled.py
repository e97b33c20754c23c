"""Linear layers on weights in the tiles that our CUDA kernels read (T16x64: layouts.py; K128: cuda/w8a8.py).

M tokens, N output features, K input features. The CPU implementations are the definitions that the kernels are tested
against; what is fast on a CPU is in ops.py.
"""

import torch
from torch import Tensor

from compressor.kernels.cuda import available, linear, w8a8
from compressor.kernels.layouts import unpack_t16x64

_library = torch.library.Library("compressor", "FRAGMENT")
_library.define("int4_tiled_linear(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, int group_size) -> Tensor")
_library.define("w8a8_tiled_linear(Tensor x, Tensor tiles, Tensor scales, Tensor? bias) -> Tensor")


def int4_tiled_linear_cpu(
    x_MK: Tensor, packed: Tensor, scales_GN: Tensor, zeros_GN: Tensor | None, group_size: int
) -> Tensor:
    """x times the transposed weight `(code - zero) * scale`, summed in float32; `[M, N]` in x's dtype."""
    linear.weight_of(packed, scales_GN, zeros_GN, group_size)
    codes_NK = unpack_t16x64(packed).float()
    if zeros_GN is not None:
        codes_NK -= zeros_GN.T.repeat_interleave(group_size, 1)
    weight_NK = codes_NK * scales_GN.float().T.repeat_interleave(group_size, 1)
    return (x_MK.float() @ weight_NK.T).to(x_MK.dtype)


_library.impl("int4_tiled_linear", int4_tiled_linear_cpu, "CPU")
_library.impl("w8a8_tiled_linear", w8a8.w8a8_linear, "CPU")
if available() is None:
    _library.impl("int4_tiled_linear", linear.int4_linear_cuda, "CUDA")
    _library.impl("w8a8_tiled_linear", w8a8.w8a8_linear_cuda, "CUDA")


@torch.library.register_fake("compressor::int4_tiled_linear", lib=_library)
def _(x_MK: Tensor, packed: Tensor, scales_GN: Tensor, *_: object) -> Tensor:
    return x_MK.new_empty(x_MK.shape[0], scales_GN.shape[1])


@torch.library.register_fake("compressor::w8a8_tiled_linear", lib=_library)
def _(x: Tensor, tiles: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], tiles.shape[1])
