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
        ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    )
    # Mixture-of-experts blocks. A shared expert sees every token, weighted by a gate of one output.
    experts: str = "mlp.experts"
    router: str = "mlp.gate"
    shared_expert: str = "mlp.shared_expert"
    shared_gate: str = "mlp.shared_expert_gate"
    # The same two in a checkpoint, and the names of one expert's gate, up and down there:
    # `<experts_on_disk>.<number>.<name>.weight`
    experts_on_disk: str = "mlp.experts"
    router_on_disk: str = "mlp.gate"
    expert_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    # Every config key that counts experts; the first is what the modelling code reads
    expert_counts: tuple[str, ...] = ()


FAMILIES = {
    "gemma": Family(),
    "gemma2": Family(),
    "gemma3_text": Family(),
    "llama": Family(),
    "mistral": Family(),
    "mixtral": Family(
        experts_on_disk="block_sparse_moe.experts",
        router_on_disk="block_sparse_moe.gate",
        expert_names=("w1", "w3", "w2"),
        expert_counts=("num_local_experts",),
    ),
    "olmoe": Family(expert_counts=("num_experts",)),
    "phi3": Family(),  # q, k, v and gate, up come fused: `qkv_proj` and `gate_up_proj` are sites like any other
    "qwen2": Family(),
    "qwen2_moe": Family(expert_counts=("num_experts",)),
    "qwen3": Family(),
    "qwen3_moe": Family(expert_counts=("num_experts", "num_local_experts")),
}


def family_of(model_type: str, where: str) -> Family:
    """The table entry of a model type; UnsupportedModel names what there is."""
    try:
        return FAMILIES[model_type]
    except KeyError:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModel(f"{where}: model type {model_type!r} is not supported; supported are {known}") from None
