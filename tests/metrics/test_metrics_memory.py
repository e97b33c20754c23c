"""Bytes held, on disk, per token, and at the peak."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig

from compressor.errors import EnvironmentProblem, UnsupportedModel
from compressor.metrics.memory import (
    PeakMemory,
    file_bytes,
    kv_bytes_per_token,
    measure_memory,
    measure_peaks,
    weight_bytes,
)
from tests.tiny_models import tiny_ids, tiny_model

MEGABYTE = 1_000_000
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can reset a process's peak")


def test_tied_weights_count_once():
    """The head and the embedding share one storage of 100 x 8 floats."""
    model = nn.ModuleDict({"embed": nn.Embedding(100, 8), "head": nn.Linear(8, 100, bias=False)})
    model["head"].weight = model["embed"].weight
    assert weight_bytes(model) == 100 * 8 * 4


def test_packed_buffers_count_with_their_own_dtype():
    """Codes are uint8, scales bf16."""
    module = nn.Module()
    module.register_buffer("codes", torch.zeros(16, 32, dtype=torch.uint8))
    module.register_buffer("scales", torch.zeros(16, 2, dtype=torch.bfloat16))
    assert weight_bytes(module) == 16 * 32 + 16 * 2 * 2


def test_a_view_counts_the_storage_that_it_keeps_alive():
    """Two experts of a stack of eight still hold the stack."""
    module = nn.Module()
    stack = torch.zeros(8, 10)
    module.register_buffer("first", stack[:1])
    module.register_buffer("second", stack[1:2])
    assert weight_bytes(module) == 8 * 10 * 4


def test_meta_tensors_hold_nothing():
    """A skeleton has shapes but no bytes."""
    with torch.device("meta"):
        assert weight_bytes(nn.Linear(1000, 1000)) == 0


def test_file_bytes_sums_all_files_and_follows_links(tmp_path):
    """Snapshots in the hub's cache are links to blobs."""
    (tmp_path / "blob").write_bytes(b"x" * 70)
    folder = tmp_path / "snapshot"
    (folder / "onnx").mkdir(parents=True)
    (folder / "config.json").write_bytes(b"x" * 30)
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    (folder / "onnx" / "model.onnx").write_bytes(b"x" * 5)
    assert file_bytes(folder) == 105
    assert file_bytes(tmp_path / "blob") == 70


def test_kv_bytes_are_keys_and_values_of_all_layers():
    """2 x layers x kv heads x head width x 2 bytes, as a real cache grows."""
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16, dtype="bfloat16"
    )
    assert kv_bytes_per_token(config) == 2 * 3 * 2 * 16 * 2


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_kv_bytes_are_what_a_real_cache_grows_by(family):
    """Two sequences, from 8 tokens to 24: 32 tokens more in the storages of the cache."""
    model, held = tiny_model(family), []
    for length in (8, 24):
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(input_ids=tiny_ids(2, length), past_key_values=cache, use_cache=True)
        held.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers))
    assert held[1] - held[0] == 32 * kv_bytes_per_token(model.config)


def test_linear_attention_layers_do_not_grow():
    """Only layers with attention keep something for each token."""
    config = LlamaConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, dtype="float32")
    config.layer_types = ["linear_attention", "full_attention", "linear_attention", "sliding_attention"]
    assert kv_bytes_per_token(config) == 2 * 2 * 64 * 4


def test_unknown_cache_is_null_with_a_reason():
    """A config without attention heads."""
    config = SimpleNamespace(model_type="mamba", num_hidden_layers=2, dtype=torch.float32)
    config.get_text_config = lambda decoder: config

    class Stored:
        def weight_bytes(self) -> int:
            return 12

        def bits_per_weight(self) -> float:
            return 4.5

    stored = Stored()
    stored.config = config
    with pytest.raises(UnsupportedModel):
        kv_bytes_per_token(config)
    memory = measure_memory(stored)
    assert (memory.weight_bytes, memory.bits_per_weight, memory.kv_bytes_per_token) == (12, 4.5, None)
    assert "num_attention_heads" in memory.reasons["kv_bytes_per_token"]
    assert memory.reasons["file_bytes"] == "it was not written to disk"


@linux_only
def test_peak_sees_memory_that_was_given_back():
    """60 MB were held inside the block only."""
    with PeakMemory() as peak:
        bytearray(60 * MEGABYTE)
    if peak.peak_bytes is None:
        pytest.skip(peak.reason)
    assert peak.peak_bytes - peak.rss_before_bytes >= 55 * MEGABYTE


@linux_only
def test_peak_before_the_block_does_not_count():
    """The high-water mark is reset at the start."""
    bytearray(60 * MEGABYTE)
    with PeakMemory() as peak:
        pass
    if peak.peak_bytes is None:
        pytest.skip(peak.reason)
    assert peak.peak_bytes - peak.rss_before_bytes < 20 * MEGABYTE


@linux_only
def test_an_inner_block_does_not_hide_the_peak_of_the_outer_one():
    """The inner block resets the mark, the outer keeps what it had reached; the inner does not see it."""
    with PeakMemory() as outer:
        bytearray(80 * MEGABYTE)
        with PeakMemory() as inner:
            bytearray(30 * MEGABYTE)
    if outer.peak_bytes is None:
        pytest.skip(outer.reason)
    assert outer.peak_bytes - outer.rss_before_bytes >= 75 * MEGABYTE
    assert 25 * MEGABYTE <= inner.peak_bytes - inner.rss_before_bytes < 60 * MEGABYTE


def test_peak_says_why_it_cannot_be_measured(monkeypatch):
    """Elsewhere than on Linux the peak of a process cannot be reset."""
    monkeypatch.setattr(sys, "platform", "darwin")
    with PeakMemory() as peak:
        pass
    assert peak.peak_bytes is None
    assert "darwin" in peak.reason


@linux_only
def test_peaks_of_a_fresh_process_hold_the_weights(llama_folder):
    """Loading takes at least the bytes of the file; generating holds them still."""
    peaks = measure_peaks(llama_folder, prompt=16, generate=4)
    if peaks.loading_bytes is None:
        pytest.skip(peaks.reason)
    assert peaks.loading_bytes >= (llama_folder / "model.safetensors").stat().st_size
    assert peaks.generating_bytes > 0
    assert peaks.process_bytes > 50 * MEGABYTE


@linux_only
def test_a_process_that_fails_says_why(tmp_path, monkeypatch):
    """The last lines that it wrote."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho Traceback >&2\necho no room for $3 >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(
        EnvironmentProblem, match=r"(?s)folder: the process .* ended with 1: Traceback.no room for folder"
    ):
        measure_peaks("folder", prompt=16, generate=4)
