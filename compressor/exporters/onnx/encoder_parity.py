"""Does an exported encoder compute what the stock model computes?

B sequences, S tokens, D width.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.errors import IntegrityError, UnsupportedModel
from compressor.exporters.onnx.encoder import COUNTED_POSITIONS, DTYPES, FAMILIES
from compressor.exporters.onnx.rounding import NO_PRODUCT, Rounding, no_weight
from compressor.models.transformers_io import quiet
from compressor.runtimes import open_onnx_encoder

TOLERANCE = 1e-4  # of a hidden state, absolute; they are normalised, so of the order of 1
LONG = 512


@torch.inference_mode()
def compare_encoder(folder: Path, out: Path, rounding: Rounding | None = None) -> dict[str, Any]:
    """Parity with the stock model in float32: `max_abs` and `relative` over all `scenarios`, padding left out.

    Weights stored in float16, or as codes by `rounding`, are compared with the stock model that has the same rounded
    weights, codes with exact accumulation; then `drift` is what the accuracy_level of the folder changes, `cost` what
    the rounding changed, and `rounded` and `float` say which weights it took. IntegrityError where a hidden state
    differs by more than 1e-4, UnsupportedModel where no weight can be rounded.
    """
    from transformers import AutoModel

    with quiet():
        stock: Any = AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
    stored = DTYPES[json.loads((Path(out) / "compressor.json").read_text())["dtype"]]
    calls = _inputs(stock.config)
    original = _hidden_states(stock.eval(), calls)
    about = {} if rounding is None else _round_layers(stock, rounding)
    for name, parameter in stock.named_parameters():
        if name not in about.get("rounded", ()):
            parameter.data = parameter.data.to(stored).float()
    expected = _hidden_states(stock, calls)
    exact = _distance(_hidden_states(open_onnx_encoder(out, accuracy_level=0), calls), expected)
    for name, difference in exact["scenarios"].items():
        if not difference <= TOLERANCE:
            raise IntegrityError(
                f"{out}: in {name} the hidden states differ by {difference:.2e} (at most {TOLERANCE:.1e})"
            )
    if rounding is None:
        return exact
    drift, cost = _distance(_hidden_states(open_onnx_encoder(out), calls), expected), _distance(expected, original)
    figures = {"accuracy_level": rounding.accuracy_level, "drift": drift, "cost": cost}
    return exact | figures | about | {"rounded": len(about["rounded"])}


def _hidden_states(model: Any, calls: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Those of all tokens but the padding, `[tokens, D]`."""
    return {name: model(**call).last_hidden_state[call["attention_mask"].bool()] for name, call in calls.items()}


def _distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Any]:
    scenarios = {name: float((found[name] - expected[name]).abs().max()) for name in found}
    relative = [(found[name] - expected[name]).norm(dim=-1) / expected[name].norm(dim=-1) for name in found]
    return {"max_abs": max(scenarios.values()), "relative": float(torch.cat(relative).max()), "scenarios": scenarios}


def _round_layers(stock: Any, rounding: Rounding) -> dict[str, Any]:
    """Give a model the weights that the codes stand for; which are `rounded`, and why others stayed `float`."""
    rounded, left = [], {}
    layers = FAMILIES[stock.config.model_type].layers
    for name, parameter in stock.named_parameters():
        if parameter.dim() < 2 or name.startswith("pooler."):  # no part of the graph
            continue
        why = rounding.why_not(parameter.data) if name.startswith(layers) else NO_PRODUCT
        if why is None:
            parameter.data = rounding.codes(parameter.data).dequantize()
            rounded.append(name)
        else:
            left[name] = why
    if not rounded:
        raise UnsupportedModel(no_weight(left))
    return {"rounded": rounded, "float": left}


def _inputs(config: Any) -> dict[str, dict[str, Tensor]]:
    """Random tokens in every way in which an encoder is called."""
    generator = torch.Generator().manual_seed(0)
    pad = config.pad_token_id or 0
    longest = min(LONG, config.max_position_embeddings - (pad + 1 if config.model_type in COUNTED_POSITIONS else 0))
    short = min(32, longest)
    shapes = {
        "a padded batch": (2, short),
        "a single row": (1, short),
        "one token": (1, 1),
        "a long text": (1, longest),
    }
    inputs = {}
    for name, (rows, length) in shapes.items():
        ids = torch.randint(0, config.vocab_size - 1, (rows, length), generator=generator)
        ids += (ids >= pad).long()  # any token but the padding
        mask = torch.ones_like(ids)
        ids[1:, length // 2 :], mask[1:, length // 2 :] = pad, 0
        inputs[name] = {"input_ids": ids, "attention_mask": mask}
        if config.model_type != "distilbert":
            types = torch.zeros_like(ids)
            types[:, length // 3 :] = getattr(config, "type_vocab_size", 1) - 1
            inputs[name]["token_type_ids"] = types
    return inputs
