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
from compressor.exporters.onnx.writer import DTYPES, OnnxSettings, quantized_table
from compressor.layers import CANONICAL, packed_weights
from compressor.models import Model, in_float32

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
    is how far the logits move with the accuracy_level that the folder is written for: the largest, and KL in nats.
    """
    ids_T = ids_T[: min(LONG, model.config.max_position_embeddings)]
    with exact_reference(model, settings.embedding_of(model)) as module:
        reference = reference_of(module, ids_T)
    found = check_graph(Session(folder, accuracy_level=0), reference, ids_T, folder)
    written = Session(folder)
    drift = _drift(written.logits(ids_T[None])[0], reference.logits[0])
    return found | {"accuracy_level": written.accuracy_level, "drift": drift}


def check_graph(exact: "Session", reference: Reference, ids_T: Tensor, folder: Path) -> dict[str, Any]:
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
    greedy = exact.greedy(ids_T[None, :PROMPT], GREEDY_TOKENS)
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


class Session:
    """A decoder in onnxruntime; `accuracy_level` overrides what its products were written with."""

    def __init__(self, folder: Path, accuracy_level: int | None = None):
        import onnx
        import onnxruntime

        proto = onnx.load(folder / "model.onnx", load_external_data=False)
        self.accuracy_level = 0
        for node in proto.graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = attribute.i if accuracy_level is None else accuracy_level
                    self.accuracy_level = attribute.i
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        self._session = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._past = {
            node.name: [1, node.shape[1], 0, node.shape[3]]
            for node in self._session.get_inputs()
            if node.name.startswith("past_key_values.")
        }
        self._outputs = [node.name for node in self._session.get_outputs()]

    def run(self, ids_BS: Tensor, mask_BT: Tensor, past: dict[str, np.ndarray] | None) -> tuple[Tensor, dict]:
        """Logits `[B, S, V]` and the cache with the new tokens in it."""
        positions = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -ids_BS.shape[1] :]
        if past is None:
            past = {name: np.zeros([len(ids_BS), *shape[1:]], np.float32) for name, shape in self._past.items()}
        feeds = {"input_ids": ids_BS, "attention_mask": mask_BT, "position_ids": positions}
        values = self._session.run(None, {name: value.numpy() for name, value in feeds.items()} | past)
        results = dict(zip(self._outputs, values, strict=True))
        logits = torch.from_numpy(results.pop("logits"))
        return logits, {name.replace("present.", "past_key_values."): value for name, value in results.items()}

    def logits(self, ids_BT: Tensor) -> Tensor:
        """Logits of whole sequences, `[B, T, V]`."""
        return self.run(ids_BT, torch.ones_like(ids_BT), None)[0]

    def greedy(self, prompt_1P: Tensor, count: int) -> Tensor:
        """The most probable tokens one after the other, `[count]`."""
        logits, past = self.run(prompt_1P, torch.ones_like(prompt_1P), None)
        tokens = [int(logits[0, -1].argmax())]
        while len(tokens) < count:
            mask = torch.ones(1, prompt_1P.shape[1] + len(tokens), dtype=torch.int64)
            logits, past = self.run(torch.tensor([[tokens[-1]]]), mask, past)
            tokens.append(int(logits[0, -1].argmax()))
        return torch.tensor(tokens)


def _scenarios(session: Session, ids_T: Tensor) -> dict[str, tuple[Tensor, slice]]:
    """Logits of the text in every way to call the graph, and which of the text's tokens they are for."""
    length = len(ids_T)
    short = min(length, 2 * PROMPT)
    found = {"prefill": (session.logits(ids_T[None, :short]), slice(0, short))}
    if length > short:
        found["a long context"] = (session.logits(ids_T[None]), slice(0, length))
    start = length - TAIL
    _, past = session.run(ids_T[None, :start], torch.ones(1, start, dtype=torch.int64), None)
    steps = []
    for k in range(start, length):
        logits, past = session.run(ids_T[None, k : k + 1], torch.ones(1, k + 1, dtype=torch.int64), past)
        steps.append(logits)
    found["decoding with a cache"] = (torch.cat(steps, dim=1), slice(start, length))
    found |= _padded(session, ids_T[:short])
    return found


def _padded(session: Session, ids_T: Tensor) -> dict[str, tuple[Tensor, slice]]:
    """A batch of two, the shorter one padded on the left: the prompt, then a step with the cache."""
    length, shorter = len(ids_T), len(ids_T) - PADS
    ids = torch.stack([ids_T, torch.cat([ids_T.new_zeros(PADS), ids_T[:shorter]])])
    mask = torch.ones_like(ids)
    mask[1, :PADS] = 0
    logits, past = session.run(ids[:, :-1], mask[:, :-1], None)
    step, _ = session.run(ids[:, -1:], mask, past)
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


def _first_layer_apart(session: Session, ids_T: Tensor, reference: Reference, tolerance: float) -> str:
    """The first layer whose keys or values differ: what was computed before it was right."""
    _, cache = session.run(ids_T[None, :PROMPT], torch.ones(1, min(PROMPT, len(ids_T)), dtype=torch.int64), None)
    for layer, expected in enumerate(reference.cache):
        for part, tensor in zip(("key", "value"), expected, strict=True):
            present = torch.from_numpy(cache[f"past_key_values.{layer}.{part}"])
            difference = float((present - tensor[:, :, : present.shape[2]]).abs().max())
            if not difference <= tolerance:
                return f"the difference begins before layer {layer}'s {part} ({difference:.2e})"
    return "keys and values agree in every layer, so it begins after the last attention's inputs"
