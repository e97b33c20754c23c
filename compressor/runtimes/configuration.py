"""The configuration beside a graph: transformers' own files, or what onnxruntime-genai's builder writes instead."""

import json
from pathlib import Path
from typing import Any

from compressor.errors import EnvironmentProblem, UnsupportedModel

GENAI = "genai_config.json"


def read_config(folder: Path) -> Any:
    """A transformers configuration: of `config.json`, or the sizes that `genai_config.json` names."""
    from transformers import AutoConfig

    try:
        if (folder / "config.json").is_file():
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = _genai(folder)
        if model is None:
            raise EnvironmentProblem(f"{folder}: no config.json beside the graph, and no {GENAI}")
        decoder = model["decoder"]
        return AutoConfig.for_model(
            model["type"],
            vocab_size=model["vocab_size"],
            max_position_embeddings=model["context_length"],
            bos_token_id=model.get("bos_token_id"),
            eos_token_id=model.get("eos_token_id"),
            pad_token_id=model.get("pad_token_id"),
            hidden_size=decoder["hidden_size"],
            head_dim=decoder["head_size"],
            num_hidden_layers=decoder["num_hidden_layers"],
            num_attention_heads=decoder["num_attention_heads"],
            num_key_value_heads=decoder["num_key_value_heads"],
        )
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModel(f"{folder}: transformers does not read the configuration: {error!r}") from error


def read_generation_config(folder: Path) -> Any:
    """What ends a text: of `generation_config.json`, else the token that the other files name."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    config = read_config(folder)
    return GenerationConfig(eos_token_id=getattr(config, "eos_token_id", None))


def _genai(folder: Path) -> dict[str, Any] | None:
    """What onnxruntime-genai is told of the model."""
    path = folder / GENAI
    return json.loads(path.read_text(encoding="utf-8"))["model"] if path.is_file() else None
