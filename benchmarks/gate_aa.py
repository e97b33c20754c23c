"""Does the gate ever fail a model against itself? Twenty A/A comparisons of SmolLM2-135M on real tasks.

`python benchmarks/gate_aa.py` writes benchmarks/results/<date>-gate_aa.{json,md}. Five samples of PIQA, ARC-easy and
LAMBADA; each is asked once as usual and again with two batch sizes and two thread counts, which changes the last bits
of every sum. All twenty pairs go through the shipped rules (`tasks`, `brier`, with a margin of a point). Texts come
from $COMPRESSOR_SHARED (default ../shared beside the project).
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import torch

from compressor.gates import Paired
from compressor.gates.paired import brier_checks, task_checks
from compressor.metrics import describe_environment
from compressor.metrics.tasks import Cloze, MultipleChoice, flips, measure_tasks
from compressor.models import load_model, wrap_live
from compressor.reports import pair_items

RESULTS = Path(__file__).parent / "results"
MARGIN = 0.01
BATCHES, THREADS, SAMPLES = (1, 32), (1, 2), 5


def tasks(folder: Path, items: int, seed: int) -> list:
    return [
        MultipleChoice(name="piqa", data=str(folder / "llmfoundry_piqa_valid.jsonl"), items=items, seed=seed),
        MultipleChoice(name="arc_easy", data=str(folder / "llmfoundry_arc_easy_test.jsonl"), items=items, seed=seed),
        Cloze(name="lambada", data=str(folder / "lambada_openai_test.jsonl"), items=items, seed=seed),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=60, help="items of each task in a sample")
    options = parser.parse_args()
    shared = Path(os.environ.get("COMPRESSOR_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    stored = load_model("demo/smollm2-135m")
    model = wrap_live(stored.take_live(), stored.tokenizer)  # read once, not for each of the 25 evaluations
    default_threads = torch.get_num_threads()
    rows = []
    for sample in range(SAMPLES):
        asked = tasks(shared / "data" / "eval", options.items, sample)
        torch.set_num_threads(default_threads)
        usual = measure_tasks(model, asked).items
        for batch, threads in itertools.product(BATCHES, THREADS):
            torch.set_num_threads(threads)
            begun = time.perf_counter()
            again = measure_tasks(model, asked, batch_size=batch).items
            pairs = pair_items(usual, again)
            checks = task_checks(pairs, Paired(margin=MARGIN)) + brier_checks(pairs, Paired(margin=MARGIN))
            changed = flips(usual, again)
            rows.append({
                "sample": sample, "batch_size": batch, "threads": threads,
                "statuses": dict(Counter(check.status for check in checks)),
                "flips": sum(task["right_to_wrong"] + task["wrong_to_right"] for task in changed.values()),
                "flips_within_noise": sum(task["within_noise"] for task in changed.values()),
                "largest_nll_difference": max(abs(a.nll - b.nll) for a, b in zip(usual, again, strict=True)),
                "noise": max(item.noise for item in usual),
                "seconds": round(time.perf_counter() - begun, 1),
            })  # fmt: skip
            print(rows[-1], flush=True)
    failed = sum("fail" in row["statuses"] for row in rows)
    outside = sum(row["flips"] - row["flips_within_noise"] for row in rows)
    result = {
        "model": "demo/smollm2-135m", "dtype": str(model.dtype), "items": options.items, "margin": MARGIN,
        "comparisons": len(rows), "failed": failed, "flips_outside_noise": outside, "rows": rows,
        "environment": describe_environment(),
    }  # fmt: skip
    path = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-gate_aa.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    lines = [
        f"{len(rows)} A/A comparisons of demo/smollm2-135m ({model.dtype}): {failed} FAIL, {outside} flips outside the "
        f"noise margin. {options.items} items of PIQA, ARC-easy and LAMBADA in each of {SAMPLES} samples.",
        "",
        "| sample | batch size | threads | verdicts | flips | within noise | largest NLL difference | noise margin |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {r['sample']} | {r['batch_size']} | {r['threads']} | "
            f"{', '.join(f'{n} {status}' for status, n in r['statuses'].items())} | {r['flips']} | "
            f"{r['flips_within_noise']} | {r['largest_nll_difference']:.2g} | {r['noise']:.2g} |"
            for r in rows
        ),
    ]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines[:1]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
