import importlib.util
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "train_tiny_moe.py"


def test_a_few_steps_give_a_folder_that_transformers_loads(tmp_path, monkeypatch):
    """Two steps on two texts: a bf16 Qwen3-MoE of the asked shape, a lossless tokenizer, a perplexity for each text."""
    for name in ("letters", "numbers"):
        lines = (f"{name} {i} are {i * i % 97} of {i % 7}, naïvely\n" for i in range(1500))
        (tmp_path / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
    out = tmp_path / "model"
    texts = [str(tmp_path / "letters.txt"), str(tmp_path / "numbers.txt")]
    shape = ["--layers", "2", "--width", "128", "--experts", "4", "--top-k", "2", "--vocab", "400"]
    size = ["--steps", "2", "--batch", "2", "--length", "32"]
    monkeypatch.setattr(sys, "argv", ["train_tiny_moe.py", "--text", *texts, "--out", str(out), *shape, *size])
    spec = importlib.util.spec_from_file_location("benchmark_train_tiny_moe", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.config.num_experts == 4
    assert not model.config.output_router_logits
    assert model.model.layers[1].mlp.experts.gate_up_proj.shape == (4, 2 * 64, 128)
    assert tokenizer.decode(tokenizer("42 naïve 猫")["input_ids"]) == "42 naïve 猫"
    figures = json.loads((out / "perplexity.json").read_text())["perplexity"]
    assert set(figures) == {"letters", "numbers"}
    assert all(1 < value < 1000 for value in figures.values())
    held_out, calibration = ((out / part / "letters.txt").read_text() for part in ("held_out", "calibration"))
    assert held_out not in calibration
