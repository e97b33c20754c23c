"""Float products of a graph that become codes: what they compute, what stays float, and what lies in the file."""

import pytest
import torch
from torch import nn

from compressor.algorithms.rounding import round_to_nearest
from compressor.errors import UnsupportedModel
from compressor.exporters.onnx.graph import Graph
from compressor.exporters.onnx.rounding import Rounding, round_graph
from compressor.quant import QuantSpec

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

INT4 = Rounding(4, 32, accuracy_level=0)
ROWS = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


class Parts(nn.Module):
    """The weights of a model, without what it does with them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 64)
        self.up = nn.Linear(64, 48)
        self.narrow = nn.Linear(48, 8)
        self.experts = nn.Parameter(torch.randn(3, 64, 32))
        self.router = nn.Linear(64, 3)
        self.head = nn.Linear(64, 11)

    def get_input_embeddings(self):
        return self.table

    def get_output_embeddings(self):
        return self.head


@pytest.fixture
def parts():
    return Parts()


@pytest.fixture
def folder(parts, tmp_path):
    """Products as torch writes them, each a result of its own; one is of a weight that it made of two."""
    graph = Graph(tmp_path, "products")
    x = graph.input("x", torch.float32, ["rows", 64])

    def result(value, name, width):
        graph.output(value, name, torch.float32, ["rows", width])

    bias = graph.constant(parts.up.bias.detach().numpy(), "float32")
    up = graph.weight("val_1", parts.up.weight)
    wide = graph.node("Gemm", [x, up, bias], transB=1)
    narrow = graph.node("MatMul", [wide, graph.weight("val_2", parts.narrow.weight.T)])
    again = graph.node("MatMul", [x, graph.node("Transpose", [up], perm=[1, 0])])
    stack = graph.weight("experts", parts.experts)
    one = graph.node("MatMul", [x, graph.node("Gather", [stack, graph.constant(1)], axis=0)])
    turned = graph.node("Transpose", [graph.node("Gather", [stack, graph.constant(2)], axis=0)], perm=[1, 0])
    two = graph.node("Gemm", [x, turned], transB=1)
    router = graph.node("MatMul", [x, graph.weight("val_3", parts.router.weight.T)])
    head = graph.node("MatMul", [x, graph.weight("val_4", parts.head.weight.T)])
    both = graph.weight("val_5", (parts.experts[0] + parts.experts[1]).contiguous())
    sum_ = graph.node("MatMul", [x, both])
    for value, name, width in [
        (wide, "wide", 48), (narrow, "narrow", 8), (again, "again", 48), (one, "one", 32), (two, "two", 32),
        (router, "router", 3), (head, "head", 11), (sum_, "sum", 32),
    ]:  # fmt: skip
        result(value, name, width)
    graph.save()
    return tmp_path


def computed(folder):
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return {
        name: torch.from_numpy(value)
        for name, value in zip(names, session.run(names, {"x": ROWS.numpy()}), strict=True)
    }


def dequantized(weight_OI, bits=4):
    """The nearest weights that codes with a scale and a zero for 32 neighbours can stand for."""
    spec = QuantSpec(bits, 32, symmetric=False)
    return round_to_nearest(weight_OI.detach(), spec, dtype=torch.float32).dequantize()


def test_products_compute_with_what_the_codes_stand_for(parts, folder):
    """Turned round or not, with a bias, out of a stack; within 1e-4 of float64, and what is not rounded as before."""
    before = computed(folder)
    up = dequantized(parts.up.weight).double()
    expected = {"wide": ROWS.double() @ up.T + parts.up.bias.double(), "again": ROWS.double() @ up.T}
    for name, e in {"one": 1, "two": 2}.items():
        expected[name] = ROWS.double() @ dequantized(parts.experts[e].T).double().T
    round_graph(folder, parts, INT4)
    found = computed(folder)
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < 1e-4
        assert (found[name] - before[name]).abs().max() > 0.1
    for name in ("router", "head", "sum"):
        assert torch.equal(found[name], before[name])


def test_the_module_gets_the_weights_of_the_codes(parts, folder):
    """And keeps the others: an expert that no product reads among them."""
    experts, router = parts.experts.detach().clone(), parts.router.weight.detach().clone()
    expected = dequantized(experts[2].T).T
    round_graph(folder, parts, INT4)
    assert torch.equal(parts.experts[2], expected)
    assert torch.equal(parts.experts[0], experts[0])
    assert torch.equal(parts.router.weight, router)


def test_what_stays_float_is_named_with_the_reason(parts, folder):
    """By the module's names, where torch's are numbers."""
    found = round_graph(folder, parts, INT4)
    assert found == {
        "rounded": 3,
        "float": {
            "narrow.weight": "rows of 48 weights do not divide into groups of 32",
            "router.weight": "a router: one row for each of 3 experts",
            "head.weight": "the output head; `head: int8` rounds it",
            "val_5": "torch made it of several weights",
            "table.weight": "no product reads it as a matrix",
        },
    }


def test_the_head_is_rounded_if_asked(parts, folder):
    """To 8 bits, whatever the others have."""
    expected = ROWS @ dequantized(parts.head.weight, bits=8).T
    found = round_graph(folder, parts, Rounding(4, 32, 0, head=True))
    assert "head.weight" not in found["float"]
    assert torch.allclose(computed(folder)["head"], expected, atol=1e-5)


def test_the_file_holds_codes_once_and_no_float_beside_them(parts, folder):
    """`up` is read by two products; the stack stays for the sake of nobody and is gone."""
    round_graph(folder, parts, INT4)
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    names = {tensor.name for tensor in proto.graph.initializer}
    assert {"val_1", "experts"} & names == set()
    assert {"val_2", "val_3", "val_4", "val_5", "up.weight.codes", "experts[1].codes"} <= names
    reads = [node.input[1] for node in proto.graph.node if node.op_type == "MatMulNBits"]
    assert sorted(reads) == ["experts[1].codes", "experts[2].codes", "up.weight.codes", "up.weight.codes"]
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "model.onnx.data"}
    codes = next(tensor for tensor in proto.graph.initializer if tensor.name == "up.weight.codes")
    assert list(codes.dims) == [48, 2, 16]


def test_a_model_of_which_nothing_can_be_rounded_is_refused(parts, folder):
    """Groups of 128 in rows of 64: the reason is said, and the files are as they were."""
    before = (folder / "model.onnx").read_bytes()
    with pytest.raises(
        UnsupportedModel, match=r"can be rounded: .*rows of 64 weights do not divide into groups of 128"
    ):
        round_graph(folder, parts, Rounding(4, 128, 0))
    assert (folder / "model.onnx").read_bytes() == before
