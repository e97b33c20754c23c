"""Do our task scores agree with lm-evaluation-harness, at any batch size, and how long does each take?

    python benchmarks/harness_agreement.py --prepare    # the peer's environment: minutes, network
    python benchmarks/harness_agreement.py              # 300 items of LAMBADA, PIQA and ARC-easy on SmolLM2-135M

Both evaluators read the same data files (the first items of $COMPRESSOR_SHARED/data/eval), ask the same texts (which is
checked, request by request) and compute in float32 on the same weights; each runs alone, one after the other. Ours
streams the stored model block by block in batches of 32, and the first `--batch-items` again in batches of 5 and 1;
lm-evaluation-harness holds the model in memory. Seconds are those of tokens and log-likelihoods: ours load the blocks
of the model meanwhile, neither reads the data.
Where the two differ most, float64 arithmetic of stock transformers says who is nearer (`against_float64`).

Exit code 0 when accuracies agree within one item and our batch sizes within 1e-4 nats, 1 when not, 3 when the
comparison could not start.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
from environments import PEERS, ROOT, WORKERS, PeersError, machine, project_version, python_of

REQUIREMENTS = "lmeval.requirements.txt"
BATCH_SIZES = (32, 5, 1)
AGREE_NATS = 1e-4
EXACT = 5  # requests of each task, those furthest apart, that float64 decides

# The same prompts for both: a template of columns in ours, in Jinja for the harness.
TASKS: dict[str, dict[str, Any]] = {
    "lambada": {
        "file": "lambada_openai_test.jsonl",
        "ours": {"kind": "cloze"},
        "theirs": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
            "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
        },
    },
    "piqa": {
        "file": "llmfoundry_piqa_valid.jsonl",
        "ours": {"kind": "multiple_choice", "query": "{query}Answer:"},
        "theirs": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{query}}Answer:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_bytes"}],
        },
    },
    "arc_easy": {
        "file": "llmfoundry_arc_easy_test.jsonl",
        "ours": {"kind": "multiple_choice", "query": "{query}\nAnswer:"},
        "theirs": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{query}}\nAnswer:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_bytes"}],
        },
    },
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=300, help="the first items of each file (default 300)")
    parser.add_argument(
        "--batch-items", type=int, default=100, help="of these, for our batches of 5 and 1 (default 100)"
    )
    parser.add_argument("--model", default="demo/smollm2-135m", help="anything that load_model takes")
    parser.add_argument("--peer-batch", type=int, default=8, help="rows in a batch of the harness (default 8)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--prepare", action="store_true", help="only build the peer's environment")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    return parser.parse_args()


def write_tasks(folder: Path, items: int) -> None:
    """The first items of each file, and a task file of the harness over each."""
    source = Path(os.environ.get("COMPRESSOR_SHARED", ROOT.parent / "shared")).resolve() / "data" / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    for name, task in TASKS.items():
        file = source / task["file"]
        if not file.exists():
            raise PeersError(f"{file} is missing; $COMPRESSOR_SHARED names the folder that holds data/eval")
        data = folder / f"{name}.jsonl"
        data.write_text("".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[:items]), encoding="utf-8")
        described = {
            "task": f"agreement_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": str(data)},
            "test_split": "train",
            **task["theirs"],
        }
        (folder / f"{name}.yaml").write_text(json.dumps(described, indent=1), encoding="utf-8")  # JSON is YAML


def run_theirs(options: argparse.Namespace, model: Path, folder: Path) -> dict[str, Any]:
    """Every log-likelihood of the harness, in its own environment and process."""
    config = {
        "model": str(model),
        "task_files": str(folder),
        "tasks": [f"agreement_{name}" for name in TASKS],
        "threads": options.threads,
        "batch_size": options.peer_batch,
        "result": str(folder / "theirs.json"),
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(options.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "PYTHONPATH": "",
    }
    log = folder / "theirs.log"
    with log.open("w", encoding="utf-8") as output:
        command = [str(python_of(REQUIREMENTS)), str(WORKERS / "with_lmeval.py"), str(folder / "config.json")]
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment).returncode
    if code != 0:
        raise PeersError(f"lm_eval ended with {code}; the end of {log}:\n{log.read_text('utf-8')[-1500:]}")
    found = json.loads((folder / "theirs.json").read_text(encoding="utf-8"))
    return {"packages": found["packages"], "tasks": {name: found["tasks"][f"agreement_{name}"] for name in TASKS}}


def run_ours(options: argparse.Namespace, folder: Path, batch_size: int, count: int) -> dict[str, Any]:
    """The requests of the first items through our evaluator: seconds, log-likelihoods and scores by task."""
    from pydantic import TypeAdapter

    from compressor.metrics.tasks import Task, encode, loglikelihoods, max_length, read_task
    from compressor.metrics.tasks.judging import judge
    from compressor.models import load_model

    model = load_model(options.model, dtype="float32")
    results = {}
    for name, task in TASKS.items():
        described = {"name": name, "data": str(folder / f"{name}.jsonl"), **task["ours"]}
        questions = read_task(TypeAdapter(Task).validate_python(described))[:count]
        asks = [ask for question in questions for ask in question.asks]
        started, cpu_started = time.perf_counter(), time.process_time()
        requests = encode(model.tokenizer, asks, max_length(model))
        scored = list(zip(requests, loglikelihoods(model, requests, batch_size=batch_size), strict=True))
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        items, start = [], 0
        for question in questions:
            own = scored[start : start + len(question.asks)]
            start += len(own)
            by_bytes = question if question.kind == "cloze" else _by_bytes(question)
            items.append(
                {
                    "asks": [list(ask) for ask in question.asks],
                    "logliks": [answer.loglik for _, answer in own],
                    "margin": (judged := judge(question, own, model.tokenizer, 0.0)).margin,
                    "acc": judged.score,
                    "acc_bytes": judge(by_bytes, own, model.tokenizer, 0.0).score,
                }
            )
        results[name] = {"seconds": seconds, "cpu_seconds": cpu_seconds, "items": items}
        print(f"ours, batches of {batch_size}: {name}, {seconds:.1f} s", file=sys.stderr, flush=True)
    return results


def _by_bytes(question: Any) -> Any:
    import dataclasses

    return dataclasses.replace(question, normalise="bytes")


def compare(name: str, theirs: dict[str, Any], ours: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """One row: scores of both, how far log-likelihoods are apart, and the seconds of each."""
    first, mine = theirs["items"], ours[BATCH_SIZES[0]]["items"]
    if [item["asks"] for item in first] != [item["asks"] for item in mine]:
        number = next(n for n, (a, b) in enumerate(zip(first, mine, strict=True)) if a["asks"] != b["asks"])
        raise PeersError(f"{name}: item {number} is asked differently: {first[number]['asks']} {mine[number]['asks']}")
    row: dict[str, Any] = {"task": name, "n": len(first)}
    for metric in ("acc", "acc_bytes"):
        if metric in first[0]:
            pairs = [(float(a[metric]), float(b[metric])) for a, b in zip(first, mine, strict=True)]
            row[metric] = {
                "theirs": sum(a for a, _ in pairs) / len(pairs),
                "ours": sum(b for _, b in pairs) / len(pairs),
                "items_apart": sum(a != b for a, b in pairs),
            }
    row["max_nats_apart"] = _apart(first, mine)
    row["requests"] = sum(len(item["logliks"]) for item in mine)
    for figure in ("seconds", "cpu_seconds"):
        row[figure] = {"theirs": theirs[figure]} | {f"ours_{size}": ours[size][figure] for size in BATCH_SIZES}
    row["between_our_batches"] = {
        str(size): {
            "n": len(ours[size]["items"]),
            "max_nats_apart": _apart(mine, ours[size]["items"]),
            "flips": [
                {"item": number, "margin": before["margin"]}
                for number, (before, after) in enumerate(zip(mine, ours[size]["items"], strict=False))
                if before["acc"] != after["acc"]
            ],
        }
        for size in BATCH_SIZES[1:]
    }
    return row


def _apart(one: list[dict], other: list[dict]) -> float:
    """Over the items that both have, from the first on."""
    return max(
        abs(a - b)
        for first, second in zip(one, other, strict=False)
        for a, b in zip(first["logliks"], second["logliks"], strict=True)
    )


def against_float64(model: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, float]:
    """Largest error of each in nats on the requests on which they differ most, one request at a time in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    from compressor.metrics.tasks import encode
    from compressor.models.loading import load_tokenizer

    pairs = [
        (ask, one, other)
        for first, second in zip(theirs["items"], ours["items"], strict=True)
        for ask, one, other in zip(second["asks"], first["logliks"], second["logliks"], strict=True)
    ]
    worst = sorted(pairs, key=lambda pair: -abs(pair[1] - pair[2]))[:EXACT]
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    requests = encode(load_tokenizer(model), [tuple(ask) for ask, _, _ in worst], module.config.max_position_embeddings)
    errors = {"theirs": 0.0, "ours": 0.0}
    for request, (_, one, other) in zip(requests, worst, strict=True):
        with torch.inference_mode():
            logits_TV = module(torch.tensor([request.context + request.continuation])).logits[0]
        target = torch.tensor(request.continuation)
        chosen = torch.log_softmax(logits_TV[len(request.context) - 1 : -1], -1)[torch.arange(len(target)), target]
        exact = float(chosen.sum())
        errors = {"theirs": max(errors["theirs"], abs(one - exact)), "ours": max(errors["ours"], abs(other - exact))}
    return errors


def agrees(row: dict[str, Any]) -> bool:
    """Within one item of the harness, and within 1e-4 nats of ourselves."""
    scores = [row[metric] for metric in ("acc", "acc_bytes") if metric in row]
    same = all(abs(score["theirs"] - score["ours"]) * row["n"] <= 1 + 1e-9 for score in scores)
    return same and all(part["max_nats_apart"] <= AGREE_NATS for part in row["between_our_batches"].values())


def table(rows: list[dict[str, Any]], title: str) -> str:
    """Agreement and speed in Markdown."""
    lines = [
        title,
        "",
        "| task | items | requests | accuracy: harness | ours | items apart | by bytes: harness | ours | items apart |",
        f"|{'---|' * 9}",
    ]
    for row in rows:
        cells = [row["task"], str(row["n"]), str(row["requests"])]
        for metric in ("acc", "acc_bytes"):
            score = row.get(metric)
            cells += (
                [f"{score['theirs']:.4f}", f"{score['ours']:.4f}", str(score["items_apart"])] if score else ["-"] * 3
            )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| task | largest difference, nats | there against float64: harness | ours | our batches of 5 and 1 against 32 "
        "| seconds: harness | ours | CPU-seconds: harness | ours |",
        f"|{'---|' * 9}",
    ]
    for row in rows:
        between = [row["between_our_batches"][str(size)]["max_nats_apart"] for size in BATCH_SIZES[1:]]
        cells = [row["task"], *_nats(row["max_nats_apart"])]
        cells += _nats(row["against_float64"]["theirs"], row["against_float64"]["ours"])
        cells.append(", ".join(_nats(*between)))
        for figure in ("seconds", "cpu_seconds"):
            cells.append(f"{row[figure]['theirs']:.1f}")
            cells.append(f"{row[figure][f'ours_{BATCH_SIZES[0]}']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _nats(*values: float) -> list[str]:
    return [f"{value:.1e}" for value in values]


def main() -> int:
    """Prepare, run one after the other, compare, report."""
    options = arguments()
    try:
        python_of(REQUIREMENTS)
        if options.prepare:
            return 0
        import torch

        from compressor.models import resolve

        torch.set_num_threads(options.threads)
        folder = PEERS / "harness_agreement"
        write_tasks(folder, options.items)
        load_before = os.getloadavg()[0]
        model = resolve(options.model).path
        theirs = run_theirs(options, model, folder)
        counts = {size: options.items if size == BATCH_SIZES[0] else options.batch_items for size in BATCH_SIZES}
        ours = {size: run_ours(options, folder, size, counts[size]) for size in BATCH_SIZES}
        by_task = {name: {size: ours[size][name] for size in BATCH_SIZES} for name in TASKS}
        rows = [compare(name, theirs["tasks"][name], by_task[name]) for name in TASKS]
        for row in rows:
            mine = by_task[row["task"]][BATCH_SIZES[0]]
            row["against_float64"] = against_float64(model, theirs["tasks"][row["task"]], mine)
    except PeersError as problem:
        print(f"harness_agreement.py: {problem}", file=sys.stderr)
        return 3
    date, here, project = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"), machine(), project_version()
    packages = ", ".join(f"{name} {version}" for name, version in theirs["packages"].items())
    title = (
        f"{date}: {options.model} in float32, first {options.items} items of each task; {packages}, batches of "
        f"{options.peer_batch} in the harness; ours in batches of 32, and of 5 and 1 on the first "
        f"{options.batch_items} items. {here['cpu']}, {options.threads} threads, load average {load_before:.1f} "
        f"before; commit {project['commit']}{'' if project['clean'] else ' with changes'}."
    )
    document = {
        "schema": "compressor.benchmark.harness_agreement/1",
        "date": date,
        "environment": {**here, "threads": options.threads, "load_before": load_before, "project": project},
        "model": options.model,
        "packages": theirs["packages"],
        "peer_batch": options.peer_batch,
        "rows": rows,
        "agrees": all(map(agrees, rows)),
    }
    options.results.mkdir(parents=True, exist_ok=True)
    shown = table(rows, title)
    (options.results / f"{date}-harness_agreement.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    (options.results / f"{date}-harness_agreement.md").write_text(shown + "\n", "utf-8")
    print(shown)
    print(json.dumps({"agrees": document["agrees"]}))
    return 0 if document["agrees"] else 1


if __name__ == "__main__":
    sys.exit(main())
