"""genai_config.json: how onnxruntime-genai finds inputs, outputs, lengths and the tokens that end a text."""

import json
from pathlib import Path
from typing import Any

from compressor.exporters.onnx.architecture import Decoder

# What onnxruntime-genai calls the families whose graphs it drives alike; others go by their own name.
TYPES = {"gemma3_text": "gemma3_text"}


def genai_config(folder: Path, config: dict[str, Any], decoder: Decoder) -> dict[str, Any]:
    """The file's content, from the model's config and the generation config that lies in the folder."""
    generation = _read(folder / "generation_config.json")
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    bos = generation.get("bos_token_id", config.get("bos_token_id"))
    first_eos = eos[0] if isinstance(eos, list) else eos
    pad = generation.get("pad_token_id", config.get("pad_token_id"))
    context = config.get("max_position_embeddings", 4096)
    return {
        "model": {
            "bos_token_id": bos,
            "context_length": context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": decoder.head_dim,
                "hidden_size": decoder.hidden_size,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": decoder.heads,
                "num_hidden_layers": decoder.num_layers,
                "num_key_value_heads": decoder.kv_heads,
            },
            "eos_token_id": eos,
            "pad_token_id": pad if pad is not None else first_eos,
            "type": TYPES.get(config["model_type"], config["model_type"]),
            "vocab_size": decoder.vocab_size,
        },
        "search": {
            "diversity_penalty": 0.0,
            "do_sample": bool(generation.get("do_sample", False)),
            "early_stopping": True,
            "length_penalty": 1.0,
            "max_length": context,
            "min_length": 0,
            "no_repeat_ngram_size": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": float(generation.get("temperature") or 1.0),
            "top_k": int(generation.get("top_k") or 50),
            "top_p": float(generation.get("top_p") or 1.0),
        },
    }


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
