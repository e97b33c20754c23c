"""The dense checkpoint: `dense.py make GGUF OUT` writes the bf16 folder, `dense.py CONFIG` is the baseline's worker.

Runs in the project's own environment (transformers' GGUF loader needs the package `gguf`).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import protocol


def make(gguf: Path, out: Path) -> None:
    """Dequantize a GGUF file into a bf16 safetensors folder with its tokenizer, the common source of all tools."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    # transformers >= 5.23 counts a model read from GGUF as quantized and refuses to save it, dequantized or not: its
    # weights go into a model of the plain configuration. A packed tensor would not fit and raise here.
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**source), dtype=torch.bfloat16)
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)


def main() -> None:
    """Evaluate the model as it is: nothing is quantized, so the times and the peak of a pass are null."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = protocol.read_config()
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    model = AutoModelForCausalLM.from_pretrained(config["model"], dtype=torch.bfloat16)
    result = {"load_seconds": time.perf_counter() - started, "seconds": None, "cpu_seconds": None, "peak_bytes": None}
    result["file_bytes"] = protocol.weight_file_bytes(config["model"])
    result.update(protocol.evaluate(model, tokenizer, config))
    protocol.write_result(config, result, ("torch", "transformers"))


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
