"""What a GGUF file holds beside weights, and that no half-written one looks whole."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from compressor.errors import EnvironmentProblem, UnsupportedModel
from compressor.exporters.gguf import export
from compressor.exporters.gguf.tokenizer import split_name
from compressor.models import load_model, wrap_live
from tests.exporters.gguf_models import (
    TEXT,
    byte_level_tokenizer,
    exported,
    file_fields,
    file_tensors,
    sentencepiece_tokenizer,
    tiny_gguf_model,
)
from tests.tiny_models import tiny_model


def written_with(tokenizer: Any, folder: Path, **settings: Any) -> Path:
    """A tiny Llama's file with this tokenizer."""
    settings = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None} | settings
    return exported(wrap_live(tiny_model("llama", **settings), tokenizer), folder).file


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_transformers_reads_the_same_tokenizer_back(make, tmp_path):
    """Same ids for the same text, and the same chat template, from the file alone."""
    tokenizer = make()
    file = written_with(tokenizer, tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name, local_files_only=True)
    for text in [*TEXT, "Ünïcode: 3 cats\n\n and <eos> in the middle"]:
        assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert read.chat_template == tokenizer.chat_template
    assert (read.bos_token, read.eos_token) == (tokenizer.bos_token, tokenizer.eos_token)


def test_byte_level_metadata_is_what_llama_cpp_expects(tmp_path):
    """Tokens by id, control tokens marked, merges in order, ids without a token as unused ones."""
    tokenizer = byte_level_tokenizer()
    fields = file_fields(written_with(tokenizer, tmp_path))
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 320
    assert all(tokens[number] == text for text, number in tokenizer.get_vocab().items())
    assert (types[0], types[2], types[-1], tokens[-1]) == (3, 1, 5, "[PAD319]")
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "llama-bpe")
    trained = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]] == trained
    assert (fields["tokenizer.ggml.add_bos_token"], fields["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (0, 1)


def test_sentencepiece_metadata_is_what_llama_cpp_expects(tmp_path):
    """Scores in the order of merges, bytes and unknown marked, a blank in front."""
    fields = file_fields(written_with(sentencepiece_tokenizer(), tmp_path))
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    scores = dict(zip(tokens, fields["tokenizer.ggml.scores"], strict=True))
    assert scores["he"] > scores["▁t"] > scores["▁the"] > scores["at"] > scores["▁cat"]
    assert (types[0], types[1], types[3], types[3 + 256]) == (2, 3, 6, 1)
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.add_space_prefix"]) == ("llama", True)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([pre_tokenizers.ByteLevel(False)], "gpt-2"),
        ([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)], "smollm"),
        ([pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(False)], "default"),
        ([pre_tokenizers.ByteLevel(False, use_regex=False)], "default"),
        ([pre_tokenizers.ByteLevel(True)], "default"),
    ],
)
def test_splits_have_llama_cpps_names(steps, name):
    """Known by what they do; one that is not known is written as the default, and the export says so."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    assert split_name(json.loads(tokenizer.to_str())["pre_tokenizer"]) == name


def test_a_split_without_a_name_is_said(tmp_path):
    """llama.cpp would split text another way: the export notes it."""
    notes = exported(tiny_gguf_model("llama"), tmp_path).notes
    assert any("compare token ids" in note for note in notes)
    assert any("no merges" in note for note in notes)


def test_tokenizers_that_gguf_cannot_hold_are_refused(tmp_path):
    """None, no BPE, or more tokens than the embedding has rows: named before anything is written."""
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    for tokenizer, settings, message in [
        (None, {}, "this model has none"),
        (words, {}, "WordLevel are not possible; possible is BPE"),
        (byte_level_tokenizer(), {"vocab_size": 260}, "the model's embedding has 260 rows"),
    ]:
        with pytest.raises(UnsupportedModel, match=message):
            written_with(tokenizer, tmp_path, **settings)
    assert not list(tmp_path.iterdir())


def test_metadata_has_the_model_s_numbers(tmp_path):
    """What llama.cpp needs and transformers does not read: width of heads and of experts."""
    model = tiny_gguf_model("qwen2_moe", intermediate_size=160)
    fields = file_fields(exported(model, tmp_path).file)
    expected = {
        "general.architecture": "qwen2moe", "qwen2moe.attention.key_length": 16, "qwen2moe.expert_count": 8,
        "qwen2moe.expert_feed_forward_length": 32, "qwen2moe.expert_shared_feed_forward_length": 96,
        "qwen2moe.feed_forward_length": 160, "qwen2moe.expert_used_count": 2, "qwen2moe.vocab_size": 257,
    }  # fmt: skip
    assert {key: fields[key] for key in expected} == expected


def test_metadata_of_gemma_3_has_both_rotations(tmp_path):
    """Of layers with a window and of the others; which those are only where it is not each sixth."""
    model = tiny_gguf_model("gemma3_text", max_position_embeddings=8)
    fields = file_fields(exported(model, tmp_path).file)
    expected = {
        "general.architecture": "gemma3", "gemma3.attention.sliding_window": 8, "gemma3.rope.freq_base": 1e6,
        "gemma3.rope.freq_base_swa": 1e4,
    }  # fmt: skip
    assert {key: fields[key] for key in expected} == expected
    assert "gemma3.attention.sliding_window_pattern" not in fields

    windows = ["full_attention", "sliding_attention"]
    written = exported(tiny_gguf_model("gemma3_text", num_hidden_layers=2, layer_types=windows), tmp_path / "own")
    assert file_fields(written.file)["gemma3.attention.sliding_window_pattern"] == [False, True]
    assert any("not as in Gemma's own models" in note for note in written.notes)


def test_metadata_of_mixtral_is_that_of_a_llama_with_experts(tmp_path):
    """llama.cpp has no architecture of that name; the width of its experts is the feed-forward length."""
    fields = file_fields(exported(tiny_gguf_model("mixtral"), tmp_path).file)
    expected = {
        "general.architecture": "llama", "llama.expert_count": 8, "llama.expert_used_count": 2,
        "llama.feed_forward_length": 32,
    }  # fmt: skip
    assert {key: fields[key] for key in expected} == expected


def test_mixtral_as_a_source_is_refused(tmp_path, monkeypatch):
    """transformers would read it as a Llama without experts."""
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    file = exported(tiny_gguf_model("mixtral"), tmp_path).file
    with pytest.raises(UnsupportedModel, match="reads no Mixtral from GGUF"):
        load_model(str(file))


def test_rotary_scaling_of_llama3_is_written_as_divisors(tmp_path):
    """Frequencies over divisors are what transformers rotates with."""
    scaling = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    model = tiny_gguf_model("llama", rope_parameters=scaling)
    divisors = file_tensors(exported(model, tmp_path).file)["rope_freqs.weight"]
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16, rope_parameters=scaling)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 16, 2) / 16)
    assert torch.allclose(plain / divisors, expected, rtol=1e-6, atol=0)
    assert divisors.unique().numel() > 2


def test_a_short_window_is_said_where_the_file_cannot_say_it(tmp_path):
    """Mistral's sliding window is no part of llama.cpp's llama: noted, with the length from which it matters."""
    assert any("contexts beyond 32 tokens" in note for note in exported(
        tiny_gguf_model("mistral", sliding_window=32), tmp_path).notes)  # fmt: skip
    fields = file_fields(exported(tiny_gguf_model("gemma2"), tmp_path).file)
    assert fields["gemma2.attention.sliding_window"] == 64


@pytest.mark.parametrize(
    ("failure", "expected"),
    [(OSError(errno.ENOSPC, "No space left on device"), EnvironmentProblem), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_failure_leaves_no_file(failure, expected, tmp_path, monkeypatch):
    """A full disk or Ctrl-C at the fifth tensor: the folder is as empty as before, the message says what is needed."""
    encode, calls = export.encode, []

    def fail_at_the_fifth(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 5:
            raise failure
        return encode(*arguments)

    monkeypatch.setattr(export, "encode", fail_at_the_fifth)
    with pytest.raises(expected, match="bytes are needed" if expected is EnvironmentProblem else None):
        exported(tiny_gguf_model("llama"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_values_beyond_float16_are_refused(tmp_path):
    """Infinity in a file is worse than none: the message names the weight and the types that hold it."""
    model = tiny_gguf_model("llama", dtype=torch.bfloat16)
    model.skeleton.model.layers[1].mlp.up_proj.weight.data[3, 3] = 1e5
    with pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp\.up_proj\.weight has values beyond .* use type bf16"):
        exported(model, tmp_path, "f16")
