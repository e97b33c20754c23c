"""A decoder in onnxruntime that the rest of the project uses like a transformers causal model.

B sequences, P tokens of a prompt, S new tokens, T = past + S columns of the attention mask, V vocabulary.
"""

import re
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from compressor.errors import IntegrityError
from compressor.runtimes.configuration import read_config, read_generation_config
from compressor.runtimes.generating import generate
from compressor.runtimes.graph_file import read_graph
from compressor.runtimes.kv_cache import PAST, PRESENT, GrowingStorage, Names, OnnxCache, SharedStorage
from compressor.runtimes.session import bind_input, bind_output, dtype_of, open_session

TOKENS = ("input_ids", "attention_mask", "position_ids")
LOGITS = "logits"


def open_onnx(
    folder: str | Path, *, threads: int | None = None, accuracy_level: int | None = None, spinning: bool = True
) -> "OnnxModel":
    """Open an exported decoder with a KV cache: `model.onnx`, its data and `config.json`, on the CPU.

    Graphs of this project, of onnxruntime-genai's builder and of optimum-onnx are understood; without a `config.json`
    `genai_config.json` will do. `threads`: as many as torch uses if None. `accuracy_level` overrides what the graph
    says of its quantized products (0 and 1: float32 activations, 4: 8-bit ones). `spinning=False` lets idle threads
    sleep, on cores that others need. EnvironmentProblem for a missing package or file, IntegrityError for damaged or
    unsafe files, UnsupportedModel for ops without a kernel.
    """
    return OnnxModel(Path(folder), threads, accuracy_level, spinning)


class OnnxModel(nn.Module):
    """An ONNX decoder: call it like a transformers causal model, or let it `generate`.

    A cache may be its own (`past_key_values` of the last output) or an empty transformers Cache, which then stands for
    one of its own for as long as it lives. `weight_bytes` are those on disk; there are no parameters but an empty one,
    which says where the model is.
    """

    def __init__(self, folder: Path, threads: int | None, accuracy_level: int | None, spinning: bool):
        super().__init__()
        file = read_graph(folder)
        self.folder, self.weight_bytes = folder, file.weight_bytes
        self.config = read_config(folder)
        self.generation_config = read_generation_config(folder)
        self.session = open_session(file, threads, accuracy_level, spinning)
        self._inputs = {value.name: value for value in self.session.get_inputs()}
        self._names = _cache_names(self._inputs, [value.name for value in self.session.get_outputs()], file.path)
        past = self._inputs[self._names[0][0]]
        self._cache_dtype = dtype_of(past, file.path)
        self._cache_shapes = [_cache_shape(self._inputs[name], self.config, file.path) for name, _ in self._names]
        self._token_dtypes = {name: dtype_of(self._inputs[name], file.path) for name in TOKENS if name in self._inputs}
        logits = next(value for value in self.session.get_outputs() if value.name == LOGITS)
        self._logits_dtype = dtype_of(logits, file.path)
        self._vocab = logits.shape[-1] if isinstance(logits.shape[-1], int) else self.config.vocab_size
        self._shares_cache = file.cache_can_be_shared({past for past, _ in self._names})
        self._counts_tokens = file.counts_tokens()
        self._one_new_token = bool(file.attention_nodes())
        self._standing_in: WeakKeyDictionary[Cache, OnnxCache] = WeakKeyDictionary()
        self.anchor = nn.Parameter(torch.empty(0), requires_grad=False)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where inputs have to be: the CPU."""
        return self.anchor.device

    def new_cache(self, batch: int) -> OnnxCache:
        """An empty cache for so many sequences."""
        binding = self.session.io_binding()
        storage = (SharedStorage if self._shares_cache else GrowingStorage)(
            binding, self._names, batch, self._cache_shapes, self._cache_dtype
        )
        return OnnxCache(binding, storage, batch)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Continue prompts `[B, P]`, padded on the left; see `generating.generate` for the options."""
        return generate(self, input_ids, attention_mask, **options)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: OnnxCache | Cache | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """Logits `[B, S, V]` of tokens `[B, S]` after what is cached, and the cache with them appended.

        `attention_mask [B, T]` has zeros for padding, on the left or on the right; `logits_to_keep` gives only those of
        the last tokens. ValueError for shapes that do not fit the cache.
        """
        batch, new = input_ids.shape
        cache = self._cache_for(past_key_values, batch)
        total = cache.length + new
        if attention_mask is None:
            attention_mask = torch.ones(batch, total, dtype=torch.int64)
        if attention_mask.shape != (batch, total):
            raise ValueError(
                f"attention_mask is {list(attention_mask.shape)}; {cache.length} cached and {new} new tokens of "
                f"{batch} sequences need {[batch, total]}"
            )
        if position_ids is None:
            position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, cache.length :]
        logits = self._in_steps(cache, input_ids, attention_mask, position_ids)
        kept = logits[:, -logits_to_keep:] if logits_to_keep else logits
        return CausalLMOutputWithPast(logits=kept, past_key_values=cache if use_cache else None)  # type: ignore[arg-type]

    def _in_steps(self, cache: OnnxCache, ids_BS: Tensor, mask_BT: Tensor, positions_BS: Tensor) -> Tensor:
        """One run, or one for each token where the kernel takes several new ones behind a past in one row only."""
        batch, new = ids_BS.shape
        padded = self._counts_tokens and not bool(mask_BT.all())
        if cache.length and new > 1 and self._one_new_token and (batch > 1 or padded):
            first = cache.length + 1
            steps = [
                self._in_steps(cache, ids_BS[:, i : i + 1], mask_BT[:, : first + i], positions_BS[:, i : i + 1])
                for i in range(new)
            ]
            return torch.cat(steps, 1)
        if not padded:
            logits = self._run(cache, ids_BS, mask_BT, positions_BS)
        elif cache.length:
            if not bool(mask_BT[:, -1].all()):
                raise ValueError("attention_mask is 0 for a new token: this graph takes padding in a prompt only")
            logits = self._run(cache, ids_BS, _ones_first(mask_BT), positions_BS)
        else:
            logits = self._run_compacted(cache, ids_BS, mask_BT, positions_BS)
        cache.length += new
        return logits

    def _run_compacted(self, cache: OnnxCache, ids_BS: Tensor, mask_BS: Tensor, positions_BS: Tensor) -> Tensor:
        """The prompt with the padding behind each row's tokens; logits where the tokens were, zeros for padding."""
        order_BS = mask_BS.sort(dim=1, descending=True, stable=True).indices[:, : int(mask_BS.sum(1).max())]
        moved = self._run(cache, ids_BS.gather(1, order_BS), _ones_first(mask_BS), positions_BS.gather(1, order_BS))
        logits = moved.new_zeros(*ids_BS.shape, moved.shape[-1])
        rows, places = mask_BS.nonzero(as_tuple=True)
        logits[rows, places] = moved[rows, (mask_BS.cumsum(1) - 1)[rows, places]]
        return logits

    def _run(self, cache: OnnxCache, ids_BS: Tensor, mask_BT: Tensor, positions_BS: Tensor) -> Tensor:
        given = dict(zip(TOKENS, (ids_BS, mask_BT, positions_BS), strict=True))
        cache.held = [given[name].to(dtype).contiguous() for name, dtype in self._token_dtypes.items()]
        for name, tensor in zip(self._token_dtypes, cache.held, strict=True):
            bind_input(cache.binding, name, tensor)
        logits = torch.empty(*ids_BS.shape, self._vocab, dtype=self._logits_dtype)
        bind_output(cache.binding, LOGITS, logits)
        cache.storage.bind(mask_BT.shape[1])
        self.session.run_with_iobinding(cache.binding)
        cache.storage.keep()
        return logits

    def _cache_for(self, given: OnnxCache | Cache | None, batch: int) -> OnnxCache:
        if given is None:
            return self.new_cache(batch)
        if isinstance(given, Cache) and given not in self._standing_in:
            if given.get_seq_length():
                raise ValueError("past_key_values holds tokens of a torch model; give an empty cache, or none")
            self._standing_in[given] = self.new_cache(batch)
        cache = self._standing_in[given] if isinstance(given, Cache) else given
        if cache.batch != batch:
            raise ValueError(f"the cache is of {cache.batch} sequences, input_ids of {batch}")
        return cache


def _ones_first(mask_BT: Tensor) -> Tensor:
    """A mask with as many ones in each row, all of them in front; no wider than the longest row."""
    lengths_B1 = mask_BT.sum(1, keepdim=True)
    return (torch.arange(int(lengths_B1.max())) < lengths_B1).to(mask_BT.dtype)


def _cache_names(inputs: dict[str, Any], outputs: list[str], path: Path) -> Names:
    """Pairs of past and present, layer by layer; IntegrityError where the graph is no decoder with a cache."""
    past = [name for name in inputs if name.startswith(f"{PAST}.")]
    unknown = [name for name in inputs if name not in (*TOKENS, *past)]
    layers = {int(found[1]) for name in past if (found := re.fullmatch(rf"{PAST}\.(\d+)\.(key|value)", name))}
    names = [(f"{PAST}.{k}.{part}", f"{PRESENT}.{k}.{part}") for k in sorted(layers) for part in ("key", "value")]
    missing = [name for name in ("input_ids", "attention_mask") if name not in inputs]
    missing += [name for pair in names for name in pair if name not in (*inputs, *outputs)]
    missing += [LOGITS] if LOGITS not in outputs else []
    if not names or unknown or missing or len(names) != len(past):
        raise IntegrityError(
            f"{path} is not a decoder with a KV cache: it reads {', '.join(inputs)} and writes {', '.join(outputs)}; "
            f"expected are input_ids, attention_mask, perhaps position_ids, {PAST}.N.key|value to {LOGITS}, "
            f"{PRESENT}.N.key|value"
        )
    return names


def _cache_shape(past: Any, config: Any, path: Path) -> tuple[int, int]:
    """Key-value heads and the width of one."""
    if len(past.shape) != 4:
        raise IntegrityError(
            f"{path}: {past.name!r} has the shape {past.shape}; expected is [batch, heads, past, width]"
        )
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return (
        past.shape[1] if isinstance(past.shape[1], int) else heads,
        past.shape[3] if isinstance(past.shape[3], int) else width,
    )
