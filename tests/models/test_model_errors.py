"""What is wrong with a checkpoint is said by name, with its own kind of error."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.errors import EnvironmentProblem, IntegrityError, UnsupportedModel
from compressor.models import load_model

ONE_FILE = "model.safetensors"


@pytest.fixture
def checkpoint(moe_folder, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(moe_folder, tmp_path / "broken")


def edit_tensors(folder, change):
    tensors = load_file(folder / ONE_FILE)
    change(tensors)
    save_file(tensors, folder / ONE_FILE, metadata={"format": "pt"})


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def open_all(folder):
    model = load_model(str(folder))
    for k in range(model.num_blocks):
        with model.open_block(k):
            pass


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.1.input_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor_is_named(checkpoint, name):
    """IntegrityError with the tensor's name."""
    edit_tensors(checkpoint, lambda tensors: tensors.pop(name))
    with pytest.raises(IntegrityError, match=name.replace(".", r"\.")):
        open_all(checkpoint)


@pytest.mark.parametrize("part", ["up_proj", "down_proj"])
def test_a_missing_expert_is_an_integrity_error(checkpoint, part):
    """One expert's weight is gone: the stack is named."""
    edit_tensors(checkpoint, lambda tensors: tensors.pop(f"model.layers.1.mlp.experts.7.{part}.weight"))
    with pytest.raises(IntegrityError, match=r"model\.layers\.1\.mlp\.experts"):
        open_all(checkpoint)


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.o_proj.weight", "model.embed_tokens.weight", "model.layers.0.mlp.gate.weight"]
)
def test_a_wrong_shape_is_named_with_both_shapes(checkpoint, name):
    """IntegrityError with the tensor's name."""
    edit_tensors(checkpoint, lambda tensors: tensors.update({name: torch.zeros(3, 64, dtype=torch.bfloat16)}))
    with pytest.raises(IntegrityError, match=rf"{name}.*\[3, 64\]"):
        open_all(checkpoint)


def test_an_unknown_tensor_of_a_block_is_refused(checkpoint):
    """A weight that the modelling code has no place for would be lost silently."""
    extra = {"model.layers.0.self_attn.extra.weight": torch.zeros(4)}
    edit_tensors(checkpoint, lambda tensors: tensors.update(extra))
    with pytest.raises(UnsupportedModel, match="extra"):
        open_all(checkpoint)


def test_an_unknown_tensor_outside_the_blocks_is_refused(checkpoint):
    """The same beside the embedding: a vision tower or a second head."""
    edit_tensors(checkpoint, lambda tensors: tensors.update({"vision_tower.weight": torch.zeros(4)}))
    with pytest.raises(UnsupportedModel, match="vision_tower"):
        open_all(checkpoint)


def test_a_truncated_shard_is_an_integrity_error(checkpoint):
    """Half of the file is there: refused when the model is opened, with the file's name."""
    path = checkpoint / ONE_FILE
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(IntegrityError, match=ONE_FILE):
        load_model(str(checkpoint))


@pytest.mark.parametrize("model_type", ["gpt2", "no_such_model"])
def test_an_unknown_family_lists_the_known_ones(checkpoint, model_type):
    """Whether transformers knows the type or not."""
    edit_config(checkpoint, model_type=model_type)
    with pytest.raises(UnsupportedModel, match=f"{model_type}.*supported are .*llama.*qwen3_moe"):
        load_model(str(checkpoint))


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "compressed-tensors", "format": "int-quantized"},
        {"quant_method": "fp8"},
    ],
    ids=["bitsandbytes", "int-quantized", "fp8"],
)
def test_other_quantized_checkpoints_are_refused(checkpoint, quantization):
    """Only our own layout is read packed; anything else would be read as if it were dense."""
    edit_config(checkpoint, quantization_config=quantization)
    with pytest.raises(UnsupportedModel, match="quantized already"):
        load_model(str(checkpoint))


def test_a_missing_config_is_named(checkpoint):
    """A folder without config.json is no transformers checkpoint."""
    (checkpoint / "config.json").unlink()
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        load_model(str(checkpoint))


def test_a_broken_config_is_an_integrity_error(checkpoint):
    """Half a config.json."""
    (checkpoint / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(IntegrityError, match=r"config\.json.*not valid JSON"):
        load_model(str(checkpoint))


def test_missing_weights_are_an_environment_problem(checkpoint):
    """Config and tokenizer alone."""
    (checkpoint / ONE_FILE).unlink()
    with pytest.raises(EnvironmentProblem, match="no weights"):
        load_model(str(checkpoint))


def test_a_missing_tokenizer_is_an_environment_problem(checkpoint):
    """Weights and config alone."""
    for path in checkpoint.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(EnvironmentProblem, match="tokenizer"):
        load_model(str(checkpoint))


@pytest.mark.parametrize("name", ["/no/such/folder", "./absent", "/no/such/model.gguf", "model.gguf", "nothing"])
def test_a_missing_model_says_what_is_possible(name):
    """No network is asked for anything that looks like a path."""
    with pytest.raises(UnsupportedModel, match=r"no model at .*possible are"):
        load_model(name)


def test_an_unknown_demo_lists_the_demos():
    """The two demo models."""
    with pytest.raises(UnsupportedModel, match="demo/tiny-moe, demo/smollm2-135m"):
        load_model("demo/huge")


def test_a_file_that_is_no_gguf_is_an_integrity_error(tmp_path, monkeypatch):
    """Bytes that are not GGUF leave nothing in the cache."""
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model" * 100)
    with pytest.raises(IntegrityError, match=r"model\.gguf"):
        load_model(str(path))
    assert list((tmp_path / "cache").iterdir()) == []


def test_layers_beyond_the_config_are_refused(checkpoint):
    """A third layer in the file of a model of two: half of a model must not pass for a whole one."""
    edit_tensors(checkpoint, lambda tensors: tensors.update({"model.layers.2.input_layernorm.weight": torch.ones(64)}))
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.2"):
        load_model(str(checkpoint))


def test_stored_rotary_frequencies_are_dropped(checkpoint):
    """Old Llama checkpoints hold them in each layer; they follow from the config."""
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    edit_tensors(checkpoint, lambda tensors: tensors.update(frequencies))
    open_all(checkpoint)
    kept = load_model(str(checkpoint)).skeleton.model.rotary_emb.inv_freq
    assert kept[-1] < 0.01  # 10000 ** (-7 / 8), not the 1 of the file
