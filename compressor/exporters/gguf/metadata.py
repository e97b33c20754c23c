"""What a GGUF file says of a model beside its tensors, under llama.cpp's keys."""

from typing import Any

from compressor.exporters.gguf.architectures import (
    GEMMA3_LOCAL_THETA,
    Architecture,
    head_dim,
    local_rope,
    rope,
    slides,
    slides_as_usual,
    sliding_window,
)

# general.file_type, by what most weights are (llama.cpp's llama_ftype)
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q4_K_M": 15, "Q6_K": 18, "BF16": 32,
}  # fmt: skip
QUANTIZATION_VERSION = 2  # of the block layouts, since 2023
OWN_PATTERN = (
    "which layers have a sliding window, or their rotation, is not as in Gemma's own models: the file says it, and the "
    "llama.cpp of llama-cpp-python 0.3.36 reads it; older ones may compute as if it were"
)


def add_metadata(
    writer: Any, config: Any, architecture: Architecture, *, name: str, licence: str | None, file_type: str
) -> None:
    """Put general and architecture keys into a GGUFWriter."""
    writer.add_type("model")
    writer.add_name(name)
    if licence:
        writer.add_license(licence)
    writer.add_quantized_by("compressor")
    writer.add_file_type(FILE_TYPES[file_type])
    writer.add_quantization_version(QUANTIZATION_VERSION)

    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_rope(writer, rope(config), head_dim(config))
    if architecture.gates is not None:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if width := getattr(config, "moe_intermediate_size", None):  # else it is the feed-forward length
            writer.add_expert_feed_forward_length(width)
        if shared := getattr(config, "shared_expert_intermediate_size", None):
            writer.add_expert_shared_feed_forward_length(shared)
    if config.model_type in ("gemma2", "gemma3_text"):
        writer.add_sliding_window(config.sliding_window)  # however long: without it the runtime takes another
        if config.final_logit_softcapping is not None:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    elif architecture.stores_window and (window := sliding_window(config)):
        writer.add_sliding_window(window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.model_type == "gemma3_text":
        writer.add_rope_freq_base_swa(local_rope(config)["rope_theta"])
        if not slides_as_usual(config):
            writer.add_sliding_window_pattern(slides(config))


def unsaid(config: Any, architecture: Architecture) -> list[str]:
    """What the config says and the file's runtime will not do, in words."""
    if config.model_type == "gemma3_text":
        usual = slides_as_usual(config) and local_rope(config)["rope_theta"] == GEMMA3_LOCAL_THETA
        return [] if usual else [OWN_PATTERN]
    window = sliding_window(config)
    if window and not architecture.stores_window:
        return [
            f"attention reaches {window} tokens back in this model, any number in the file's runtime: contexts beyond "
            f"{window} tokens are computed another way"
        ]
    return []


def _add_rope(writer: Any, settings: dict[str, Any], width: int) -> None:
    import gguf

    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(settings["rope_theta"])
    if settings.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(settings["factor"])
