"""An ONNX folder is exported, loaded, asked, measured and gated like any model."""

import errno
import json

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from compressor.errors import EnvironmentProblem, RecipeError, UnsupportedModel
from compressor.gates import Policy
from compressor.metrics import TextSet, measure_accuracy
from compressor.models import load_model
from compressor.pipeline import export, gate, generate, load, measure, run
from compressor.pipeline.onnx_subject import OnnxSubject
from compressor.recipe import Evaluate
from tests.tiny_models import save_tiny, tiny_ids, tiny_tokenizer

pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A dense model and its float ONNX folder."""
    root = tmp_path_factory.mktemp("onnx")
    dense = save_tiny(root / "dense", "qwen3_moe")
    export(dense, root / "onnx", "onnx")
    text = root / "text.txt"
    text.write_text("A small text that is long enough for a few windows of bytes. " * 20)
    questions = root / "questions.jsonl"
    lines = [{"query": f"{n} and {n + 1} and", "choices": [str(n + 2), str(n)], "gold": n % 2} for n in range(8)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluate = Evaluate(
        text={"small": str(text)}, windows=2, length=64, latency=None,
        tasks=[{"name": "counting", "kind": "multiple_choice", "data": str(questions)}],
    )  # fmt: skip
    return {"root": root, "dense": dense, "onnx": root / "onnx", "evaluate": evaluate}


def test_its_perplexity_is_the_models(world):
    """The graph's logits of the same windows: each window's NLL within float32's sums."""
    texts = [TextSet("a", tiny_ids(3, 32))]
    of_graph = measure_accuracy(OnnxSubject(world["onnx"]), texts, baseline=None)
    of_model = measure_accuracy(load_model(str(world["dense"])), texts, baseline=None)
    assert of_graph.accuracy.window_nll["a"] == pytest.approx(of_model.accuracy.window_nll["a"], abs=1e-5)


def test_it_is_measured_beside_the_model_that_it_came_from(world):
    """KL nought, every first choice the same, the same task score."""
    found = measure(world["onnx"], baseline=world["dense"], evaluate=world["evaluate"])
    assert found["accuracy"]["kl_mean"]["value"] == pytest.approx(0, abs=1e-6)
    assert found["accuracy"]["top1_agreement"]["value"] == 1.0
    assert found["behaviour"]["flips"]["counting"]["right_to_wrong"] == 0


def test_a_gate_takes_it_as_a_candidate(world):
    """Structure is about safetensors and is skipped aloud; fidelity is measured."""
    result = gate(world["onnx"], world["dense"], Policy(kl_mean={"max": 1e-4}), evaluate=world["evaluate"])
    assert [(check.group, check.status) for check in result.verdict.checks] == [
        ("structure", "skipped"),
        ("fidelity", "pass"),
    ]


def test_it_writes_what_the_model_writes(world):
    """By name, and live with its tokenizer."""
    assert generate(str(world["onnx"]), "ab", 8) == generate(str(world["dense"]), "ab", 8)


def test_load_gives_a_module_that_is_called_like_a_model(world):
    """Logits of tokens, without a look at what runs them."""
    ids = tiny_ids(1, 16)
    with torch.inference_mode():
        dense, onnx = load(world["dense"])(ids).logits, load(world["onnx"])(ids).logits
    assert torch.allclose(dense.float(), onnx, atol=1e-4)


def test_a_16_bit_graph_is_proven_by_its_twin(world):
    """No CPU kernel runs it; the float32 graph of the same codes is compared, and does not stay behind."""
    import onnx

    written = export(world["dense"], world["root"] / "half", "onnx", {"dtype": "float16"})
    assert (written["parity"]["of"], written["parity"]["max_abs"] <= 1e-4) == ("its float32 twin", True)
    graph = onnx.load(world["root"] / "half" / "model.onnx", load_external_data=False).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]}
    assert kinds["logits"] == kinds["past_key_values.0.key"] == onnx.TensorProto.FLOAT16
    assert sorted(path.name for path in world["root"].glob("*half*")) == ["half"]


def test_a_graph_is_not_exported_again(world):
    """It holds no codes that another format could take."""
    with pytest.raises(RecipeError, match="is an ONNX folder; give the model"):
        export(world["onnx"], world["root"] / "again", "gguf")


def test_a_run_writes_all_three_formats(world, tmp_path):
    """`export: [safetensors, onnx, gguf]`: three folders beside each other, each with its parity in the report."""
    pytest.importorskip("gguf", reason="the extra `gguf` is not installed")
    recipe = tmp_path / "recipe.yaml"
    text = world["evaluate"].text["small"]
    recipe.write_text(
        json.dumps({
            "model": str(world["dense"]), "calibration": {"data": text, "samples": 2, "length": 64},
            "passes": [{"quantize": {"bits": 4, "group_size": 32}}],
            "evaluate": {"text": {"small": text}, "windows": 2, "length": 64, "latency": False},
            "export": ["safetensors", {"onnx": {"accuracy_level": 0}}, "gguf"],
        })
    )  # fmt: skip
    out = run(recipe, tmp_path / "out").out
    exports = {one["format"]: one for one in json.loads((out / "report.json").read_text())["exports"]}
    assert {name: (out / one["path"]).is_dir() for name, one in exports.items()} == {
        "safetensors": True, "onnx": True, "gguf": True,
    }  # fmt: skip
    assert exports["onnx"]["parity"]["max_abs"] <= 1e-4
    assert exports["gguf"]["parity"]["greedy_equal"]


def test_a_full_disk_says_so_and_leaves_nothing(world, tmp_path, monkeypatch):
    from compressor.exporters.onnx import writer

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "copy_companions", full)
    with pytest.raises(EnvironmentProblem, match=r"the disk is full: [1-9][0-9,]* bytes of it were written"):
        export(world["dense"], tmp_path / "onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_writes_gguf_alone_measures_that_file(world, tmp_path):
    """Its bytes; loading is other software's, which the report says instead of a time."""
    pytest.importorskip("gguf", reason="the extra `gguf` is not installed")
    recipe = tmp_path / "recipe.yaml"
    text = world["evaluate"].text["small"]
    latency = {"batch": [1], "prompt": 8, "generate": 2, "loading": True}
    recipe.write_text(
        json.dumps({
            "model": str(world["dense"]),
            "passes": [{"quantize": {"method": "rtn", "scale_search": "mse", "group_size": 32}}],
            "evaluate": {"text": {"small": text}, "windows": 2, "length": 64, "latency": latency},
            "export": ["gguf"],
        })
    )  # fmt: skip
    out = run(recipe, tmp_path / "out").out
    measured = json.loads((out / "report.json").read_text())["steps"][-1]["measurement"]
    (file,) = (out / "gguf").glob("*.gguf")
    assert measured["memory"]["file_bytes"] == file.stat().st_size
    assert measured["latency"]["load_s"] is None
    assert measured["latency"]["load_s_reason"] == "GGUF is loaded by other software: time it there"


def test_a_family_that_passes_do_not_know_goes_through_torch(tmp_path):
    """GPT-2 has learned positions and transposed weights; nothing of ours knows it."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_embd=32, n_layer=1, n_head=2, n_positions=256, eos_token_id=256)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    written = export(tmp_path / "gpt2", tmp_path / "onnx", "onnx")
    assert written["parity"]["max_abs"] <= 1e-4
    assert len(generate(str(tmp_path / "onnx"), "ab", 4)) >= 2


def test_an_encoder_is_exported_and_loaded(tmp_path):
    """Hidden states within 1e-4 of the stock model's, in batches with padding."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=257, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    assert export(tmp_path / "bert", tmp_path / "onnx", "onnx")["parity"]["max_abs"] <= 1e-4
    assert load(tmp_path / "onnx")(tiny_ids(1, 8)).last_hidden_state.shape == (1, 8, 32)
    written = export(tmp_path / "bert", tmp_path / "int4", "onnx", {"weights": "int4"})
    assert (written["parity"]["rounded"], written["parity"]["max_abs"] <= 1e-4) == (6, True)
    with pytest.raises(UnsupportedModel, match="is an encoder; it has no head to store as int8"):
        export(tmp_path / "bert", tmp_path / "head", "onnx", {"weights": "int4", "head": "int8"})


def test_families_that_passes_know_are_quantized_by_a_pass(world, tmp_path):
    """Not while they are exported: the message says how."""
    with pytest.raises(UnsupportedModel, match=r"quantize: \{bits: 4\}. in a recipe for .compress run."):
        export(world["dense"], tmp_path / "onnx", "onnx", {"weights": "int4"})


def test_a_group_size_without_weights_is_refused(tmp_path):
    """It would do nothing."""
    with pytest.raises(RecipeError, match="group_size belongs to `weights: int4`"):
        export(tmp_path, tmp_path / "onnx", "onnx", {"group_size": 32})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"accuracy_level": 0}, "accuracy_level is for rounded weights; give weights=int4 or weights=int8"),
        ({"dtype": "float16"}, "dtype is for families that passes know; this one is written in float32"),
        ({"weights": "int4", "embedding": "int8"}, "embedding is for families that passes know"),
    ],
    ids=str,
)
def test_options_that_do_nothing_in_a_torch_graph_are_refused(options, said, tmp_path):
    """Before anything is written."""
    (tmp_path / "gpt2").mkdir()
    GPT2Config(n_embd=32, n_layer=1, n_head=2).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UnsupportedModel, match=said):
        export(tmp_path / "gpt2", tmp_path / "onnx", "onnx", options)
    assert not (tmp_path / "onnx").exists()
