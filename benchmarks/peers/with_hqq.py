"""HQQ on the common protocol: no calibration, asymmetric 4-bit groups along the inputs (axis 1).

The file is not called hqq.py because a script's folder comes first on the path and would hide the package. HQQ has no
format that stock transformers loads without hqq, so the quantized model is evaluated as it lies in memory (each layer
dequantizes to bf16 and multiplies); its own file is written for the size only. Zero points are stored beside the
scales, so it spends more bits than the symmetric tools.
"""

from __future__ import annotations

import time

import protocol
import torch
from hqq.core.quantize import BaseQuantizeConfig
from hqq.models.hf.base import AutoHQQHFModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Quantize (measured), save, evaluate."""
    config = protocol.read_config()
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    model = AutoModelForCausalLM.from_pretrained(config["model"], dtype=torch.bfloat16)
    result = {"load_seconds": time.perf_counter() - started, "calibration_tokens": None}
    scheme = BaseQuantizeConfig(nbits=config["bits"], group_size=config["group_size"], axis=1)

    with protocol.measured() as figures:
        AutoHQQHFModel.quantize_model(model, quant_config=scheme, compute_dtype=torch.bfloat16, device="cpu")
    result.update(figures)

    started = time.perf_counter()
    AutoHQQHFModel.save_quantized(model, config["out"])
    result["save_seconds"] = time.perf_counter() - started
    result["file_bytes"] = protocol.weight_file_bytes(config["out"])
    result.update(protocol.evaluate(model, tokenizer, config))
    protocol.write_result(config, result, ("hqq", "torch", "transformers"))


if __name__ == "__main__":
    main()
