"""Writes an ONNX model node by node, its weights straight to disk: a few rows at a time are converted in memory.

IR 10 and opset 21, which onnxruntime 1.20 and later read; the newest versions that `onnx` would pick do not load
(reference: onnxruntime refuses IR > 13, onnx 1.23 writes 14).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from compressor.errors import EnvironmentProblem

IR_VERSION, OPSET = 10, 21
MICROSOFT = "com.microsoft"
DATA = "model.onnx.data"
# Offsets of larger tensors are multiples of a page, so that a runtime can map them instead of reading them.
PAGE, SMALL = 4096, 64
# Rows of so many bytes are converted and put in order at once (at least one row): no second copy of a large table.
CHUNK_BYTES = 8 << 20

Shape = Sequence[int | str]


def require_onnx() -> Any:
    """The package `onnx`; EnvironmentProblem says how to get it and its runtime."""
    try:
        import onnx
        import onnxruntime  # noqa: F401  (what was written is run before anybody gets it)
    except ImportError as error:
        raise EnvironmentProblem(
            f"export to ONNX needs the extra `onnx` ({error.name} is missing): pip install 'compressor[onnx]'"
        ) from None
    return onnx


class Graph:
    """An ONNX graph in the making; `name = graph.node("Add", [a, b])` says what reads and writes what.

    Weights go into `folder/model.onnx.data` when they are added; `save` writes `folder/model.onnx`. EnvironmentProblem
    where `onnx` is missing.
    """

    def __init__(self, folder: Path, name: str):
        self._onnx = require_onnx()
        self.folder, self.name = folder, name
        self.nodes: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.metadata: dict[str, str] = {}
        self._initializers: dict[str, Any] = {}
        self._constants: dict[Any, str] = {}
        self._data: BinaryIO = (folder / DATA).open("wb")

    # -- values -----------------------------------------------------------------------------------------------------

    def input(self, name: str, dtype: torch.dtype, shape: Shape) -> str:
        """Declare an input; names in the shape are dimensions that vary."""
        self.inputs.append(self._onnx.helper.make_tensor_value_info(name, self.type_of(dtype), list(shape)))
        return name

    def output(self, value: str, name: str, dtype: torch.dtype, shape: Shape) -> None:
        """Declare an output under its public name; the node that makes the value writes it directly."""
        for node in self.nodes:
            for index, made in enumerate(node.output):
                if made == value:
                    node.output[index] = name
            for index, read in enumerate(node.input):
                if read == value:
                    node.input[index] = name
        self.outputs.append(self._onnx.helper.make_tensor_value_info(name, self.type_of(dtype), list(shape)))

    def weight(self, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> str:
        """Write a tensor, turned round or not, into the data file, as `dtype` (its own if None).

        A name that is there already is used again (tied weights).
        """
        if name in self._initializers:
            return name
        dtype = dtype or tensor.dtype
        length = tensor.numel() * dtype.itemsize
        start = self._align(PAGE if length >= PAGE else SMALL)
        for rows in _chunks(tensor.detach(), dtype):
            self._data.write(rows.reshape(-1).view(torch.uint8).numpy().data)
        proto = self._onnx.TensorProto(name=name, data_type=self.type_of(dtype), dims=tensor.shape)
        proto.data_location = self._onnx.TensorProto.EXTERNAL
        for key, value in {"location": DATA, "offset": start, "length": length}.items():
            proto.external_data.add(key=key, value=str(value))
        self._initializers[name] = proto
        return name

    def view(self, name: str, of: str, shape: Sequence[int]) -> str:
        """The bytes of a weight that was written before, under another name and shape."""
        proto = self._onnx.TensorProto()
        proto.CopyFrom(self._initializers[of])
        proto.name = name
        del proto.dims[:]
        proto.dims.extend(shape)
        self._initializers[name] = proto
        return name

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """A small value inside the graph itself; equal ones are kept once."""
        array = np.asarray(value, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._initializers[name] = self._onnx.numpy_helper.from_array(array, name)
            self._constants[key] = name
        return self._constants[key]

    # -- nodes ------------------------------------------------------------------------------------------------------

    def node(self, op: str, inputs: Sequence[str], *, name: str = "", domain: str = "", **attributes: Any) -> str:
        """Add a node with one output; gives the output's name. An empty input name is an input left out."""
        return self.nodes_of(op, inputs, 1, name=name, domain=domain, **attributes)[0]

    def nodes_of(
        self, op: str, inputs: Sequence[str], outputs: int, *, name: str = "", domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs; gives their names."""
        name = name or f"{op}_{len(self.nodes)}"
        results = [f"{name}/output_{k}" for k in range(outputs)]
        node = self._onnx.helper.make_node(op, list(inputs), results, name=name, domain=domain, **attributes)
        self.nodes.append(node)
        return results

    def save(self) -> Path:
        """Write the graph beside its data, checked by `onnx`; gives the file."""
        self._data.close()
        helper = self._onnx.helper
        graph = helper.make_graph(
            self.nodes, self.name, self.inputs, self.outputs, initializer=list(self._initializers.values())
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="compressor")
        helper.set_model_props(model, self.metadata)
        path = self.folder / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    def close(self) -> None:
        """Let go of the data file, whether or not the graph was saved."""
        self._data.close()

    def type_of(self, dtype: torch.dtype) -> int:
        """The number that ONNX gives an element type."""
        names = {
            torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16", torch.int64: "INT64",
            torch.int32: "INT32", torch.uint8: "UINT8", torch.int8: "INT8",
        }  # fmt: skip
        return getattr(self._onnx.TensorProto, names[dtype])

    def _align(self, multiple: int) -> int:
        self._data.write(b"\0" * (-self._data.tell() % multiple))
        return self._data.tell()


def _chunks(tensor: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """A tensor as `dtype`, in order, a few rows at a time."""
    tensor = torch.atleast_1d(tensor)
    row_bytes = tensor[:1].numel() * dtype.itemsize
    for rows in tensor.split(max(1, CHUNK_BYTES // max(1, row_bytes))):
        yield rows.to(dtype).contiguous()
