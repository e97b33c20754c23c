"""How fast and how true are our ONNX folders beside those of onnxruntime-genai's own builder?

    python benchmarks/onnx_decode.py --prepare      # environments and the builder's folders: minutes, network
    python benchmarks/onnx_decode.py --folder ours-int4=runs/a/onnx --folder ours-fp32=runs/b/onnx
    python benchmarks/onnx_decode.py --smoke        # one block of turns, into .peers/smoke: does it all run?

Every folder runs in onnxruntime with one and the same loop (compressor.runtimes.OnnxModel), and in onnxruntime-genai's
own loop in a process of its own. `NAME=PATH@LEVEL` overrides the accuracy_level of a folder's quantized products (then
without onnxruntime-genai, which has no such setting). Greedy, batch 1, a prompt of 32 tokens and 64 new ones; all sides
take turns, each order followed by its mirror image, so that a drift of the machine cancels, and ratios are paired by
turn. Truth is the dense model in float32 torch: KL divergence and perplexity on windows of WikiText-2 test
($COMPRESSOR_SHARED/data/text), and the first 32 greedy tokens. Last, optimum-onnx is asked to load each folder.

Writes <date>-onnx_decode.json and .md. Exit code 0, or 3 when it could not start.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor.metrics import describe_environment
from compressor.metrics.latency import paired_ratio
from compressor.metrics.latency.rounds import turns_of
from compressor.models.loading import load_tokenizer, resolve
from compressor.runtimes import OnnxModel, open_onnx

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
from environments import PEERS, ROOT, WORKERS, PeersError, model_hash, python_of
from peers import failure_reason, refuse_busy_machine

PROMPT, NEW, COMPARED = 32, 64, 32
WINDOW = 256
BUILDER = ("int4", "fp32")
GENAI, OPTIMUM = "genai.requirements.txt", "optimum-onnx.requirements.txt"
REST_S = 0.05  # between two turns, so that the threads of the side before have stopped spinning

Turn = Callable[[list[int], int], dict[str, Any]]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", action="append", default=[], metavar="NAME=PATH[@LEVEL]", help="a folder of ours")
    parser.add_argument("--model", default="demo/smollm2-135m", help="the dense model that all were made from")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each side (default 20)")
    parser.add_argument("--windows", type=int, default=16, help=f"windows of {WINDOW} tokens for KL (default 16)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prepare", action="store_true", help="only build the environments and the builder's folders")
    parser.add_argument("--force", action="store_true", help="run beside other work; the figures are marked")
    parser.add_argument("--smoke", action="store_true", help="one block of turns and one window, into .peers/smoke")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.windows, options.force, options.results = 2, 1, True, PEERS / "smoke"
    for folder in options.folder:
        if "=" not in folder:
            parser.error(f"--folder {folder}: it takes NAME=PATH, with @LEVEL behind it for another accuracy_level")
    return options


def builder_folder(model: Path, precision: str) -> Path:
    """What onnxruntime-genai's own builder makes of the dense model, with its defaults for the CPU; made once."""
    folder = PEERS / "onnx" / f"{model_hash(model)}-genai-{precision}"
    if not folder.exists():
        print(f"building {folder.relative_to(ROOT)}", file=sys.stderr, flush=True)
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        command = [
            str(python_of(GENAI)),
            "-m",
            "onnxruntime_genai.models.builder",
            "-i",
            str(model),
            "-o",
            str(partial),
        ]
        command += ["-p", precision, "-e", "cpu", "-c", str(PEERS / "onnx" / "cache")]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        if done.returncode != 0:
            raise PeersError(f"the builder ({precision}): {failure_reason(done.stderr or done.stdout)}")
        partial.rename(folder)
    return folder


def in_onnxruntime(model: OnnxModel) -> Turn:
    """A turn of the plain loop."""

    def turn(prompt: list[int], new: int) -> dict[str, Any]:
        tokens, cache, ids = [], None, torch.tensor([prompt])
        gc.disable()
        begun = first = time.perf_counter()
        for step in range(new):
            out = model(ids, past_key_values=cache, logits_to_keep=1)
            cache = out.past_key_values
            tokens.append(int(out.logits[0, -1].numpy().argmax()))
            ids = torch.tensor([[tokens[-1]]])
            first = time.perf_counter() if step == 0 else first
        ended = time.perf_counter()
        gc.enable()
        return {"tokens": tokens, "prefill_ms": 1000 * (first - begun), "decode_ms": 1000 * (ended - first) / (new - 1)}

    return turn


@contextlib.contextmanager
def in_genai(folder: Path, threads: int) -> Iterator[Turn]:
    """A turn of onnxruntime-genai's loop, in a process that waits for them; PeersError with the reason if it ends."""
    with tempfile.TemporaryDirectory() as scratch, open(Path(scratch) / "log", "w+", encoding="utf-8") as log:
        config = Path(scratch) / "config.json"
        config.write_text(json.dumps({"folder": str(folder.resolve()), "threads": threads}), encoding="utf-8")
        command = [str(python_of(GENAI)), str(WORKERS / "with_genai.py"), str(config)]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        assert worker.stdin is not None
        assert worker.stdout is not None

        def answer() -> dict[str, Any]:
            line = worker.stdout.readline()  # type: ignore[union-attr]
            if not line:
                worker.wait()
                log.seek(0)
                raise PeersError(failure_reason(log.read()))
            return json.loads(line)

        def turn(prompt: list[int], new: int) -> dict[str, Any]:
            print(json.dumps({"prompt": prompt, "new": new}), file=worker.stdin, flush=True)
            return answer()

        try:
            answer()
            yield turn
        finally:
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.close()
            worker.wait()


def take_turns(sides: dict[str, Turn], prompt: list[int], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """All sides `rounds` times each, after one turn each that does not count."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    names = list(sides)
    for name in names:
        sides[name](prompt, NEW)
    orders = turns_of(len(names), seed=0)
    for number in range(rounds):
        for index in next(orders):
            time.sleep(REST_S)
            found[names[index]].append(sides[names[index]](prompt, NEW))
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return found


@torch.inference_mode()
def truth(model: Path, windows: Tensor, prompt: list[int], new: int) -> tuple[Tensor, list[int]]:
    """Log probabilities `[N, T, V]` of the dense model in float32, and its greedy continuation."""
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    log_probs = torch.stack([module(row[None]).logits[0].log_softmax(-1) for row in windows])
    ids = module.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=new, min_new_tokens=new)
    return log_probs, ids[0, len(prompt) :].tolist()


def closeness(model: OnnxModel, windows: Tensor, expected: Tensor) -> dict[str, Any]:
    """KL divergence from the dense model in nats a token, its standard error over windows, agreement, perplexity."""
    kl, agrees, losses = [], [], []
    for row, expected_TV in zip(windows, expected, strict=True):
        found_TV = model(row[None]).logits[0].float().log_softmax(-1)
        kl.append(float((expected_TV.exp() * (expected_TV - found_TV)).sum(-1).double().mean()))
        agrees.append(float((expected_TV.argmax(-1) == found_TV.argmax(-1)).double().mean()))
        losses.append(float(-found_TV[:-1].gather(1, row[1:, None]).double().mean()))
    error = statistics.stdev(kl) / math.sqrt(len(kl)) if len(kl) > 1 else None
    return {
        "kl": statistics.fmean(kl), "kl_standard_error": error, "same_top": statistics.fmean(agrees),
        "perplexity": math.exp(statistics.fmean(losses)),
    }  # fmt: skip


def in_optimum(folder: Path, prompt: list[int], threads: int) -> dict[str, Any]:
    """The greedy tokens of optimum-onnx, or why it does not load the folder."""
    with tempfile.TemporaryDirectory() as scratch:
        config, result = Path(scratch) / "config.json", Path(scratch) / "result.json"
        asked = {"folder": str(folder.resolve()), "prompt": prompt, "new": COMPARED, "result": str(result)}
        config.write_text(json.dumps(asked), encoding="utf-8")
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        command = [str(python_of(OPTIMUM)), str(WORKERS / "with_optimum_onnx.py"), str(config)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            return {"failed": failure_reason(done.stderr or done.stdout)}
        return json.loads(result.read_text(encoding="utf-8"))


def leading(tokens: list[int], others: list[int]) -> int:
    """How many of the first tokens are the same, up to 32."""
    pairs = list(zip(tokens[:COMPARED], others[:COMPARED], strict=True))
    return next((n for n, (one, other) in enumerate(pairs) if one != other), len(pairs))


def spread(values: list[float]) -> dict[str, float]:
    """Median, and the middle half."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": middle, "p25": low, "p75": high, "n": len(values)}


def measure(options: argparse.Namespace, model: Path, folders: dict[str, tuple[Path, int | None]]) -> dict[str, Any]:
    """All figures of all folders."""
    text = Path(os.environ.get("COMPRESSOR_SHARED", ROOT.parent / "shared")) / "data/text/wikitext2_raw_test.txt"
    if not text.exists():
        raise PeersError(f"{text} is missing; $COMPRESSOR_SHARED names the folder that holds data/text")
    ids = load_tokenizer(model)(text.read_text(encoding="utf-8")[:400_000], add_special_tokens=False)["input_ids"]
    prompt, windows = ids[:PROMPT], torch.tensor(ids[: options.windows * WINDOW]).view(-1, WINDOW)
    torch.set_num_threads(options.threads)
    expected, dense_tokens = truth(model, windows, prompt, NEW)
    rows: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        sides: dict[str, Turn] = {}
        for name, (folder, level) in folders.items():
            opened = open_onnx(folder, threads=options.threads, accuracy_level=level)
            sides[name] = in_onnxruntime(opened)
            rows[name] = {"weight_bytes": opened.weight_bytes, **closeness(opened, windows, expected)}
            print(f"{name}: {rows[name]}", file=sys.stderr, flush=True)
            if level is None:
                try:
                    sides[f"{name}, genai"] = stack.enter_context(in_genai(folder, options.threads))
                except PeersError as error:
                    rows[f"{name}, genai"] = {"failed": str(error)}
        load_before = os.getloadavg()
        turns = take_turns(sides, prompt, options.rounds)
    baseline = "builder-int4"
    for name, taken in turns.items():
        row = rows.setdefault(name, {})
        for figure in ("prefill_ms", "decode_ms"):
            times = [turn[figure] for turn in taken]
            row[figure] = spread(times)
            row[f"{figure}_over_{baseline}"] = paired_ratio(times, [turn[figure] for turn in turns[baseline]]).to_json()
        row["tokens"] = taken[0]["tokens"][:COMPARED]
        row["as_torch"] = leading(taken[0]["tokens"], dense_tokens)
        row["always_the_same_tokens"] = all(turn["tokens"] == taken[0]["tokens"] for turn in taken)
    for name, (folder, level) in folders.items():
        if f"{name}, genai" in turns:
            rows[name]["as_genai"] = leading(turns[name][0]["tokens"], turns[f"{name}, genai"][0]["tokens"])
        if level is None:
            loaded = in_optimum(folder, prompt, options.threads)
            rows[name]["optimum"] = loaded
            if "tokens" in loaded:
                rows[name]["as_optimum"] = leading(turns[name][0]["tokens"], loaded["tokens"])
    return {
        "sides": rows,
        "dense_tokens": dense_tokens,
        "load_average_before_turns": load_before,
        "turns": {
            name: [{key: turn[key] for key in ("prefill_ms", "decode_ms")} for turn in taken]
            for name, taken in turns.items()
        },
    }


def table(found: dict[str, Any]) -> str:
    """One line for each side, in Markdown."""
    lines = [
        "| side | decode ms a token (middle half) | x builder-int4 [95 %] | prefill ms | weights MB | KL (se) "
        "| perplexity | tokens as torch | as genai | as optimum |",
        "|---|---|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    for name, row in found["sides"].items():
        if "failed" in row:
            lines.append(f"| {name} | failed: {row['failed'].replace('|', '/')} | | | | | | | | |")
            continue
        decode, ratio = row["decode_ms"], row["decode_ms_over_builder-int4"]
        interval = "[{:.3f}, {:.3f}]".format(*ratio["ci95"]) if ratio["ci95"] else ""
        error = f" ({row['kl_standard_error']:.1e})" if row.get("kl_standard_error") else ""
        optimum = row.get("as_optimum", "failed" if "failed" in row.get("optimum", {}) else "")
        cells = [
            name,
            f"{decode['median']:.2f} ({decode['p25']:.2f} to {decode['p75']:.2f})",
            f"{ratio['value']:.3f} {interval}",
            f"{row['prefill_ms']['median']:.1f}",
            f"{row['weight_bytes'] / 1e6:.1f}" if "weight_bytes" in row else "",
            f"{row['kl']:.3e}{error}" if "kl" in row else "",
            f"{row['perplexity']:.2f}" if "perplexity" in row else "",
            str(row["as_torch"]),
            str(row.get("as_genai", "")),
            str(optimum),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Prepare, measure, write."""
    options = arguments()
    try:
        model = resolve(options.model).path
        folders: dict[str, tuple[Path, int | None]] = {}
        for named in options.folder:
            name, _, place = named.partition("=")
            path, _, level = place.partition("@")
            folders[name] = (Path(path), int(level) if level else None)
        folders |= {f"builder-{precision}": (builder_folder(model, precision), None) for precision in BUILDER}
        python_of(OPTIMUM)
        if options.prepare:
            return 0
        refuse_busy_machine(options)
        environment = describe_environment()
        found = measure(options, model, folders)
    except PeersError as error:
        print(error, file=sys.stderr)
        return 3
    date = f"{datetime.now(UTC):%Y-%m-%d}"
    found |= {
        "command": " ".join(sys.argv),
        "settings": {"model": options.model, "prompt": PROMPT, "new": NEW, "rounds": options.rounds,
                     "windows": [options.windows, WINDOW], "threads": options.threads, "forced": options.force},
        "onnxruntime": version("onnxruntime"),
        "environment": environment,
    }  # fmt: skip
    title = (
        f"# {date}: greedy decoding of {options.model} in ONNX, batch 1, {PROMPT} + {NEW} tokens, {options.threads} "
        f"threads, {options.rounds} turns a side{' (beside other work)' if options.force else ''}\n\n"
        f"{environment['cpu']['model']}; onnxruntime {version('onnxruntime')}; KL and perplexity on {options.windows} "
        f"x {WINDOW} tokens of WikiText-2 test, against the dense model in float32 torch. Tokens: how many of the "
        f"first {COMPARED} are the same.\n\n"
    )
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"{date}-onnx_decode.json"
    path.write_text(json.dumps(found, indent=1), encoding="utf-8")
    path.with_suffix(".md").write_text(f"{title}{table(found)}\n", encoding="utf-8")
    print(title + table(found))
    print(
        json.dumps(
            {"path": str(path), "sides": {k: {"decode_ms": v.get("decode_ms")} for k, v in found["sides"].items()}}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
