"""Does the graph compute what the model computes? Exactly first, then how far the fast arithmetic drifts.

B sequences, T tokens, V vocabulary. The reference is the model with its packed weights dequantized, in float32, and
with the embedding that the export stored. The graph runs with accuracy_level 0, that is in float32, in every way in
which a runtime will use it; the tolerance leaves room for sums in another order and for nothing else, since one that is
wide enough for rounding hides a wrong layout (reference, section 6).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.errors import IntegrityError
from compressor.exporters.onnx.rounded_inputs import (
    check_rounding,
    logits_of,
    rounds_inputs,
    unrounded_graph,
    unrounded_inputs,
)
from compressor.exporters.onnx.writer import DTYPES, OnnxSettings, quantized_table
from compressor.layers import CANONICAL, packed_weights
from compressor.models import Model, in_float32
from compressor.runtimes import OnnxModel, open_onnx
from compressor.runtimes.decoder import LOGITS, TOKENS
from compressor.runtimes.kv_cache import PAST, PRESENT

TOLERANCE = 1e-4  # of a logit, absolute, for logits of up to 10; larger ones in proportion
GREEDY_TOKENS = 64
PROMPT, LONG = 32, 512
TAIL = 8  # tokens that are decoded one by one after the prompt
PADS = 5


@dataclass(frozen=True)
class Reference:
    """What the model itself computes: logits `[1, T, V]` of a text, keys and values by layer, greedy tokens."""

    logits: Tensor
    cache: list[tuple[Tensor, Tensor]]
    greedy: Tensor


def compare_onnx(model: Model, folder: Path, ids_T: Tensor, settings: OnnxSettings) -> dict[str, Any]:
    """Parity of an ONNX folder with the live model: `max_abs` over all ways to call it, each in `scenarios`.

    `ids_T` is a text, longer than the model's sliding window where that is possible. IntegrityError where the exact
    graph differs by more than 1e-4 (it says in which layer the difference begins) or 64 greedy tokens differ. `drift`
    is how far the logits move with the accuracy_level that the folder is written for: the largest, and KL in nats. Of
    layers that round their inputs the exact graph is the one without the rounding; `rounding` tells of that.
    """
    ids_T = ids_T[: min(LONG, model.config.max_position_embeddings)]
    with exact_reference(model, settings.embedding_of(model)) as module:
        with unrounded_inputs(module):
            reference = reference_of(module, ids_T)
        expected = logits_of(module, ids_T) if rounds_inputs(module) else reference.logits
    with unrounded_graph(folder) as exact:
        found = check_graph(open_onnx(exact, accuracy_level=0), reference, ids_T, folder)
    if expected is not reference.logits:
        found["rounding"] = check_rounding(folder, ids_T, expected, reference.logits)
    drift = _drift(open_onnx(folder)(ids_T[None]).logits[0], expected[0])
    has_products = model.is_quantized or settings.embedding_of(model) == "int8"
    return found | {"accuracy_level": settings.accuracy_level if has_products else 0, "drift": drift}


def check_graph(exact: OnnxModel, reference: Reference, ids_T: Tensor, folder: Path) -> dict[str, Any]:
    """`max_abs`, `relative`, `scenarios` and `greedy_equal` of a graph; IntegrityError where it differs."""
    found = _scenarios(exact, ids_T)
    tolerance = TOLERANCE * max(1.0, float(reference.logits.abs().max()) / 10)
    differences = {name: _difference(logits, reference.logits, at) for name, (logits, at) in found.items()}
    for name, difference in differences.items():
        if not difference <= tolerance:
            where = _first_layer_apart(exact, ids_T, reference, tolerance)
            raise IntegrityError(
                f"{folder}: in {name} the logits differ by {difference:.2e} (at most {tolerance:.1e}); {where}"
            )
    prompt = ids_T[None, :PROMPT]
    greedy = exact.generate(prompt, max_new_tokens=GREEDY_TOKENS, eos_token_id=())[0, prompt.shape[1] :]
    if not torch.equal(greedy, reference.greedy):
        first = int((greedy != reference.greedy).nonzero()[0])
        raise IntegrityError(f"{folder}: greedy token {first + 1} of {GREEDY_TOKENS} differs from the model's")
    return {
        "max_abs": max(differences.values()),
        "relative": _relative(found["prefill"][0], reference.logits),
        "greedy_equal": True,
        "greedy_tokens": GREEDY_TOKENS,
        "scenarios": differences,
    }


@contextlib.contextmanager
def exact_reference(model: Model, embedding: str) -> Iterator[nn.Module]:
    """The live model in float32 arithmetic, with the embedding as an export stores it; as it was afterwards.

    Experts are dequantized in float32 too, as the graph does: stock loaders round them to the file's dtype.
    """
    with model.live(layout=CANONICAL) as module, in_float32(module), contextlib.ExitStack() as stack:
        for packed in packed_weights(module).values():
            stack.callback(setattr, packed, "file_dtype", packed.file_dtype)
            packed.file_dtype = torch.float32
        tables: set[Any] = {module.get_submodule(name) for name in (model.family.embedding, model.family.head)}
        for table in tables:
            weight: Any = table.weight
            stack.callback(setattr, weight, "data", weight.data)
        stored = {id(table.weight): _as_stored(table.weight.data, embedding) for table in tables}
        for table in tables:
            table.weight.data = stored[id(table.weight)]
        yield module


def _as_stored(weight_VD: Tensor, embedding: str) -> Tensor:
    if embedding == "int8":
        return quantized_table(weight_VD).dequantize()
    return weight_VD.to(DTYPES[embedding]).float()


@torch.inference_mode()
def reference_of(module: Any, ids_T: Tensor) -> Reference:
    from transformers import DynamicCache

    cache: Any = DynamicCache()  # not of the config, whose window would cut it off even where no layer has one
    logits = module(ids_T[None], past_key_values=cache, use_cache=True).logits
    keys_values = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    cache = DynamicCache()
    # Not `generate`: it would stop at the end of a text, or forbid it
    tokens = [int(module(ids_T[None, :PROMPT], past_key_values=cache, use_cache=True).logits[0, -1].argmax())]
    while len(tokens) < GREEDY_TOKENS:
        step = module(torch.tensor([[tokens[-1]]]), past_key_values=cache, use_cache=True)
        tokens.append(int(step.logits[0, -1].argmax()))
    return Reference(logits, keys_values, torch.tensor(tokens))


def _raw(
    model: OnnxModel, ids_BS: Tensor, mask_BT: Tensor, past: dict[str, np.ndarray] | None = None
) -> tuple[Tensor, dict[str, np.ndarray]]:
    """Logits `[B, S, V]` and the cache with the new tokens in it, as a runtime that knows only the graph calls it.

    Ours moves padding where a graph needs that, and shares one buffer of keys between past and present; others do not.
    """
    if past is None:
        inputs = [value for value in model.session.get_inputs() if value.name.startswith(f"{PAST}.")]
        past = {i.name: np.zeros([len(ids_BS), i.shape[1], 0, i.shape[3]], np.float32) for i in inputs}
    positions = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -ids_BS.shape[1] :]
    tokens = dict(zip(TOKENS, (ids_BS.numpy(), mask_BT.numpy(), positions.numpy()), strict=True))
    names = [value.name for value in model.session.get_outputs()]
    values = dict(zip(names, model.session.run(names, tokens | past), strict=True))
    logits = torch.from_numpy(values.pop(LOGITS))
    return logits, {name.replace(f"{PRESENT}.", f"{PAST}."): value for name, value in values.items()}


def _scenarios(exact: OnnxModel, ids_T: Tensor) -> dict[str, tuple[Tensor, slice]]:
    """Logits of the text in every way to call the graph, and which of the text's tokens they are for."""
    length = len(ids_T)
    short = min(length, 2 * PROMPT)
    found = {"prefill": (exact(ids_T[None, :short]).logits, slice(0, short))}
    if length > short:
        found["a long context"] = (exact(ids_T[None]).logits, slice(0, length))
    start = length - TAIL
    cache = exact(ids_T[None, :start]).past_key_values
    steps = [exact(ids_T[None, k : k + 1], past_key_values=cache).logits for k in range(start, length)]
    found["decoding with a cache"] = (torch.cat(steps, dim=1), slice(start, length))
    return found | _padded(exact, ids_T[:short])


def _padded(exact: OnnxModel, ids_T: Tensor) -> dict[str, tuple[Tensor, slice]]:
    """A batch of two, the shorter one padded on the left: the prompt, then a step with the cache."""
    length, shorter = len(ids_T), len(ids_T) - PADS
    ids = torch.stack([ids_T, torch.cat([ids_T.new_zeros(PADS), ids_T[:shorter]])])
    mask = torch.ones_like(ids)
    mask[1, :PADS] = 0
    logits, past = _raw(exact, ids[:, :-1], mask[:, :-1])
    step, _ = _raw(exact, ids[:, -1:], mask, past)
    both = torch.cat([logits, step], dim=1)
    return {
        "the full row of a padded batch": (both[:1], slice(0, length)),
        "the padded row of a batch": (both[1:, PADS:], slice(0, shorter)),
    }


def _difference(found: Tensor, reference: Tensor, at: slice) -> float:
    return float((found.float() - reference[:, at]).abs().max())


def _relative(found: Tensor, reference: Tensor) -> float:
    expected = reference[:, : found.shape[1]].double()
    return float(((found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def _drift(found_TV: Tensor, reference_TV: Tensor) -> dict[str, float]:
    """What the arithmetic that the folder asks for changes: largest logit difference, mean KL, first choices kept."""
    log_p, log_q = reference_TV.float().log_softmax(-1), found_TV.float().log_softmax(-1)
    return {
        "max_abs": float((found_TV.float() - reference_TV).abs().max()),
        "kl_mean": float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        "top1_agreement": float((log_p.argmax(-1) == log_q.argmax(-1)).float().mean()),
    }


def _first_layer_apart(exact: OnnxModel, ids_T: Tensor, reference: Reference, tolerance: float) -> str:
    """The first layer whose keys or values differ: what was computed before it was right."""
    prompt = ids_T[None, :PROMPT]
    _, cache = _raw(exact, prompt, torch.ones_like(prompt))
    for layer, expected in enumerate(reference.cache):
        for part, tensor in zip(("key", "value"), expected, strict=True):
            present = torch.from_numpy(cache[f"{PAST}.{layer}.{part}"])
            difference = float((present - tensor[:, :, : present.shape[2]]).abs().max())
            if not difference <= tolerance:
                return f"the difference begins before layer {layer}'s {part} ({difference:.2e})"
    return "keys and values agree in every layer, so it begins after the last attention's inputs"
