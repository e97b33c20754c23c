"""A model by name, in memory for a while: what loading is timed of, and what a fresh process measures itself on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from compressor.models import load_model
from compressor.runtimes import open_onnx


@contextmanager
def opened(name: str | Path) -> Iterator[nn.Module]:
    """A transformers model of a folder, file or demo model, or an ONNX folder in onnxruntime."""
    if (Path(name) / "model.onnx").is_file():
        yield open_onnx(name)
    else:
        with load_model(str(name)).live() as model:
            yield model
