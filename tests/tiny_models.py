"""Random two-layer models and a byte tokenizer, saved like a checkpoint of the hub: no downloads."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCAB = 257  # the 256 bytes and <eos>
EOS = 256


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte of UTF-8, so that windows of text can be counted by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(alphabet)} | {"<eos>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def tiny_model(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> Any:
    """A `llama` or `qwen3_moe` of two layers, hidden width 64; weights large enough that layers and routing matter."""
    common = {
        "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.15,
        "eos_token_id": EOS, "pad_token_id": EOS, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(seed)
    if family == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**common | {"intermediate_size": 128} | settings))
    else:
        experts = {
            "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "intermediate_size": 128,
            "norm_topk_prob": True,
        }  # fmt: skip
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**common | experts | settings))
    for parameter in model.parameters():  # not model.to(): rotary frequencies are float32 in a bfloat16 model
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def save_tiny(
    folder: Path,
    family: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shard: str = "5GB",
    model: Any = None,
    **settings: Any,
) -> Path:
    """Save a tiny model (or the one given) with its tokenizer; returns the folder."""
    model = tiny_model(family, dtype=dtype, seed=seed, **settings) if model is None else model
    model.save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


def tiny_ids(windows: int = 8, length: int = 32, seed: int = 0) -> Tensor:
    """Random token ids `[N, T]`."""
    return torch.randint(0, VOCAB - 1, (windows, length), generator=torch.Generator().manual_seed(seed))
