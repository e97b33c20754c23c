"""What a model takes: weights in memory, files on the disk, cache per token, and the peak while something runs."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from compressor.errors import EnvironmentProblem, UnsupportedModel
from compressor.models import Model
from compressor.reports.measurement import Memory

# What layer types of transformers' `config.layer_types` keep a key and a value for each token (sliding and chunked
# attention up to their window). Any other type (linear attention, state space) keeps a state of fixed size.
CACHING_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")


def measure_memory(model: Model, *, files: Path | None = None, peak: "PeakMemory | None" = None) -> Memory:
    """The memory section of the report; `files` is the Model's folder or file on disk, `peak` a block that has ended.

    The peak is the process's resident memory on the CPU, what torch allocated on a GPU.
    """
    reasons: dict[str, str] = {}
    kv_bytes = None
    try:
        kv_bytes = kv_bytes_per_token(model.config)
    except UnsupportedModel as error:
        reasons["kv_bytes_per_token"] = str(error)
    if files is None:
        reasons["file_bytes"] = "it was not written to disk"
    if peak is None:
        reasons["peak_bytes"] = "it was not watched"
    elif peak.peak_bytes is None:
        reasons["peak_bytes"] = peak.reason or "it was not measured"
    return Memory(
        weight_bytes=model.weight_bytes(),
        bits_per_weight=model.bits_per_weight(),
        file_bytes=None if files is None else file_bytes(files),
        kv_bytes_per_token=kv_bytes,
        peak_bytes=None if peak is None else peak.peak_bytes,
        reasons=reasons,
    )


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the storages that a module's parameters and buffers hold; a shared storage (tied weights) counts once.

    A view counts the whole storage that it keeps alive. Tensors on the meta device hold nothing.
    """
    held: dict[tuple[Any, ...], int] = {}
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if tensor.device.type == "meta":
            continue
        key, size = _storage(tensor)
        held[key] = size
    return sum(held.values())


def _storage(tensor: Tensor) -> tuple[tuple[Any, ...], int]:
    if tensor.layout != torch.strided:  # sparse and oneDNN tensors have no storage to ask
        return (id(tensor),), tensor.numel() * tensor.element_size()
    storage = tensor.untyped_storage()
    return (str(tensor.device), storage.data_ptr()), storage.nbytes()


def file_bytes(path: Path) -> int:
    """Bytes of a file, or of all files under a folder; links (the hub's cache) count what they point to."""
    path = Path(path)
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def kv_bytes_per_token(config: Any) -> int:
    """Bytes that transformers' cache grows by for each token of one sequence, from the config and its dtype.

    Sliding layers stop growing at their window. UnsupportedModel when the config does not say how wide keys are.
    """
    config = config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    # Some models let the last layers read the cache of earlier ones.
    layers = sum(kind in CACHING_LAYERS for kind in types) - (getattr(config, "num_kv_shared_layers", 0) or 0)
    dtype = config.dtype or torch.float32
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return layers * _kv_width(config) * dtype.itemsize


def _kv_width(config: Any) -> int:
    """Numbers in the keys and values of one token in one layer."""
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        raise UnsupportedModel(f"{config.model_type}: the config has no num_attention_heads, so the cache is not known")
    if getattr(config, "kv_lora_rank", None):  # multi-head latent attention is cached expanded
        return heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * kv_heads * head_dim


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Highest resident memory beyond what Python and the libraries hold (`process_bytes`), in a process of its own.

    `loading_bytes` while the folder becomes a model; `generating_bytes` from then on, weights included, while it reads
    a prompt and generates. Pages of mapped files count. None has a reason.
    """

    loading_bytes: int | None = None
    generating_bytes: int | None = None
    process_bytes: int | None = None
    reason: str | None = None


def measure_peaks(model: str | Path, *, batch: int = 1, prompt: int, generate: int, timeout_s: float = 600) -> Peaks:
    """Load a model and generate with it in a fresh process, and give the peaks of both.

    A process that has loaded other models reuses their memory, and its peak would show too little; or it still holds
    them, and shows too much. EnvironmentProblem where the process fails; the message holds the end of what it wrote.
    """
    command = [
        sys.executable,
        "-m",
        "compressor.metrics.memory_probe",
        str(model),
        *map(str, (batch, prompt, generate)),
    ]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise EnvironmentProblem(f"{model}: loading and generating took more than {timeout_s:g} s") from None
    if run.returncode:
        tail = "\n".join(run.stderr.strip().splitlines()[-3:])
        raise EnvironmentProblem(f"{model}: the process that was to load it ended with {run.returncode}: {tail}")
    return Peaks(**json.loads(run.stdout.splitlines()[-1]))


class PeakMemory:
    """Watch the highest memory use within a block; blocks may be nested.

    with PeakMemory() as peak:
        ...
    peak.peak_bytes

    `rss_bytes` is the highest resident memory of the whole process, mapped files included; `rss_before_bytes` is what
    it held at the start. `cuda_bytes` is the highest that torch allocated on `device`, if that is a GPU; there
    `peak_bytes` is this, elsewhere `rss_bytes`. What cannot be measured is None, and `reason` says why. The kernel's
    high-water mark is reset at the start, so a peak before the block does not count.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.rss_bytes: int | None = None
        self.rss_before_bytes: int | None = None
        self.cuda_bytes: int | None = None
        self.reason: str | None = None

    @property
    def peak_bytes(self) -> int | None:
        """The figure for the report: GPU memory on a GPU, else resident memory."""
        return self.cuda_bytes if self.device.type == "cuda" else self.rss_bytes

    def __enter__(self) -> "PeakMemory":
        # Resetting the marks would hide from the blocks around this one what they reached before: they note it first.
        for around in _WATCHING:
            around._note()
        self.reason = _reset_high_water()
        self.rss_before_bytes = psutil.Process().memory_info().rss
        for device in _cuda_devices([*_WATCHING, self]):
            torch.cuda.reset_peak_memory_stats(device)
        _WATCHING.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        self._note()
        _WATCHING.remove(self)

    def _note(self) -> None:
        """Take over the marks as they stand now."""
        if self.reason is None:
            self.rss_bytes = max(self.rss_bytes or 0, _high_water_bytes())
        if self.device.type == "cuda":
            self.cuda_bytes = max(self.cuda_bytes or 0, torch.cuda.max_memory_allocated(self.device))


# The blocks that are open now, outermost first. The marks belong to the process, so this does too.
_WATCHING: list[PeakMemory] = []


def _cuda_devices(blocks: list[PeakMemory]) -> Iterator[torch.device]:
    return (device for device in {block.device for block in blocks} if device.type == "cuda")


def _reset_high_water() -> str | None:
    """Set the high-water mark of resident memory back to what is held now; the reason when that is not possible."""
    if not sys.platform.startswith("linux"):
        return f"only Linux can reset the peak of a process, this is {sys.platform}"
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5: VmHWM only, pages stay as they are (man 5 proc)
        _high_water_bytes()
    except (OSError, StopIteration) as error:
        return f"the peak of resident memory cannot be reset here ({error!r}; kernel {os.uname().release})"
    return None


def _high_water_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))
