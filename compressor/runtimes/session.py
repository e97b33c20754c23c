"""An onnxruntime session: its options, its errors in our words, and torch tensors as its inputs and outputs."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.errors import EnvironmentProblem, IntegrityError, RecipeError, UnsupportedModel
from compressor.runtimes.graph_file import GraphFile

# onnxruntime's names of types, torch's, and the numbers that ONNX gives them.
DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
}
NUMBERS = {
    torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.int32: 6, torch.int64: 7, torch.float16: 10,
    torch.bfloat16: 16,
}  # fmt: skip
ACCURACY_LEVELS = (0, 1, 2, 3, 4)
QUIET = 3  # onnxruntime's log level of errors: its warnings speak of its own optimiser


def open_session(file: GraphFile, threads: int | None, accuracy_level: int | None, spinning: bool) -> Any:
    """An InferenceSession on the CPU.

    `threads`: as many as torch uses if None. `accuracy_level`: what the graph says if None; else it holds for all
    quantized products, those that onnxruntime makes out of QDQ pairs included. `spinning`: idle threads wait in a loop
    during a run, which is faster on cores of one's own.
    """
    if threads is not None and threads < 1:
        raise RecipeError(f"threads is {threads}; at least 1 is needed")
    if accuracy_level is not None and accuracy_level not in ACCURACY_LEVELS:
        raise RecipeError(f"accuracy_level is {accuracy_level}; possible are {', '.join(map(str, ACCURACY_LEVELS))}")
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = QUIET
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    # Between two runs its threads would burn the cores that torch computes on.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    graph: str | bytes = str(file.path)
    if accuracy_level is not None:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy_level))
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.folder))
        graph = file.with_accuracy_level(accuracy_level)
    problems = ort.capi.onnxruntime_pybind11_state
    try:
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except problems.NotImplemented as error:
        raise UnsupportedModel(f"{file.path}: onnxruntime {ort.__version__} has no kernel for it: {error}") from error
    except (problems.Fail, problems.InvalidGraph, problems.InvalidProtobuf, problems.InvalidArgument,
            problems.RuntimeException, problems.NoSuchFile) as error:  # fmt: skip
        raise IntegrityError(f"{file.path}: onnxruntime {ort.__version__} does not load it: {error}") from error


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise EnvironmentProblem(
            "running an ONNX folder needs the extra `onnx`: pip install 'compressor[onnx]' (onnxruntime is missing)"
        ) from None
    return onnxruntime


def dtype_of(value: Any, path: Path) -> torch.dtype:
    """The torch type of an input or output of a session."""
    if value.type not in DTYPES:
        raise UnsupportedModel(f"{path}: {value.name!r} is of type {value.type}; possible are {', '.join(DTYPES)}")
    return DTYPES[value.type]


def bind_input(binding: Any, name: str, tensor: Tensor) -> None:
    """Let a run read a contiguous CPU tensor; the caller keeps it until the run is over."""
    binding.bind_input(name, "cpu", 0, NUMBERS[tensor.dtype], list(tensor.shape), tensor.data_ptr())


def bind_output(binding: Any, name: str, tensor: Tensor) -> None:
    """Let a run write into a contiguous CPU tensor."""
    binding.bind_output(name, "cpu", 0, NUMBERS[tensor.dtype], list(tensor.shape), tensor.data_ptr())
