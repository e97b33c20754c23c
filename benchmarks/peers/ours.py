"""compressor on the common protocol: one recipe through `cx.run`, the exported folder loaded back by transformers.

Runs in the environment that peers.py itself runs in. The figures of the pass are the ones that the run reports for its
step `quantize`; `run_*` are those of the whole run (baseline evaluation, export, load-back included), for orientation.
Before the perplexity is taken the run's model is gone: the folder on disk is what is judged, as for the other tools.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path

import protocol
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import compressor as cx


def recipe(config: dict) -> dict:
    """The recipe that says what the protocol says."""
    calibration, evaluation = config["calibration"], config["evaluation"]
    quantize = {
        "method": config["method"],
        "bits": config["bits"],
        "group_size": config["group_size"],
        "symmetric": True,
    }
    return {
        "model": config["model"],
        "seed": 0,
        "calibration": {
            "data": calibration["text"],
            "samples": calibration["samples"],
            "length": calibration["length"],
        },
        "passes": [{"quantize": quantize}],
        "evaluate": {
            "when": "end",
            "text": {"wikitext2": evaluation["text"]},
            "windows": evaluation["windows"],
            "length": evaluation["length"],
            "latency": False,
        },
        "export": ["safetensors"],
    }


def main() -> None:
    """Run the recipe (it measures its step `quantize`), load the export with stock transformers, evaluate."""
    config = protocol.read_config()
    work = Path(config["out"])
    work.mkdir(parents=True, exist_ok=True)
    recipe_path, out = work / "recipe.yaml", work / "run"
    recipe_path.write_text(json.dumps(recipe(config), indent=1), encoding="utf-8")  # JSON is YAML

    with protocol.measured() as figures:
        cx.run(str(recipe_path), out=str(out))
    gc.collect()
    step = next(s for s in json.loads((out / "report.json").read_text("utf-8"))["steps"] if s["name"] == "quantize")
    result = {
        "seconds": step["seconds"],
        "cpu_seconds": step["cpu_seconds"],
        "peak_bytes": step["peak_memory_bytes"],
        "run_seconds": figures["seconds"],
        "run_cpu_seconds": figures["cpu_seconds"],
        "run_peak_bytes": figures["peak_bytes"],
        "file_bytes": protocol.weight_file_bytes(out / "model"),
    }

    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    loaded = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.bfloat16)
    result.update(protocol.evaluate(loaded, tokenizer, config))
    protocol.write_result(config, result, ("compressed-tensors", "torch", "transformers"))


if __name__ == "__main__":
    main()
