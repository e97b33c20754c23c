"""What is left of a model in a GGUF file, by type: GPTQ codes carried over, against the same types rounded to nearest?

    python benchmarks/gguf_quality.py --threads 1    # SmolLM2-135M; 35 minutes on one core beside other work
    python benchmarks/gguf_quality.py --llama-python PYTHON    # with llama.cpp's perplexity beside it
    python benchmarks/gguf_quality.py --smoke    # two short windows: does it all run?

Every file is read by stock transformers in a process of its own (weights dequantized to float32), and by llama.cpp
where an environment with llama-cpp-python is given. Rows "live" are the model in memory that the file was written from,
in float32 arithmetic. Perplexity on the first windows of WikiText-2 raw test, GPTQ calibrated on raw validation (64
windows of 512 tokens), groups of 32, scales searched by weighted error; token ids are made once and handed to every
reader. Texts come from $COMPRESSOR_SHARED (default ../shared beside the project).

What transformers cannot read a config of from the file alone (a mixture with other widths than its default) has rows
that say so.

Checks that hold or fail the run (exit code 1): the carried file's perplexity is the live model's (relative 1e-5 in
transformers), better than round-to-nearest's at the same size; Q4_K_M is better than round-to-nearest Q4_0.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE), str(HERE / "peers")]
GROUP = 32
CALIBRATION = (64, 512)
# What is written: of the dense model or the GPTQ one, and as which type
FILES = {
    "bf16": ("dense", "bf16"),
    "q8_0, to nearest": ("dense", "q8_0"),
    "gptq, carried (auto)": ("gptq", "auto"),
    "gptq, carried (q4_0)": ("gptq", "q4_0"),
    "q4_0, to nearest": ("dense", "q4_0"),
    "q4_k_m": ("dense", "q4_k_m"),
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/smollm2-135m", help="a dense model (default demo/smollm2-135m)")
    parser.add_argument("--windows", type=int, default=32, help="windows of the test text (default 32)")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window (default 512)")
    parser.add_argument("--llama-python", type=Path, help="interpreter of an environment with llama-cpp-python")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--smoke", action="store_true", help="two windows of 64 tokens, results into a scratch folder")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--reader", nargs=4, metavar=("NAME", "FILE", "IDS", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke:
        options.windows, options.length = 2, 64
        options.results = Path(tempfile.mkdtemp(prefix="gguf_quality-"))
    return options


def text_ids(tokenizer: Any, split: str, windows: int, length: int) -> Any:
    """Token windows `[N, T]` of WikiText-2 raw, tokenized once as a whole."""
    import protocol

    folder = Path(os.environ.get("COMPRESSOR_SHARED", ROOT.parent / "shared")) / "data" / "text"
    return protocol.token_windows(str(folder / f"wikitext2_raw_{split}.txt"), tokenizer, length, windows)


def live_losses(model: Any, ids_NT: Any) -> list[float]:
    """Mean loss of each window, in float32 from the weights (or codes) that the model holds."""
    import torch

    from compressor.layers import CANONICAL
    from compressor.models import in_float32

    with torch.inference_mode(), model.live(layout=CANONICAL) as module, in_float32(module):
        return [_loss(module(row[None], use_cache=False).logits[0], row) for row in ids_NT]


def read_with_transformers(file: Path, ids: list[list[int]]) -> list[float]:
    """The same of a file, loaded by stock transformers, in this process; nothing of the project is imported."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with torch.inference_mode():
        rows = [torch.tensor(row) for row in ids]
        return [_loss(model(row[None], use_cache=False).logits[0], row) for row in rows]


def read_with_llama_cpp(file: Path, ids: list[list[int]]) -> list[float]:
    """The same by llama.cpp, whose products round activations to 8 bits where weights are quantized."""
    import llama_cpp
    import numpy

    defaults = llama_cpp.llama_model_default_params

    def plain_kernels() -> Any:
        """Without repacked weights: their AMX kernels end in an illegal instruction on the machine of the results."""
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

    llama_cpp.llama_cpp.llama_model_default_params = plain_kernels
    length, threads = len(ids[0]), int(os.environ["OMP_NUM_THREADS"])
    settings = {"n_ctx": length, "n_batch": length, "n_ubatch": length, "n_threads": threads, "logits_all": True}
    llama = llama_cpp.Llama(str(file), n_threads_batch=threads, verbose=False, **settings)
    losses = []
    for row in ids:
        llama.reset()
        llama.eval(row)
        logits = numpy.asarray(llama.scores[: length - 1], dtype=numpy.float64)
        peak = logits.max(-1, keepdims=True)
        norm = numpy.log(numpy.exp(logits - peak).sum(-1)) + peak[:, 0]
        losses.append(float((norm - logits[numpy.arange(length - 1), row[1:]]).mean()))
    return losses


READERS = {"transformers": read_with_transformers, "llama.cpp": read_with_llama_cpp}


def read_apart(reader: str, python: Path, file: Path, ids: Path, threads: int) -> dict[str, Any]:
    """Losses from a reader in a process of its own, or {"failed": reason}."""
    out = ids.with_name("losses.json")
    command = [str(python), str(Path(__file__).resolve()), "--reader", reader, str(file), str(ids), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        return {"failed": f"exit {done.returncode}: {(done.stderr.strip().splitlines() or ['no output'])[-1][:300]}"}
    found = json.loads(out.read_text())
    return {**found, "seconds": time.perf_counter() - started}


def measure(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """A row for each live model and each file."""
    import copy

    import torch

    import compressor as cx
    from compressor.exporters.gguf import export_gguf
    from compressor.models import load_model, wrap_live

    torch.set_num_threads(options.threads)
    stored = load_model(options.model)
    tokenizer = stored.tokenizer
    dense = wrap_live(stored.take_live(), tokenizer)
    ids_NT = text_ids(tokenizer, "test", options.windows, options.length)
    ids = work / "ids.json"
    ids.write_text(json.dumps(ids_NT.tolist()))
    windows, length = (2, 64) if options.smoke else CALIBRATION
    calibration = text_ids(tokenizer, "valid", windows, length)

    say("GPTQ, groups of 32 ...")
    quantized = copy.deepcopy(dense.skeleton)
    cx.apply(quantized, [cx.Quantize(bits=4, group_size=GROUP)], calibration=calibration)
    models = {"dense": dense, "gptq": wrap_live(quantized, tokenizer)}
    rows = []
    for name, model in models.items():
        say(f"{name}, live ...")
        rows.append({"name": f"{name}, live", "losses": {"live": live_losses(model, ids_NT)}})
    for name, (source, type) in FILES.items():
        say(f"{name} ...")
        started = time.perf_counter()
        exported = export_gguf(models[source], work / name.replace(" ", "_"), type=type)
        row: dict[str, Any] = {
            "name": name, "source": source, "type": type, "file": exported.file.name, "bytes": exported.bytes,
            "lossless": exported.lossless, "write_seconds": time.perf_counter() - started,
            "types": count(exported.types), "fallbacks": count(exported.reasons), "losses": {}, "versions": {},
        }  # fmt: skip
        pythons = {"transformers": Path(sys.executable), "llama.cpp": options.llama_python}
        for reader, python in pythons.items():
            if python is None:
                continue
            found = read_apart(reader, python, exported.file, ids, options.threads)
            if "failed" in found:
                row[f"failed {reader}"] = found["failed"]
            else:
                row["losses"][reader], row["versions"][reader] = found["losses"], found["version"]
        rows.append(row)
    parameters = dense.num_parameters()
    for row in rows:
        if "bytes" in row:
            row["bits_per_weight"] = row["bytes"] * 8 / parameters
    return rows


def count(values: dict[str, str]) -> dict[str, int]:
    """How often each value occurs."""
    return {value: list(values.values()).count(value) for value in sorted(set(values.values()))}


def checks(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """What has to hold of the perplexities in transformers."""
    found = {row["name"]: row["losses"].get("transformers") for row in rows}
    live = {row["name"]: row["losses"].get("live") for row in rows}

    def same(file: str, model: str) -> bool:
        if not found[file]:
            return False
        return max(abs(a - b) for a, b in zip(found[file], live[model], strict=True)) < 1e-5

    def better(one: str, other: str) -> bool:
        return bool(found[one] and found[other]) and sum(found[one]) < sum(found[other])

    return {
        "bf16 file = live dense model": same("bf16", "dense, live"),
        "carried file = live GPTQ model": same("gptq, carried (auto)", "gptq, live"),
        "carried codes better than q4_0 to nearest": better("gptq, carried (q4_0)", "q4_0, to nearest"),
        "q4_k_m better than q4_0 to nearest": better("q4_k_m", "q4_0, to nearest"),
    }


def table(rows: list[dict[str, Any]], title: str, held: dict[str, bool]) -> str:
    """The figures in Markdown."""
    from peers import paired_ratio

    reference = rows[0]["losses"]["live"]
    lines = [
        title,
        "",
        "| model | MB | bits a weight | perplexity, transformers | ratio to dense (95 %) | llama.cpp | types |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        losses = row["losses"].get("live") or row["losses"].get("transformers")
        ratio = paired_ratio(losses, reference) if losses else None
        row["ratio"] = ratio
        llama = row["losses"].get("llama.cpp")
        size = (f"{row['bytes'] / 1e6:.1f}", f"{row['bits_per_weight']:.2f}") if "bytes" in row else ("", "")
        cells = [
            row["name"],
            *size,
            f"{perplexity(losses):.4f}" if losses else row["failed transformers"],
            f"{ratio['value']:.4f} [{ratio['ci95'][0]:.4f}, {ratio['ci95'][1]:.4f}]" if ratio else "",
            f"{perplexity(llama):.4f}" if llama else row.get("failed llama.cpp", ""),
            ", ".join(f"{number} {type}" for type, number in row.get("types", {}).items()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- {'holds' if holds else 'FAILS'}: {what}" for what, holds in held.items())]
    return "\n".join(lines)


def perplexity(losses: list[float]) -> float:
    """exp of the mean loss."""
    return math.exp(sum(losses) / len(losses))


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def _loss(logits: Any, row: Any) -> float:
    import torch

    return torch.nn.functional.cross_entropy(logits[:-1].float(), row[1:]).item()


def read_one(name: str, file: str, ids: str, out: str) -> int:
    """The reader's process: losses and the version of what computed them."""
    import importlib.metadata

    package = {"transformers": "transformers", "llama.cpp": "llama-cpp-python"}[name]
    losses = READERS[name](Path(file), json.loads(Path(ids).read_text()))
    Path(out).write_text(json.dumps({"losses": losses, "version": f"{package} {importlib.metadata.version(package)}"}))
    return 0


def main() -> int:
    """Measure, report, check."""
    options = arguments()
    if options.reader:
        return read_one(*options.reader)
    from environments import machine, project_version

    with tempfile.TemporaryDirectory(prefix="gguf_quality-") as work:
        rows = measure(options, Path(work))
    held = checks(rows)
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    here, project = machine(), project_version()
    title = (
        f"{date}: {options.model}, GGUF by type; perplexity on {options.windows} x {options.length} tokens of "
        f"WikiText-2 test. {here['cpu']}, {options.threads} threads; commit {project['commit']}"
        f"{'' if project['clean'] else ' with changes'}."
    )
    if options.model == "demo/smollm2-135m":
        title += (
            " The dense model was a Q4_1 file once: its weights lie on grids of 32 with a minimum, which types with a "
            "minimum (Q4_K) find again more easily than they would find others."
        )
    shown = table(rows, title, held)
    document = {
        "schema": "compressor.benchmark.gguf_quality/1",
        "date": date,
        "environment": {**here, "threads": options.threads, "project": project},
        "model": options.model,
        "settings": {"windows": options.windows, "length": options.length, "group": GROUP, "calibration": CALIBRATION},
        "checks": held,
        "rows": rows,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / f"{date}-gguf_quality.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (options.results / f"{date}-gguf_quality.md").write_text(shown + "\n", encoding="utf-8")
    print(shown)
    short = {row["name"]: {name: perplexity(losses) for name, losses in row["losses"].items()} for row in rows}
    print(json.dumps({"results": str(options.results / f"{date}-gguf_quality.json"), "perplexity": short}))
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
