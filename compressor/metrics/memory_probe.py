"""Run in a fresh process: load a model, generate with it, print the peaks of memory as one line of JSON.

`python -m compressor.metrics.memory_probe MODEL BATCH PROMPT GENERATE`; see `memory.measure_peaks`.
"""

import json
import sys

import torch

from compressor.metrics.latency.measuring import evaluating, random_ids
from compressor.metrics.latency.rounds import generate_once
from compressor.metrics.memory import PeakMemory
from compressor.metrics.opening import opened


def main(name: str, batch: int, prompt: int, generate: int) -> int:
    """Print `{loading_bytes, generating_bytes, process_bytes, reason}`."""
    with PeakMemory() as loading:
        live = opened(name)
        model = live.__enter__()
    before = loading.rss_before_bytes or 0
    with torch.inference_mode(), evaluating(model), PeakMemory() as generating:
        generate_once(model, random_ids((model,), batch, prompt, seed=0), generate)
    figures = {
        "loading_bytes": None if loading.rss_bytes is None else loading.rss_bytes - before,
        "generating_bytes": None if generating.rss_bytes is None else generating.rss_bytes - before,
        "process_bytes": before,
        "reason": loading.reason or generating.reason,
    }
    live.__exit__(None, None, None)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
