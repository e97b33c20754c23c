"""A decoder without its modelling code: the same modules, a cache that is allocated once, little around the products.

In eager transformers a step of a small model is mostly Python around the products, which hides every kernel (reference,
kernels, finding 7). B sequences, S new tokens, T tokens in the cache with them, D model width, H query heads, K key and
value heads, W width of a head, R rotary frequencies, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, rms_norm, silu
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from compressor.algorithms.rounding import round_to_nearest
from compressor.layers import PackedExperts, joined
from compressor.models.anatomy import Block
from compressor.models.attention import attend, seen_keys, turned
from compressor.models.decoder import Decoder, attention_scale, describe_decoder, norm_weight
from compressor.models.graphs import GraphedStep, room_for
from compressor.models.model import Model
from compressor.quant import QuantSpec
from compressor.runtimes.generating import generate

ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
}
FIRST_ROOM = 256  # tokens that a cache has room for at first; it doubles


class StaticCache:
    """Keys and values of all layers in memory that a step writes into; `length` tokens of it are filled."""

    def __init__(self, decoder: Decoder, batch: int, room: int, dtype: torch.dtype, device: torch.device):
        shape = (decoder.num_layers, 2, batch, decoder.kv_heads, room, decoder.head_dim)
        self.held = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def batch(self) -> int:
        return self.held.shape[2]

    def make_room(self, tokens: int) -> None:
        """Room for so many more tokens; a cache that is full moves into one of twice the size."""
        room = self.held.shape[4]
        if self.length + tokens <= room:
            return
        while room < self.length + tokens:
            room *= 2
        wider = self.held.new_empty(*self.held.shape[:4], room, self.held.shape[5])
        wider[..., : self.length, :] = self.held[..., : self.length, :]
        self.held = wider


@dataclass(frozen=True)
class _Layer:
    """The modules of one block and the numbers that they are called with."""

    attention: Any
    feed_forward: Any
    queries_keys_values: Any | None  # one layer instead of three
    gates_ups: Any | None  # one instead of two
    before_attention: Tensor
    after_attention: Tensor | None
    before_feed_forward: Tensor
    after_feed_forward: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    scale: float
    window: int | None
    rotary: str


class StaticDecoder(nn.Module):
    """A live transformers decoder that decodes faster: call it like the model, or let it `generate`.

    It computes with the model's own modules, packed or dense, and holds no weights of its own but, with `int8_head`,
    the output head in int8 with one scale a row (the embedding, tied or not, stays as it is). UnsupportedModel for
    families that `describe_decoder` does not know.
    """

    def __init__(self, model: Model, module: Any, *, int8_head: bool = False):
        super().__init__()
        self.config, self.generation_config = module.config, module.generation_config
        self.decoder = describe_decoder(model)
        family = model.family
        self._embedding = module.get_submodule(family.embedding)
        self._head = module.get_submodule(family.head)
        self._final_norm = norm_weight(module.get_submodule(family.norm)).to(self.dtype)
        blocks = module.get_submodule(family.blocks)
        anatomy = [model.anatomy(k) for k in range(len(blocks))]
        self._layers = [_layer(block, blocks[block.index], self.decoder, self.dtype) for block in anatomy]
        self._experts = [blocks[block.index].get_submodule(family.experts) for block in anatomy if block.experts]
        self._graphs: dict[tuple[int, int], GraphedStep] = {}
        self._tables: dict[str, tuple[Tensor, Tensor]] = {}  # cos and sin by kind of rotary, as long as was needed
        self._standing_in: WeakKeyDictionary[Cache, StaticCache] = WeakKeyDictionary()
        self._int8_head = _int8_rows(self._head.weight) if int8_head else None
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where inputs have to be."""
        return self._embedding.weight.device

    def new_cache(self, batch: int, room: int = FIRST_ROOM) -> StaticCache:
        """An empty cache for so many sequences, with room for so many tokens at first."""
        return StaticCache(self.decoder, batch, room, self.dtype, self.device)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Continue prompts `[B, P]`, padded on the left; see `runtimes.generating.generate` for the options.

        On a GPU each token replays a CUDA graph, captured once for a batch and room.
        """
        if self.device.type != "cuda" or not self.static:
            return generate(self, input_ids, attention_mask, **options)
        batch, prompt = input_ids.shape
        key = batch, room_for(prompt + options["max_new_tokens"], FIRST_ROOM)
        if key not in self._graphs:
            self._graphs[key] = GraphedStep(self, *key, capture=True)
        return generate(self._graphs[key], input_ids, attention_mask, **options)

    @property
    def static(self) -> bool:
        """Whether a step's shapes do not depend on its numbers: experts have to be one call."""
        return all(isinstance(experts, PackedExperts) and experts.at_once for experts in self._experts)

    @torch.inference_mode()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StaticCache | Cache | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """Logits `[B, S, V]` of tokens `[B, S]` after what is cached, and the cache with them appended.

        A cache is one of `new_cache`, or an empty one of transformers, which then stands for one of ours as long as it
        lives. `attention_mask [B, T]` has zeros for padding; `logits_to_keep` gives only those of the last tokens.
        ValueError for a cache of another batch.
        """
        batch, new = input_ids.shape
        cache = self._cache_for(past_key_values, batch)
        cache.make_room(new)
        total = cache.length + new
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, cache.length :]
        elif position_ids is None:
            position_ids = torch.arange(cache.length, total, device=self.device).expand(batch, new)
        turns = {kind: self._turn(kind, position_ids, total) for kind in self.decoder.rotary}
        masks = {
            window: seen_keys(cache.length, new, window, attention_mask, self.device)
            for window in {layer.window for layer in self._layers}
        }
        hidden = self._embedding(input_ids)
        for index, layer in enumerate(self._layers):
            hidden = self._block(
                layer, hidden, cache.held[index], cache.length, turns[layer.rotary], masks[layer.window]
            )
        cache.length = total
        kept = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        logits = self._logits(self._norm(kept, self._final_norm))
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache if use_cache else None)  # type: ignore[arg-type]

    @torch.inference_mode()
    def step(self, ids_B1: Tensor, positions_B1: Tensor, place_1: Tensor, held: Tensor, seen_BT: Tensor) -> Tensor:
        """Logits `[B, 1, V]` of one token a sequence, whose keys and values go to a place of a room of T tokens.

        The same launches on the same memory for every place: what a CUDA graph can hold. `held` as in `StaticCache`,
        without NaN anywhere; `seen_BT` is False for padding. Call `prepare_tables` before.
        """
        room = held.shape[4]
        places = torch.arange(room, device=self.device)
        seen = seen_BT & (places <= place_1)
        masks = {
            window: (seen if window is None else seen & (places > place_1 - window))[:, None, None]
            for window in {layer.window for layer in self._layers}
        }
        turns = {kind: self._turn(kind, positions_B1, room) for kind in self.decoder.rotary}
        hidden = self._embedding(ids_B1)
        for index, layer in enumerate(self._layers):
            hidden = self._block(layer, hidden, held[index], place_1, turns[layer.rotary], masks[layer.window])
        return self._logits(self._norm(hidden, self._final_norm))

    def prepare_tables(self, room: int) -> list[Tensor]:
        """The tables of rotations, for so many positions at least; whoever captures a step has to keep them."""
        nowhere = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        for kind in self.decoder.rotary:
            self._turn(kind, nowhere, room)
        return [table for tables in self._tables.values() for table in tables]

    def _cache_for(self, given: StaticCache | Cache | None, batch: int) -> StaticCache:
        if isinstance(given, Cache):
            if given not in self._standing_in:
                if given.get_seq_length():
                    raise ValueError("past_key_values holds tokens of another loop; give an empty cache, or none")
                self._standing_in[given] = self.new_cache(batch)
            given = self._standing_in[given]
        cache = self.new_cache(batch) if given is None else given
        if cache.batch != batch:
            raise ValueError(f"the cache is of {cache.batch} sequences, input_ids of {batch}")
        return cache

    # -- the parts of a step ----------------------------------------------------------------------------------------

    def _block(
        self, layer: _Layer, hidden: Tensor, held: Tensor, past: int | Tensor, turn: Any, mask: Tensor | None
    ) -> Tensor:
        attended = self._attention(layer, self._norm(hidden, layer.before_attention), held, past, turn, mask)
        if layer.after_attention is not None:  # Gemma 2 and 3: norms around both parts
            attended = self._norm(attended, layer.after_attention)
        hidden = hidden + attended
        out = self._feed_forward(layer, self._norm(hidden, layer.before_feed_forward))
        if layer.after_feed_forward is not None:
            out = self._norm(out, layer.after_feed_forward)
        return hidden + out

    def _attention(
        self,
        layer: _Layer,
        x: Tensor,
        held: Tensor,
        past: int | Tensor,
        turn: tuple[Tensor, Tensor],
        mask: Tensor | None,
    ) -> Tensor:
        """`past`: tokens before these; or, for one token, the place `[1]` where it goes: `mask` is then of the room."""
        batch, new, _ = x.shape
        query, key, value = self._queries_keys_values(layer, x)
        if isinstance(past, Tensor):
            keys, values = held[0], held[1]
            keys.index_copy_(2, past, turned(key, turn))
            values.index_copy_(2, past, value)
        else:
            total = past + new
            keys, values = held[0, :, :, :total], held[1, :, :, :total]
            keys[:, :, past:] = turned(key, turn)
            values[:, :, past:] = value
        if mask is None and layer.window is not None and new == 1:  # older keys are out of sight
            keys, values = keys[:, :, -layer.window :], values[:, :, -layer.window :]
        softcap = self.decoder.softcap
        mixed = attend(turned(query, turn), keys, values, mask, scale=layer.scale, softcap=softcap, causal=new > 1)
        return layer.attention.o_proj(mixed.transpose(1, 2).reshape(batch, new, -1))

    def _feed_forward(self, layer: _Layer, x: Tensor) -> Tensor:
        if layer.gates_ups is None:
            out = layer.feed_forward(x)
            return out[0] if isinstance(out, tuple) else out  # some routers hand their logits on
        gate, up = layer.gates_ups(x).chunk(2, dim=-1)
        return layer.feed_forward.down_proj(ACTIVATE[self.decoder.activation](gate).mul_(up))

    def _queries_keys_values(self, layer: _Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, heads, S, W]` each, before rotation."""
        decoder, attention = self.decoder, layer.attention
        whole = layer.queries_keys_values
        if whole is not None:
            widths = [decoder.head_dim * count for count in (decoder.heads, decoder.kv_heads, decoder.kv_heads)]
            parts = list(whole(x).split(widths, dim=-1))
        else:
            parts = [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)]
        for position, weight in enumerate((layer.query_norm, layer.key_norm)):
            if weight is None:
                continue
            width = weight.shape[0]  # of a head (Qwen 3, Gemma 3), or of all of them together (OLMoE)
            parts[position] = self._norm(parts[position].unflatten(-1, (-1, width)), weight).flatten(-2)
        if decoder.clip_qkv is not None:
            parts = [part.clamp(-decoder.clip_qkv, decoder.clip_qkv) for part in parts]
        query, key, value = (part.unflatten(-1, (-1, decoder.head_dim)).transpose(1, 2) for part in parts)
        return query, key, value

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm. On a CPU torch has no kernel for it, but x beside -x has no mean, and a kernel for layer norms."""
        if x.device.type != "cpu":
            return rms_norm(x, weight.shape, weight, self.decoder.eps)
        width = x.shape[-1]
        normed = layer_norm(torch.cat([x, -x], dim=-1), (2 * width,), eps=self.decoder.eps)
        return normed[..., :width] * weight

    def _logits(self, normed: Tensor) -> Tensor:
        if self._int8_head is not None:
            codes, scales = self._int8_head
            logits = torch.ops.compressor.int8_linear(normed.flatten(0, 1), codes, scales).unflatten(
                0, normed.shape[:2]
            )
        else:
            logits = self._head(normed)
        cap = self.decoder.final_softcap
        return logits if cap is None else (logits / cap).tanh() * cap

    def _turn(self, kind: str, positions_BS: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """cos of the positions for both halves of a head, and sin, negative for the first, `[B, 1, S, 2R]`."""
        if kind not in self._tables or self._tables[kind][0].shape[0] < total:
            rotary = self.decoder.rotary[kind]
            places = torch.arange(max(FIRST_ROOM, 2 * total), dtype=torch.float32).unsqueeze(1)
            angles = places * rotary.frequencies_R.cpu()
            cos, sin = angles.cos() * rotary.scaling, angles.sin() * rotary.scaling
            tables = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
            self._tables[kind] = tables[0].to(self.device, self.dtype), tables[1].to(self.device, self.dtype)
        cos, sin = self._tables[kind]
        return cos[positions_BS].unsqueeze(1), sin[positions_BS].unsqueeze(1)


def _int8_rows(weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Codes `[V, D]` and one scale a row `[V]`; a slice at a time, since a float32 copy would be the largest tensor."""
    parts = [round_to_nearest(part, QuantSpec(8, None), dtype=torch.bfloat16) for part in weight_VD.split(8192)]
    return torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts]).flatten()


def _layer(block: Block, module: Any, decoder: Decoder, dtype: torch.dtype) -> _Layer:
    def weight(owner: Any, name: str) -> Tensor | None:
        norm = getattr(owner, name, None)
        return None if norm is None else norm_weight(norm).to(dtype)

    around = hasattr(module, "pre_feedforward_layernorm")
    second = "pre_feedforward_layernorm" if around else "post_attention_layernorm"
    before_attention, before_feed_forward = weight(module, "input_layernorm"), weight(module, second)
    assert before_attention is not None
    assert before_feed_forward is not None
    window = decoder.window_of(block.index)
    attention, feed_forward = module.self_attn, module.mlp
    return _Layer(
        attention=attention,
        feed_forward=feed_forward,
        queries_keys_values=_as_one(attention, "qkv_proj", ("q_proj", "k_proj", "v_proj")),
        gates_ups=_as_one(feed_forward, "gate_up_proj", ("gate_proj", "up_proj")),
        before_attention=before_attention,
        after_attention=weight(module, "post_attention_layernorm") if around else None,
        before_feed_forward=before_feed_forward,
        after_feed_forward=weight(module, "post_feedforward_layernorm"),
        query_norm=weight(module.self_attn, "q_norm"),
        key_norm=weight(module.self_attn, "k_norm"),
        scale=attention_scale(block, decoder),
        window=None if window < 0 else window,
        rotary=decoder.layer_types[block.index],
    )


def _as_one(owner: Any, whole: str, parts: tuple[str, ...]) -> Any | None:
    """The layer that computes `parts` at once: the model's own (Phi-3) or theirs joined; None if neither is."""
    if hasattr(owner, whole):
        return getattr(owner, whole)
    return joined([getattr(owner, part) for part in parts]) if all(hasattr(owner, part) for part in parts) else None
