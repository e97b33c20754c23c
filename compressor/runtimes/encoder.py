"""A BERT-like encoder in onnxruntime, for embeddings. B sequences, T tokens, D width."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from compressor.errors import IntegrityError
from compressor.runtimes.configuration import read_config
from compressor.runtimes.graph_file import read_graph
from compressor.runtimes.session import bind_input, dtype_of, open_session

TOKENS = ("input_ids", "attention_mask", "token_type_ids")
HIDDEN = "last_hidden_state"


def open_onnx_encoder(
    folder: str | Path, *, threads: int | None = None, accuracy_level: int | None = None, spinning: bool = True
) -> "OnnxEncoder":
    """Open an exported encoder; the options and errors are those of `open_onnx`."""
    return OnnxEncoder(Path(folder), threads, accuracy_level, spinning)


class OnnxEncoder(nn.Module):
    """An ONNX encoder: call it with tokens, as a transformers one; its output has `last_hidden_state`.

    `weight_bytes` are those on disk; the one empty parameter says where the model is.
    """

    def __init__(self, folder: Path, threads: int | None, accuracy_level: int | None, spinning: bool):
        super().__init__()
        file = read_graph(folder)
        self.folder, self.weight_bytes = folder, file.weight_bytes
        self.config = read_config(folder)
        self.session = open_session(file, threads, accuracy_level, spinning)
        inputs = {value.name: value for value in self.session.get_inputs()}
        outputs = [value.name for value in self.session.get_outputs()]
        if "input_ids" not in inputs or set(inputs) - set(TOKENS) or HIDDEN not in outputs:
            raise IntegrityError(
                f"{file.path} is not an encoder: it reads {', '.join(inputs)} and writes {', '.join(outputs)}; "
                f"expected are {', '.join(TOKENS)} to {HIDDEN}"
            )
        self._dtypes = {name: dtype_of(value, file.path) for name, value in inputs.items()}
        self.anchor = nn.Parameter(torch.empty(0), requires_grad=False)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where inputs have to be: the CPU."""
        return self.anchor.device

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> BaseModelOutput:
        """Hidden states `[B, T, D]` of tokens `[B, T]`; without a mask all count, without types all are of type 0."""
        given = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids) if attention_mask is None else attention_mask,
            "token_type_ids": torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids,
        }
        binding = self.session.io_binding()
        held = {name: given[name].to(dtype).contiguous() for name, dtype in self._dtypes.items()}
        for name, tensor in held.items():
            bind_input(binding, name, tensor)
        binding.bind_output(HIDDEN, "cpu")
        self.session.run_with_iobinding(binding)
        return BaseModelOutput(last_hidden_state=torch.from_dlpack(binding.get_outputs()[0]))
