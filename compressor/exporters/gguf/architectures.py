"""Which architecture of llama.cpp a family of models is, and what that architecture takes for granted."""

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


ARCHITECTURES = {
    "gemma2": Architecture("gemma2", norm_offset=1.0, activation="gelu_pytorch_tanh", stores_window=True),
    "llama": Architecture("llama", interleaved=True),
    "mistral": Architecture("llama", interleaved=True),
    "phi3": Architecture("phi3", stores_window=True),
    "qwen2": Architecture("qwen2"),
    "qwen2_moe": Architecture("qwen2moe", gates="as they are"),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe", gates="normalised"),
}
ROPE_TYPES = ("default", "linear", "llama3")
GEMMA2_27B_LAYERS = 46


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
    """The rotary settings: rope_type, rope_theta and whatever its type needs."""
    return dict(config.rope_parameters)


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
        found.append("rope_type llama3: only llama and mistral have it in GGUF")
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        found.append("partial rotation of heads (partial_rotary_factor)")
    activation = getattr(config, "hidden_act", None) or config.hidden_activation
    if activation != architecture.activation:
        found.append(f"activation {activation}: its runtime computes {architecture.activation}")
    if architecture.gates is not None:
        if config.norm_topk_prob != (architecture.gates == "normalised"):
            found.append(
                f"norm_topk_prob {str(config.norm_topk_prob).lower()}: its runtime takes the gates {architecture.gates}"
            )
        if config.mlp_only_layers or config.decoder_sparse_step != 1:
            found.append("layers without experts (mlp_only_layers, decoder_sparse_step): its runtime expects none")
    if config.model_type == "gemma2":
        found += _gemma2_problems(config)
    return found


def _gemma2_problems(config: Any) -> list[str]:
    found = []
    wide = config.num_hidden_layers == GEMMA2_27B_LAYERS  # how its runtime tells the 27B model
    scale = config.hidden_size // config.num_attention_heads if wide else head_dim(config)
    if config.query_pre_attn_scalar != scale:
        found.append(f"query_pre_attn_scalar {config.query_pre_attn_scalar}: its runtime computes with {scale}")
    alternating = ["sliding_attention", "full_attention"] * config.num_hidden_layers
    if config.layer_types != alternating[: config.num_hidden_layers]:
        found.append("layer_types other than sliding and full in turn")
    return found
