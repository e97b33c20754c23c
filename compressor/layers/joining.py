"""Linear layers that read the same input, computed as one: fewer and larger products, the weights held once.

O output features of all of them, I input features, G groups in a row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compressor.kernels import ops
from compressor.layers.layouts import CANONICAL, CPU, CUDA
from compressor.layers.packed import PackedLinear, PackedWeight


def joined(layers: Sequence[nn.Module]) -> PackedLinear | None:
    """A layer whose output is those of `layers` one after the other, `[..., O]`; None where they do not join.

    Packed layers of one scheme and layout join. They go on computing as before: their weights become slices of the
    joined one, so nothing is held twice (but the scales of int4 weights in the CPU's and the CUDA layout).
    """
    packed = [layer for layer in layers if isinstance(layer, PackedLinear)]
    if len(packed) < len(layers) or len({_scheme(layer.packed) for layer in packed}) > 1:
        return None
    weight = _joined([layer.packed for layer in packed])
    return None if weight is None else PackedLinear(weight, _biases(packed))


def _scheme(weight: PackedWeight) -> tuple[object, ...]:
    return weight.spec, weight.layout, weight.shape[1:], weight.file_dtype


def _joined(parts: list[PackedWeight]) -> PackedWeight | None:
    first = parts[0]
    in_tiles = first.layout != CANONICAL and first.spec.bits == 4
    if first.layout == CPU and in_tiles and any(one.shape[0] % ops.INT4_ROW_BLOCK for one in parts[:-1]):
        return None  # the op's own order of rows runs over the border
    if first.layout == CUDA and not in_tiles:
        return None  # K128 lies by columns: the parts' weights would be no slices in one piece
    whole = PackedWeight(first.spec, (sum(one.shape[0] for one in parts), first.shape[1]), first.file_dtype, "meta")
    whole.layout = first.layout
    along = 1 if in_tiles else 0  # of scales and zeros, which tiles have by group and row
    whole.words = torch.cat([one.words for one in parts])
    whole.scales = torch.cat([one.scales for one in parts], dim=along)
    zeros = [one.zeros for one in parts if one.zeros is not None]
    whole.zeros = torch.cat(zeros, dim=along) if zeros else None
    start = 0
    for one in parts:
        rows = slice(start, start + one.shape[0])
        one.words = whole.words.narrow(0, start * len(one.words) // one.shape[0], len(one.words))
        if not in_tiles:  # there they are `[G, O]`, and the op wants them in one piece
            one.scales = whole.scales[rows]
            one.zeros = None if whole.zeros is None else whole.zeros[rows]
        start = rows.stop
    return whole


def _biases(layers: Sequence[PackedLinear]) -> Tensor | None:
    """The biases one after the other, zeros for a layer that has none; None if none has."""
    present = next((layer.bias for layer in layers if layer.bias is not None), None)
    if present is None:
        return None
    parts = [present.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
    return torch.cat([part.detach() for part in parts])
