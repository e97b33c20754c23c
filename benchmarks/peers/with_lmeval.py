"""lm-evaluation-harness on task files over local data: every log-likelihood, and the seconds that it took.

`with_lmeval.py CONFIG` runs in the environment of lmeval.requirements.txt; harness_agreement.py writes the
configuration and reads the result. `seconds` and `cpu_seconds` are HFLM's own work, tokens and log-likelihoods;
`whole_seconds` is all of `simple_evaluate` without imports and model loading.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    """Run every task by itself and write figures and samples."""
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(config["threads"])
    module = AutoModelForCausalLM.from_pretrained(config["model"], dtype=torch.float32).eval()
    model = HFLM(
        pretrained=module,
        tokenizer=AutoTokenizer.from_pretrained(config["model"]),
        batch_size=config["batch_size"],
    )
    scoring = {}
    loglikelihood = model.loglikelihood

    def timed(requests: list, **options: object) -> list:
        started, cpu_started = time.perf_counter(), time.process_time()
        found = loglikelihood(requests, **options)
        scoring["seconds"] = time.perf_counter() - started
        scoring["cpu_seconds"] = time.process_time() - cpu_started
        return found

    model.loglikelihood = timed
    manager = TaskManager(include_path=config["task_files"])
    result: dict = {"packages": {name: version(name) for name in ("lm_eval", "torch", "transformers")}, "tasks": {}}
    for task in config["tasks"]:
        started = time.perf_counter()
        found = lm_eval.simple_evaluate(
            model=model, tasks=[task], task_manager=manager, bootstrap_iters=0, log_samples=True, verbosity="ERROR"
        )
        seconds = time.perf_counter() - started
        samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
        result["tasks"][task] = {
            **scoring,
            "whole_seconds": seconds,
            "figures": {key: value for key, value in found["results"][task].items() if isinstance(value, float)},
            "items": [
                {
                    "asks": [list(pair)[:2] for pair in _pairs(sample["arguments"])],
                    "logliks": [float(response[0]) for response in sample["filtered_resps"]],
                    "greedy": [bool(response[1]) for response in sample["filtered_resps"]],
                    **{name: sample[name] for name in ("acc", "acc_norm", "acc_bytes") if name in sample},
                }
                for sample in samples
            ],
        }
    Path(config["result"]).write_text(json.dumps(result), encoding="utf-8")


def _pairs(arguments: object) -> list:
    """Context and continuation of each request of a sample, whatever container this version keeps them in."""
    if isinstance(arguments, dict):
        return [[part["arg_0"], part["arg_1"]] for part in arguments.values()]
    return list(arguments)


if __name__ == "__main__":
    main()
