"""Does the latency rule tell a slow-down from a busy machine? Replays of recorded timings, and live trials under load.

`python benchmarks/latency_gate.py` (about 25 minutes; `--smoke` for 3) writes results/<date>-latency_gate.json and .md
beside it. Two cases: A/A (a model against its copy) and planted (26 decoder layers against 30, about 15 % more work).
Each is recorded with two busy processes beside it and without. Then:

- replays: recorded rounds are resampled, in segments of neighbours, into trials that the shipped rule sees one round at
  a time (metrics.latency.rounds.Watch, gates.judge), until it stops or 60 s of measuring time are over. A third
  case is A/A with one side's times multiplied by 1.15, a slow-down of 15 % to the digit;
- live: `measure_latency` itself under the two busy processes, then the verdict.

The budget is a ratio of 1.05. Aims: at most 1 % of A/A fails, at least 90 % of the planted slow-downs do.
"""

import argparse
import contextlib
import copy
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compressor.gates import Policy, judge
from compressor.metrics import describe_environment
from compressor.metrics.bootstrap import mapped
from compressor.metrics.latency import measure_latency, paired_ratio
from compressor.metrics.latency.crowd import quiet_conditions
from compressor.metrics.latency.measuring import evaluating, random_ids
from compressor.metrics.latency.ratio import block_estimate, blocks, log_ratios, trimmed_mean
from compressor.metrics.latency.rounds import (
    DECODE,
    FIGURES,
    PREFILL,
    TTFT,
    Patience,
    Rounds,
    Shape,
    Watch,
    decoding_step_ms,
    take_rounds,
)
from compressor.reports import Estimate

RESULTS = Path(__file__).parent / "results"
BUDGET = 1.05
LAYERS, MORE_LAYERS = 26, 4
SLOWER = 1.15
PROMPT, GENERATE = 32, 32
GATED = (DECODE, PREFILL)
SEGMENT = 4  # rounds that stay together when recorded rounds are resampled: two blocks of A B B A
MIN_ROUNDS = 5  # as measure_latency has it
CASES = ("A/A", "planted")
# Trials of a fixed length on which ways to centre the log ratios are compared.
COMPARED_S = 15.0


POLICY = Policy(decode_latency_ratio={"max": BUDGET})


def verdict(ratio: Estimate) -> str:
    """What the gate says of one ratio of times: pass, fail or inconclusive."""
    report = {"steps": [{"delta": {"from_baseline": {"decode_latency_ratio": ratio.to_json()}}}]}
    return judge(report, POLICY).checks[0].status


def tiny_model(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257, hidden_size=128, intermediate_size=320, num_hidden_layers=layers, num_attention_heads=4,
            max_position_embeddings=256,
        )
    ).eval()  # fmt: skip


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that do nothing but compute."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    time.sleep(0.5 if processes else 0)
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


@torch.inference_mode()
def record(sides: Sequence[LlamaForCausalLM], load: int, seconds: float) -> dict[str, Any]:
    """Rounds of two models for some seconds, with the circumstances."""
    with busy(load), contextlib.ExitStack() as stack:
        for side in sides:
            stack.enter_context(evaluating(side))
        step = functools.partial(decoding_step_ms, sides[0], random_ids(tuple(sides), 1, 1, 0))
        conditions = stack.enter_context(quiet_conditions(step, torch.device("cpu")))
        ids_BP = random_ids(tuple(sides), 1, PROMPT, 0)
        forever = Patience(min_rounds=sys.maxsize, patience_s=0, limit_s=seconds)
        start = time.perf_counter()
        rounds = take_rounds(sides, ids_BP, GENERATE, forever, clock=conditions.clock)
        wall_s = round(time.perf_counter() - start, 2)
    return {"load": load, "wall_s": wall_s, "conditions": asdict(conditions), "rounds": rounds}


def as_json(recording: dict[str, Any]) -> dict[str, Any]:
    """A recording as it is written down: `times[clock][figure][side][turn]` in ms."""
    plain = asdict(recording["rounds"])
    for by_figure in plain["times"].values():
        for figure, sides in by_figure.items():
            by_figure[figure] = [[round(ms, 3) for ms in times] for times in sides]
    return recording | {"rounds": plain}


def from_json(recording: dict[str, Any]) -> dict[str, Any]:
    """What `as_json` gives, read back."""
    plain = recording["rounds"]
    times = {
        clock: {figure: tuple(map(list, sides)) for figure, sides in figures.items()}
        for clock, figures in plain["times"].items()
    }
    return recording | {"rounds": Rounds(Shape(**plain["shape"]), plain["clock"], times)}


def described(recording: dict[str, Any]) -> dict[str, Any]:
    """What a recording says as a whole, by each clock: the ratios, and how far one turn lies from the next."""
    rounds: Rounds = recording["rounds"]
    figures: dict[str, Any] = {"clock": rounds.clock, "threads": recording["conditions"]["threads"]}
    for clock in ("wall", "cpu"):
        figures[clock] = {}
        for figure in FIGURES:
            times = rounds.times[clock][figure]
            ratios_N = log_ratios(*times)
            figures[clock][figure] = {
                "ratio": paired_ratio(*times).to_json(),
                "baseline_median_ms": statistics.median(times[1]),
                "sd_of_log_ratio": float(ratios_N.std()),
                "correlation_of_neighbours": float(np.corrcoef(ratios_N[1:], ratios_N[:-1])[0, 1]),
            }
    return figures


def resampled(rounds: Rounds, generator: random.Random) -> Iterator[int]:
    """Numbers of recorded rounds, in random segments of neighbours that begin with a block."""
    while True:
        begin = 2 * generator.randrange((number_of(rounds) - SEGMENT) // 2 + 1)
        yield from range(begin, begin + SEGMENT)


def add(seen: Rounds, rounds: Rounds, k: int, *, with_decoding: bool = True) -> float:
    """Put round k of a recording behind those that a trial has seen; returns the seconds that it took."""
    shape, ms = rounds.shape, 0.0
    for figure in FIGURES if with_decoding else (PREFILL, TTFT):
        each = shape.turns if figure == DECODE else shape.reads
        for clock, by_figure in rounds.times.items():
            for side, times in enumerate(by_figure[figure]):
                new = times[k * each : (k + 1) * each]
                seen.times[clock][figure][side].extend(new)
                # The first token's time holds the prefill's
                ms += sum(new) * {PREFILL: 0, TTFT: 1, DECODE: shape.burst}[figure] * (clock == "wall")
    return ms / 1000


def replay(rounds: Rounds, limit_s: float, stretch: float, seed: int) -> dict[str, Any]:
    """One synthetic trial through the shipped rule; `stretch` is the wall time of a recorded second of timings."""
    seen, elapsed_s = Rounds.empty(2, rounds.shape, rounds.clock), 0.0
    watch = Watch(Patience(MIN_ROUNDS, 0.0, limit_s, dict.fromkeys(GATED, BUDGET)), num_sides=2)
    for k in resampled(rounds, random.Random(seed)):
        elapsed_s += stretch * add(seen, rounds, k, with_decoding=watch.needs_decoding)
        if watch.after(seen, elapsed_s):
            break
    return outcome({figure: seen.ratio(figure) for figure in GATED}, elapsed_s)


def outcome(ratios: dict[str, Estimate], seconds: float) -> dict[str, Any]:
    """The verdict on each figure, and on both together as a gate would have it."""
    verdicts = {figure: verdict(ratio) for figure, ratio in ratios.items()}
    worst = max(verdicts.values(), key=("pass", "inconclusive", "fail").index)
    return {"seconds": seconds, "gate": worst, **verdicts}


def replays(recording: dict[str, Any], count: int, limit_s: float) -> list[dict[str, Any]]:
    rounds = recording["rounds"]
    timed_s = sum(add(Rounds.empty(2, rounds.shape), rounds, k) for k in range(number_of(rounds)))
    one = functools.partial(replay, rounds, limit_s, recording["wall_s"] / timed_s)
    with multiprocessing.get_context("spawn").Pool(2, os.nice, (10,)) as pool:  # nothing is timed here
        return pool.map(one, range(count), chunksize=20)


def slowed(recording: dict[str, Any]) -> dict[str, Any]:
    """The same recording, had one side taken 15 % longer."""
    rounds = copy.deepcopy(recording["rounds"])
    for by_figure in rounds.times.values():
        for times in by_figure.values():
            times[0][:] = [SLOWER * ms for ms in times[0]]
    return recording | {"rounds": rounds}


def number_of(rounds: Rounds) -> int:
    return len(rounds.of(PREFILL, 0)) // rounds.shape.reads


def shares(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """How often each verdict fell, for each figure and for both together, and the seconds that it took."""
    from scipy import stats

    table: dict[str, Any] = {"trials": len(outcomes)}
    for name in ("gate", *GATED):
        counts = {status: sum(row[name] == status for row in outcomes) for status in ("pass", "inconclusive", "fail")}
        interval = stats.binomtest(counts["fail"], len(outcomes)).proportion_ci(0.95)
        table[name] = counts | {"fail_share": counts["fail"] / len(outcomes), "fail_ci95": [*interval]}
    seconds = sorted(row["seconds"] for row in outcomes)
    return table | {"seconds_median": statistics.median(seconds), "seconds_most": seconds[-1]}


def hodges_lehmann(values_K: np.ndarray) -> Any:
    """The median of the means of all pairs of blocks, each with itself too."""
    one, other = np.triu_indices(values_K.shape[-1])
    return np.median((values_K[..., one] + values_K[..., other]) / 2, axis=-1)


CENTRES: dict[str, Callable[[np.ndarray], Any]] = {
    "20 % trimmed mean of blocks (shipped)": trimmed_mean,
    "median of blocks": lambda values_K: np.median(values_K, axis=-1),
    "Hodges-Lehmann of blocks": hodges_lehmann,
    "mean of blocks": lambda values_K: values_K.mean(-1),
}


def compared(recording: dict[str, Any], count: int) -> dict[str, dict[str, float]]:
    """Verdicts on decoding after a fixed time by other centres, by the wall clock, and by medians of it."""
    rounds = recording["rounds"]
    needed = max(SEGMENT, round(COMPARED_S * number_of(rounds) / recording["wall_s"] / 2) * 2)
    found: dict[str, list[str]] = {}
    for seed in range(count):
        seen = Rounds.empty(2, rounds.shape, rounds.clock)
        for k in itertools.islice(resampled(rounds, random.Random(seed)), needed):
            add(seen, rounds, k)
        times, wall = seen.times[seen.clock][DECODE], seen.times["wall"][DECODE]
        values_K = blocks(log_ratios(*times))
        statuses = {name: by_centre(values_K, centre) for name, centre in CENTRES.items()}
        statuses["20 % trimmed mean of the wall clock"] = by_centre(blocks(log_ratios(*wall)), trimmed_mean)
        statuses["medians of the same turns on the wall, no interval"] = by_medians(*wall)
        # As with two runs of a benchmark: one side in one stretch of the recording, the other in the next.
        one, other = rounds.times["wall"][DECODE]
        length = min(needed * rounds.shape.turns, len(one)) // 2
        begin = random.Random(seed).randrange(len(one) - 2 * length + 1)
        after = by_medians(one[begin : begin + length], other[begin + length : begin + 2 * length])
        statuses["medians on the wall, one model after the other"] = after
        for name, status in statuses.items():
            found.setdefault(name, []).append(status)
    return {name: {s: statuses.count(s) / count for s in ("pass", "fail")} for name, statuses in found.items()}


def by_centre(values_K: np.ndarray, centre: Callable[[np.ndarray], Any]) -> str:
    logs = block_estimate(values_K, len(values_K), centre=centre)
    return verdict(mapped(logs, math.exp))


def by_medians(times: Sequence[float], baseline: Sequence[float]) -> str:
    return "fail" if statistics.median(times) > BUDGET * statistics.median(baseline) else "pass"


def live(models: dict[str, LlamaForCausalLM], trials: int, limit_s: float) -> dict[str, list[dict[str, Any]]]:
    """A/A and planted in turns, under two busy processes."""
    outcomes: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
    with busy(2):
        for trial in range(trials):
            for case in CASES:
                start = time.perf_counter()
                measured = measure_latency(
                    models[case],
                    baseline=models["baseline"],
                    batch_sizes=[1],
                    prompt=PROMPT,
                    generate=GENERATE,
                    budget_ratio=BUDGET,
                    max_seconds=limit_s,
                    seed=trial,
                )
                seconds = time.perf_counter() - start
                ratios = {name: (measured.ratio_to_baseline or {})[name]["1"] for name in GATED}
                row = outcome({name: ratio for name, ratio in ratios.items() if ratio is not None}, seconds)
                row |= {f"{name}_ratio": ratio.to_json() for name, ratio in ratios.items() if ratio is not None}
                row |= {key: measured.extra[key] for key in ("clock", "threads", "others_share")}
                outcomes[case].append(row)
                print(f"live {trial} {case}: {row['gate']} in {seconds:.1f} s", flush=True)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=30, help="live trials of each case")
    parser.add_argument("--seconds", type=float, default=60.0, help="measuring time of a trial at most")
    parser.add_argument("--replays", type=int, default=2000, help="replays of each recording")
    parser.add_argument("--record", type=float, default=120.0, help="seconds of each recording under load")
    parser.add_argument("--smoke", action="store_true", help="see that all of it runs; no figures worth keeping")
    parser.add_argument("--again", type=Path, help="replay the recordings of this result, and keep its live trials")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.smoke:
        options.trials, options.seconds, options.replays, options.record = 2, 10.0, 40, 15.0
    begun, environment = time.perf_counter(), describe_environment()
    earlier = json.loads(options.again.read_text()) if options.again else None
    baseline = tiny_model(LAYERS)
    models = {"baseline": baseline, "A/A": copy.deepcopy(baseline), "planted": tiny_model(LAYERS + MORE_LAYERS)}
    recordings = {}
    for load, seconds in ((0, options.record / 2), (2, options.record)):
        for case in CASES:
            name = f"{case}, {load} busy processes"
            if earlier:
                recordings[name] = from_json(earlier["recordings"][name])
            else:
                recordings[name] = record((models[case], baseline), load, seconds)
    result: dict[str, Any] = {
        "budget": BUDGET,
        "limit_s": options.seconds,
        "recorded": {name: described(recording) for name, recording in recordings.items()},
        "replayed": {},
        "compared": {},
    }
    multiplied = {f"{name} x {SLOWER}": slowed(one) for name, one in recordings.items() if name.startswith("A/A")}
    for name, recording in (recordings | multiplied).items():
        result["replayed"][name] = shares(replays(recording, options.replays, options.seconds))
        print(f"replayed {name}: {result['replayed'][name]['gate']}", flush=True)
        result["compared"][name] = compared(recording, max(20, options.replays // 5))
    if earlier:
        kept = ("live", "minutes", "environment", "environment_after", "live_trials", "recordings")
        write(result | {key: earlier[key] for key in kept} | {"again": options.again.name}, options.out)
        return 0 if met(result | {"live": earlier["live"]}) else 1
    outcomes = live(models, options.trials, options.seconds)
    result["live"] = {case: shares(rows) for case, rows in outcomes.items()}
    result |= {"minutes": round((time.perf_counter() - begun) / 60, 1), "environment": environment}
    result["environment_after"] = {"load_average": describe_environment()["cpu"]["load_average"]}
    result["live_trials"] = outcomes
    result["recordings"] = {name: as_json(recording) for name, recording in recordings.items()}
    write(result, options.out)
    return 0 if met(result) else 1


def met(result: dict[str, Any]) -> bool:
    """Whether both aims hold in each table row: in the replays, idle and under load, and in the live trials."""
    rows = [(name, table["gate"]["fail_share"]) for name, table in (result["replayed"] | result["live"]).items()]
    same = {name for name in result["recorded"] if name.startswith("A/A")} | {"A/A"}
    return all(fails <= 0.01 if name in same else fails >= 0.90 for name, fails in rows)


def write(result: dict[str, Any], out: Path) -> None:
    out.mkdir(exist_ok=True)
    path = out / f"{datetime.now(UTC):%Y-%m-%d}-latency_gate.json"
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in result.items())
    path.write_text(f"{{\n{lines}\n}}\n")
    path.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))
    kept = {key: result[key] for key in ("budget", "limit_s", "replayed", "live", "minutes")}
    print(json.dumps(kept | {"met": met(result)}))


def markdown(result: dict[str, Any]) -> str:
    cpu = result["environment"]["cpu"]
    lines = [
        "# Latency under load: false alarms, and slow-downs that are caught",
        "",
        f"`python benchmarks/latency_gate.py`, {result['minutes']} minutes; {cpu['model']}, "
        f"{cpu['logical_cores']} cores, torch {result['environment']['versions']['torch']}. Load average before "
        f"{cpu['load_average'][0]:.1f}, after {result['environment_after']['load_average'][0]:.1f}. "
        f"Budget {result['budget']}, at most {result['limit_s']:g} s a trial. The gate fails if decoding or prefill "
        f"does. Aims: A/A fails <= 1 %, planted fails >= 90 %: {'met' if met(result) else 'NOT met'}."
        + (" Replayed again from its recordings with the present rule (`--again`)." if result.get("again") else ""),
        "",
        "| trials | case | n | gate fails [95 %] | passes | decoding fails | prefill fails | median s | longest s |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    rows = [("replayed", name, table) for name, table in result["replayed"].items()]
    rows += [("live", f"{case}, 2 busy processes", table) for case, table in result["live"].items()]
    for kind, name, table in rows:
        low, high = table["gate"]["fail_ci95"]
        lines.append(
            f"| {kind} | {name} | {table['trials']} | {table['gate']['fail_share']:.2%} [{low:.2%}, {high:.2%}] "
            f"| {table['gate']['pass'] / table['trials']:.1%} | {table[DECODE]['fail_share']:.2%} "
            f"| {table[PREFILL]['fail_share']:.2%} | {table['seconds_median']:.1f} | {table['seconds_most']:.1f} |"
        )
    lines += ["", "Recorded timings (the whole of each recording); the clock in bold is the one that counts there:", ""]
    lines += ["| recording | threads | clock | decode ratio | prefill ratio | decode ms | sd of a turn's log ratio |"]
    lines += ["|---|---:|---|---:|---:|---:|---:|"]
    for name, figures in result["recorded"].items():
        for clock in ("wall", "cpu"):
            decode, prefill = figures[clock][DECODE], figures[clock][PREFILL]
            lines.append(
                f"| {name} | {figures['threads']} | {f'**{clock}**' if clock == figures['clock'] else clock} "
                f"| {shown(decode['ratio'])} | {shown(prefill['ratio'])} | {decode['baseline_median_ms']:.1f} "
                f"| {decode['sd_of_log_ratio']:.3f} |"
            )
    lines += [
        "",
        f"The same resampled timings of decoding after {COMPARED_S:g} s, by other rules (fails / passes):",
        "",
    ]
    lines += ["| rule | " + " | ".join(result["compared"]) + " |", "|---|" + "---:|" * len(result["compared"])]
    for rule in next(iter(result["compared"].values())):
        cells = [f"{table[rule]['fail']:.1%} / {table[rule]['pass']:.1%}" for table in result["compared"].values()]
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def shown(ratio: dict[str, Any]) -> str:
    low, high = ratio["ci95"]
    return f"{ratio['value']:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    sys.exit(main())
