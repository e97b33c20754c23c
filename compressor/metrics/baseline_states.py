"""What is kept of the baseline so that every later model can be compared with it exactly, without keeping logits.

N windows, T tokens in each, D model width, V vocabulary. A text's last hidden states take N x T x D values; its logits
would take N x T x V, for most models 30 to 250 times as much.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint import CheckpointReader, write_safetensors
from compressor.errors import CompressorError, IntegrityError
from compressor.models import Head


@dataclass(frozen=True)
class TextSet:
    """One evaluation text: N consecutive windows of T token ids, unpadded.

    `bytes_N` is the number of UTF-8 bytes that each window's predicted tokens (all but its first) stand for; with it,
    bits per byte are measured too. ValueError when the shapes are not these or T < 2.
    """

    name: str
    ids: Tensor
    bytes_N: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ids.dim() != 2 or self.ids.dtype != torch.int64 or self.ids.shape[0] < 1 or self.ids.shape[1] < 2:
            raise ValueError(
                f"text {self.name!r}: needs int64 token ids [windows >= 1, tokens >= 2], "
                f"got {self.ids.dtype} {list(self.ids.shape)}"
            )
        if self.bytes_N is not None and self.bytes_N.shape != self.ids.shape[:1]:
            raise ValueError(
                f"text {self.name!r}: {self.ids.shape[0]} windows need as many byte counts, "
                f"got shape {list(self.bytes_N.shape)}"
            )

    @property
    def sha256(self) -> str:
        """Digest of the windows: equal digests mean that two measurements can be paired window by window."""
        shape = f"{list(self.ids.shape)}".encode()
        return hashlib.sha256(shape + self.ids.cpu().contiguous().numpy().tobytes()).hexdigest()


def window_bytes(ids_NT: Tensor, tokenizer: Any) -> Tensor:
    """UTF-8 bytes of what each window's predicted tokens (all but the first) stand for, `[N]`, for `TextSet.bytes_N`.

    A character whose bytes are split over two windows counts as the replacement character in both.
    """

    def size(ids: list[int]) -> int:
        return len(tokenizer.decode(ids, clean_up_tokenization_spaces=False).encode())

    return torch.tensor([max(1, size(window) - size(window[:1])) for window in ids_NT.tolist()])


@dataclass(frozen=True)
class BaselineStates:
    """The baseline's last hidden states on the evaluation windows, a file per text in `folder`, and its head."""

    folder: Path
    head: Head

    def path(self, text: TextSet) -> Path:
        """Where the states of a text are kept; names that differ never share a file."""
        readable = re.sub(r"[^A-Za-z0-9_.-]+", "_", text.name)
        return Path(self.folder) / f"{readable}-{hashlib.sha256(text.name.encode()).hexdigest()[:8]}.safetensors"

    def keep(self, text: TextSet, hidden_NTD: Tensor, nll_N: Tensor) -> None:
        """Write the last hidden states (before the final norm, model dtype) and each window's mean NLL in nats."""
        path = self.path(text)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"hidden": hidden_NTD.cpu().contiguous(), "nll": nll_N.cpu().double().contiguous()}
        write_safetensors(path, tensors, {"text": text.name, "ids_sha256": text.sha256})

    def holds(self, text: TextSet) -> bool:
        """Whether the states of exactly these windows are kept."""
        path = self.path(text)
        try:
            return path.is_file() and CheckpointReader(path).metadata().get("ids_sha256") == text.sha256
        except CompressorError:  # a broken file is as good as none: it is written again
            return False

    def load(self, text: TextSet) -> tuple[Tensor, Tensor]:
        """Hidden states `[N, T, D]` in the baseline's dtype and mean NLL by window `[N]`, float64, in nats.

        IntegrityError when the file is missing or broken, or was written for other windows.
        """
        path = self.path(text)
        if not path.is_file():
            raise IntegrityError(f"{path}: the baseline's states of text {text.name!r} were not kept; measure it first")
        reader = CheckpointReader(path)
        written_for = reader.metadata().get("ids_sha256")
        if written_for != text.sha256:
            raise IntegrityError(
                f"{path}: kept for other windows of text {text.name!r} (digest {written_for}, now {text.sha256}); "
                "measure the baseline again"
            )
        return reader.tensor("hidden"), reader.tensor("nll")
