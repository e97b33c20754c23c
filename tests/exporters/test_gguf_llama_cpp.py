"""GGUF files in the runtime that they are made for, where there is one.

$COMPRESSOR_LLAMA_PYTHON names the interpreter of an environment with llama-cpp-python (`pip install llama-cpp-python`
compiles llama.cpp: 13 minutes on one core).
"""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from compressor.exporters.gguf.architectures import ARCHITECTURES
from tests.exporters.gguf_models import (
    TEXT,
    byte_level_tokenizer,
    exported,
    gemma_tokenizer,
    quantized,
    sentencepiece_tokenizer,
    tiny_gguf_model,
)

PYTHON = os.environ.get("COMPRESSOR_LLAMA_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="COMPRESSOR_LLAMA_PYTHON names no environment with llama.cpp")
# Plain kernels: repacked weights use AMX, which ends in an illegal instruction on some virtual machines. Keys and
# values in float32 (type 0), as in the live model.
READER = """
import json, sys
import llama_cpp
defaults = llama_cpp.llama_model_default_params
def plain():
    parameters = defaults()
    parameters.use_extra_bufts = False
    return parameters
llama_cpp.llama_cpp.llama_model_default_params = plain
asked = json.load(open(sys.argv[2]))
llama = llama_cpp.Llama(sys.argv[1], n_ctx=64, n_batch=64, n_ubatch=64, logits_all=True, verbose=False, n_threads=1,
                        type_k=0, type_v=0, flash_attn=False)
ids = [llama.tokenize(text.encode(), add_bos=True, special=True) for text in asked["texts"]]
llama.eval(asked["ids"])
logits = llama.scores[: len(asked["ids"])].tolist()
json.dump({"logits": logits, "ids": ids}, open(sys.argv[3], "w"))
"""
VOCABULARY = {"vocab_size": 280, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
# Relative. Gemma's float16 table: a sum in another order falls on the other side of a step now and then
EXACT, TABLE = 1e-5, 5e-4
IDS = torch.randint(2, 260, (48,), generator=torch.Generator().manual_seed(0))
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
CASES = [(family, {}) for family in sorted(ARCHITECTURES)]
GEMMA3 = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
WINDOWS = ["full_attention", "sliding_attention", "sliding_attention"]
CASES += [
    ("gemma3_text", {"rope_parameters": GEMMA3, "num_hidden_layers": 3, "layer_types": WINDOWS}),
    ("gemma3_text", {"final_logit_softcapping": 3.0, "tie_word_embeddings": True}),
    ("mixtral", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("qwen2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
]


def read(file: Path, texts: list[str]) -> dict:
    """Logits `[T, V]` of IDS and the ids of texts, by llama.cpp."""
    request, result = file.with_suffix(".ask.json"), file.with_suffix(".json")
    request.write_text(json.dumps({"ids": IDS.tolist(), "texts": texts}))
    command = [str(PYTHON), "-c", READER, str(file), str(request), str(result)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(result.read_text())


def relative(found: list, expected: torch.Tensor) -> float:
    """Largest difference of a token's logits relative to their size."""
    return float(((torch.tensor(found) - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def named(family: str, **settings):
    """A tiny model that llama.cpp does not know by its name (it treats tokens of "phi3" another way)."""
    model = tiny_gguf_model(family, **VOCABULARY | settings)
    model.tokenizer = byte_level_tokenizer()
    model.source = dataclasses.replace(model.source, name="tiny")
    return model


class TableGelu(torch.nn.Module):
    """Gemma's activation as ggml's CPU computes it: a table from float16 to float16, but for its ends."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, table))


@pytest.mark.parametrize(("family", "settings"), CASES)
@torch.inference_mode()
def test_llama_cpp_computes_the_live_model_s_logits(family, settings, tmp_path):
    """Every family in float32, beyond the sliding window, rotary scaling and other patterns of windows included."""
    model = named(family, **settings)
    file = exported(model, tmp_path, "f32").file
    if family.startswith("gemma"):
        for layer in model.skeleton.model.layers:
            layer.mlp.act_fn = TableGelu()
    expected = model.skeleton(IDS[None]).logits[0]
    assert relative(read(file, [])["logits"], expected) < (TABLE if family.startswith("gemma") else EXACT)


@pytest.mark.parametrize("bits", [4, 8])
@torch.inference_mode()
def test_llama_cpp_computes_with_the_codes(bits, tmp_path):
    """It rounds activations to 8 bits, which costs 5 % at the worst token here; rows out of place cost 150 %."""
    model = quantized(named("llama", dtype=torch.bfloat16), bits=bits, group=32)
    expected = torch.nn.Module.float(model.skeleton)(IDS[None]).logits[0]
    found = read(exported(model, tmp_path).file, [])["logits"]
    assert relative(found, expected) < 0.1


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer, gemma_tokenizer])
def test_llama_cpp_splits_text_the_same_way(make, tmp_path):
    """Same ids, the token in front included."""
    model = named("llama")
    model.tokenizer = make()
    texts = [*TEXT, "Ünïcode: 3 cats\n\n and 123 mats"]
    bos = [] if model.tokenizer(texts[0])["input_ids"][0] == model.tokenizer.bos_token_id else [1]
    found = read(exported(model, tmp_path, "f32").file, texts)["ids"]
    assert [[i for i in ids if i not in bos] for ids in found] == [model.tokenizer(text)["input_ids"] for text in texts]
