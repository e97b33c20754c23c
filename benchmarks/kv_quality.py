"""What does a KV cache of 8 or 4 bits cost in perplexity, and how many bytes does it hold?

    python benchmarks/kv_quality.py --threads 1    # SmolLM2-135M; 6 minutes on one core beside other work
    python benchmarks/kv_quality.py --smoke    # two short windows: does it all run?

Perplexity on the first windows of WikiText-2 raw test, in float32 arithmetic. The text goes through the cache 32 tokens
at a time: with blocks of 32 tokens every token then sees the codes and the exact window that decoding one by one shows
it. Texts come from $COMPRESSOR_SHARED (default ../shared beside the project).

Checks that hold or fail the run (exit code 1): 8 bits cost at most 0.1 %, 4 bits at most 2.5 % (upper ends of the
intervals), and bytes shrink with the bits.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE), str(HERE / "peers")]
CHUNK = 32
# Name: bits and window; None is transformers' own cache in the model's dtype
CACHES = {"exact": None, "int8, window 64": (8, 64), "int4, window 64": (4, 64), "int4, window 128": (4, 128)}
LIMITS = {8: 1.001, 4: 1.025}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/smollm2-135m", help="default demo/smollm2-135m")
    parser.add_argument("--windows", type=int, default=8, help="windows of the test text (default 8)")
    parser.add_argument("--length", type=int, default=640, help="tokens in a window (default 640)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--smoke", action="store_true", help="two windows of 192 tokens, results into a scratch folder")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the results")
    options = parser.parse_args()
    if options.smoke:
        options.windows, options.length = 2, 192
        options.results = Path(tempfile.mkdtemp(prefix="kv_quality-"))
    return options


def losses_and_bytes(model: Any, ids_NT: Any, settings: tuple[int, int] | None) -> tuple[list[float], int]:
    """Mean loss of each window with a cache, and the bytes that it holds at the end, 16-bit numbers counted as such."""
    import torch
    from transformers import DynamicCache

    from compressor.layers.kv_cache import QuantizedKvCache

    cache: Any = DynamicCache(config=model.config)
    if settings is not None:
        cache = QuantizedKvCache(model.config, bits=settings[0], window=settings[1])
    sums = torch.zeros(len(ids_NT), dtype=torch.float64)
    with torch.inference_mode():
        for begin in range(0, ids_NT.shape[1] - 1, CHUNK):
            logits = model(ids_NT[:, begin : begin + CHUNK], past_key_values=cache).logits
            targets = ids_NT[:, begin + 1 : begin + 1 + CHUNK]
            logits = logits[:, : targets.shape[1]].transpose(1, 2)
            sums += torch.nn.functional.cross_entropy(logits, targets, reduction="none").sum(-1).double()
    held = sum(_bytes(tensor) for layer in cache.layers for tensor in vars(layer).values() if torch.is_tensor(tensor))
    return (sums / (ids_NT.shape[1] - 1)).tolist(), held


def _bytes(tensor: Any) -> int:
    """The model runs in float32 here; a real one holds its exact keys and values in 16 bits."""
    return tensor.nbytes // 2 if tensor.element_size() == 4 and tensor.is_floating_point() else tensor.nbytes


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each cache."""
    import protocol
    import torch
    from peers import paired_ratio

    from compressor.models import load_model

    torch.set_num_threads(options.threads)
    stored = load_model(options.model)
    folder = Path(os.environ.get("COMPRESSOR_SHARED", ROOT.parent / "shared")) / "data" / "text"
    text = str(folder / "wikitext2_raw_test.txt")
    ids_NT = protocol.token_windows(text, stored.tokenizer, options.length, options.windows)
    model: Any = stored.take_live().float().eval()
    rows: list[dict[str, Any]] = []
    for name, settings in CACHES.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        losses, held = losses_and_bytes(model, ids_NT, settings)
        row = {
            "name": name,
            "bits": settings and settings[0],
            "losses": losses,
            "perplexity": math.exp(sum(losses) / len(losses)),
            "bytes": held,
            "bytes_per_token": held / ids_NT.numel(),
        }
        rows.append(row | {"ratio": paired_ratio(losses, rows[0]["losses"] if rows else losses)})
    return rows


def checks(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """What has to hold."""
    held = {}
    for row in rows[1:]:
        limit = LIMITS[row["bits"]]
        held[f"{row['name']}: at most {100 * (limit - 1):.1f} %"] = row["ratio"]["ci95"][1] <= limit
    sizes = {name: row["bytes"] for name, row in zip(CACHES, rows, strict=True)}
    held["bytes: 4 bits < 8 bits < exact"] = sizes["int4, window 64"] < sizes["int8, window 64"] < sizes["exact"]
    return held


def table(rows: list[dict[str, Any]], title: str, held: dict[str, bool]) -> str:
    """The figures in Markdown."""
    lines = [title, "", "| cache | perplexity | ratio (95 %) | bytes a token | of exact |", "|---|---|---|---|---|"]
    for row in rows:
        low, high = row["ratio"]["ci95"]
        share = row["bytes"] / rows[0]["bytes"]
        cells = (
            row["name"],
            f"{row['perplexity']:.4f}",
            f"{row['ratio']['value']:.4f} [{low:.4f}, {high:.4f}]",
            f"{row['bytes_per_token']:.0f}",
            f"{share:.3f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {'holds' if holds else 'FAILS'}: {what}" for what, holds in held.items())])


def main() -> int:
    """Measure, report, check."""
    from environments import machine, project_version

    options = arguments()
    rows = measure(options)
    held = checks(rows)
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    here, project = machine(), project_version()
    title = (
        f"{date}: {options.model}, KV cache by bits; perplexity on {options.windows} x {options.length} tokens of "
        f"WikiText-2 test, in float32. {here['cpu']}, {options.threads} threads; commit {project['commit']}"
        f"{'' if project['clean'] else ' with changes'}. Bytes at the end of the windows, spare capacity and the exact "
        "window included, exact numbers counted as 16 bits."
    )
    shown = table(rows, title, held)
    document = {
        "schema": "compressor.benchmark.kv_quality/1",
        "date": date,
        "environment": {**here, "threads": options.threads, "project": project},
        "model": options.model,
        "settings": {"windows": options.windows, "length": options.length, "chunk": CHUNK},
        "checks": held,
        "rows": rows,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / f"{date}-kv_quality.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (options.results / f"{date}-kv_quality.md").write_text(shown + "\n", encoding="utf-8")
    print(shown)
    print(json.dumps({"results": str(options.results / f"{date}-kv_quality.json"), "checks": held}))
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
