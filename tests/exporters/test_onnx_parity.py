"""Graphs of every family compute what the model computes, in onnxruntime, in every way that a runtime calls them."""

import pytest
import torch

from compressor.calibration import Calibration
from compressor.errors import IntegrityError, UnsupportedModel
from compressor.exporters.onnx import OnnxSettings, compare_onnx, export_onnx, refuse_onnx
from compressor.exporters.onnx.experts import write_experts
from compressor.exporters.onnx.parity import exact_reference
from compressor.models import load_model, wrap_live
from compressor.passes import Context, Quantize
from compressor.runtimes import open_onnx
from compressor.runtimes.graph_file import ATTENTION, BIAS_INPUT
from tests.tiny_models import FAMILIES, rough_vectors, save_tiny, tiny_ids, tiny_model, tiny_tokenizer

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

TEXT = tiny_ids(1, 72)[0]
SLIDING = {
    "mistral": {"sliding_window": 8},
    "mixtral": {"sliding_window": 8},
    "phi3": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": 8},
    "llama": {"sliding_window": 8},  # a key that Llama does not have: stock ignores it
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SETTINGS = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("qwen3", {"rope_parameters": YARN}),
    (
        "phi3",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            "hidden_size": 128,
            "head_dim": 32,
        },
    ),
    ("olmoe", {"norm_topk_prob": False}),
    ("qwen2_moe", {"mlp_only_layers": [1], "norm_topk_prob": False}),
]


def a_model(family: str, **settings):
    """A live model of two layers with norms that are not all ones."""
    return wrap_live(rough_vectors(tiny_model(family, **settings)), tiny_tokenizer())


def quantized(model, **options):
    """The model with packed weights."""
    context = Context(calibration=Calibration(), seed=0, ids=tiny_ids(2, 16))
    Quantize(**{"bits": 4, "group_size": 32, "method": "rtn"} | options).apply(model, context)
    return model


def parity(model, tmp_path, **settings):
    """Export, then compare; an IntegrityError where they differ."""
    chosen = OnnxSettings(**settings)
    export_onnx(model, tmp_path / "onnx", chosen)
    return compare_onnx(model, tmp_path / "onnx", TEXT, chosen)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_float_graph_is_the_model(family, tmp_path):
    """Prompt, cache, left padding: within 1e-4; 64 greedy tokens equal."""
    found = parity(a_model(family), tmp_path)
    assert max(found["scenarios"].values()) <= 1e-4
    assert (found["greedy_equal"], found["greedy_tokens"]) == (True, 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_codes_are_the_model(family, tmp_path):
    """int4 codes as they are, accumulated exactly: the same bound; head and embedding in int8 on both sides."""
    assert parity(quantized(a_model(family)), tmp_path)["max_abs"] <= 1e-4


@pytest.mark.parametrize(("family", "settings"), SETTINGS, ids=str)
def test_settings_of_a_config_reach_the_graph(family, settings, tmp_path):
    """Biases, tied tables, scaled and partial rotary frequencies, routing that is not normalised."""
    assert parity(a_model(family, **settings), tmp_path)["max_abs"] <= (1e-5 if family == "olmoe" else 1e-4)


@pytest.mark.parametrize("family", SLIDING)
def test_a_window_hides_what_lies_behind_it(family, tmp_path):
    """Windows of 8 in a text of 72 tokens; and none where the family knows none."""
    assert parity(a_model(family, **SLIDING[family]), tmp_path)["max_abs"] <= 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 8, "group_size": "channel"},
        {"bits": 8, "group_size": 32},
        {"bits": 3, "group_size": 32},
        {"bits": 4, "group_size": 64},
        {"bits": 4, "group_size": 32, "symmetric": False},
    ],
    ids=str,
)
def test_every_grid_of_a_dense_model_is_carried(options, tmp_path):
    """One scale a row, three bits in four, zero points."""
    assert parity(quantized(a_model("llama"), **options), tmp_path)["max_abs"] <= 1e-4


@pytest.mark.parametrize("options", [{"bits": 8, "group_size": 32}, {"bits": 4, "group_size": "channel"}], ids=str)
def test_every_grid_of_experts_is_carried(options, tmp_path):
    """QMoE takes one block size for both products, which are 64 and 32 wide here."""
    assert parity(quantized(a_model("qwen3_moe"), **options), tmp_path)["max_abs"] <= 1e-4


@pytest.mark.parametrize("embedding", ["float32", "float16", "int8"])
def test_embedding_and_head_are_stored_as_asked(embedding, tmp_path):
    """The reference computes with the stored numbers, so that only the graph is compared."""
    assert parity(a_model("llama", tie_word_embeddings=True), tmp_path, embedding=embedding)["max_abs"] <= 1e-4


def test_eight_bit_activations_are_a_drift_of_their_own(tmp_path):
    """The folder is written for accuracy_level 4; the parity is that of exact arithmetic."""
    found = parity(quantized(a_model("llama")), tmp_path, accuracy_level=4)
    assert found["accuracy_level"] == 4
    assert found["drift"]["max_abs"] > 10 * found["max_abs"]
    exact = parity(quantized(a_model("llama")), tmp_path, accuracy_level=0)
    assert exact["drift"]["max_abs"] <= 1e-4


def test_a_stored_model_is_written_block_by_block(tmp_path):
    """The same bytes as of the live model."""
    folder = save_tiny(tmp_path / "dense", "qwen3_moe")
    stored, live = load_model(str(folder)), load_model(str(folder))
    export_onnx(stored, tmp_path / "stored")
    with live.live():
        export_onnx(live, tmp_path / "live")
    assert (tmp_path / "stored/model.onnx.data").read_bytes() == (tmp_path / "live/model.onnx.data").read_bytes()


def test_a_wrong_graph_is_found_and_the_layer_named(tmp_path):
    """Layer 1's value projection was changed after the export."""
    model = a_model("llama")
    export_onnx(model, tmp_path)
    model.skeleton.model.layers[1].self_attn.v_proj.weight.data *= 1.01
    with pytest.raises(IntegrityError, match="the difference begins before layer 1's value"):
        compare_onnx(model, tmp_path, TEXT, OnnxSettings())


def test_a_graph_that_ignores_left_padding_is_found(tmp_path):
    """Without the bias on the scores. Our runtime would move such a prompt's padding; parity calls the graph itself."""
    model = a_model("llama")
    export_onnx(model, tmp_path)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    for node in graph.graph.node:
        if node.op_type == ATTENTION:
            node.input[BIAS_INPUT] = ""
    (tmp_path / "model.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(IntegrityError, match="in the padded row of a batch the logits differ"):
        compare_onnx(model, tmp_path, TEXT, OnnxSettings())


def test_renormalised_routing_would_be_found(tmp_path, monkeypatch):
    """Were OLMoE's gates divided by their sum, the comparison would say so: it is no formality."""
    model = a_model("olmoe", norm_topk_prob=False)
    monkeypatch.setattr(type(model.anatomy(0).experts), "normalises_gates", True)
    assert write_experts is not None
    export_onnx(model, tmp_path)
    with pytest.raises(IntegrityError, match="the logits differ"):
        compare_onnx(model, tmp_path, TEXT, OnnxSettings())


def test_the_reference_leaves_the_model_as_it_was():
    """Weights, dtypes and the dtype of packed scales return."""
    model = quantized(a_model("qwen3_moe", dtype=torch.bfloat16))
    before = {name: tensor.clone() for name, tensor in model.skeleton.state_dict().items()}
    with exact_reference(model, "int8") as module:
        assert next(module.parameters()).dtype == torch.float32
    after = model.skeleton.state_dict()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_a_prompt_of_one_token_starts_with_an_empty_cache(tmp_path):
    """past is 0 long, sequence is 1."""
    model = a_model("llama")
    export_onnx(model, tmp_path)
    one = open_onnx(tmp_path)(TEXT[None, :1]).logits
    with torch.inference_mode():
        assert torch.allclose(one, model.skeleton(TEXT[None, :1]).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("llama", {"hidden_act": "relu2"}, "hidden_act 'relu2'; possible are silu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'dynamic'",
        ),
        ("llama", {"head_dim": 20}, "20 of a head's dimensions are rotated"),
    ],
)
def test_what_a_graph_cannot_say_is_refused_before_any_work(family, settings, said):
    """The config is enough to know."""
    with pytest.raises(UnsupportedModel, match=said):
        refuse_onnx(a_model(family, **settings), OnnxSettings())
