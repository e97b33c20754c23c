"""llm-compressor on the common protocol: GPTQ or round-to-nearest, saved compressed, loaded back by transformers.

The file is not called llmcompressor.py because a script's folder comes first on the path and would hide the package.
Everything that the protocol does not fix stays at the tool's defaults (GPTQ: static activation order, damping 0.01,
blocks of 128 columns, sequential over decoder layers, batch 1). Calibration windows must arrive as a datasets.Dataset
with an `input_ids` column (or a DataLoader); anything else is tokenized again as text.
"""

from __future__ import annotations

import time

import protocol
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def recipe(config: dict) -> GPTQModifier | QuantizationModifier:
    """Symmetric integer weights in groups along the inputs, all Linear layers except lm_head."""
    weights = {
        "num_bits": config["bits"],
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": config["group_size"],
    }
    modifier = {"gptq": GPTQModifier, "rtn": QuantizationModifier}[config["method"]]
    return modifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])


def calibration_arguments(config: dict, tokenizer: object) -> tuple[dict, str | None]:
    """The dataset arguments of oneshot and the digest of the tokens; round-to-nearest takes none."""
    if config["method"] == "rtn":
        return {}, None
    settings = config["calibration"]
    windows = protocol.token_windows(settings["text"], tokenizer, settings["length"], settings["samples"])
    columns = {"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()}
    arguments = {
        "dataset": Dataset.from_dict(columns),
        "num_calibration_samples": settings["samples"],
        "max_seq_length": settings["length"],
        "shuffle_calibration_samples": False,
    }
    return arguments, protocol.digest(windows)


def main() -> None:
    """Quantize (measured), save, load the saved folder with stock transformers, evaluate."""
    config = protocol.read_config()
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    model = AutoModelForCausalLM.from_pretrained(config["model"], dtype=torch.bfloat16)
    arguments, calibration_tokens = calibration_arguments(config, tokenizer)
    result = {"load_seconds": time.perf_counter() - started, "calibration_tokens": calibration_tokens}

    with protocol.measured() as figures:
        oneshot(model=model, tokenizer=tokenizer, recipe=recipe(config), **arguments)
    result.update(figures)

    started = time.perf_counter()
    model.save_pretrained(config["out"], save_compressed=True)
    tokenizer.save_pretrained(config["out"])
    result["save_seconds"] = time.perf_counter() - started
    result["file_bytes"] = protocol.weight_file_bytes(config["out"])
    del model

    loaded = AutoModelForCausalLM.from_pretrained(config["out"], dtype=torch.bfloat16)
    result.update(protocol.evaluate(loaded, tokenizer, config))
    protocol.write_result(config, result, ("llmcompressor", "compressed-tensors", "torch", "transformers"))


if __name__ == "__main__":
    main()
