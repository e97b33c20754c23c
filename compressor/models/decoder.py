"""What is needed to compute a decoder without its modelling code: read off config and modules, refused where it would
be a guess. The ONNX writer and our own decoding loop are made of it.

D model width, H query heads, R rotary frequencies.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.errors import UnsupportedModel
from compressor.models.anatomy import Block
from compressor.models.model import Model

DESCRIBED = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3",
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe",
)  # fmt: skip
# Families that mask each layer by `layer_types`, and those that mask all by `sliding_window`; others read neither.
BY_LAYER = ("gemma2", "gemma3_text", "qwen2", "qwen2_moe", "qwen3")
WINDOWED = ("mistral", "mixtral", "phi3", "qwen3_moe")
# Norms whose weight is what is added to 1.
OFFSET_NORMS = ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm")
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# Frequencies of these depend on nothing but the config; others change with the length of the prompt.
FIXED_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Rotary:
    """Frequencies `[R]` and the factor that cos and sin are multiplied by."""

    frequencies_R: Tensor
    scaling: float


@dataclass(frozen=True)
class Decoder:
    """The numbers that a decoder is made of."""

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    longest: int
    eps: float
    activation: str
    softcap: float
    final_softcap: float | None
    clip_qkv: float | None
    embedding_scale: float | None
    rotary: dict[str, Rotary]
    layer_types: tuple[str, ...]
    window: int | None

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    def window_of(self, layer: int) -> int:
        """Keys that a query of a layer sees, itself included; -1 for all of them."""
        return self.window if self.window and self.layer_types[layer] == "sliding_attention" else -1


def describe_decoder(model: Model) -> Decoder:
    """What a model's config and modules say; UnsupportedModel for families and settings that are not described.

    Nothing is read but config, the skeleton and the rotary module.
    """
    config = model.config
    if config.model_type not in DESCRIBED:
        raise UnsupportedModel(
            f"{model.name}: what {config.model_type!r} computes is not described; described are {', '.join(DESCRIBED)}"
        )
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in ACTIVATIONS:
        raise UnsupportedModel(f"{model.name}: hidden_act {activation!r}; possible are {', '.join(ACTIVATIONS)}")
    layer_types = tuple(config.layer_types if config.model_type in BY_LAYER else _uniform_types(config))
    if odd := set(layer_types) - {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(f"{model.name}: layers of type {', '.join(sorted(odd))} are not described")
    heads = config.num_attention_heads
    return Decoder(
        hidden_size=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        longest=config.max_position_embeddings,
        eps=config.rms_norm_eps,
        activation=ACTIVATIONS[activation],
        softcap=getattr(config, "attn_logit_softcapping", None) or 0.0,
        final_softcap=getattr(config, "final_logit_softcapping", None),
        clip_qkv=getattr(config, "clip_qkv", None),
        embedding_scale=config.hidden_size**0.5 if config.model_type.startswith("gemma") else None,
        rotary=_rotary(model, layer_types),
        layer_types=layer_types,
        window=getattr(config, "sliding_window", None) if "sliding_attention" in layer_types else None,
    )


def attention_scale(block: Block, decoder: Decoder) -> float:
    """What the products of queries and keys are multiplied by."""
    attention: Any = block.module.self_attn
    return float(getattr(attention, "scaling", decoder.head_dim**-0.5))


def norm_weight(norm: Any) -> Tensor:
    """The factor of an RMS norm in float32; Gemma stores what is added to 1."""
    weight = norm.weight.detach().float()
    return weight + 1 if type(norm).__name__ in OFFSET_NORMS else weight


def _uniform_types(config: Any) -> list[str]:
    window = config.sliding_window if config.model_type in WINDOWED else None
    return ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers


def _rotary(model: Model, layer_types: tuple[str, ...]) -> dict[str, Rotary]:
    """By layer type: one module holds the frequencies of all of them, or of each (Gemma 3)."""
    module: Any = model.skeleton.get_submodule(model.family.rotary)
    found = {}
    for kind in dict.fromkeys(layer_types):
        own = hasattr(module, f"{kind}_inv_freq")
        prefix = f"{kind}_" if own else ""
        rope_type = module.rope_type[kind] if own else module.rope_type
        if rope_type not in FIXED_ROPE:
            raise UnsupportedModel(
                f"{model.name}: rope_type {rope_type!r} changes with the prompt's length, which a table cannot hold; "
                f"possible are {', '.join(FIXED_ROPE)}"
            )
        frequencies = getattr(module, f"{prefix}inv_freq")
        found[kind] = Rotary(frequencies.to(torch.float32), float(getattr(module, f"{prefix}attention_scaling")))
    return found
