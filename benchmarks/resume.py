"""Does a run survive `kill -9`, and what does it cost? Kills a run at three places of the walk and runs it again.

`python benchmarks/resume.py [--recipe recipes/int4_moe.yaml]` writes benchmarks/results/<date>-resume.json: for each
kill the time of both sessions together relative to an unbroken run (medians of rounds in which both take turns), blocks
that the journal holds twice, and whether `model/` is identical to the byte.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from compressor.checkpoint import folder_digests
from compressor.metrics import describe_environment

RESULTS = Path(__file__).parent / "results"


def journal(out: Path) -> list[dict]:
    path = out / "work" / "journal.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def start(recipe: str, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "compressor", "run", recipe, "--out", str(out), "--quiet"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def unbroken(recipe: str, out: Path) -> float:
    """Seconds of a run from start to end, imports included."""
    begun = time.perf_counter()
    process = start(recipe, out)
    _, errors = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"{recipe} ends with {process.returncode}: {errors.decode()[-2000:]}")
    return time.perf_counter() - begun


def killed_and_resumed(recipe: str, out: Path, after_blocks: int) -> tuple[float, int]:
    """Seconds of both sessions, and how many blocks were finished when the first one died."""
    begun = time.perf_counter()
    process = start(recipe, out)
    while sum(line["kind"] == "block" for line in journal(out)) < after_blocks:
        if process.poll() is not None:
            raise SystemExit(f"the run ended with {process.returncode} before block {after_blocks}")
        time.sleep(0.05)
    time.sleep(0.5)  # into the next block
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = sum(line["kind"] == "block" for line in journal(out))
    first = time.perf_counter() - begun
    return first + unbroken(recipe, out), finished


def one_kill(recipe: str, out: Path, blocks: int, expected: dict[str, str]) -> dict:
    """What a kill after so many blocks cost."""
    seconds, finished = killed_and_resumed(recipe, out, blocks)
    written = [line["block"] for line in journal(out) if line["kind"] == "block"]
    return {
        "killed_after_blocks": finished,
        "blocks_journalled_twice": len(written) - len(set(written)),
        "seconds": round(seconds, 1),
        "identical": folder_digests(out / "model") == expected,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="recipes/int4_moe.yaml")
    parser.add_argument(
        "--kills", type=int, nargs="+", default=[1, 2, 3], help="blocks finished when the run is killed"
    )
    parser.add_argument("--rounds", type=int, default=3, help="times that every run is taken")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="resume-"))
    whole: list[float] = []
    kills: dict[int, list[dict]] = {blocks: [] for blocks in options.kills}
    digests = None
    try:
        for turn in range(options.rounds):
            out = scratch / f"whole-{turn}"
            whole.append(unbroken(options.recipe, out))
            digests = digests or folder_digests(out / "model")
            print(f"unbroken: {whole[-1]:.1f} s, identical {folder_digests(out / 'model') == digests}", flush=True)
            for blocks, rows in kills.items():
                rows.append(one_kill(options.recipe, scratch / f"killed-{blocks}-{turn}", blocks, digests))
                print(rows[-1], flush=True)
        median = statistics.median(whole)
        result = {
            "recipe": options.recipe,
            "unbroken_seconds": [round(seconds, 1) for seconds in whole],
            "kills": [
                {
                    "killed_after_blocks": blocks,
                    "seconds": [row["seconds"] for row in rows],
                    "relative": round(statistics.median(row["seconds"] for row in rows) / median, 3),
                    "blocks_journalled_twice": max(row["blocks_journalled_twice"] for row in rows),
                    "identical": all(row["identical"] for row in rows),
                }
                for blocks, rows in kills.items()
            ],
            "environment": describe_environment(),
        }
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-resume.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps({key: value for key, value in result.items() if key != "environment"}))
        return 0 if all(row["identical"] for row in result["kills"]) else 1
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
