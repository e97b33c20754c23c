"""What a family of models is called and where its parts are; only exceptions from what the modules say themselves."""

from dataclasses import dataclass

from compressor.errors import UnsupportedModel


@dataclass(frozen=True)
class Family:
    """Paths inside a causal language model of transformers; `{}` of paths is relative to one decoder block."""

    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    rotary: str = "model.rotary_emb"
    head: str = "lm_head"
    # Linear layers of a block that read the same input. They share statistics, are solved as one matrix and keep one
    # scheme: servers fuse them into one kernel.
    shared_inputs: tuple[tuple[str, ...], ...] = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    )
    # Mixture-of-experts blocks
    experts: str = "mlp.experts"
    router: str = "mlp.gate"
    # Names of one expert's weights in a checkpoint: `<experts>.<number>.<name>.weight`
    expert_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    # Every config key that counts experts; the first is what the modelling code reads
    expert_counts: tuple[str, ...] = ()


FAMILIES = {
    "llama": Family(),
    "qwen3_moe": Family(expert_counts=("num_experts", "num_local_experts")),
}


def family_of(model_type: str, where: str) -> Family:
    """The table entry of a model type; UnsupportedModel names what there is."""
    try:
        return FAMILIES[model_type]
    except KeyError:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModel(f"{where}: model type {model_type!r} is not supported; supported are {known}") from None
