"""Random two-layer models and a byte tokenizer, saved like a checkpoint of the hub: no downloads."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 257  # the 256 bytes and <eos>
EOS = 256
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.15,
    "eos_token_id": EOS, "pad_token_id": EOS, "tie_word_embeddings": False,
}  # fmt: skip


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte of UTF-8, so that windows of text can be counted by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(alphabet)} | {"<eos>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


MOE = {"num_experts_per_tok": 2, "norm_topk_prob": True}
# What each family needs beside COMMON; names are transformers' model types
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": {"intermediate_size": 128},
    "gemma2": {
        "intermediate_size": 128, "sliding_window": 8, "query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        "intermediate_size": 128, "sliding_window": 8, "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "llama": {"intermediate_size": 128},
    "mistral": {"intermediate_size": 128, "sliding_window": None},
    "mixtral": {"intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2},
    "olmoe": MOE | {"intermediate_size": 32, "num_experts": 8, "clip_qkv": 1.0},
    "phi3": {"intermediate_size": 128},
    "qwen2": {"intermediate_size": 128},
    "qwen2_moe": MOE | {
        "intermediate_size": 128, "num_experts": 8, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 96,
    },
    "qwen3": {"intermediate_size": 128},
    "qwen3_moe": MOE | {"intermediate_size": 128, "num_experts": 8, "moe_intermediate_size": 32},
}  # fmt: skip


def tiny_model(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> Any:
    """Two layers of a family in FAMILIES, hidden width 64; weights large enough that layers and routing matter."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **COMMON | FAMILIES[family] | settings)
    model: Any = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # not model.to(): rotary frequencies are float32 in a bfloat16 model
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def rough_vectors(model: Any) -> Any:
    """The model with norms and biases that are not the ones and zeros that they start as."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.data = (parameter.float() + noise).to(parameter.dtype)
    return model


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
