"""How fast do packed models run on this CPU: in eager transformers, and by our own loop, beside the dense model?

`python benchmarks/cpu_decode.py --int4 RUN --w8a8 RUN --moe RUN`: runs of SmolLM2-135M in int4 and in W8A8, and of
tiny-moe in int4. Each pair takes turns in one process (`compressor.metrics.measure_latency`); a ratio below 1 is faster
than the dense model. Fast ops are also held against exact arithmetic: KL of their logits on the demo texts.
"""

import argparse
import datetime
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import compressor as cx
from compressor.calibration import load_texts, windows
from compressor.kernels import ops
from compressor.layers import CPU, relayout
from compressor.metrics import describe_environment, measure_latency
from compressor.models import StaticDecoder, load_tokenizer, resolve, wrap_live
from compressor.reports.measurement import section_to_json

ROOT = Path(__file__).resolve().parent.parent
PROMPT, GENERATE = 512, 32
DENSE, MOE = "demo/smollm2-135m", "demo/tiny-moe"
LINEAR = 4096
FEW = 8  # tokens at a time where drift is measured: the ops of decoding, not those of long prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("int4", "w8a8", "moe"):
        parser.add_argument(f"--{name}", required=True, help="a run's folder")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each pair, at most (default 60)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    given = parser.parse_args()
    load = [round(value, 2) for value in os.getloadavg()]
    dense, int4, w8a8 = cx.load(DENSE), cx.load(given.int4), cx.load(given.w8a8)
    moe, moe_dense = cx.load(given.moe), cx.load(MOE)
    single = cx.load(DENSE).float()
    pairs: dict[str, tuple[Any, Any]] = {
        "int4, eager / bf16, eager": (int4, dense),
        "int4, our loop / bf16, eager": (loop(int4), dense),
        "int4, our loop, int8 head / bf16, eager": (loop(int4, int8_head=True), dense),
        "int4, our loop, int8 head / fp32, eager": (loop(int4, int8_head=True), single),
        "int4, our loop, int8 head / bf16, our loop": (loop(int4, int8_head=True), loop(dense)),
        "bf16, our loop / bf16, eager": (loop(dense), dense),
        "W8A8, eager / bf16, eager": (w8a8, dense),
        "W8A8, our loop / bf16, eager": (loop(w8a8), dense),
        "tiny-moe int4, eager / bf16, eager": (moe, moe_dense),
        "tiny-moe int4, our loop / bf16, eager": (loop(moe), moe_dense),
    }
    rows = {name: timed(model, baseline, given.seconds) for name, (model, baseline) in pairs.items()}
    drift = {
        "SmolLM2-135M int4": drift_of(given.int4, DENSE),
        "SmolLM2-135M int4, int8 head": drift_of(given.int4, DENSE, int8_head=True),
        "tiny-moe int4": drift_of(given.moe, MOE),
    }
    document = {
        "prompt": PROMPT, "generate": GENERATE, "load_average_before": load, "pairs": rows,
        "linear_4096_M1": linear(), "drift": drift, "drift_tokens_at_a_time": FEW,
        "environment": describe_environment(),
    }  # fmt: skip
    stem = given.results / f"{datetime.date.today()}-cpu_decode"
    stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    stem.with_suffix(".md").write_text(table(document))
    print(table(document))


def loop(module: nn.Module, *, int8_head: bool = False) -> StaticDecoder:
    """The model in our decoding loop."""
    return StaticDecoder(wrap_live(module, None), module, int8_head=int8_head)


def timed(model: Any, baseline: Any, seconds: float) -> dict[str, Any]:
    """Milliseconds of both, and the ratio in turns, of the prompt and of a step."""
    found = measure_latency(
        model, baseline=baseline, batch_sizes=(1,), prompt=PROMPT, generate=GENERATE, max_seconds=seconds
    )
    section = section_to_json(found)
    return {
        figure: {
            "ms": section[figure]["1"], "baseline_ms": section["baseline"][figure]["1"],
            "ratio": section["ratio_to_baseline"][figure]["1"],
        }
        for figure in ("prefill_ms", "decode_ms_per_token")
    } | {"clock": section.get("clock"), "threads": section.get("threads")}  # fmt: skip


@torch.inference_mode()
def linear(rounds: int = 200) -> dict[str, float]:
    """One 4096 x 4096 product of one token: int4 and bfloat16 in turns, over eight weights each."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, LINEAR, generator=generator).to(torch.bfloat16)
    dense = [torch.randn(LINEAR, LINEAR, generator=generator).to(torch.bfloat16) for _ in range(8)]
    codes = torch.randint(-8, 8, (LINEAR, LINEAR), generator=generator, dtype=torch.int8)
    scales = torch.ones(LINEAR, LINEAR // 64)
    packed = [ops.pack_int4_cpu(codes, scales, None) for _ in range(8)]
    times: dict[str, list[float]] = {"int4": [], "bf16": []}
    for k in range(rounds):
        words, scales_zeros = packed[k % 8]
        times["int4"].append(seconds_of(lambda w=words, s=scales_zeros: ops.int4_linear_cpu(x, w, s, 64)))
        times["bf16"].append(seconds_of(lambda w=dense[k % 8]: nn.functional.linear(x, w)))
    int4, bf16 = median(times["int4"]), median(times["bf16"])
    return {"int4_us": int4 * 1e6, "bf16_us": bf16 * 1e6, "speed_up": bf16 / int4}


def seconds_of(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.inference_mode()
def drift_of(run: str, source: str, *, int8_head: bool = False) -> dict[str, float]:
    """KL of fast logits from exact ones of the same packed model, in nats a token, and first choices kept."""
    text = next(iter(load_texts("demo/text", "held_out").values()))
    ids = windows(text, load_tokenizer(resolve(source).path), FEW, 128)
    module = cx.load(run, fast=False)
    exact = torch.cat([module(row[None]).logits.float().log_softmax(-1) for row in ids])
    relayout(module, CPU)
    model = loop(module, int8_head=int8_head) if int8_head else module
    fast = torch.cat([model(row[None]).logits.float().log_softmax(-1) for row in ids])
    return {
        "kl_mean": float((exact.exp() * (exact - fast)).sum(-1).mean()),
        "top1_agreement": float((exact.argmax(-1) == fast.argmax(-1)).float().mean()),
    }


def table(document: dict[str, Any]) -> str:
    lines = [
        f"# On this CPU, {datetime.date.today()}", "",
        f"Batch 1, prompt {PROMPT}, {GENERATE} steps, {document['environment']['cpu']['model']}, "
        f"{torch.get_num_threads()} threads; load before {document['load_average_before']}. "
        "Ratios are of times in turns (below 1: faster), with 95 % intervals.", "",
        "| | prompt ms | ratio | step ms | ratio |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, row in document["pairs"].items():
        cells = []
        for figure in ("prefill_ms", "decode_ms_per_token"):
            one, ratio = row[figure], row[figure]["ratio"]
            low, high = ratio["ci95"]
            cells += [
                f"{one['ms']['value']:.1f} / {one['baseline_ms']['value']:.1f}",
                f"{ratio['value']:.2f} [{low:.2f}, {high:.2f}]",
            ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    one = document["linear_4096_M1"]
    product = f"int4 {one['int4_us']:.0f} us, bf16 {one['bf16_us']:.0f} us: {one['speed_up']:.2f} x."
    lines += ["", f"A 4096 x 4096 product of one token: {product}", ""]
    lines += ["| fast ops against exact ones | KL, nats a token | first choices kept |", "|---|---|---|"]
    lines += [f"| {name} | {d['kl_mean']:.2e} | {d['top1_agreement']:.4f} |" for name, d in document["drift"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
