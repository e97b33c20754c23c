"""GGUF files read back by stock transformers: equal to the live model, and what is not is noticed."""

from pathlib import Path

import pytest
import torch

from compressor.errors import IntegrityError
from compressor.exporters.gguf import compare_gguf, weights
from compressor.exporters.gguf.architectures import ARCHITECTURES
from tests.exporters.gguf_models import exported, quantized, reader_in_process, tiny_gguf_model
from tests.tiny_models import tiny_ids

__all__ = ["reader_in_process"]
IDS = tiny_ids(2, 32)


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_float32_files_compute_the_same_bits(family, tmp_path, reader_in_process):
    """The reader gives the logits of the live model exactly: names, order of rows and metadata are right.

    The reader is transformers', or our own for the three families that it does not know.
    """
    model = tiny_gguf_model(family)
    parity = compare_gguf(model, exported(model, tmp_path, "f32").file, IDS)
    reader = "compressor" if family in ("gemma", "mixtral", "olmoe") else "transformers"
    assert parity.pop("read_by") == reader
    assert parity == {"max_abs": 0.0, "relative": 0.0, "greedy_equal": True, "greedy_tokens": 32}


@pytest.mark.parametrize("family", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_parity_is_found_in_a_fresh_process(family, tmp_path):
    """The reader's own process sees nothing of this one."""
    model = quantized(tiny_gguf_model(family, dtype=torch.bfloat16), bits=4, group=32)
    assert compare_gguf(model, exported(model, tmp_path).file, IDS)["max_abs"] == 0.0


CARRIED = [
    ("llama", 4, True), ("llama", 4, False), ("llama", 8, True), ("llama", 3, False), ("qwen3_moe", 4, True),
    ("gemma", 4, True), ("gemma3_text", 4, True), ("mixtral", 4, False), ("olmoe", 4, True),
]  # fmt: skip


@pytest.mark.parametrize(("family", "bits", "symmetric"), CARRIED)
def test_carried_codes_compute_the_same(family, bits, symmetric, tmp_path, reader_in_process):
    """Codes that are not rounded again give the live model's logits up to the order of float32 sums."""
    model = quantized(tiny_gguf_model(family, dtype=torch.bfloat16), bits=bits, group=32, symmetric=symmetric)
    written = exported(model, tmp_path)
    parity = compare_gguf(model, written.file, IDS)
    assert written.lossless
    assert parity["greedy_equal"]
    assert parity["relative"] <= 1e-6


def test_a_stored_model_exports_as_a_live_one(llama_folder: Path, tmp_path):
    """Block by block from disk or from memory: the same bytes, but for the model's name."""
    from compressor.models import load_model

    stored = load_model(str(llama_folder))
    written = exported(stored, tmp_path / "stored")
    live = load_model(str(llama_folder))
    live.take_live()
    assert written.file.read_bytes() == exported(live, tmp_path / "live").file.read_bytes()
    assert set(written.types.values()) == {"BF16", "F32"}


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_rows_in_transformers_order_are_noticed_in_four_bits(family, tmp_path, monkeypatch, reader_in_process):
    """Without the permutation of q and k the loaded weights are others, by far more than four bits explain."""
    monkeypatch.setattr(weights, "interleave", lambda rows, heads: rows)
    model = tiny_gguf_model(family, dtype=torch.bfloat16)
    file = exported(model, tmp_path, "q4_0").file
    with pytest.raises(IntegrityError, match=r"blk\.0\.attn_[qk]\.weight \(Q4_0\), loaded back, is 1\.\d off"):
        compare_gguf(model, file, IDS)


@pytest.mark.parametrize("type", ["f16", "bf16", "q8_0", "q4_0", "q4_1", "q4_k_m", "q6_k"])
def test_rounded_files_are_within_what_their_type_explains(type, tmp_path, reader_in_process):
    """Every type of a dense model loads, and is near it; with 8 bits and more, nearer than a tenth."""
    model = tiny_gguf_model("qwen3", hidden_size=256, intermediate_size=256)
    written = exported(model, tmp_path, type)
    parity = compare_gguf(model, written.file, IDS)
    assert not written.lossless
    assert parity["relative"] < (0.1 if type in ("f16", "bf16", "q8_0") else 1)


@pytest.mark.parametrize("family", ["llama", "olmoe", "gemma3_text"])
def test_another_theta_in_the_file_is_noticed(family, tmp_path, reader_in_process):
    """Metadata that the reader knows has to be the model's."""
    theta = {"rope_type": "default", "rope_theta": 1e3}
    nested = {"full_attention": theta, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    model = tiny_gguf_model(family, rope_parameters=nested if family == "gemma3_text" else theta)
    file = exported(model, tmp_path, "f32").file
    theta = model.config.rope_parameters
    theta.get("full_attention", theta)["rope_theta"] = 5e5
    with pytest.raises(IntegrityError, match=r"rope_theta is 1000\.0, the model has 500000\.0"):
        compare_gguf(model, file, IDS)


def test_a_tensor_of_another_name_is_noticed(tmp_path, reader_in_process):
    """Our own reader, as transformers', takes no file in which one of the model's tensors is missing."""
    model = tiny_gguf_model("mixtral")
    file = exported(model, tmp_path, "f32").file
    file.write_bytes(file.read_bytes().replace(b"blk.1.ffn_up_exps.weight", b"blk.1.ffn_no_exps.weight"))
    with pytest.raises(IntegrityError, match=r"there is no tensor blk\.1\.ffn_up_exps\.weight"):
        compare_gguf(model, file, IDS)


def test_a_damaged_scale_is_noticed(tmp_path, reader_in_process):
    """One bit of one float16 scale in a file that rounds nothing."""
    import gguf

    model = quantized(tiny_gguf_model("llama", dtype=torch.bfloat16), bits=4, group=32)
    file = exported(model, tmp_path).file
    tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.1.ffn_up.weight")
    with file.open("r+b") as opened:
        opened.seek(tensor.data_offset + 1)
        byte = opened.read(1)[0]
        opened.seek(tensor.data_offset + 1)
        opened.write(bytes([byte ^ 4]))
    with pytest.raises(IntegrityError, match=r"blk\.1\.ffn_up"):
        compare_gguf(model, file, IDS)
