"""int8 weights with int8 activations as ONNX: one layer exactly, a model but for which way a tie falls."""

import pytest
import torch

from compressor.errors import IntegrityError
from compressor.exporters.onnx import OnnxSettings, compare_onnx, export_onnx
from compressor.exporters.onnx.graph import Graph
from compressor.exporters.onnx.linear import Linears
from compressor.layers import PackedLinear
from tests.exporters.test_w8a8 import w8a8
from tests.tiny_models import tiny_ids

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

TEXT = tiny_ids(1, 72)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_layer_in_onnxruntime_is_the_exact_layer(dtype, tmp_path):
    """A token of zeros and a large one among others; 1e-6 of the largest output, in a float16 graph its own step."""
    layer = w8a8(dtype=torch.float32).anatomy(0).sites[0].module
    assert isinstance(layer, PackedLinear)
    graph = Graph(tmp_path, "one layer")
    x = graph.input("x", dtype, ["tokens", layer.in_features])
    graph.output(Linears(graph, dtype, 4).joined("layer", [layer], x), "y", dtype, ["tokens", layer.out_features])
    session = onnxruntime.InferenceSession(graph.save())
    inputs = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
    inputs[1], inputs[2] = 0, inputs[2] * 100
    (found,) = session.run(None, {"x": inputs.numpy()})
    expected = layer(inputs.float())
    assert (torch.from_numpy(found).float() - expected).abs().max() < (
        1e-6 if dtype == torch.float32 else 5e-4
    ) * expected.abs().max()


@pytest.mark.parametrize(
    ("family", "settings"), [("llama", {"attention_bias": True}), ("phi3", {}), ("gemma2", {})], ids=str
)
def test_a_graph_is_the_model_but_for_which_way_a_tie_falls(family, settings, tmp_path):
    """Without the rounding within 1e-4 in all ways to call it; with it nearer than the rounding itself moves it."""
    model = w8a8(family, dtype=torch.float32, **settings)
    export_onnx(model, tmp_path / "onnx")
    found = compare_onnx(model, tmp_path / "onnx", TEXT, OnnxSettings())
    assert found["max_abs"] <= 1e-4
    assert found["rounding"]["apart"] < found["rounding"]["cost"]


def test_weights_that_differ_are_found_in_a_graph(tmp_path):
    """One scale doubled after the export."""
    model = w8a8(dtype=torch.float32)
    export_onnx(model, tmp_path / "onnx")
    model.anatomy(1).sites[0].module.packed.scales[5] *= 2
    with pytest.raises(IntegrityError, match="the logits differ"):
        compare_onnx(model, tmp_path / "onnx", TEXT, OnnxSettings())


def test_a_wrong_rounding_is_found_in_a_graph(tmp_path):
    """Steps that are twenty times too large: the graph without rounding is right, the one with it is not."""
    model = w8a8(dtype=torch.float32)
    export_onnx(model, tmp_path / "onnx")
    path = tmp_path / "onnx/model.onnx"
    proto = onnx.load(path, load_external_data=False)
    for constant in proto.graph.initializer:
        if constant.name.startswith("constant_") and onnx.numpy_helper.to_array(constant).tolist() == 127.5:
            constant.CopyFrom(onnx.numpy_helper.from_array(torch.tensor(127.5 / 20).numpy(), constant.name))
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(IntegrityError, match="with inputs rounded to int8"):
        compare_onnx(model, tmp_path / "onnx", TEXT, OnnxSettings())
