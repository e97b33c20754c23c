"""GGUF as a run's export: what is refused where a recipe is planned, and what the report says."""

from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from compressor.errors import UnsupportedModel
from compressor.pipeline.exporting import format_of, write_export
from compressor.recipe import Gguf
from tests.exporters.gguf_models import quantized, reader_in_process, tiny_gguf_model
from tests.tiny_models import tiny_ids

__all__ = ["reader_in_process"]


def without_bytes(kind: type, **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of another kind than byte-level BPE."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(kind(**options)), unk_token="a")


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (None, "this model has none"),
        (without_bytes(models.WordPiece, vocab={"a": 0}, unk_token="a"), "type WordPiece are not possible"),
        (without_bytes(models.Unigram, vocab=[("a", 0.0)], unk_id=0), "type Unigram are not possible"),
        (without_bytes(models.BPE, vocab={"a": 0}, merges=[], unk_token="a"), "BPE tokenizer without bytes"),
    ],
)
def test_tokenizers_that_gguf_cannot_hold_are_refused_at_plan_time(tokenizer, words):
    """Where a recipe is planned, that is before hours of calibration."""
    model = tiny_gguf_model("llama")
    model.tokenizer = tokenizer
    with pytest.raises(UnsupportedModel, match=words):
        format_of(Gguf()).refuse(Gguf(), model, {})


def test_the_report_says_what_each_tensor_became_and_why(tmp_path, reader_in_process):
    """Its type, the reason where that is not the expected one, how many scales float16 rounds, and who read it back."""
    model = quantized(tiny_gguf_model("llama"), bits=8, group=64)
    parity = write_export(Gguf(), model, tmp_path / "gguf", tiny_ids(2, 32)).parity
    assert len(parity["types"]) == 2 * 9 + 3
    assert parity["types"]["blk.1.ffn_down.weight"] == "Q8_0"
    assert parity["types"]["token_embd.weight"] == "F32"
    assert parity["reasons"]["blk.1.ffn_down.weight"] == "groups of 64, whose scale is written for each 32"
    assert parity["inexact"]["blk.1.ffn_down.weight"] == 64 * 128 // 64
    assert parity["read_by"] == "transformers"
