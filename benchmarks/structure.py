"""Do the structural rules of the gate see silent corruptions, in what time, and are they silent when all is well?

`python benchmarks/structure.py` makes an int4 export (rounding) of demo/smollm2-135m and demo/tiny-moe, times
`check_structure` on them, and plants every fault of `gates.faults` into copies. `--healthy` also exports both models at
8, 4, 3 and 2 bits by rounding and GPTQ, and tiny-moe through pruning and distillation, holds the rules against each,
and notes how near the figures come to their bounds. Writes benchmarks/results/<date>-structure.json and .md; what is
not asked for stays as it is in the file of the day.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compressor.calibration import Calibration, Workplace
from compressor.checkpoint import Journal
from compressor.exporters import export_safetensors
from compressor.gates.faults import self_test
from compressor.gates.structure import check_structure
from compressor.gates.structure.experts import find_origins
from compressor.gates.structure.history import read_history
from compressor.gates.structure.layout import read_layout
from compressor.gates.structure.nearness import BOUNDS, MOST_OFFSET, measure_nearness
from compressor.gates.structure.stored import Packed, Stored
from compressor.metrics import describe_environment
from compressor.models import load_model, resolve
from compressor.models.transformers_io import read_config
from compressor.passes import Context, Distill, Prune, Quantize

RESULTS = Path(__file__).parent / "results"
MODELS = ("demo/smollm2-135m", "demo/tiny-moe")
SHARD = 50_000_000  # several shards, so that faults of the index apply
FEW = Calibration(samples=16, length=512)  # few tokens: GPTQ then moves weights further, which is what bounds must bear


def export(name: str, passes: Sequence[Any], out: Path) -> tuple[Path, list[dict]]:
    """A model folder as a run writes it, and the ledgers of its passes."""
    model, ledgers = load_model(name), []
    for i, step in enumerate(passes):
        place = out / f"{i:02d}"
        place.mkdir(parents=True)
        workplace = Workplace(place, Journal(out / f"{i:02d}.jsonl", {"benchmark": "structure"}), i)
        context = Context(FEW, workplace=workplace, reference=lambda: load_model(name))
        ledgers.append(step.apply(model, context).to_json())
        model.finish_generation(place)
    export_safetensors(model, out / "model", shard_bytes=SHARD)
    return out / "model", ledgers


def faults(name: str, scratch: Path) -> dict[str, Any]:
    """Time of the check on a healthy int4 export (median of three), and what became of every fault."""
    step = Quantize(method="rtn", bits=4, group_size=64, scale_search="minmax")
    folder, ledgers = export(name, [step], scratch / name.replace("/", "-"))
    baseline = resolve(name).path
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        findings = check_structure(folder, baseline, ledgers=ledgers)
        seconds.append(time.perf_counter() - begun)
    trials = self_test(
        folder, baseline, ledgers=ledgers, progress=lambda what, done, total: print(".", end="", flush=True)
    )
    print(flush=True)
    tried = [trial for trial in trials if trial.caught is not None]
    return {
        "model": name,
        "check_seconds": round(statistics.median(seconds), 2),
        "rules": len({finding.rule for finding in findings}),
        "false_alarms": [finding.to_json() for finding in findings if finding.status == "fail"],
        "faults_tried": len(tried),
        "faults_caught": sum(bool(trial.caught) for trial in tried),
        "slowest_check_seconds": round(max(trial.seconds for trial in tried), 2),
        "trials": [trial.to_json() for trial in trials],
    }


def nearness(folder: Path, baseline: Path, ledgers: list[dict]) -> dict[str, float]:
    """The figures of a healthy export that come nearest to their bounds."""
    stored, original = Stored(folder), Stored(baseline)
    layout, history = read_layout(read_config(folder), str(folder)), read_history(ledgers)
    origins = find_origins(stored, original, layout, history)
    worst = {"correlation": 1.0, "noise": 0.0, "spread": 0.0, "offset": 0.0, "over": 0.0, "far": 0.0}
    for linear in layout.linears:
        origin = origins.name(linear)
        if not stored.is_packed(linear.name) or origin is None:
            continue
        weight = stored.weight(linear.name)
        assert isinstance(weight, Packed)
        pruned = history.sparsity(linear.ledger) is not None
        near = measure_nearness(weight, original.weight(origin), pruned=pruned)
        worst["correlation"] = min(worst["correlation"], near.correlation)
        for key in ("noise", "spread", "offset", "over", "far"):
            worst[key] = max(worst[key], abs(getattr(near, key) or 0.0))
    return {key: round(value, 4) for key, value in worst.items()}


def healthy(scratch: Path) -> list[dict[str, Any]]:
    """Exports on which every rule must be silent."""
    cases: list[tuple[str, str, list[Any]]] = []
    for bits in (8, 4, 3, 2):
        for name in MODELS:
            plain = Quantize(method="rtn", bits=bits, group_size=64, scale_search="minmax")
            cases.append((name, f"rtn int{bits}, largest weight", [plain]))
            if name == "demo/tiny-moe" or bits in (4, 2):  # the search takes a minute on SmolLM2
                cases.append((name, f"gptq int{bits}", [Quantize(method="gptq", bits=bits, group_size=64)]))
            else:
                plain = Quantize(method="gptq", bits=bits, group_size=64, scale_search="minmax")
                cases.append((name, f"gptq int{bits}, largest weight", [plain]))
    searched = Quantize(method="rtn", bits=4, group_size=64, scale_search="mse")
    cases.append(("demo/tiny-moe", "rtn int4, searched", [searched]))
    row = Quantize(method="gptq", bits=4, group_size="channel")
    cases.append(("demo/tiny-moe", "gptq int4, one scale a row", [row]))
    experts, four = Prune(structure="experts", ratio=0.25), Quantize(method="gptq", bits=4, group_size=64)
    train = Distill(tokens=60_000, batch_tokens=256)
    cases.append(("demo/tiny-moe", "2:4, gptq int4", [Prune(structure="2:4"), four]))
    cases.append(("demo/tiny-moe", "experts, gptq int4", [experts, four]))
    cases.append(("demo/tiny-moe", "experts, distill, gptq int4", [experts, train, four]))
    cases.append(("demo/tiny-moe", "distill", [train]))
    rows = []
    for i, (name, what, passes) in enumerate(cases):
        folder, ledgers = export(name, passes, scratch / f"healthy-{i}")
        baseline = resolve(name).path
        failing = [f.to_json() for f in check_structure(folder, baseline, ledgers=ledgers) if f.status == "fail"]
        rows.append(
            {"model": name, "passes": what, "false_alarms": failing, "worst": nearness(folder, baseline, ledgers)}
        )
        print(rows[-1], flush=True)
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The tables: one line a fault, one line a healthy export."""
    cpu = result["environment"]["cpu"]
    lines = [
        f"{result['date']}: structural rules of the gate, int4 exports by rounding. {cpu['model']}, "
        f"{cpu['threads']} threads, load average at the end {cpu['load_average'][0]:.1f}.",
        "",
    ]
    for part in result["models"]:
        lines += [
            f"`{part['model']}`: {part['rules']} rules in {part['check_seconds']} s on the healthy export, "
            f"{len(part['false_alarms'])} false alarms; {part['faults_caught']} of {part['faults_tried']} faults "
            f"caught by a rule that names the tensor or file, each in at most {part['slowest_check_seconds']} s.",
            "",
            "| fault | what was done | caught by | named | s |",
            "|---|---|---|---|---|",
        ]
        for trial in part["trials"]:
            if trial["caught"] is None:
                lines.append(f"| {trial['fault']} | {trial['text']} | | | |")
                continue
            caught = f"`{trial['rule']}`" if trial["caught"] else "**no**"
            named = f"`{trial['named']}`" if trial["named"] else ""
            lines.append(f"| {trial['fault']} | {trial['injected']} | {caught} | {named} | {trial['seconds']:.1f} |")
        lines.append("")
    if result.get("healthy"):
        lines += [
            "Healthy exports, and the figures that come nearest to their bounds (8,192 calibration tokens):",
            "",
            "| model | passes | false alarms | correlation | noise | spread | offset |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in result["healthy"]:
            worst = row["worst"]
            figures = " | ".join(f"{worst[key]:.4g}" for key in ("correlation", "noise", "spread", "offset"))
            lines.append(f"| `{row['model']}` | {row['passes']} | {len(row['false_alarms'])} | {figures} |")
        bounds = "; ".join(
            f"{bits} bits: {b.correlation}, {b.noise}, {b.spread if b.spread else 'none'}" for bits, b in BOUNDS.items()
        )
        lines += ["", f"Bounds of correlation, noise, spread: {bounds}; offset {MOST_OFFSET}.", ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--healthy", action="store_true", help="also hold the rules against healthy exports (minutes)")
    parser.add_argument(
        "--only-healthy", action="store_true", help="leave the faults of an existing result as they are"
    )
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    date = f"{datetime.now(UTC):%Y-%m-%d}"
    path = RESULTS / f"{date}-structure.json"
    result = json.loads(path.read_text()) if path.exists() else {"models": [], "healthy": []}
    with tempfile.TemporaryDirectory(prefix="structure-") as scratch:
        if not options.only_healthy:
            result["models"] = [faults(name, Path(scratch)) for name in MODELS]
        if options.healthy or options.only_healthy:
            result["healthy"] = healthy(Path(scratch))
    result |= {"date": date, "environment": describe_environment()}
    path.write_text(json.dumps(result, indent=2) + "\n")
    path.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))
    missed = [trial for part in result["models"] for trial in part["trials"] if trial["caught"] is False]
    alarms = [row for row in (*result["models"], *result["healthy"]) if row["false_alarms"]]
    return 1 if missed or alarms else 0


if __name__ == "__main__":
    sys.exit(main())
