"""Run in a fresh process: load a GGUF file with transformers and write down what it computes.

`python -P reload.py FILE REQUEST RESULT`, by its path, so that nothing else of this project is imported. REQUEST holds
`ids [N, T]`, `prompt [1, P]`, and in its metadata the config and generation config of the live model; RESULT gets
float32 `logits [N, T, V]`, the greedy continuation and every parameter's product with a fixed vector.

transformers reads the file itself, but for families that its reader does not know: their tensors are read here.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

# Of the live model's config these say what it is called and kept as, not what it computes
NOT_COMPUTED = {"model_type", "architectures", "dtype", "_name_or_path", "quantization_config", "transformers_version"}
# Families that the reader of transformers 5.23 does not know (it takes Mixtral for a Llama without experts), and their
# architectures
UNKNOWN_TO_READER = {"gemma": "gemma", "mixtral": "llama", "olmoe": "olmoe"}
# What their files say of the config
KEYS = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "vocab_size": "vocab_size", "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
}  # fmt: skip


class Differs(Exception):
    """The file is not the live model; the message says in what."""


def probe(parameter: Tensor) -> Tensor:
    """The product of a weight's rows with a fixed random vector: rows or columns out of place show, at little size."""
    if parameter.dim() == 1:
        return parameter.float()
    width = parameter.shape[-1]
    vector = torch.randn(width, generator=torch.Generator().manual_seed(width))
    return (parameter.float() @ vector).contiguous()


def read_config(file: Path, expected: dict[str, Any]) -> tuple[Any, list[str]]:
    """The config that transformers reads from the file, and in words where it says another thing than the live model.

    transformers 5.23 reads a part of the keys (no width of experts, no head width of Qwen3, no rotary scaling): what it
    does not read is taken from the live model.
    """
    from transformers import AutoConfig
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    read = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    found = read.to_dict()
    mapping: dict[str, Any] = GGUF_CONFIG_MAPPING
    known = {key for key in mapping[read.model_type.removesuffix("_text")].values() if key} | {"tie_word_embeddings"}
    keys = {read.attribute_map.get(key, key) for key in known}
    wrong = _differences({key: found[key] for key in keys & found.keys()} | _theta(found), expected | _theta(expected))
    unread = found.keys() & expected.keys() - keys - NOT_COMPUTED
    return type(read).from_dict(found | {key: expected[key] for key in unread}), wrong


def load(file: Path, expected: dict[str, Any]) -> Any:
    """The model as transformers reads it; Differs where the file says another thing than the live model's config."""
    from transformers import AutoModelForCausalLM

    config, wrong = read_config(file, expected)
    if wrong:
        raise Differs("the file's metadata: " + "; ".join(wrong))
    source = {"gguf_file": file.name, "local_files_only": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, config=config, dtype=torch.float32, output_loading_info=True, **source
    )
    return _whole(*loaded)


def load_own(file: Path, expected: dict[str, Any]) -> Any:
    """The same of a family that transformers does not read: the definition of the format turned around.

    Rows of q and k back in halves, norms without the 1 that Gemma adds, gate and up in one stack.
    """
    import gguf
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture = UNKNOWN_TO_READER[expected["model_type"]]
    reader = gguf.GGUFReader(file)
    said = {name.removeprefix(f"{architecture}."): field.contents() for name, field in reader.fields.items()}
    config: Any = AutoConfig.for_model(**{key: expected[key] for key in expected.keys() - {"quantization_config"}})
    asked = {key: getattr(config, key) for key in KEYS.values() if hasattr(config, key)} | _theta(expected)
    found = {config_key: said[key] for key, config_key in KEYS.items() if key in said}
    wrong = _differences(found | {"rope_theta": said["rope.freq_base"]}, asked)
    if wrong:
        raise Differs("the file's metadata: " + "; ".join(wrong))

    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(config)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    tensors = {name: _own_tensor(name, stored, config, architecture) for name, _ in skeleton.named_parameters()}
    if left := sorted(stored.keys() - {"rope_freqs.weight"}):
        raise Differs(f"unexpected tensors: {', '.join(left[:5])}")
    loaded = type(skeleton).from_pretrained(
        None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True
    )
    return _whole(*loaded)


def _own_tensor(name: str, stored: dict[str, Any], config: Any, architecture: str) -> Tensor:
    """One parameter by its name in transformers; what it was read from is taken out of `stored`."""
    import gguf

    number = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    path, _, leaf = name.rpartition(".")
    if leaf in ("gate_up_proj", "down_proj"):
        parts = ("gate", "up") if leaf == "gate_up_proj" else ("down",)
        sources = [f"blk.{name.split('.')[2]}.ffn_{part}_exps.weight" for part in parts]
    else:
        sources = [f"{gguf.get_tensor_name_map(number, config.num_hidden_layers).get_name(path)}.{leaf}"]
    found = []
    for source in sources:
        if source not in stored:
            raise Differs(f"there is no tensor {source}")
        tensor = stored.pop(source)
        found.append(torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()))
    values = torch.cat(found, dim=1) if len(found) > 1 else found[0]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if architecture == "llama" and (count := heads.get(path.rpartition(".")[2])):
        return values.unflatten(0, (count, -1, 2)).transpose(1, 2).flatten(0, 2)
    return values - 1 if architecture == "gemma" and values.dim() == 1 else values


def main(file: str, request: str, result: str) -> int:
    """Exit 0 and a result file, or 4 and the reason on stderr."""
    from transformers import GenerationConfig

    with safe_open(request, framework="pt") as opened:
        asked = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        said = opened.metadata()
    expected = json.loads(said["config"])
    try:
        model = (load_own if expected["model_type"] in UNKNOWN_TO_READER else load)(Path(file), expected)
    except Differs as differs:
        print(differs, file=sys.stderr)
        return 4
    torch.nn.Module.float(model.eval())  # transformers refuses `model.float()` on models from such files
    model.generation_config = GenerationConfig.from_dict(json.loads(said["generation"]))
    with torch.inference_mode():
        logits = torch.cat([model(row[None]).logits for row in asked["ids"]])
        new = int(asked["new_tokens"])
        length = {"max_new_tokens": new, "min_new_tokens": new}
        greedy = model.generate(asked["prompt"], do_sample=False, pad_token_id=0, **length)
        probes = {f"probe:{name}": probe(parameter) for name, parameter in model.named_parameters()}
    save_file({"logits": logits.float().contiguous(), "greedy": greedy.contiguous()} | probes, result)
    return 0


def _whole(model: Any, info: dict[str, Any]) -> Any:
    """The model, where every tensor of the file found its place and no place stayed empty."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            raise Differs(f"{kind}: {', '.join(map(str, sorted(info[kind])[:5]))}")
    return model


def _theta(config: dict[str, Any]) -> dict[str, float]:
    """The base of the rotation; of Gemma 3, that of full attention."""
    settings = config["rope_parameters"]
    return {"rope_theta": settings.get("full_attention", settings)["rope_theta"]}


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    return [
        f"{key} is {found[key]}, the model has {expected[key]}"
        for key in sorted(found.keys() & expected.keys())
        if found[key] != expected[key] and not _close(found[key], expected[key])
    ]


def _close(one: Any, other: Any) -> bool:
    """Numbers are float32 in the file."""
    numbers = all(isinstance(value, int | float) for value in (one, other))
    return numbers and abs(one - other) <= 1e-6 * abs(other)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
