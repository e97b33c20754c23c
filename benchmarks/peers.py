"""How do our int4 quality, time and memory compare with those of other tools, on one protocol and one machine?

    python benchmarks/peers.py --prepare                # environments and the dense checkpoint: minutes, network
    python benchmarks/peers.py                          # the comparison: cached runs are not repeated
    python benchmarks/peers.py --only ours --fresh      # measure one tool again
    python benchmarks/peers.py --repeats 3              # interleaved rounds; median and range
    python benchmarks/peers.py --smoke                  # two windows of each kind, into .peers/smoke: does it all run?

Protocol: one dense bf16 folder for all tools; calibration on the first 64 windows of 512 tokens of WikiText-2 raw
validation (the whole text tokenized once); perplexity on the first 32 windows of 1,024 tokens of WikiText-2 raw test,
model in bf16, loss in float32; 4 bits, symmetric where the tool can, Linear layers only, lm_head untouched. Times, CPU
seconds and peak resident memory are those of the quantization alone: imports, model load, save and evaluation are
separate fields. Tools run one after another in environments of their own (benchmarks/peers/*.requirements.txt).
Texts come from $COMPRESSOR_SHARED (default ../shared beside the project).

A tool that fails is a row with its reason. Exit code 0 when every row has figures, 1 when a tool failed, 3 when the
comparison could not start.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import math
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
from environments import (
    PEERS,
    ROOT,
    WORKERS,
    PeersError,
    dense_checkpoint,
    file_hash,
    machine,
    machine_cpu_seconds,
    model_hash,
    project_version,
    python_of,
)


@dataclasses.dataclass(frozen=True)
class Tool:
    """One row of the comparison: the worker script, the pinned environment (None: the project's) and its method."""

    worker: str
    requirements: str | None
    method: str


TOOLS = {
    "dense": Tool("dense.py", None, "none"),
    "ours": Tool("ours.py", None, "gptq"),
    "llmcompressor-gptq": Tool("with_llmcompressor.py", "llmcompressor.requirements.txt", "gptq"),
    "llmcompressor-rtn": Tool("with_llmcompressor.py", "llmcompressor.requirements.txt", "rtn"),
    "hqq": Tool("with_hqq.py", "hqq.requirements.txt", "hqq"),
}
FIGURES = ("seconds", "cpu_seconds", "peak_bytes", "file_bytes", "perplexity")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"comma-separated tools of: {', '.join(TOOLS)} (dense is always there)")
    parser.add_argument("--model", default="demo/smollm2-135m", help="a dense checkpoint folder, or demo/smollm2-135m")
    parser.add_argument("--group", type=int, default=64, help="weights that share a scale (default 64)")
    parser.add_argument("--repeats", type=int, default=1, help="interleaved rounds; medians are shown (default 1)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--fresh", action="store_true", help="measure again what is cached")
    parser.add_argument("--force", action="store_true", help="run beside other work; the times are marked")
    parser.add_argument("--prepare", action="store_true", help="only build the environments and the dense checkpoint")
    parser.add_argument("--smoke", action="store_true", help="tiny settings on one thread, results into .peers/smoke")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(TOOLS)
    if unknown := [name for name in names if name not in TOOLS]:
        parser.error(f"--only has no tool {unknown[0]!r}; it takes {', '.join(TOOLS)}")
    options.only = ["dense", *(name for name in TOOLS if name in names and name != "dense")]
    if options.smoke:
        options.threads, options.force, options.results = 1, True, PEERS / "smoke"
    return options


def shared_settings(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    """What every worker is told; the paths of the texts are checked here."""
    texts = Path(os.environ.get("COMPRESSOR_SHARED", ROOT.parent / "shared")).resolve() / "data" / "text"
    calibration, evaluation = texts / "wikitext2_raw_valid.txt", texts / "wikitext2_raw_test.txt"
    for text in (calibration, evaluation):
        if not text.exists():
            raise PeersError(f"{text} is missing; $COMPRESSOR_SHARED names the folder that holds data/text")
    samples, length, windows, evaluation_length = (2, 64, 2, 128) if options.smoke else (64, 512, 32, 1024)
    return {
        "model": str(model),
        "bits": 4,
        "group_size": options.group,
        "threads": options.threads,
        "calibration": {"text": str(calibration), "samples": samples, "length": length},
        "evaluation": {"text": str(evaluation), "windows": windows, "length": evaluation_length},
    }


def cache_key(name: str, settings: dict[str, Any], hashes: dict[str, str]) -> dict[str, Any]:
    """Everything a cached figure depends on: tool, protocol, data, model, settings and machine. Paths are not in it."""
    tool = TOOLS[name]
    version = file_hash(WORKERS / tool.requirements) if tool.requirements else hashes["project"]
    if name == "dense":
        version = "none"
    paths_out = {
        key: ({k: v for k, v in value.items() if k != "text"} if isinstance(value, dict) else value)
        for key, value in settings.items()
        if key != "model"
    }
    here = machine()
    return {
        "tool": name,
        "method": tool.method,
        "version": version,
        "worker": file_hash(WORKERS / tool.worker),
        "protocol": hashes["protocol"],
        "data": hashes["data"],
        "model": hashes["model"],
        "settings": paths_out,
        "machine": [here["cpu"], here["cores"]],
    }


def run_once(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Start the worker in its environment and wait; what it measured, or {"failed": reason}.

    `other_cpu_seconds` is what the rest of the machine computed meanwhile: near 0 on an idle one.
    """
    tool, work = TOOLS[name], PEERS / "work" / name
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    config = {**settings, "name": name, "method": tool.method, "out": str(work / "out"), "result": str(work / "r.json")}
    (work / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(settings["threads"]),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT) if tool.requirements is None else "",
    }
    log = PEERS / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    children_before, machine_before = _children_cpu_seconds(), machine_cpu_seconds()
    with log.open("w", encoding="utf-8") as output:
        command = [str(python_of(tool.requirements)), str(WORKERS / tool.worker), str(work / "config.json")]
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=work).returncode
    other = machine_cpu_seconds() - machine_before - (_children_cpu_seconds() - children_before)
    if code != 0 or not (work / "r.json").exists():
        reason = failure_reason(log.read_text("utf-8", errors="replace"))
        return {"failed": f"{reason} (exit {code}; {log.relative_to(ROOT)})"}
    result = json.loads((work / "r.json").read_text(encoding="utf-8"))
    result["other_cpu_seconds"] = max(other, 0.0)
    shutil.rmtree(work)
    return result


def failure_reason(log: str) -> str:
    """The line of a log that names the exception (long messages go on for many lines), else its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Unsupported\w*|Interrupt)\b", line)]
    return (named or lines or ["no output"])[-1][:300]


def _children_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(options: argparse.Namespace, settings: dict[str, Any], keys: dict[str, Any]) -> dict[str, list[dict]]:
    """All runs of every tool, `repeats` each, round by round; successful runs are read from and kept in the cache."""
    files = {
        name: PEERS
        / "cache"
        / f"{name}-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.json"
        for name, key in keys.items()
    }
    runs: dict[str, list[dict]] = {}
    for name, file in files.items():
        cached = file.exists() and not options.fresh
        runs[name] = json.loads(file.read_text(encoding="utf-8"))["runs"] if cached else []
        # A forced run beside other work must not pass for a clean one later.
        runs[name] = [run for run in runs[name] if options.force or not run["forced"]]
    for round_number in range(options.repeats):
        for name, file in files.items():
            if len(runs[name]) > round_number or any("failed" in run for run in runs[name]):
                continue
            print(f"{name}: run {round_number + 1} of {options.repeats} ...", file=sys.stderr, flush=True)
            started = time.perf_counter()
            run = {**run_once(name, settings), "forced": options.force}
            print(
                f"  {run.get('failed') or 'done'}, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True
            )
            runs[name].append(run)
            if "failed" not in run:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps({"key": keys[name], "runs": runs[name]}, indent=1), encoding="utf-8")
    return runs


def summarize(name: str, runs: list[dict], dense: list[dict]) -> dict[str, Any]:
    """The row of one tool: median, lowest and highest of each figure, and the perplexity's ratio to the dense model."""
    row: dict[str, Any] = {"name": name, "method": TOOLS[name].method}
    if failed := [run["failed"] for run in runs if "failed" in run]:
        return {**row, "failed": failed[0]}
    for figure in FIGURES:
        values = [run[figure] for run in runs if run.get(figure) is not None]
        row[figure] = (
            {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}
            if values
            else None
        )
    if "window_nll" in dense[0]:
        row["perplexity_ratio"] = paired_ratio(runs[0]["window_nll"], dense[0]["window_nll"])
    row["forced"] = any(run["forced"] for run in runs)
    row["runs"] = runs
    return row


def paired_ratio(nll: list[float], reference: list[float]) -> dict[str, Any]:
    """exp of the mean difference of per-window losses, with a 95 % bootstrap interval over the windows (seed 0)."""
    differences = [a - b for a, b in zip(nll, reference, strict=True)]
    draw, n = random.Random(0), len(differences)
    means = sorted(statistics.fmean(draw.choices(differences, k=n)) for _ in range(2000))
    return {
        "value": math.exp(statistics.fmean(differences)),
        "ci95": [math.exp(means[49]), math.exp(means[1949])],
        "n": n,
    }


def check_same_tokens(rows: list[dict]) -> None:
    """Refuse a comparison in which two tools saw other tokens (tokenizer versions differ between environments)."""
    for field in ("evaluation_tokens", "calibration_tokens"):
        seen = {row["name"]: run[field] for row in rows for run in row.get("runs", []) if run.get(field)}
        if len(set(seen.values())) > 1:
            raise PeersError(f"{field} differ between tools, so their figures cannot be compared: {seen}")


def table(rows: list[dict], title: str) -> str:
    """The comparison in Markdown, which is also what is printed."""
    lines = [
        title,
        "",
        "| tool | perplexity | ratio to dense (95 %) | seconds | CPU-seconds | peak GB | files MB | versions |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['name']} | failed: {row['failed'].replace('|', '/')} | | | | | | |")
            continue
        ratio = row.get("perplexity_ratio")
        versions = ", ".join(f"{name} {version}" for name, version in row["runs"][0]["packages"].items())
        cells = [
            row["name"] + (" (beside other work)" if row["forced"] else ""),
            _cell(row["perplexity"], 3),
            f"{ratio['value']:.4f} [{ratio['ci95'][0]:.4f}, {ratio['ci95'][1]:.4f}]" if ratio else "-",
            _cell(row["seconds"], 1),
            _cell(row["cpu_seconds"], 1),
            _cell(row["peak_bytes"], 2, 1e9),
            _cell(row["file_bytes"], 1, 1e6),
            versions,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(figure: dict[str, float] | None, digits: int, unit: float = 1.0) -> str:
    if figure is None:
        return "-"
    low, middle, high = (f"{figure[key] / unit:.{digits}f}" for key in ("min", "median", "max"))
    return middle if low == high else f"{middle} ({low} to {high})"


def refuse_busy_machine(options: argparse.Namespace) -> None:
    """Times taken beside other work are worthless: two heavy processes on two cores slow each other down 4x."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > 0.5 * cores and not options.force:
        raise PeersError(
            f"the load average is {load:.2f} on {cores} cores (limit {0.5 * cores:.2f}): wait until the machine "
            "is idle (building environments counts too: --prepare does it before), or --force it and times are marked"
        )


def report(options: argparse.Namespace, settings: dict[str, Any], rows: list[dict], hashes: dict[str, str]) -> None:
    """Write <date>-peers.json and .md, print the table, and one JSON line last."""
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    here, project = machine(), project_version()
    calibration, evaluation = settings["calibration"], settings["evaluation"]
    title = (
        f"{date}: {options.model}, 4 bits, groups of {options.group}; calibration {calibration['samples']} x "
        f"{calibration['length']} tokens of WikiText-2 validation, perplexity on {evaluation['windows']} x "
        f"{evaluation['length']} tokens of its test text. "
        f"{here['cpu']}, {options.threads} threads; commit {project['commit']}"
        f"{'' if project['clean'] else ' with changes'}."
    )
    document = {
        "schema": "compressor.benchmark.peers/1",
        "date": date,
        "environment": {**here, "threads": options.threads, "project": project},
        "model": options.model,
        "settings": settings,
        "hashes": hashes,
        "rows": rows,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    shown = table(rows, title)
    (options.results / f"{date}-peers.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (options.results / f"{date}-peers.md").write_text(shown + "\n", encoding="utf-8")
    print(shown)
    short = {row["name"]: {f: row[f]["median"] if row.get(f) else None for f in FIGURES} for row in rows}
    print(json.dumps({"results": str(options.results / f"{date}-peers.json"), "medians": short}))


def main() -> int:
    """Prepare, measure, report."""
    options = arguments()
    try:
        if not options.prepare:
            refuse_busy_machine(options)
        model = dense_checkpoint(options.model)
        for name in options.only:
            python_of(TOOLS[name].requirements)
        if options.prepare:
            print("ready: wait until the load average has fallen, then run the comparison", file=sys.stderr)
            return 0
        settings = shared_settings(options, model)
        hashes = {
            "protocol": file_hash(WORKERS / "protocol.py"),
            "data": file_hash(Path(settings["calibration"]["text"]), Path(settings["evaluation"]["text"])),
            "model": model_hash(model),
            "project": str(project_version()["sources"]),
        }
        runs = measure(options, settings, {name: cache_key(name, settings, hashes) for name in options.only})
        rows = [summarize(name, runs[name], runs["dense"]) for name in options.only]
        check_same_tokens(rows)
        report(options, settings, rows, hashes)
    except PeersError as problem:
        print(f"peers.py: {problem}", file=sys.stderr)
        return 3
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
