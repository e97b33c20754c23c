"""Which type each tensor of a GGUF file gets, and what is refused before any work."""

import pytest
import torch
from transformers import AutoConfig

from compressor.errors import RecipeError, UnsupportedModel
from compressor.exporters.gguf import refuse_gguf
from compressor.exporters.gguf.types import carried_type, dense_type, fitting, use_more_bits
from compressor.quant import QuantSpec
from tests.exporters.gguf_models import exported, file_fields, file_tensors, packed_values, quantized, tiny_gguf_model
from tests.tiny_models import tiny_tokenizer

NAME = "model.layers.0.mlp.up_proj"


def spec(text: str) -> QuantSpec:
    """A scheme out of bits, s(ymmetric), a(symmetric) or w (inputs of 8 bits too), and group: "4s-32", "8a-channel"."""
    bits, kind, group = int(text[0]), text[1], None if text[3:] == "channel" else int(text[3:])
    return QuantSpec(bits, group, symmetric=kind != "a", activation_bits=8 if kind == "w" else None)


@pytest.mark.parametrize(
    ("codes", "type", "error", "words"),
    [
        ("4s-64", "q4_0", RecipeError, "int4 symmetric group 64.*quantize with group_size: 32, or use type auto"),
        ("4s-channel", "q4_1", RecipeError, "int4 symmetric channel.*type auto"),
        ("4a-32", "q4_0", RecipeError, "round model.layers.0.mlp.up_proj again.*type auto"),
        ("8s-32", "q4_0", RecipeError, "round .* again, which is int8 symmetric group 32"),
        ("4s-32", "q4_k_m", RecipeError, "q4_k_m would round .* before `quantize`"),
        ("8s-32", "q6_k", RecipeError, "q6_k would round"),
        ("8a-32", "auto", UnsupportedModel, "Q8_0 has no zero points; quantize with symmetric: true"),
        ("8a-32", "q8_0", UnsupportedModel, "no zero points"),
        ("8w-channel", "q8_0", UnsupportedModel, "int8 activations, and GGUF says nothing of activations"),
        ("8w-channel", "f32", UnsupportedModel, "quantize without `activations`"),
        ("4s-32", "q5_k_m", RecipeError, "no type 'q5_k_m'; possible are auto, f32, f16, bf16, q8_0, q4_0"),
    ],
)
def test_types_that_would_round_codes_again_are_refused(codes, type, error, words):
    """By config and schemes alone, naming the weight and what to do."""
    with pytest.raises(error, match=words):
        refuse_gguf(AutoConfig.for_model("llama"), tiny_tokenizer(), {NAME: spec(codes)}, type)


@pytest.mark.parametrize(
    ("codes", "type"),
    [("4s-32", "q4_0"), ("4s-32", "q4_1"), ("4a-32", "q4_1"), ("8s-channel", "q8_0"), ("4s-64", "auto"),
     ("4a-128", "auto"), ("2a-64", "auto"), ("8a-32", "f16")],
)  # fmt: skip
def test_types_that_hold_the_codes_are_not_refused(codes, type):
    """What is refused above is refused for its reason, and not by the lot."""
    assert refuse_gguf(AutoConfig.for_model("llama"), tiny_tokenizer(), {NAME: spec(codes)}, type) is None


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("gpt2", {}, "model type 'gpt2' is not possible in this version; possible are gemma, gemma2, gemma3_text"),
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob true: its runtime takes the gates as they are"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0: its runtime clips nothing"),
        ("olmoe", {"num_key_value_heads": 4}, "num_key_value_heads 4: its runtime expects one for each of the 16"),
        ("olmoe", {"head_dim": 64}, "head_dim 64: its runtime expects hidden_size over heads"),
        ("olmoe", {"tie_word_embeddings": True}, "tie_word_embeddings true: its runtime takes an output beside"),
        ("qwen2_moe", {"tie_word_embeddings": True}, "tie_word_embeddings true: its runtime takes an output beside"),
        ("olmoe", {"attention_bias": True}, "attention_bias true: its runtime has no biases there"),
        ("gemma", {"tie_word_embeddings": False}, "tie_word_embeddings false: its runtime takes the embedding"),
        ("gemma", {"use_bidirectional_attention": True}, "its runtime looks back only"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping null: its runtime always bends"),
        ("gemma3_text", {"sliding_window": None}, "sliding_window None: its runtime needs one"),
        ("gemma3_text", {"query_pre_attn_scalar": 224}, "query_pre_attn_scalar 224: its runtime computes with 256"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 26}, "layer_types without sliding attention"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0: its runtime has none"),
        ("gemma3_text", {"rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}}},
         "its runtime scales full attention only"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob false: its runtime takes the gates normalised"),
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob true: its runtime takes the gates as they are"),
        ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [0]}, "layers without experts"),
        ("llama", {"hidden_act": "gelu"}, "activation gelu: its runtime computes silu"),
        ("gemma2", {"query_pre_attn_scalar": 224}, "query_pre_attn_scalar 224: its runtime computes with 256"),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
         "partial_rotary_factor"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
         "rope_type yarn: possible are default, linear, llama3"),
    ],
)  # fmt: skip
def test_models_that_the_runtime_computes_another_way_are_refused(family, settings, words):
    """A file that loads and computes something else is worse than none."""
    with pytest.raises(UnsupportedModel, match=words):
        refuse_gguf(AutoConfig.for_model(family, **settings), tiny_tokenizer(), {}, "auto")


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gemma", {"hidden_act": "gelu"}),  # as the released config has it; transformers computes the other one
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("gemma3_text", {"num_hidden_layers": 62, "num_attention_heads": 32, "hidden_size": 5376,
                         "query_pre_attn_scalar": 168, "head_dim": 128}),  # Gemma 3 27B
        ("mixtral", {}),
        ("olmoe", {}),
    ],
)  # fmt: skip
def test_models_as_they_were_released_are_not_refused(family, settings):
    """transformers' defaults are the first model of each family."""
    assert refuse_gguf(AutoConfig.for_model(family, **settings), tiny_tokenizer(), {}, "auto") is None


@pytest.mark.parametrize(
    ("codes", "minima_round", "type", "reason"),
    [
        ("4s-32", False, "Q4_0", ""),
        ("4s-64", False, "Q4_0", "groups of 64, whose scale is written for each 32"),
        ("4s-channel", False, "Q4_0", "one scale a row, written for each 32"),
        ("4a-32", False, "Q4_1", ""),
        ("4a-32", True, "Q5_0", "Q4_1 would round scale x zero point to float16"),
        ("8s-32", False, "Q8_0", ""),
        ("3s-32", False, "Q4_0", "3-bit codes in 4 bits"),
        ("2a-32", False, "Q4_0", "2-bit codes in 4 bits"),
    ],
)
def test_auto_takes_the_smallest_type_that_holds_the_codes(codes, minima_round, type, reason):
    """And says why it is larger than the codes."""
    chosen = carried_type(spec(codes), 256, "auto", minima_round=minima_round)
    assert chosen.type == type
    assert chosen.reason.startswith(reason) if reason else not chosen.reason


@pytest.mark.parametrize(
    ("type", "width", "found"),
    [("Q4_K", 512, "Q4_K"), ("Q4_K", 576, "Q5_0"), ("Q6_K", 576, "Q8_0"), ("Q4_K", 48, "F16"), ("Q8_0", 48, "F16")],
)
def test_rows_that_do_not_divide_fall_back_as_in_llama_cpp(type, width, found):
    """Q4_K to Q5_0 and Q6_K to Q8_0 where 32 divides the row, else to float16; with the reason."""
    chosen = fitting(type, width)
    assert chosen.type == found
    assert (f"rows of {width} weights do not divide" in chosen.reason) == (found != type)


def test_q4_k_m_spends_six_bits_where_llama_cpp_does():
    """The first and last eighth of 32 layers and each third between; output always, the rest four bits."""
    layers = [layer for layer in range(32) if use_more_bits(layer, 32)]
    assert layers == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    for kind, more_bits, type in [
        ("attn_v", True, "Q6_K"), ("attn_v", False, "Q4_K"), ("ffn_down", True, "Q6_K"), ("linear", True, "Q4_K"),
        ("output", False, "Q6_K"), ("embedding", False, "Q4_K"), ("router", True, "F32"), ("vector", True, "F32"),
    ]:  # fmt: skip
        assert dense_type(kind, 4096, "q4_k_m", "BF16", more_bits=more_bits).type == type


def test_a_mix_falls_back_tensor_by_tensor(tmp_path):
    """Width 320 is no multiple of 256, 512 is: the embedding and q fall back with a reason, ffn_down does not."""
    model = tiny_gguf_model("llama", hidden_size=320, intermediate_size=512, head_dim=80, tie_word_embeddings=True)
    written = exported(model, tmp_path, "q4_k_m")
    assert written.file.name == "model-Q4_K_M.gguf"
    types = written.types
    assert types["token_embd.weight"] == "Q8_0"  # it is the output too: Q6_K, which does not fit
    assert (types["blk.0.attn_q.weight"], types["blk.1.attn_v.weight"]) == ("Q5_0", "Q8_0")
    assert types["blk.1.ffn_down.weight"] == "Q6_K"
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert set(written.reasons) == {name for name, type in types.items() if type in ("Q5_0", "Q8_0")}
    assert "output.weight" not in types
    assert file_fields(written.file)["general.file_type"] == 15


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_file_holds_the_codes_of_every_weight(family, tmp_path):
    """All that `dequantize` gives is in the file, rows of q and k in llama.cpp's order, experts stacked in three."""
    model = quantized(tiny_gguf_model(family, dtype=torch.bfloat16), bits=4, group=32)
    values = packed_values(model)
    found = file_tensors(exported(model, tmp_path).file)
    assert torch.equal(found["blk.1.attn_v.weight"], values["model.layers.1.self_attn.v_proj"])
    q = values["model.layers.1.self_attn.q_proj"]
    if family == "llama":  # 4 heads of 16 rows: 0, 8, 1, 9, ... of each
        order = [head * 16 + half * 8 + row for head in range(4) for row in range(8) for half in range(2)]
        assert torch.equal(found["blk.1.attn_q.weight"], q[order])
    else:
        assert torch.equal(found["blk.1.attn_q.weight"], q)
        both = values["model.layers.1.mlp.experts.gate_up"]
        assert torch.equal(found["blk.1.ffn_gate_exps.weight"], both[:, :32])
        assert torch.equal(found["blk.1.ffn_up_exps.weight"], both[:, 32:])
        assert torch.equal(found["blk.1.ffn_down_exps.weight"], values["model.layers.1.mlp.experts.down"])


def test_auto_keeps_the_dtype_of_what_is_not_quantized(tmp_path):
    """Embedding and head stay bfloat16; norms and the router are float32, as llama.cpp expects them."""
    model = quantized(tiny_gguf_model("qwen3_moe", dtype=torch.bfloat16), bits=8, group=32)
    types = exported(model, tmp_path).types
    assert (types["token_embd.weight"], types["output.weight"]) == ("BF16", "BF16")
    assert (types["blk.0.ffn_gate_inp.weight"], types["output_norm.weight"]) == ("F32", "F32")
    assert types["blk.0.ffn_up_exps.weight"] == types["blk.0.attn_k.weight"] == "Q8_0"


def test_float32_scales_are_counted(tmp_path):
    """Scales of a float32 model are no float16 numbers: the file says that it rounds, and how many."""
    model = quantized(tiny_gguf_model("llama"), bits=8, group=32)
    written = exported(model, tmp_path)
    assert not written.lossless
    assert written.inexact["blk.0.ffn_down.weight"] == 64 * 128 // 32
