"""A KV cache in 8 or 4 bits for transformers models, on the CPU and on our CUDA kernels.

    model.set_attn_implementation("compressor_kv")    # decodes from the codes; without it, any attention works
    model.generate(**inputs, past_key_values=QuantizedKvCache(model.config, bits=8))

A prompt attends exactly and is quantized afterwards; what decoding sees is described in `compressor.kernels.kv_cache`.
Layers with a sliding window keep transformers' own 16-bit cache, which is bounded by the window.

B sequences, H key/value heads, Q query heads, T tokens, D head width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from compressor.errors import UnsupportedModel
from compressor.kernels import ops_kv
from compressor.kernels.kv_cache import BLOCK, dequantize_blocks, quantized_tokens

KV_ATTENTION = "compressor_kv"
GROWTH = 4  # capacity grows by a quarter


class QuantizedKvCache(Cache):
    """Keys and values of a model's full-attention layers in `bits`; the last `window` tokens and more stay exact.

    `window` is a multiple of 32; up to 32 tokens more are exact. If the model's attention is "compressor_kv" when the
    cache is made, decoding reads the codes; if not, every step dequantizes all of them first.
    """

    def __init__(self, config: Any, *, bits: int = 8, window: int = 64):
        if bits not in (4, 8):
            raise ValueError(f"bits={bits}: a KV cache has 8 or 4")
        if window < BLOCK or window % BLOCK:
            raise ValueError(f"window={window}: tokens are quantized in blocks of {BLOCK}; give a multiple of that")
        fused = config.get_text_config(decoder=True)._attn_implementation == KV_ATTENTION
        stock = DynamicCache(config=config).layers
        layers = [QuantizedKvLayer(bits, window, fused) if type(layer) is DynamicLayer else layer for layer in stock]
        if not any(isinstance(layer, QuantizedKvLayer) for layer in layers):
            raise UnsupportedModel(f"{config.model_type}: no layer here attends to all tokens; nothing to quantize")
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes held now: codes and scales with their spare capacity, rings, and layers that are not quantized."""
        return sum(tensor.nbytes for layer in self.layers for tensor in _tensors(layer).values())


class QuantizedKvLayer(CacheLayerMixin):
    """One layer: blocks of codes, and a ring of the newest tokens."""

    is_sliding = False
    is_croppable = False
    codes: Tensor
    scales: Tensor
    ring_keys: Tensor
    ring_values: Tensor
    starts: Tensor  # [B] int32: tokens of padding on the left
    lengths: Tensor  # [B] int32: `tokens`, where the kernels read it

    def __init__(self, bits: int, window: int, fused: bool):
        super().__init__()
        self.bits, self.ring, self.fused = bits, window + BLOCK, fused
        self.tokens = self.coded = 0
        self.unread = False  # a token was appended and its attention not yet asked for

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Memory for the sequences of the first tokens seen."""
        B, H, _, D = key_states.shape
        if D % 32 or D > 256 or value_states.shape[-1] != D:
            widths = f"keys of {D} and values of {value_states.shape[-1]} channels"
            raise UnsupportedModel(f"{widths} a head: a quantized KV cache needs the same multiple of 32, at most 256")
        self.dtype, self.device = key_states.dtype, key_states.device
        self.codes, self.scales = ops_kv.empty_blocks(key_states, 0, self.bits)
        self.ring_keys, self.ring_values = (key_states.new_zeros(B, H, self.ring, D) for _ in range(2))
        self.starts, self.lengths = (torch.zeros(B, dtype=torch.int32, device=self.device) for _ in range(2))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in new tokens `[B, H, T, D]`; what attention is to see comes back: all tokens, or a fused step's own."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.unread:
            raise RuntimeError(f"this model does not hand keys to {KV_ATTENTION} as the cache gives them: use sdpa")
        if self.fused and self.tokens and key_states.shape[2] == 1:
            return self._append(key_states, value_states), value_states
        self._quantize_oldest(quantized_tokens(self.tokens + 1, self.ring))
        keys, values = self._dense()
        keys, values = torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)
        self._extend(keys, values)
        return (LayerKeys.of(keys, self), values) if self.fused else (keys, values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset that masks are made for: all tokens."""
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.tokens

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: removed tokens may have set the scales of those that stay."""
        if tokens_to_remove != 0:
            raise ValueError("a quantized KV cache cannot be cropped (assisted decoding): use a DynamicCache")

    def reset(self) -> None:
        """Forget all tokens and give the memory back."""
        for name in _tensors(self):
            delattr(self, name)
        self.tokens = self.coded = 0
        self.unread = self.is_initialized = False

    def offload(self) -> None:
        """To the memory of the CPU."""
        self._each(lambda tensor: tensor.to("cpu"))

    def prefetch(self) -> None:
        """Back to the device of the model."""
        self._each(lambda tensor: tensor.to(self.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequences in another order (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence several times."""
        self._each(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these sequences."""
        self._each(lambda tensor: tensor[indices.to(tensor.device)])

    def attend(self, query_BQ1D: Tensor, scaling: float) -> Tensor:
        """Attention of the token appended last, `[B, 1, Q, D]`."""
        self.unread = False
        blocks = (self.codes, self.scales, self.ring_keys, self.ring_values, self.starts, self.lengths)
        query = query_BQ1D.squeeze(2).contiguous()
        return torch.ops.compressor.kv_attention(query, *blocks, self.bits, scaling).unsqueeze(1)

    def _append(self, key_states: Tensor, value_states: Tensor) -> Tensor:
        self.tokens += 1
        self.coded = quantized_tokens(self.tokens, self.ring)
        self._reserve(self.coded // BLOCK)
        self.lengths += 1
        blocks = (self.codes, self.scales, self.ring_keys, self.ring_values, self.lengths)
        torch.ops.compressor.kv_append(key_states.contiguous(), value_states.contiguous(), *blocks, self.bits)
        self.unread = True
        return LayerKeys.of(key_states, self)

    def _dense(self) -> tuple[Tensor, Tensor]:
        """All tokens in order, codes dequantized."""
        num_blocks = self.coded // BLOCK
        coded = dequantize_blocks(self.codes[:, :, :num_blocks], self.scales[:, :, :num_blocks], self.bits)
        slots = self._slots(self.coded, self.tokens)
        rings = (self.ring_keys, self.ring_values)
        keys, values = (
            torch.cat([part.to(self.dtype), ring[:, :, slots]], dim=2) for part, ring in zip(coded, rings, strict=True)
        )
        return keys, values

    def _quantize_oldest(self, coded: int) -> None:
        """Tokens of the ring before `coded` become blocks."""
        if coded > self.coded:
            slots = self._slots(self.coded, coded)
            self._write(self.ring_keys[:, :, slots], self.ring_values[:, :, slots])

    def _extend(self, keys: Tensor, values: Tensor) -> None:
        """Hold all of these tokens, of which those before `coded` are held as codes already."""
        self.tokens = keys.shape[2]
        self.lengths.fill_(self.tokens)
        coded = quantized_tokens(self.tokens, self.ring)
        if coded > self.coded:
            self._write(keys[:, :, self.coded : coded], values[:, :, self.coded : coded])
        slots = self._slots(self.coded, self.tokens)
        self.ring_keys[:, :, slots] = keys[:, :, self.coded :]
        self.ring_values[:, :, slots] = values[:, :, self.coded :]

    def _write(self, keys: Tensor, values: Tensor) -> None:
        first, self.coded = self.coded // BLOCK, self.coded + keys.shape[2]
        self._reserve(self.coded // BLOCK)
        codes, scales = torch.ops.compressor.kv_write(keys.contiguous(), values.contiguous(), self.bits)
        self.codes[:, :, first : self.coded // BLOCK] = codes
        self.scales[:, :, first : self.coded // BLOCK] = scales

    def _reserve(self, num_blocks: int) -> None:
        held = self.codes.shape[2]
        if num_blocks > held:
            more = ops_kv.empty_blocks(self.ring_keys, max(num_blocks - held, held // GROWTH), self.bits)
            self.codes, self.scales = torch.cat([self.codes, more[0]], dim=2), torch.cat([self.scales, more[1]], dim=2)

    def _slots(self, begin: int, end: int) -> Tensor:
        return torch.arange(begin, end, device=self.ring_keys.device) % self.ring

    def _each(self, change: Any) -> None:
        if self.is_initialized:
            for name, tensor in _tensors(self).items():
                setattr(self, name, change(tensor))


class LayerKeys(Tensor):
    """Keys on their way from a cache layer to `quantized_attention`, which finds the layer on them."""

    layer: QuantizedKvLayer
    # Whatever is computed from them is a plain tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, keys: Tensor, layer: QuantizedKvLayer) -> "LayerKeys":
        """Keys that know their layer."""
        tagged = keys.as_subclass(cls)
        tagged.layer = layer
        return tagged


def quantized_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention function "compressor_kv": decoding from codes, all else by `sdpa`."""
    layer = key.layer if isinstance(key, LayerKeys) else None
    if layer is None or not layer.unread:
        if layer is not None:
            layer.starts.copy_(left_padding(attention_mask, query.shape[0]))
        return sdpa_attention_forward(
            module, query, key.as_subclass(Tensor), value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    foreign = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if foreign:
        raise ValueError(f"{KV_ATTENTION} does not know {', '.join(foreign)}: use another attention with this cache")
    return layer.attend(query, query.shape[-1] ** -0.5 if scaling is None else scaling), None


def left_padding(mask_B1TL: Tensor | None, num_sequences: int) -> Tensor:
    """How many tokens of each sequence the newest token does not see, `[B]`; they must be the first ones."""
    if mask_B1TL is None:
        return torch.zeros(num_sequences, dtype=torch.int32)
    seen_BL = mask_B1TL[:, 0, -1].expand(num_sequences, -1)
    starts = seen_BL.int().argmax(-1)
    if not torch.equal(seen_BL.sum(-1) + starts, torch.full_like(starts, seen_BL.shape[1])):
        raise ValueError(f"{KV_ATTENTION} takes padding on the left only; the attention mask hides other tokens too")
    return starts.int()


def _tensors(layer: Any) -> dict[str, Tensor]:
    return {name: value for name, value in vars(layer).items() if isinstance(value, Tensor)}


AttentionInterface.register(KV_ATTENTION, quantized_attention)
AttentionMaskInterface.register(KV_ATTENTION, sdpa_mask)
