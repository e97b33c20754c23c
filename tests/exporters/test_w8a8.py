"""int8 weights with int8 activations in files: stock transformers and our own reader compute the same."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.calibration import Calibration, last_hidden
from compressor.errors import IntegrityError, UnsupportedModel
from compressor.exporters import compare_reloaded, export_safetensors
from compressor.gates.structure import check_structure
from compressor.models import load_model, wrap_live
from compressor.passes import Context, Quantize
from tests.tiny_models import rough_vectors, tiny_ids, tiny_model, tiny_tokenizer


def w8a8(family="llama", *, dtype=torch.bfloat16, **settings):
    """A live model of two layers, quantized."""
    model = wrap_live(rough_vectors(tiny_model(family, dtype=dtype, **settings)), tiny_tokenizer())
    context = Context(calibration=Calibration(), ids=tiny_ids(2, 16))
    Quantize(bits=8, group_size="channel", activations="int8", method="rtn").apply(model, context)
    return model


@pytest.fixture
def folder(tmp_path):
    export_safetensors(w8a8(), tmp_path / "model", shard_bytes=10**9)
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {"attention_bias": True, "mlp_bias": True}), pytest.param("gemma2", {}, marks=pytest.mark.slow)],
    ids=str,
)
def test_stock_transformers_rounds_as_we_do(family, settings, tmp_path):
    """In a fresh process, through compressed-tensors: not a bit of the float32 logits is different."""
    model = w8a8(family, **settings)
    export_safetensors(model, tmp_path / "model", shard_bytes=10**9)
    assert compare_reloaded(model, tmp_path / "model", tiny_ids(2, 64))["max_abs"] == 0


def test_the_file_holds_plain_int8_and_its_scales(folder):
    """Names, dtypes and shapes of docs/format.md; the config says what happens to activations."""
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    parts = {
        key.removeprefix(name): (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items() if name in key
    }
    assert parts == {".weight": (torch.int8, (64, 128)), ".weight_scale": (torch.bfloat16, (64, 1))}
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    (group,) = settings["config_groups"].values()
    assert settings["format"] == group["format"] == "int-quantized"
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    assert inputs.items() <= group["input_activations"].items()


def test_our_own_reader_reads_it_back(folder):
    """The same hidden states as before the export, bit for bit."""
    assert torch.equal(last_hidden(load_model(str(folder)), tiny_ids(2)), last_hidden(w8a8(), tiny_ids(2)))


def test_other_activation_schemes_are_refused_when_a_checkpoint_is_opened(folder):
    """Static ones, for instance."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"]["dynamic"] = False
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="input_activations"):
        load_model(str(folder))


def test_a_missing_scale_is_named(folder):
    """IntegrityError with the layer's name."""
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"layers\.1\.mlp\.up_proj"), load_model(str(folder)).open_block(1):
        pass


def test_structural_rules_know_the_layout(folder):
    """Silent on a healthy folder; one scale of infinity is found under its name."""
    assert [finding for finding in check_structure(folder, None) if finding.status == "fail"] == []
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight_scale"][3] = torch.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = {(one.rule, one.where) for one in check_structure(folder, None) if one.status == "fail"}
    assert ("values.scales", "model.layers.1.mlp.up_proj.weight_scale") in found
