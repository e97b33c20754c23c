"""What every tool of the comparison shares: the texts, the windows, the clock and the perplexity.

Each worker imports this one file inside its own environment, so a figure means the same whoever produced it. It needs
torch only (imported where it is used); models and tokenizers are handed in. A change here changes the cache key.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".bin")


def read_config() -> dict[str, Any]:
    """The settings of this run: the JSON file that peers.py names as the worker's only argument."""
    config = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import torch

    torch.set_num_threads(config["threads"])
    torch.manual_seed(0)
    return config


def write_result(config: dict[str, Any], result: dict[str, Any], packages: tuple[str, ...]) -> None:
    """Hand the figures back to peers.py, with the versions that produced them."""
    result["packages"] = {name: importlib.metadata.version(name) for name in packages}
    Path(config["result"]).write_text(json.dumps(result, indent=1), encoding="utf-8")


def token_windows(path: str, tokenizer: Any, length: int, count: int) -> Any:
    """The first `count` consecutive windows [count, length] of a text that is tokenized once, as a whole.

    No special tokens and no padding; what is left over is dropped. Raises ValueError when the text is too short.
    """
    import torch

    text = Path(path).read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) < length * count:
        raise ValueError(f"{path}: {len(ids)} tokens; {count} windows of {length} need {length * count}")
    return torch.tensor(ids[: length * count], dtype=torch.long).view(count, length)


def digest(windows: Any) -> str:
    """A fingerprint of token windows: two tools with the same digest saw the same tokens."""
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16]


@contextlib.contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Wall seconds, CPU seconds and peak resident bytes of the block; the dict is filled when the block ends.

    CPU seconds are user + system over all threads and finished children. The peak is absolute (the model that lies in
    memory at the start counts, and so do libraries); `resident_before_bytes` is the floor that it started from.
    """
    figures: dict[str, float] = {}
    reset_peak()
    figures["resident_before_bytes"] = _status_bytes("VmRSS")
    cpu_before, wall_before = cpu_seconds(), time.perf_counter()
    yield figures
    figures["seconds"] = time.perf_counter() - wall_before
    figures["cpu_seconds"] = cpu_seconds() - cpu_before
    figures["peak_bytes"] = _status_bytes("VmHWM")


def reset_peak() -> None:
    """Let VmHWM start again from what is resident now (Linux; 5 is the kernel's code for exactly that)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def cpu_seconds() -> float:
    """User + system seconds of this process so far, finished children included."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def evaluate(model: Any, tokenizer: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Perplexity of the model on the evaluation windows, one window at a time, with the loss in float32.

    Every window predicts its tokens 2..length from what precedes them inside the window; the perplexity is
    exp(mean negative log likelihood over all predicted tokens). `window_nll` keeps the mean of each window, so that two
    tools can be compared in pairs. The model is left in the dtype it has (bf16 by the protocol).
    """
    import torch

    settings = config["evaluation"]
    windows = token_windows(settings["text"], tokenizer, settings["length"], settings["windows"])
    started = time.perf_counter()
    window_nll = []
    model.eval()
    with torch.inference_mode():
        for window in windows:
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
            window_nll.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
    return {
        "perplexity": math.exp(sum(window_nll) / len(window_nll)),
        "window_nll": window_nll,
        "evaluation_tokens": digest(windows),
        "evaluate_seconds": time.perf_counter() - started,
    }


def weight_file_bytes(folder: str | os.PathLike[str]) -> int:
    """Bytes of the weight files that the tool wrote into a folder."""
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.suffix in WEIGHT_SUFFIXES)
