"""Run in a fresh process: load a GGUF file with stock transformers and write down what it computes.

`python -P reload.py FILE REQUEST RESULT`, by its path, so that nothing else of this project is imported. REQUEST holds
`ids [N, T]`, `prompt [1, P]`, and in its metadata the config and generation config of the live model; RESULT gets
float32 `logits [N, T, V]`, the greedy continuation and every parameter's product with a fixed vector.
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
    known = {key for key in mapping[read.model_type].values() if key} | {"tie_word_embeddings"}
    keys = {read.attribute_map.get(key, key) for key in known}
    wrong = [
        f"{key} is {found[key]}, the model has {expected[key]}"
        for key in sorted(keys & found.keys() & expected.keys())
        if found[key] != expected[key] and not _close(found[key], expected[key])
    ]
    theta, asked = (config["rope_parameters"]["rope_theta"] for config in (found, expected))
    if not _close(theta, asked):
        wrong.append(f"rope_theta is {theta}, the model has {asked}")
    unread = found.keys() & expected.keys() - keys - NOT_COMPUTED
    return type(read).from_dict(found | {key: expected[key] for key in unread}), wrong


def main(file: str, request: str, result: str) -> int:
    """Exit 0 and a result file, or 4 and the reason on stderr."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    with safe_open(request, framework="pt") as opened:
        asked = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        said = opened.metadata()
    path = Path(file)
    config, wrong = read_config(path, json.loads(said["config"]))
    if wrong:
        print("the file's metadata: " + "; ".join(wrong), file=sys.stderr)
        return 4
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=config, dtype=torch.float32, local_files_only=True,
        output_loading_info=True,
    )  # fmt: skip
    model, info = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            print(f"{kind}: {', '.join(map(str, sorted(info[kind])[:5]))}", file=sys.stderr)
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


def _close(one: Any, other: Any) -> bool:
    """Numbers are float32 in the file."""
    numbers = all(isinstance(value, int | float) for value in (one, other))
    return numbers and abs(one - other) <= 1e-6 * abs(other)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
