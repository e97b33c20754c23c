"""Decoders that our writer does not know, exported through torch: the same interface, the same parity."""

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from compressor.calibration import Calibration
from compressor.errors import IntegrityError, UnsupportedModel
from compressor.exporters.onnx.rounding import Rounding
from compressor.exporters.onnx.torch_graph import (
    EXPERTS,
    compare_with_torch,
    export_with_torch,
    round_with_torch,
    static_sparse_experts,
)
from compressor.models import wrap_live
from compressor.passes import Context, Quantize
from compressor.runtimes import open_onnx
from tests.tiny_models import EOS, VOCAB, rough_vectors, tiny_ids, tiny_model, tiny_tokenizer

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxscript", reason="onnxscript, which torch's exporter is written in, is not installed")

TEXT = tiny_ids(1, 72)[0]
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 256,
    "initializer_range": 0.15, "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": EOS,
}  # fmt: skip
GROUPED = {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64}
MOE = GROUPED | {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "deepseek_v3": {
        "num_hidden_layers": 2, "intermediate_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 4,
        "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 16,
        "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    },
    "gpt2": {"n_layer": 1, "n_positions": 256},
    "gpt_neox": {"num_hidden_layers": 2, "intermediate_size": 64},
    "gpt_oss": MOE | {"sliding_window": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "granite": GROUPED,
    "granitemoe": MOE,
    "mamba": {"num_hidden_layers": 2},
    "opt": {"num_hidden_layers": 2, "ffn_dim": 64, "word_embed_proj_dim": 64},
    "stablelm": GROUPED,
}  # fmt: skip


def a_decoder(family: str, dtype: torch.dtype = torch.float32):
    """One or two random layers."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **COMMON | FAMILIES[family])
    return rough_vectors(AutoModelForCausalLM.from_config(config, dtype=dtype)).eval()


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A GPT-2 and the folder it was exported to; the one export through torch (10 s) of the quick tests."""
    model, folder = a_decoder("gpt2"), tmp_path_factory.mktemp("gpt2") / "onnx"
    exported = export_with_torch(model, model.config, folder)
    return SimpleNamespace(model=model, folder=folder, exported=exported)


def test_the_graph_is_the_model(gpt2):
    """Prompt, cache, left padding: within 1e-4; 64 greedy tokens equal."""
    found = compare_with_torch(gpt2.model, gpt2.folder, TEXT)
    assert max(found["scenarios"].values()) <= 1e-4
    assert (found["greedy_equal"], found["greedy_tokens"]) == (True, 64)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"gpt2", "mamba"}))
def test_other_families_are_the_model_too(family, tmp_path):
    """Alibi, latent attention, sinks and windows, experts with and without biases."""
    model = a_decoder(family)
    export_with_torch(model, model.config, tmp_path)
    assert compare_with_torch(model, tmp_path, TEXT)["max_abs"] <= 1e-4


def test_versions_names_and_lengths_are_those_of_our_own_graphs(gpt2):
    """IR 10, opset 21; a cache of any length; and nothing says on which machine it was made."""
    proto = onnx.load(gpt2.folder / "model.onnx", load_external_data=False)
    assert (proto.ir_version, [(one.domain, one.version) for one in proto.opset_import]) == (10, [("", 21)])
    shapes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in [*proto.graph.input, *proto.graph.output]
    }
    assert shapes == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total"],
        "position_ids": ["batch", "sequence"],
        "past_key_values.0.key": ["batch", 4, "past", 16],
        "past_key_values.0.value": ["batch", 4, "past", 16],
        "logits": ["batch", "sequence", VOCAB],
        "present.0.key": ["batch", 4, "total", 16],
        "present.0.value": ["batch", 4, "total", 16],
    }
    assert b".py" not in (gpt2.folder / "model.onnx").read_bytes()
    assert gpt2.exported.bytes == sum(file.stat().st_size for file in gpt2.folder.iterdir())


def test_our_runtime_generates_with_it(gpt2):
    """The same tokens as the model's own, prompts of different lengths included."""
    ids = TEXT[:20].reshape(2, 10)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected = gpt2.model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    found = open_onnx(gpt2.folder, threads=1).generate(ids, mask, max_new_tokens=8)
    assert torch.equal(found, expected)


def test_a_wrong_graph_is_found_and_the_layer_named(gpt2):
    """The layer's projection was changed after the export."""
    weight = gpt2.model.transformer.h[0].attn.c_attn.weight
    before = weight.data.clone()
    weight.data[:, 128:] *= 1.01  # the values
    try:
        with pytest.raises(IntegrityError, match="the difference begins before layer 0's value"):
            compare_with_torch(gpt2.model, gpt2.folder, TEXT)
    finally:
        weight.data = before


def rounded(gpt2, folder, **settings):
    """A copy of the GPT-2 whose weights become codes, in the module and in the graph."""
    shutil.copytree(gpt2.folder, folder)
    model = copy.deepcopy(gpt2.model)
    exported, parity = round_with_torch(model, folder, Rounding(group_size=32, **settings), TEXT)
    return SimpleNamespace(model=model, exported=exported, parity=parity)


def test_a_rounded_graph_is_the_model_with_the_rounded_weights(gpt2, tmp_path):
    """Within 1e-4 with exact arithmetic; what accuracy_level 4 and the rounding change is said."""
    found = rounded(gpt2, tmp_path / "onnx", bits=4, accuracy_level=4)
    assert found.parity["max_abs"] <= 1e-4
    assert found.parity["greedy_equal"]
    assert (found.parity["accuracy_level"], found.parity["rounded"]) == (4, 4)
    assert 1e-4 < found.parity["drift"]["max_abs"] < found.parity["cost"]["max_abs"]
    assert set(found.parity["float"]) == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert found.exported.bytes < gpt2.exported.bytes
    with torch.no_grad():
        expected = found.model(TEXT[None]).logits
    assert torch.allclose(open_onnx(tmp_path / "onnx", accuracy_level=0)(TEXT[None]).logits, expected, atol=1e-4)


def test_a_rounded_head_leaves_the_embedding_that_it_was_tied_to(gpt2, tmp_path):
    """The graph looks tokens up in the float table and multiplies by the codes."""
    found = rounded(gpt2, tmp_path / "onnx", bits=8, accuracy_level=0, head=True)
    assert found.parity["max_abs"] <= 1e-4
    assert found.parity["rounded"] == 5
    assert torch.equal(found.model.transformer.wte.weight, gpt2.model.transformer.wte.weight)
    assert not torch.equal(found.model.lm_head.weight, found.model.transformer.wte.weight)


@pytest.mark.slow
def test_experts_are_rounded_one_by_one(tmp_path):
    """gpt-oss: transposed stacks with biases; two products for each of four experts in two layers, q, k, v and o."""
    model = a_decoder("gpt_oss")
    export_with_torch(model, model.config, tmp_path)
    _, parity = round_with_torch(model, tmp_path, Rounding(4, 32, accuracy_level=4), TEXT)
    assert parity["max_abs"] <= 1e-4
    assert parity["rounded"] == 2 * (4 * 2 + 4)
    assert parity["float"]["model.layers.0.mlp.router.weight"] == "a router: one row for each of 4 experts"
    assert not any(name.endswith("_proj") for name in parity["float"])


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss"])
def test_the_loop_over_experts_is_what_transformers_computes(family):
    """Halves side by side, and interleaved, transposed ones with biases; some experts see no token."""
    model = a_decoder(family)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        expected = model(TEXT[None, :3]).logits
        ALL_EXPERTS_FUNCTIONS.register(EXPERTS, static_sparse_experts)
        model.set_experts_implementation(EXPERTS)
        found = model(TEXT[None, :3]).logits
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_failed_export_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    """Its dtype, its training mode and its experts return; no folder appears; torch's own reason is said."""

    def fails(*_, **__):
        raise torch.onnx.OnnxExporterError("no such operator") from ValueError("what torch says\nin many lines")

    model = a_decoder("granitemoe", torch.bfloat16).train()
    experts = model.config._experts_implementation
    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(UnsupportedModel, match=r"granitemoe: torch cannot export it to ONNX: what torch says$"):
        export_with_torch(model, model.config, tmp_path / "onnx")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert (model.training, model.config._experts_implementation) == (True, experts)
    assert not (tmp_path / "onnx").exists()


def test_a_state_that_does_not_grow_is_no_cache(tmp_path):
    """Mamba's."""
    model = a_decoder("mamba")
    with pytest.raises(UnsupportedModel, match="mamba: not every layer caches keys and values of all tokens"):
        export_with_torch(model, model.config, tmp_path / "onnx")


def test_packed_weights_are_refused(tmp_path):
    """torch would not know what to do with our kernels."""
    model = wrap_live(tiny_model("llama"), tiny_tokenizer())
    context = Context(calibration=Calibration(), seed=0, ids=tiny_ids(2, 16))
    Quantize(bits=4, group_size=32, method="rtn").apply(model, context)
    with pytest.raises(UnsupportedModel, match="only float weights can be exported with torch"):
        export_with_torch(model.skeleton, model.config, tmp_path / "onnx")
