"""An ONNX folder in the place of a model: measured, gated, compared by the code that measures models.

N windows, T tokens, M places, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import EnvironmentProblem
from compressor.models import Model, Source, build_skeleton, family_of, load_model, load_tokenizer
from compressor.models.model import State
from compressor.runtimes import OnnxModel, open_onnx

GRAPH = "model.onnx"
POSITION_BITS = 32


def is_onnx(name: str | Path) -> bool:
    """Whether a name is a folder with an ONNX graph."""
    return (Path(name) / GRAPH).is_file()


def load_subject(name: str | Path) -> Model:
    """A model to be measured: an ONNX folder in onnxruntime, anything else as `load_model` has it."""
    return OnnxSubject(Path(name)) if is_onnx(name) else load_model(str(name))


def stored_model(model: str | Path | Model) -> Model:
    """A model by name or as it is; a run's folder means its `model/`. EnvironmentProblem for a run that is not done."""
    if isinstance(model, Model):
        return model
    path = Path(model)
    if (path / "model" / "config.json").exists():
        return load_subject(path / "model")
    if (path / "work").is_dir() and not (path / "config.json").exists():
        raise EnvironmentProblem(f"{path}: this run has not finished; `compress run` with the same recipe continues it")
    return load_subject(model)


class OnnxSubject(Model):
    """A graph without blocks: it gives logits only, so what stands for hidden states are places in its windows.

    `embed` notes the windows and gives each token's place; `head().logits` runs the windows that the places lie in. The
    two ends of a model are all that is measured of it, so everything that walks a model works on a graph too. Each
    window is run alone: as long as it is, and in the arithmetic that the folder was written for.
    """

    def __init__(self, folder: Path):
        self.source = Source(str(folder), folder)
        self.module: OnnxModel = open_onnx(folder)
        self.skeleton: Any = self.module
        self.tokenizer = load_tokenizer(folder)
        self.module.config.dtype = torch.float32  # of the cache, whatever the original computed in
        self.reader = self.generation = None
        self.state = State()
        self._windows: list[Tensor] = []

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def num_blocks(self) -> int:
        return 0

    @property
    def is_quantized(self) -> bool:
        return False  # nothing here could be packed or unpacked

    def num_parameters(self) -> int:
        """Of the architecture, whatever stands for them in the file."""
        config = self.module.config
        skeleton = build_skeleton(config, torch.float32, family_of(config.model_type, self.name))
        return sum(parameter.numel() for parameter in skeleton.parameters())

    def weight_bytes(self) -> int:
        return self.module.weight_bytes

    def embed(self, ids: Tensor) -> Tensor:
        """The place of each token, int64 `[N, T, 1]`."""
        first = len(self._windows)
        self._windows += list(ids)
        windows = torch.arange(first, len(self._windows)).unsqueeze(1) << POSITION_BITS
        return (windows + torch.arange(ids.shape[1])).unsqueeze(-1)

    def head(self) -> Any:
        return _Places(self.module, self._windows)

    @contextmanager
    def live(self, *, layout: str = "") -> Iterator[nn.Module]:
        yield self.module

    def take_live(self) -> nn.Module:
        return self.module


class _Places:
    """Logits of tokens by their places."""

    def __init__(self, module: OnnxModel, windows: list[Tensor]):
        self.module, self.windows = module, windows
        self._last: tuple[int, Tensor] | None = None

    @property
    def vocab_size(self) -> int:
        return self.module.config.vocab_size

    @torch.no_grad()
    def logits(self, places_M1: Tensor) -> Tensor:
        """Float32 `[M, V]`; neighbours of one window cost one run of it."""
        places = places_M1.flatten().tolist()
        parts = []
        for window, group in groupby(places, lambda place: place >> POSITION_BITS):
            positions = [place & ((1 << POSITION_BITS) - 1) for place in group]
            parts.append(self._of_window(window)[positions])
        return torch.cat(parts)

    def _of_window(self, window: int) -> Tensor:
        if self._last is None or self._last[0] != window:
            self._last = window, self.module(self.windows[window][None], use_cache=False).logits[0].float()
        return self._last[1]
