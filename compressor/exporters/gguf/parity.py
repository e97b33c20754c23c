"""Load a GGUF file back with transformers in a fresh process and compare it with the live model.

N windows, T tokens in a window.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor.errors import IntegrityError
from compressor.exporters.gguf import reload
from compressor.exporters.gguf.architectures import architecture_of
from compressor.exporters.gguf.export import LOSSLESS
from compressor.exporters.gguf.library import require_gguf
from compressor.exporters.gguf.reload import UNKNOWN_TO_READER, probe
from compressor.exporters.gguf.weights import block_weights, names_of, rest_weights
from compressor.exporters.parity import NEW_TOKENS, live_logits, relative_difference
from compressor.layers import CANONICAL, PackedExperts, PackedLinear, packed_weights
from compressor.models import Model

# Relative, of logits and weights where nothing is rounded: float32 sums in another order
TOLERANCE = 1e-5
# Relative, of a weight's product with a fixed vector, by its type: about thrice what rounding costs normal weights, and
# far from the 1.4 of rows or columns out of place. A tolerance on logits that allows four bits would hide those.
ROUNDING = {
    "F32": TOLERANCE, "F16": 2e-3, "BF16": 1e-2, "Q8_0": 0.02, "Q6_K": 0.06, "Q5_0": 0.15, "Q4_0": 0.4, "Q4_1": 0.3,
    "Q4_K": 0.3,
}  # fmt: skip


def compare_gguf(model: Model, file: Path, ids_NT: Tensor) -> dict[str, float | int | bool | str]:
    """Parity of a GGUF file: `max_abs`, `relative` (of the logits), `greedy_equal`, `greedy_tokens`, `read_by`.

    Both sides compute in float32, with transformers; the file is read by `transformers` too, or by `compressor` where
    its reader does not know the family. Raises IntegrityError where the file does not load, or its metadata, a weight
    or (of a file that rounds nothing) the logits or greedy tokens differ by more than the file's types explain.
    """
    require_gguf()
    prompt = ids_NT[:1, : ids_NT.shape[1] // 2].clone()
    with _as_written(model) as module:
        expected, greedy = live_logits(model, ids_NT, prompt)
        probes = dict(_probes(module))
    reloaded = _reload(model, file, ids_NT, prompt)
    types, lossless = _read_types(file)
    _check_weights(model, file, types, lossless, reloaded, probes)
    found = reloaded["logits"]
    relative, same = relative_difference(found, expected), bool(torch.equal(reloaded["greedy"], greedy))
    if lossless and not (relative <= TOLERANCE and same):
        raise IntegrityError(
            f"{file}: nothing is rounded in this file, yet loaded back the logits differ by {relative:.2e} relative "
            f"(at most {TOLERANCE:g}), {NEW_TOKENS} greedy tokens are {'equal' if same else 'different'}"
        )
    max_abs = float((found - expected).abs().max())
    return {
        "max_abs": max_abs,
        "relative": relative,
        "greedy_equal": same,
        "greedy_tokens": NEW_TOKENS,
        "read_by": "compressor" if model.config.model_type in UNKNOWN_TO_READER else "transformers",
    }


@contextmanager
def _as_written(model: Model) -> Iterator[nn.Module]:
    """The live model, packed experts computed from their codes as a runtime of the file does.

    (Stock transformers rounds them to the file's dtype when it loads compressed-tensors: PackedWeight.dequantize.)
    """
    with model.live(layout=CANONICAL) as module:
        weights = list(packed_weights(module).values())
        dtypes = [weight.file_dtype for weight in weights]
        for weight in weights:
            weight.file_dtype = torch.float32
        try:
            yield module
        finally:
            for weight, dtype in zip(weights, dtypes, strict=True):
                weight.file_dtype = dtype


def _probes(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight's product with the fixed vector, by the name that it has in the unpacked model."""
    for path, child in module.named_modules():
        if isinstance(child, PackedLinear):
            yield f"{path}.weight", probe(child.packed.dequantize(torch.float32))
        elif isinstance(child, PackedExperts):
            yield f"{path}.gate_up_proj", probe(child.gate_up.dequantize(torch.float32))
            yield f"{path}.down_proj", probe(child.down.dequantize(torch.float32))
    for name, parameter in module.named_parameters():
        yield name, probe(parameter.detach())


def _reload(model: Model, file: Path, ids_NT: Tensor, prompt: Tensor) -> dict[str, Tensor]:
    """What transformers computes with the file in a process of its own."""
    skeleton: Any = model.skeleton
    said = {
        "config": model.config.to_json_string(use_diff=False),
        "generation": json.dumps(skeleton.generation_config.to_dict()),
    }
    with tempfile.TemporaryDirectory() as scratch:
        request, result = Path(scratch) / "request.safetensors", Path(scratch) / "result.safetensors"
        save_file({"ids": ids_NT, "prompt": prompt, "new_tokens": torch.tensor(NEW_TOKENS)}, request, said)
        # -P: this folder's types.py would stand in for Python's own
        command = [sys.executable, "-P", reload.__file__, str(file), str(request), str(result)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            tail = "\n".join(done.stderr.strip().splitlines()[-5:])
            raise IntegrityError(f"{file}: this file does not load back:\n{tail}")
        return load_file(result)


def _read_types(file: Path) -> tuple[dict[str, str], bool]:
    """Every tensor's type by its name in the file, and whether the exporter rounded nothing."""
    import gguf

    reader = gguf.GGUFReader(file)
    return {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}, reader.fields[LOSSLESS].contents()


def _check_weights(
    model: Model,
    file: Path,
    types: dict[str, str],
    lossless: bool,
    reloaded: dict[str, Tensor],
    probes: dict[str, Tensor],
) -> None:
    """Each loaded weight is the live one up to its type's rounding: rows and columns in place, scales right."""
    architecture = architecture_of(model.config)
    names = names_of(model, architecture)
    weights = list(rest_weights(model, architecture, names))
    for k in range(model.num_blocks):
        with model.open_block(k) as block:
            weights += list(block_weights(model, block, architecture, names))
    for weight in weights:
        if not weight.source:  # made for the file: no parameter of the model
            continue
        found, expected = reloaded[f"probe:{weight.source}"], probes[weight.source]
        allowed = TOLERANCE if lossless else ROUNDING[types[weight.name]]
        error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
        if not error <= allowed:
            raise IntegrityError(
                f"{file}: {weight.name} ({types[weight.name]}), loaded back, is {error:.2g} off {weight.source} of the "
                f"live model; this type explains {allowed:g}"
            )
