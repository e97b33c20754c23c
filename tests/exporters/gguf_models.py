"""Tiny models and tokenizers for the GGUF tests, and transformers' reader in this process: another takes seconds."""

import contextlib
import io
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from compressor.algorithms.rounding import round_to_nearest
from compressor.exporters.gguf import Exported, export_gguf, parity, reload
from compressor.layers import PackedExperts, PackedLinear
from compressor.models import Model, wrap_live
from compressor.quant import QuantSpec
from tests.tiny_models import FAMILIES, rough_vectors, tiny_model, tiny_tokenizer

# What a family's GGUF architecture asks, where the tiny model of the other tests has it another way
SETTINGS: dict[str, dict[str, Any]] = {
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"sliding_window": 64, "tie_word_embeddings": True},
    # each sixth layer sees everything; theta is another there, and the last layer is one with a window
    "gemma3_text": {"num_hidden_layers": 7, "layer_types": None, "sliding_window": 8, "initializer_range": 0.1},
    "olmoe": {"norm_topk_prob": False, "clip_qkv": None, "num_key_value_heads": 4},
    "qwen2_moe": {"norm_topk_prob": False},
}
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = ["the cat sat on the mat", "a dog and a cat, and 12 mats", "they sat there", "the theory of mats"]


def tiny_gguf_model(family: str, *, dtype: torch.dtype = torch.float32, **settings: Any) -> Model:
    """A live model of a family that GGUF knows, with norms and biases that matter."""
    assert family in FAMILIES
    return wrap_live(
        rough_vectors(tiny_model(family, dtype=dtype, **SETTINGS.get(family, {}) | settings)), tiny_tokenizer()
    )


def quantized(model: Model, *, bits: int, group: int | None, symmetric: bool = True) -> Model:
    """The model with all linears and experts packed, on the spot."""
    spec = QuantSpec(bits=bits, group_size=group, symmetric=symmetric)
    for k in range(model.num_blocks):
        block = model.anatomy(k)
        for site in block.sites:
            site.install(round_to_nearest(site.read(), spec, dtype=model.dtype))
        if block.experts:
            both, down = block.experts.read()
            packed = [round_to_nearest(stack, spec, dtype=model.dtype) for stack in (both, down)]
            block.experts.install(*packed)
    return model


def exported(model: Model, folder: Path, type: str = "auto") -> Exported:
    """The export, with transformers' chatter swallowed."""
    with contextlib.redirect_stderr(io.StringIO()):
        return export_gguf(model, folder, type=type)


def file_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file as gguf's own reader and dequantizer give it, float32."""
    return {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in GGUFReader(file).tensors}


def file_fields(file: Path) -> dict[str, Any]:
    """The file's metadata."""
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


def packed_values(model: Model) -> dict[str, torch.Tensor]:
    """What the codes of a packed live model stand for in float32, by path."""
    found = {}
    for path, module in model.skeleton.named_modules():
        if isinstance(module, PackedLinear):
            found[path] = module.packed.quantized().dequantize()
        elif isinstance(module, PackedExperts):
            found[f"{path}.gate_up"] = module.gate_up.quantized().dequantize()
            found[f"{path}.down"] = module.down.quantized().dequantize()
    return found


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits as Llama 3, with a chat template, merges and a control token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, special_tokens=["<bos>", "<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = "{% for message in messages %}<bos>{{ message['content'] }}{% endfor %}"
    return fast


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """BPE with byte fallback and a blank in front, like Llama 2's."""
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), *"▁theacsomd", "▁t", "he", "▁the", "at", "▁c", "▁cat"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {piece: number + 3 for number, piece in enumerate(pieces)}
    merges = [("h", "e"), ("▁", "t"), ("▁t", "he"), ("a", "t"), ("▁", "c"), ("▁c", "at")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """BPE with byte fallback and nothing in front of a text but `<bos>`, like Gemma's."""
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), *"▁theacsomd", "he", "the", "▁the", "at", "▁c", "▁cat"]
    vocabulary = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3} | {piece: i + 4 for i, piece in enumerate(pieces)}
    merges = [("h", "e"), ("t", "he"), ("▁", "the"), ("a", "t"), ("▁", "c"), ("▁c", "at")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )


@pytest.fixture
def reader_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`compare_gguf` reads the file here in place of a fresh process."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = reload.main(*command[3:])
        return subprocess.CompletedProcess(command, code, "", said.getvalue())

    monkeypatch.setattr(parity.subprocess, "run", run)
