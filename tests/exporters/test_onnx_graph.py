"""What a graph's data file holds, and what writing it takes."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compressor.exporters.onnx import graph as module
from compressor.exporters.onnx.graph import Graph

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

TABLE = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made meanwhile; views of `given` are not made."""

    def __init__(self, given: Tensor):
        super().__init__()
        self.given, self.bytes = given, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.untyped_storage().data_ptr() != self.given.untyped_storage().data_ptr():
            self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return made


def written(folder, tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    """A tensor as `onnx` reads it back."""
    graph = Graph(folder, "test")
    graph.weight("table", tensor, dtype)
    (proto,) = onnx.load(graph.save()).graph.initializer
    return onnx.numpy_helper.to_array(proto)


@pytest.mark.parametrize(
    "tensor",
    [TABLE, TABLE.T, TABLE.view(4, 25, 64), TABLE[0], TABLE[0, 0], TABLE[:0]],
    ids=["rows", "turned round", "a stack", "one row", "one number", "no rows"],
)
def test_what_is_written_in_chunks_is_whole(tensor, tmp_path, monkeypatch):
    """Chunks of 1000 bytes divide nothing here."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 1000)
    assert np.array_equal(written(tmp_path, tensor, torch.float32), tensor.float().numpy())


@pytest.mark.parametrize("table", [TABLE, TABLE.T], ids=["as it lies", "turned round"])
def test_no_copy_of_a_table_is_made(table, tmp_path, monkeypatch):
    """A float32 copy would be 25,600 bytes."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 2000)
    graph = Graph(tmp_path, "test")
    with Largest(table) as largest:
        graph.weight("table", table, torch.float32)
    graph.close()
    assert 0 < largest.bytes <= 2000
