"""Float weights of a finished graph become codes, without calibration data: for families that passes do not know.

torch names a weight that it turned round `val_145`: where a product's weight lies in the module is found by its values.

O output features, I input features, E experts.
"""

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.algorithms.rounding import round_to_nearest
from compressor.errors import UnsupportedModel
from compressor.exporters.onnx.graph import DATA, Graph, require_onnx
from compressor.exporters.onnx.linear import Linears
from compressor.exporters.onnx.weights import to_nbits
from compressor.quant import QuantizedTensor, QuantSpec

NO_PRODUCT = "no product reads it as a matrix"
HEAD = "the output head; `head: int8` rounds it"


@dataclass(frozen=True)
class Rounding:
    """How weights become codes: `bits` bits, with a scale and a zero for `group_size` neighbours in a row."""

    bits: int
    group_size: int
    accuracy_level: int
    head: bool = False  # the output head too, in 8 bits

    def why_not(self, weight_OI: Tensor) -> str | None:
        """What keeps a weight in float; None where nothing does."""
        if weight_OI.shape[1] % self.group_size:
            return f"rows of {weight_OI.shape[1]} weights do not divide into groups of {self.group_size}"
        return None

    def codes(self, weight_OI: Tensor, bits: int | None = None) -> QuantizedTensor:
        """Round to nearest, with the scales that lose least."""
        return round_to_nearest(weight_OI, self._spec(bits or self.bits), dtype=torch.float32)

    def _spec(self, bits: int) -> QuantSpec:
        # SmolLM2-135M, int4 in groups of 32: KL 0.25 with zeros and 0.35 without, for an eighth of a bit (docs/onnx.md)
        return QuantSpec(bits, self.group_size, symmetric=False)

    def __str__(self) -> str:
        return str(self._spec(self.bits))


@torch.no_grad()
def round_graph(folder: Path, module: Any, rounding: Rounding) -> dict[str, Any]:
    """Put codes in place of the weights that a decoder's float32 graph multiplies by; one of them in memory at a time.

    `module` is what the graph was made from, in float32, its head untied; it has the rounded weights afterwards. Gives
    how many matrices were `rounded`, and by name why others stayed `float`. UnsupportedModel where none can be rounded.
    """
    onnx = require_onnx()
    old = onnx.load(folder / "model.onnx", load_external_data=False).graph
    constants = _Constants(onnx, folder, old)
    products, left = _plan(old, constants, module, rounding)
    if not products:
        raise UnsupportedModel(no_weight(left))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        graph = Graph(Path(scratch), old.name)
        try:
            _rewrite(onnx, graph, old, constants, products, rounding)
            graph.save()
        finally:
            graph.close()
        for name in ("model.onnx", DATA):
            (Path(scratch) / name).replace(folder / name)
    return {"rounded": len({product.name for product in products.values()}), "float": left}


def no_weight(left: Mapping[str, str]) -> str:
    """What to say where every weight stays float: each reason, and one weight that it holds for."""
    reasons = {why: name for name, why in left.items()}
    return f"no weight of this model can be rounded: {'; '.join(f'{why} ({name})' for why, name in reasons.items())}"


@dataclass(frozen=True)
class _Product:
    """A node that multiplies by a constant: the weight's name, and where it lies in the module, as `[O, I]` views."""

    name: str
    places: list[Tensor]
    bits: int


class _Constants:
    """The constants of a graph: initializers, turned round or taken out of a stack; read when they are used."""

    def __init__(self, onnx: Any, folder: Path, graph: Any):
        self.onnx, self.folder = onnx, folder
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.makers = {output: node for node in graph.node for output in node.output}

    def is_external(self, name: str) -> bool:
        tensor = self.initializers[name]
        return (
            tensor.data_location == self.onnx.TensorProto.EXTERNAL and tensor.data_type == self.onnx.TensorProto.FLOAT
        )

    def proto(self, name: str) -> Any:
        """An initializer with its data inside."""
        tensor = self.onnx.TensorProto()
        tensor.CopyFrom(self.initializers[name])
        if tensor.external_data:
            self.onnx.external_data_helper.load_external_data_for_tensor(tensor, str(self.folder))
        return tensor

    def tensor(self, name: str) -> Tensor | None:
        """The value of a constant; None for what is computed, and for what is no float."""
        if name in self.initializers:
            return self.floats(name) if self.initializers[name].data_type == self.onnx.TensorProto.FLOAT else None
        node = self.makers.get(name)
        if node is None or node.op_type not in ("Transpose", "Gather"):
            return None
        tensor, settings = self.tensor(node.input[0]), attributes(self.onnx, node)
        if tensor is None:
            return None
        if node.op_type == "Transpose":
            return tensor.permute(settings.get("perm", list(range(tensor.dim()))[::-1]))
        index = self.initializers.get(node.input[1])
        if index is None or list(index.dims) or settings.get("axis", 0) != 0:
            return None
        return tensor[int(self.onnx.numpy_helper.to_array(index))]

    def floats(self, name: str) -> Tensor:
        """A float initializer; its pages are read from the disk when they are used."""
        proto = self.initializers[name]
        if not self.is_external(name):
            return torch.from_numpy(self.onnx.numpy_helper.to_array(proto).copy())
        said = {entry.key: entry.value for entry in proto.external_data}
        file, offset = self.folder / said["location"], int(said.get("offset", 0))
        return torch.from_numpy(np.memmap(file, np.float32, "c", offset, tuple(proto.dims)))


def attributes(onnx: Any, node: Any) -> dict[str, Any]:
    """A node's settings by name."""
    return {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}


def _plan(
    graph: Any, constants: _Constants, module: Any, rounding: Rounding
) -> tuple[dict[str, _Product], dict[str, str]]:
    """The products to round, by the output of their node, and why each other matrix stays as it is."""
    matrices, head = _matrices(module), module.get_output_embeddings().weight
    found, left = {}, {}
    for node in graph.node:
        weight_OI = _weight_of(constants, node)
        if weight_OI is None:
            continue
        places = [(name, place) for name, matrix in matrices[_key(weight_OI)] for place in _same(matrix, weight_OI)]
        if places:
            found[node.output[0]] = (places, weight_OI)
        else:
            left[node.input[1]] = "torch made it of several weights"
    stacks = {_parameter(name) for places, _ in found.values() for name, _ in places if name != _parameter(name)}
    experts = {module.get_parameter(name).shape[0] for name in stacks}
    products: dict[str, _Product] = {}
    rounded: set[str] = set()
    for output, (places, weight_OI) in found.items():
        is_head = any(place.data_ptr() == head.data_ptr() for _, place in places)
        if is_head and not rounding.head:
            why: str | None = HEAD
        elif len(weight_OI) in experts:
            why = f"a router: one row for each of {len(weight_OI)} experts"
        else:
            why = rounding.why_not(weight_OI)
        names = {_parameter(name) for name, _ in places}
        if why is None:
            products[output] = _Product(places[0][0], [place for _, place in places], 8 if is_head else rounding.bits)
            rounded |= names
        else:
            left |= dict.fromkeys(names, why)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1 and name not in rounded:
            left.setdefault(name, NO_PRODUCT)
    return products, left


def _parameter(name: str) -> str:
    """The parameter that a matrix is in: itself, or the stack of `experts[3]`."""
    return name.partition("[")[0]


def _matrices(module: Any) -> dict[Any, list[tuple[str, Tensor]]]:
    """The matrices of a module, also those in stacks, under what they have in common with themselves turned round."""
    found, table = defaultdict(list), module.get_input_embeddings().weight
    for name, parameter in module.named_parameters():
        if parameter is table and parameter is not module.get_output_embeddings().weight:
            continue  # it may have the values of an untied head
        stack = [(name, parameter.data)] if parameter.dim() == 2 else []
        if parameter.dim() == 3:
            stack = [(f"{name}[{e}]", matrix) for e, matrix in enumerate(parameter.data)]
        for entry in stack:
            found[_key(entry[1])].append(entry)
    return found


def _key(matrix: Tensor) -> tuple[Any, ...]:
    return (*sorted(matrix.shape), float(matrix[0, 0]), float(matrix[-1, -1]))


def _same(matrix: Tensor, weight_OI: Tensor) -> Iterator[Tensor]:
    """The matrix as the graph has it, turned round or not, if it is the same."""
    for turned in (matrix, matrix.T):
        if torch.equal(turned, weight_OI):
            yield turned
            return


def _weight_of(constants: _Constants, node: Any) -> Tensor | None:
    """The constant `[O, I]` that a node multiplies by; None for what is no such product."""
    settings = attributes(constants.onnx, node)
    if node.op_type == "Gemm" and (settings.get("transA", 0), settings.get("alpha", 1), settings.get("beta", 1)) != (
        0, 1, 1,
    ):  # fmt: skip
        return None
    if node.op_type not in ("Gemm", "MatMul"):
        return None
    weight = constants.tensor(node.input[1])
    if weight is None or weight.dim() != 2:
        return None
    return weight if settings.get("transB", 0) else weight.T


def _rewrite(
    onnx: Any, graph: Graph, old: Any, constants: _Constants, products: dict[str, _Product], rounding: Rounding
) -> None:
    """Fill a graph with what another one computes, codes in place of the weights of some products."""
    graph.inputs, graph.outputs = list(old.input), list(old.output)
    linears, written = Linears(graph, torch.float32, rounding.accuracy_level), {}
    nodes = []
    for node in old.node:
        product = products.get(node.output[0])
        if product is None:
            nodes.append(node)
            continue
        if product.name not in written:
            quantized = rounding.codes(product.places[0], product.bits)
            linears.nbits(product.name, to_nbits(quantized, torch.float32, product.name), node.input[0])
            written[product.name] = graph.nodes.pop()
            for place in product.places:
                place.copy_(quantized.dequantize())
        rounded = onnx.NodeProto()
        rounded.CopyFrom(written[product.name])
        rounded.input[0], rounded.output[0], rounded.name = node.input[0], node.output[0], node.name
        nodes.append(rounded)
        if len(node.input) > 2 and node.input[2]:
            rounded.output[0] = f"{node.output[0]}/product"
            nodes.append(onnx.helper.make_node("Add", [rounded.output[0], node.input[2]], list(node.output)))
    kept, needed = _needed(nodes, [value.name for value in old.output])
    for name in (name for name in constants.initializers if name in needed):
        if constants.is_external(name):
            graph.weight(name, constants.floats(name))
        else:
            graph.nodes.append(onnx.helper.make_node("Constant", [], [name], value=constants.proto(name)))
    graph.nodes += kept
    graph.metadata = {"accuracy_level": str(rounding.accuracy_level), "weights": str(rounding)}


def _needed(nodes: Sequence[Any], outputs: Sequence[str]) -> tuple[list[Any], set[str]]:
    """The nodes that some outputs depend on, and all that these read: what turned a rounded weight round is gone."""
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(_reads(node))
    return kept[::-1], needed


def _reads(node: Any) -> Iterator[str]:
    """What a node reads, in its branches too."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _reads(inner)
