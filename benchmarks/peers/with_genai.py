"""onnxruntime-genai's own generate loop on one folder, a turn at a time, beside other processes' turns.

`with_genai.py CONFIG` runs in the environment of genai.requirements.txt; onnx_decode.py starts it and asks for turns: a
line of JSON in, `{"prompt": ids, "new": tokens}`, a line out. Between two turns it waits for the next line. The end of
a text is not heeded, so that every turn has its length.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime_genai as og


def main() -> None:
    """Load the model once, then answer turns until the input ends."""
    config = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints is no answer
    settings = og.Config(config["folder"])
    options = {"intra_op_num_threads": config["threads"]}
    settings.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = og.Model(settings)
    print(json.dumps({"ready": version("onnxruntime-genai")}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(_turn(model, request["prompt"], request["new"])), file=answers, flush=True)


def _turn(model: og.Model, prompt: list[int], new: int) -> dict[str, Any]:
    """The tokens of one greedy continuation, and milliseconds of the prompt and of each token after the first."""
    length = len(prompt) + new
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, parameters)
    begun = time.perf_counter()
    generator.append_tokens(prompt)
    generator.generate_next_token()
    first = time.perf_counter()
    for _ in range(new - 1):
        generator.generate_next_token()
    ended = time.perf_counter()
    tokens = [int(token) for token in generator.get_sequence(0)[len(prompt) :]]
    return {"tokens": tokens, "prefill_ms": 1000 * (first - begun), "decode_ms": 1000 * (ended - first) / (new - 1)}


if __name__ == "__main__":
    main()
