"""Does the gate see a loss, and does it cry wolf? Simulated comparisons under the shipped verdict and peers' rules.

`python benchmarks/gate_power.py [--draws 4000]` writes benchmarks/results/<date>-gate_power.json and .md. For each
number of items and true drop: the share of draws that are flagged by `compressor.gates.statistics.compare` (at the
margin of the default preset) and, on the same draws, by the rules of other projects; beside it the exact probability
that ours flags, summed over all outcomes. Then the verdicts at the margins of all presets. Two minutes on one core.

N items of a draw. One uniform number an item decides both models' answers: the baseline is right with probability 0.75,
8 % of the items flip, lost - gained = the true drop. The peers' rules, as read in their sources:

- llm-compressor, tests/lmeval/test_lmeval.py (0090f19): candidate / baseline, rounded to two decimals, below 0.95.
- vLLM, .buildkite/lm-eval-harness/test_lm_eval_correctness.py (9942f6d): not numpy.isclose(rtol=0.05), both sides.
  Its newer accuracy_gate.py (5d9064a) is one-sided with rtol 0.08: candidate below 0.92 x baseline.
- lm-evaluation-harness, scripts/model_comparator.py (1c62da1): unpaired two-tailed z-test at 0.05.

vLLM's rules take the baseline's accuracy on the same items for their stored value, which is kind to them.
"""

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from compressor.gates.policy import PRESETS
from compressor.gates.sample_size import items_to_pass
from compressor.gates.statistics import compare
from compressor.metrics import describe_environment

RESULTS = Path(__file__).parent / "results"
ACCURACY = 0.75
FLIPS = 0.08
DROPS = (0.0, 0.01, 0.02, 0.03, 0.05)
ITEMS = (250, 1000)
VERDICTS = ("fail", "pass", "inconclusive")
Array = NDArray[np.float64]


def draws(n: int, drop: float, flips: float, count: int, seed: int) -> Iterator[tuple[Array, Array]]:
    """0/1 records of baseline and candidate `[N]`, one pair a draw."""
    lost, gained = (flips + drop) / 2, (flips - drop) / 2
    generator = np.random.default_rng([seed, n, round(1e4 * drop), round(1e4 * flips)])
    for _ in range(count):
        uniform_N = generator.random(n)
        baseline_N = uniform_N < ACCURACY
        candidate_N = (baseline_N & (uniform_N >= lost)) | (uniform_N >= 1 - gained)
        yield baseline_N.astype(np.float64), candidate_N.astype(np.float64)


def peers(baseline_N: Array, candidate_N: Array) -> dict[str, bool]:
    """Which of the other projects' rules flag this draw."""
    n, before, after = baseline_N.size, float(baseline_N.mean()), float(candidate_N.mean())
    # lm-eval's standard error of a mean has n - 1 in its denominator.
    error = math.sqrt((before * (1 - before) + after * (1 - after)) / (n - 1))
    return {
        "llm_compressor": round(after / before, 2) < 0.95,
        "vllm_two_sided_5": not np.isclose(before, after, rtol=0.05),
        "vllm_one_sided_8": after < before * (1 - 0.08),
        "lm_eval_z": 2 * stats.norm.sf(abs(before - after) / error) < 0.05,
    }


def simulate(n: int, drop: float, count: int, seed: int) -> dict:
    """The share of draws with each verdict of ours and flagged by each peer."""
    ours: Counter[str] = Counter()
    others: Counter[str] = Counter()
    seconds = 0.0
    for baseline_N, candidate_N in draws(n, drop, FLIPS, count, seed):
        begun = time.perf_counter()
        found = compare(baseline_N, candidate_N, margin=(1 - PRESETS["default"]) * float(baseline_N.mean()))
        seconds += time.perf_counter() - begun
        ours[found.status] += 1
        others.update(name for name, flagged in peers(baseline_N, candidate_N).items() if flagged)
    names = peers(baseline_N, candidate_N)
    return {
        "n": n,
        "drop": drop,
        "draws": count,
        "ours": {status: ours[status] / count for status in VERDICTS},
        **{name: others[name] / count for name in names},
        "seconds_in_compare": round(seconds, 2),
    }


def exact(n: int, drops: tuple[float, ...], flips: float, margin: float) -> dict[float, dict[str, float]]:
    """The probability of each verdict for each true drop: the shipped verdict on every outcome that can matter."""
    chances: dict[float, Counter[str]] = {drop: Counter() for drop in drops}
    for flipped in range(n + 1):
        if stats.binom.pmf(flipped, n, flips) < 1e-9:
            continue
        weights = {drop: _weights(n, flipped, drop, flips) for drop in drops}
        for lost in np.flatnonzero(sum(weights.values()) > 1e-9):
            status = compare(*_records(int(lost), flipped - int(lost), n), margin=margin).status
            for drop in drops:
                chances[drop][status] += float(weights[drop][lost])
    return {drop: {status: chances[drop][status] for status in VERDICTS} for drop in drops}


def _weights(n: int, flipped: int, drop: float, flips: float) -> Array:
    """The probability that so many items flip and that 0, 1, ... of them are lost."""
    lost_share = (flips + drop) / 2 / flips
    return stats.binom.pmf(flipped, n, flips) * stats.binom.pmf(np.arange(flipped + 1), flipped, lost_share)


def _records(lost: int, gained: int, n: int) -> tuple[Array, Array]:
    baseline_N, candidate_N = np.zeros(n), np.zeros(n)
    baseline_N[:lost] = 1
    candidate_N[lost : lost + gained] = 1
    return baseline_N, candidate_N


def presets(count: int, seed: int) -> list[dict]:
    """The verdicts of each preset where nothing is lost, half the margin, the margin, and twice the margin."""
    rows = []
    for name, kept in PRESETS.items():
        margin = (1 - kept) * ACCURACY
        for flips in (0.02, FLIPS):
            for n in (*ITEMS, 5000):
                for share in (0.0, 0.5, 1.0, 2.0):
                    drop = share * margin
                    if drop > flips:
                        continue
                    verdicts: Counter[str] = Counter()
                    without_tolerance: Counter[str] = Counter()
                    for pair in draws(n, drop, flips, count, seed):
                        verdicts[compare(*pair, margin=margin).status] += 1
                        without_tolerance[compare(*pair, margin=margin, tolerance=0).status] += 1
                    rows.append(
                        {
                            "preset": name,
                            "margin": margin,
                            "flips": flips,
                            "n": n,
                            "drop": drop,
                            "draws": count,
                            **{status: verdicts[status] / count for status in VERDICTS},
                            "fail_with_tolerance_0": without_tolerance["fail"] / count,
                            "items_to_pass_without_loss": items_to_pass(flips, margin),
                        }
                    )
        print(f"preset {name}: done", flush=True)
    return rows


def requirements(power: list[dict]) -> dict[str, dict]:
    """The issue's figures at 1,000 items: simulated, exact, asked."""
    rows = {row["drop"]: row for row in power if row["n"] == 1000}

    def required(drop: float, bound: float) -> dict:
        simulated, true = rows[drop]["ours"]["fail"], rows[drop]["exact"]["fail"]
        met = (simulated <= bound and true <= bound) if drop == 0 else (simulated >= bound and true >= bound)
        return {"simulated": simulated, "exact": true, "bound": bound, "met": met}

    return {
        "false_alarms_at_most": required(0.0, 0.05),
        "3_points_caught_at_least": required(0.03, 0.95),
        "2_points_caught_at_least": required(0.02, 0.65),
    }


def markdown(result: dict) -> str:
    """Both tables, in percent of the draws."""
    environment = result["environment"]
    commit = (environment["git"] or {}).get("commit") or "unknown"
    changes = " with changes" if (environment["git"] or {}).get("has_changes") else ""
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}: share of {result['draws']:,} simulated paired comparisons that are flagged "
        f"(%). Base accuracy {ACCURACY}, {FLIPS:.0%} flips, seed {result['seed']}; commit {commit[:7]}{changes}.",
        "`exact` is the probability that ours flags, summed over all outcomes; peers as read in their sources.",
        "",
        "| n | true drop | ours | exact | ours: pass | inconclusive | llm-compressor 0.95 | vLLM ±5 % | vLLM -8 % "
        "| lm-eval z |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["power"]:
        shares = [row["ours"]["fail"], row["exact"]["fail"], row["ours"]["pass"], row["ours"]["inconclusive"]]
        shares += [row[name] for name in ("llm_compressor", "vllm_two_sided_5", "vllm_one_sided_8", "lm_eval_z")]
        cells = " | ".join(f"{100 * share:.1f}" for share in shares)
        lines.append(f"| {row['n']} | {100 * row['drop']:g} pp | {cells} |")
    lines += ["", "| at 1,000 items | asked | simulated | exact | met |", "|---|---|---|---|---|"]
    for name, row in result["requirements"].items():
        figures = " | ".join(f"{100 * row[key]:.2f} %" for key in ("bound", "simulated", "exact"))
        lines.append(f"| {name.replace('_', ' ')} | {figures} | {'yes' if row['met'] else 'no'} |")
    lines += [
        "",
        f"Verdicts of the presets (% of {result['presets'][0]['draws']:,} draws); the last column is the least n that "
        "passes with power 0.8 when nothing is lost.",
        "",
        "| preset | margin | flips | n | true drop | pass | fail | inconclusive | fail if tolerance = 0 | n to pass |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["presets"]:
        keys = ("pass", "fail", "inconclusive", "fail_with_tolerance_0")
        cells = " | ".join(f"{100 * row[key]:.1f}" for key in keys)
        lines.append(
            f"| {row['preset']} | {100 * row['margin']:.3g} pp | {row['flips']:.0%} | {row['n']} "
            f"| {100 * row['drop']:.3g} pp | {cells} | {row['items_to_pass_without_loss']:,} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=4000, help="simulated comparisons for each case")
    parser.add_argument("--preset-draws", type=int, default=1000, help="the same for the table of presets")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begun = time.perf_counter()
    power = []
    for n in ITEMS:
        chances = exact(n, DROPS, FLIPS, (1 - PRESETS["default"]) * ACCURACY)
        for drop in DROPS:
            power.append({**simulate(n, drop, options.draws, options.seed), "exact": chances[drop]})
            print(power[-1], flush=True)
    result = {
        "accuracy": ACCURACY,
        "flips": FLIPS,
        "draws": options.draws,
        "seed": options.seed,
        "requirements": requirements(power),
        "power": power,
        "presets": presets(options.preset_draws, options.seed),
        "seconds": round(time.perf_counter() - begun, 1),
        "environment": describe_environment(),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-gate_power.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    path.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))
    print(json.dumps({"seconds": result["seconds"], **result["requirements"]}))
    return 0 if all(row["met"] for row in result["requirements"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
