"""Load an export back in a fresh process and compare it with the live model: no run succeeds without it.

N windows, T tokens in a window, V vocabulary.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.errors import IntegrityError
from compressor.layers import CANONICAL
from compressor.models import Model, in_float32

NEW_TOKENS = 32
TOLERANCE = 1e-3  # relative, of the logits in float32 arithmetic on both sides


def compare_reloaded(model: Model, folder: Path, ids_NT: Tensor) -> dict[str, float | int | bool]:
    """Parity of an exported folder: `max_abs`, `relative` (both of the logits), `greedy_equal`.

    Both sides compute in float32 from the same codes. Raises IntegrityError where stock transformers does not load the
    folder, a key is missing or unexpected, the logits differ by more than 1e-3 relative, or greedy tokens differ.
    """
    prompt = ids_NT[:1, : ids_NT.shape[1] // 2].clone()
    expected, greedy = live_logits(model, ids_NT, prompt)
    with tempfile.TemporaryDirectory() as scratch:
        request, result = Path(scratch) / "request.safetensors", Path(scratch) / "result.safetensors"
        save_file({"ids": ids_NT, "prompt": prompt, "new_tokens": torch.tensor(NEW_TOKENS)}, request)
        command = [sys.executable, "-m", "compressor.exporters.reload", str(folder), str(request), str(result)]
        # As many threads as here: sums depend on it, and a sum's last bit can move an int8 activation by a whole step
        threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=threads)
        if done.returncode != 0:
            tail = "\n".join(done.stderr.strip().splitlines()[-5:])
            raise IntegrityError(f"{folder}: stock transformers does not load this export back:\n{tail}")
        reloaded = load_file(result)
    found = reloaded["logits"]
    relative = relative_difference(found, expected)
    parity = {
        "max_abs": float((found - expected).abs().max()),
        "relative": relative,
        "greedy_equal": bool(torch.equal(reloaded["greedy"], greedy)),
        "greedy_tokens": NEW_TOKENS,
    }
    if not relative <= TOLERANCE or not parity["greedy_equal"]:
        raise IntegrityError(
            f"{folder}: loaded back, the logits differ by {relative:.2e} relative (at most {TOLERANCE:g}), "
            f"{NEW_TOKENS} greedy tokens are {'equal' if parity['greedy_equal'] else 'different'}"
        )
    return parity


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference of a token's logits relative to their size (Euclidean norms)."""
    difference = (found.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
    return float(difference.max())


@torch.inference_mode()
def live_logits(model: Model, ids_NT: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 logits and greedy continuation of the live model in exact arithmetic."""
    with model.live(layout=CANONICAL) as module, in_float32(module):
        live: Any = module
        logits = torch.cat([live(row[None]).logits for row in ids_NT])
        greedy = live.generate(
            prompt, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=0
        )
    return logits, greedy
