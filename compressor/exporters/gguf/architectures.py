"""Which architecture of llama.cpp a family of models is, and what that architecture takes for granted."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compressor.errors import UnsupportedModel


@dataclass(frozen=True)
class Architecture:
    """What GGUF calls a family, and how its tensors differ from those of transformers."""

    name: str  # general.architecture
    # Rows of q and k are stored with the two halves of a head interleaved: llama.cpp rotates neighbours, transformers
    # halves. Families that llama.cpp added later rotate halves.
    interleaved: bool = False
    norm_offset: float = 0.0  # added to every norm's weight
    activation: str = "silu"
    gates: str | None = None  # of experts: whether the runtime divides a token's by their sum; None: no experts
    stores_window: bool = False  # whether its runtime limits attention to the sliding window
    tied: bool | None = None  # whether its runtime takes the embedding for the output; None: if the file has none


ARCHITECTURES = {
    "gemma": Architecture("gemma", norm_offset=1.0, activation="gelu_pytorch_tanh", tied=True),
    "gemma2": Architecture("gemma2", norm_offset=1.0, activation="gelu_pytorch_tanh", stores_window=True, tied=True),
    "gemma3_text": Architecture("gemma3", norm_offset=1.0, activation="gelu_pytorch_tanh", stores_window=True),
    "llama": Architecture("llama", interleaved=True),
    "mistral": Architecture("llama", interleaved=True),
    "mixtral": Architecture("llama", interleaved=True, gates="normalised"),
    "olmoe": Architecture("olmoe", gates="as they are", tied=False),
    "phi3": Architecture("phi3", stores_window=True),
    "qwen2": Architecture("qwen2"),
    "qwen2_moe": Architecture("qwen2moe", gates="as they are", tied=False),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe", gates="normalised"),
}
ROPE_TYPES = ("default", "linear", "llama3")
# How a runtime tells the 27B models, whose attention it scales by hidden size over heads
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3_text": 62}
GEMMA3_LOCAL_THETA = 10000.0  # of layers with a sliding window, where the file says nothing


def architecture_of(config: Any) -> Architecture:
    """The table's entry of a model, once it is sure that llama.cpp computes the same.

    UnsupportedModel names what the file cannot say: the family, or the setting of the config.
    """
    try:
        architecture = ARCHITECTURES[config.model_type]
    except KeyError:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedModel(
            f"export.gguf: model type {config.model_type!r} is not possible in this version; possible are {known}"
        ) from None
    for problem in _problems(config, architecture):
        raise UnsupportedModel(f"export.gguf: {config.model_type} with {problem}")
    return architecture


def head_dim(config: Any) -> int:
    """Width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope(config: Any) -> dict[str, Any]:
    """The rotary settings: rope_type, rope_theta and whatever its type needs; of Gemma 3, those of full attention."""
    settings = dict(config.rope_parameters)
    return dict(settings.get("full_attention", settings))


def local_rope(config: Any) -> dict[str, Any]:
    """The rotary settings of Gemma 3's layers with a sliding window."""
    return dict(config.rope_parameters["sliding_attention"])


def slides(config: Any) -> list[bool]:
    """Which of Gemma 3's layers have a sliding window."""
    return [kind == "sliding_attention" for kind in config.layer_types]


def slides_as_usual(config: Any) -> bool:
    """Whether each sixth layer is without one, as the runtime assumes where the file says nothing."""
    return slides(config) == [layer % 6 < 5 for layer in range(config.num_hidden_layers)]


def sliding_window(config: Any) -> int | None:
    """Tokens that some layers' attention is limited to, or None; shorter contexts never notice."""
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return None
    return window if window < config.max_position_embeddings else None


def _problems(config: Any, architecture: Architecture) -> list[str]:
    """What this architecture's runtime does another way, in words."""
    found = []
    settings = rope(config)
    if settings.get("rope_type", "default") not in ROPE_TYPES:
        found.append(f"rope_type {settings['rope_type']}: possible are {', '.join(ROPE_TYPES)}")
    if settings.get("rope_type") == "llama3" and architecture.name != "llama":
        found.append("rope_type llama3: only llama, mistral and mixtral have it in GGUF")
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        found.append("partial rotation of heads (partial_rotary_factor)")
    activation = getattr(config, "hidden_act", None) or config.hidden_activation
    if activation != architecture.activation:
        found.append(f"activation {activation}: its runtime computes {architecture.activation}")
    if architecture.tied is not None and config.tie_word_embeddings != architecture.tied:
        output = "the embedding for its output" if architecture.tied else "an output beside the embedding"
        found.append(f"tie_word_embeddings {str(config.tie_word_embeddings).lower()}: its runtime takes {output}")
    if getattr(config, "attention_bias", False) and architecture.name != "llama":
        found.append("attention_bias true: its runtime has no biases there")
    if getattr(config, "use_bidirectional_attention", False):
        found.append("use_bidirectional_attention true: its runtime looks back only")
    if architecture.gates is not None:
        normalised = getattr(config, "norm_topk_prob", True)  # Mixtral has no choice
        if normalised != (architecture.gates == "normalised"):
            found.append(f"norm_topk_prob {str(normalised).lower()}: its runtime takes the gates {architecture.gates}")
        if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
            found.append("layers without experts (mlp_only_layers, decoder_sparse_step): its runtime expects none")
    return found + FAMILY_PROBLEMS.get(config.model_type, lambda _: [])(config)


def _gemma2_problems(config: Any) -> list[str]:
    found = _window_and_scale_problems(config)
    alternating = ["sliding_attention", "full_attention"] * config.num_hidden_layers
    if config.layer_types != alternating[: config.num_hidden_layers]:
        found.append("layer_types other than sliding and full in turn")
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, cap) is None:
            found.append(f"{cap} null: its runtime always bends these logits")
    return found


def _gemma3_problems(config: Any) -> list[str]:
    found = _window_and_scale_problems(config)
    if not any(slides(config)):
        found.append("layer_types without sliding attention: its runtime expects some")
    if local_rope(config).get("rope_type", "default") != "default":
        found.append("scaled rotation in layers with a sliding window: its runtime scales full attention only")
    if config.attn_logit_softcapping is not None:
        found.append(f"attn_logit_softcapping {config.attn_logit_softcapping}: its runtime has none")
    return found


def _window_and_scale_problems(config: Any) -> list[str]:
    found = []
    if not config.sliding_window:
        found.append(f"sliding_window {config.sliding_window}: its runtime needs one")
    wide = config.num_hidden_layers == GEMMA_27B_LAYERS[config.model_type]
    scale = config.hidden_size // config.num_attention_heads if wide else head_dim(config)
    if config.query_pre_attn_scalar != scale:
        found.append(f"query_pre_attn_scalar {config.query_pre_attn_scalar}: its runtime computes with {scale}")
    return found


def _olmoe_problems(config: Any) -> list[str]:
    found = []
    if config.clip_qkv is not None:
        found.append(f"clip_qkv {config.clip_qkv}: its runtime clips nothing")
    if config.num_key_value_heads != config.num_attention_heads:
        found.append(
            f"num_key_value_heads {config.num_key_value_heads}: its runtime expects one for each of the "
            f"{config.num_attention_heads} heads"
        )
    if config.num_attention_heads * head_dim(config) != config.hidden_size:
        found.append(f"head_dim {head_dim(config)}: its runtime expects hidden_size over heads")
    return found


FAMILY_PROBLEMS: dict[str, Callable[[Any], list[str]]] = {
    "gemma2": _gemma2_problems, "gemma3_text": _gemma3_problems, "olmoe": _olmoe_problems,
}  # fmt: skip
