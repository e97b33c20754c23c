"""Export of decoders that our graph writer does not know, through torch's own exporter; and their parity.

What torch makes of a model is slower than our graphs (attention and norms in small steps, no quantized products), but
needs no knowledge of the family. Inputs, outputs and files are the same as those of our writer.

B sequences, T tokens, K experts of a token, E experts, D model width.
"""

import contextlib
import inspect
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from compressor.checkpoint import write_json
from compressor.errors import EnvironmentProblem, UnsupportedModel
from compressor.exporters.onnx.graph import DATA, IR_VERSION, OPSET, require_onnx
from compressor.exporters.onnx.parity import LONG, _drift, check_graph, reference_of
from compressor.exporters.onnx.rounding import Rounding, round_graph
from compressor.exporters.safetensors import Exported
from compressor.layers import packed_weights
from compressor.models import in_float32
from compressor.runtimes import open_onnx

EXPERTS = "compressor_static_sparse"
# torch.export takes sizes of 0 and 1 for constants, and equal ones for the same; what is not seen stays free.
ROWS, NEW, CACHED = 2, 4, 3


def export_with_torch(module: nn.Module, config: Any, out: Path) -> Exported:
    """Write a live transformers decoder with a KV cache as ONNX, in float32; the module is afterwards as it was.

    Takes about twice the model's memory and stores tied tables twice, since torch turns weights round while it exports;
    and some 10 s, plus 0.7 s for each expert (2 to 24 of them, one core).
    Writes model.onnx, its data, config.json, generation_config.json and compressor.json; the tokenizer is the caller's.
    UnsupportedModel for modules without a growing KV cache, with packed weights, or that torch cannot export;
    EnvironmentProblem where `onnxscript` is missing.
    """
    onnx = _require()
    name = config.model_type
    if packed_weights(module):
        raise UnsupportedModel(f"{name}: only float weights can be exported with torch; dequantize the model first")
    with in_float32(module), _for_export(module), torch.no_grad():
        program = _exported(module, _example_past(module, name), name)
        out.mkdir(parents=True, exist_ok=True)
        program.save(out / "model.onnx", external_data=True)
    _finish(onnx, out / "model.onnx", name)
    written = json.loads(config.to_json_string(use_diff=True))
    write_json(out / "config.json", written | {"architectures": [type(module).__name__], "dtype": "float32"})
    generation = getattr(module, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(out)
    write_json(out / "compressor.json", {"schema": "compressor.onnx/1", "dtype": "float32", "exporter": "torch"})
    return _written(out)


def compare_with_torch(module: nn.Module, folder: Path, ids_T: Tensor) -> dict[str, Any]:
    """Parity of such a folder with the live model: `max_abs` over all `scenarios`, and 64 greedy tokens.

    `ids_T` is a text, longer than the model's sliding window where that is possible. IntegrityError where logits
    differ by more than 1e-4 (it says in which layer that begins) or a greedy token differs.
    """
    ids_T = _as_long_as_possible(module, ids_T)
    with in_float32(module):
        reference = reference_of(module, ids_T)
    return check_graph(open_onnx(folder, accuracy_level=0), reference, ids_T, folder)


def round_with_torch(module: Any, folder: Path, rounding: Rounding, ids_T: Tensor) -> tuple[Exported, dict[str, Any]]:
    """Put codes in place of the float weights of such a folder, and hold the result against the module.

    The module has the rounded weights afterwards. The parity is that of `compare_with_torch`, with exact accumulation;
    `drift` is what the accuracy_level of the folder changes, `cost` what the rounding itself changed; `rounded` and
    `float` say which weights it took. IntegrityError, UnsupportedModel as there, and where no weight can be rounded.
    """
    head = module.get_output_embeddings()
    if rounding.head and head.weight is module.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())  # the embedding stays as it is
    ids_T, level = _as_long_as_possible(module, ids_T), rounding.accuracy_level
    with in_float32(module), torch.inference_mode():
        before_TV = module(ids_T[None]).logits[0]
        about = round_graph(folder, module, rounding)
        after_TV = module(ids_T[None]).logits[0]
    parity = compare_with_torch(module, folder, ids_T)
    drift = _drift(open_onnx(folder)(ids_T[None]).logits[0], after_TV)
    stored = {"dtype": "float32", "exporter": "torch", "weights": str(rounding), "accuracy_level": level}
    write_json(folder / "compressor.json", {"schema": "compressor.onnx/1"} | stored)
    about |= {"accuracy_level": level, "drift": drift, "cost": _drift(after_TV, before_TV)}
    return _written(folder), parity | about


def static_sparse_experts(experts: Any, hidden_TD: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """What transformers' experts compute, each for the tokens routed to it: a loop that torch can export.

    The stock loop runs over the experts that were hit, which depends on data; the others have no ONNX, or gather a copy
    of the weights for every token.
    """
    out_TD = torch.zeros_like(hidden_TD)
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    for e in range(experts.num_experts):
        tokens, slots = (chosen_TK == e).nonzero(as_tuple=True)
        up = _expert_product(experts, first, e, hidden_TD[tokens])
        activated = experts._apply_gate(up) if experts.has_gate else experts.act_fn(up)
        down = _expert_product(experts, "down_proj", e, activated)
        if experts.has_post_expert_norm:
            down = experts.post_expert_norm(down)
        out_TD = out_TD.index_add(0, tokens, (down * weights_TK[tokens, slots, None]).to(out_TD.dtype))
    return out_TD


def _expert_product(experts: Any, name: str, e: int, x: Tensor) -> Tensor:
    weight = getattr(experts, name)[e]
    bias = getattr(experts, f"{name}_bias")[e] if experts.has_bias else None
    return linear(x, weight.T if experts.is_transposed else weight, bias)


class _FlatCache(nn.Module):
    """The decoder with its cache as plain tensors: what goes in is the past, what comes out holds the new tokens too.

    Exporters call it with `past` as [key, value] of layer 0, then of layer 1, and so on.
    """

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder = decoder
        self.takes_positions = "position_ids" in inspect.signature(decoder.forward).parameters

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache: Any = DynamicCache()  # not of the config, whose window would cut it off
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        positions = {"position_ids": position_ids} if self.takes_positions else {}
        logits = self.decoder(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **positions
        ).logits
        return logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


def _as_long_as_possible(module: Any, ids_T: Tensor) -> Tensor:
    return ids_T[: min(LONG, getattr(module.config, "max_position_embeddings", None) or LONG)]


def _written(folder: Path) -> Exported:
    return Exported(folder, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()), {})


def _require() -> Any:
    onnx = require_onnx()
    try:
        import onnxscript  # noqa: F401  (torch's exporter is written in it)
    except ImportError:
        raise EnvironmentProblem(
            "export through torch needs the extra `onnx` (onnxscript is missing): pip install 'compressor[onnx]'"
        ) from None
    return onnx


def _example_past(module: Any, name: str) -> list[Tensor]:
    """Random keys and values in the shapes that the model itself caches."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    module(torch.zeros(1, NEW, dtype=torch.int64), past_key_values=cache, use_cache=True)
    tensors: list[Any] = [getattr(layer, part, None) for layer in cache.layers for part in ("keys", "values")]
    if not tensors or any(tensor is None or tensor.shape[::2] != (1, NEW) for tensor in tensors):
        raise UnsupportedModel(f"{name}: not every layer caches keys and values of all tokens; it cannot be exported")
    return [torch.randn(ROWS, tensor.shape[1], CACHED, tensor.shape[3]) for tensor in tensors]


def _exported(module: nn.Module, past: list[Tensor], name: str) -> Any:
    """torch's program, its inputs and outputs named."""
    ids = torch.ones(ROWS, NEW, dtype=torch.int64)
    mask = torch.ones(ROWS, CACHED + NEW, dtype=torch.int64)
    positions = torch.arange(CACHED, CACHED + NEW).repeat(ROWS, 1)
    new = {0: "batch", 1: "sequence"}
    cached = [f"past_key_values.{k}.{part}" for k in range(len(past) // 2) for part in ("key", "value")]
    try:
        return torch.onnx.export(
            _FlatCache(module).eval(),
            (ids, mask, positions, past),
            input_names=["input_ids", "attention_mask", "position_ids", *cached],
            output_names=["logits", *(one.replace("past_key_values", "present") for one in cached)],
            dynamic_shapes={
                "input_ids": new, "attention_mask": {0: "batch", 1: "total"}, "position_ids": new,
                "past": [{0: "batch", 2: "past"} for _ in past],
            },
            opset_version=OPSET, dynamo=True, verbose=False,
        )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        cause = str(error.__cause__ or error).strip().partition("\n")[0]
        raise UnsupportedModel(f"{name}: torch cannot export it to ONNX: {cause}") from error


def _finish(onnx: Any, path: Path, name: str) -> None:
    """Versions and names as our own graphs have them, without notes on files of this machine."""
    proto = onnx.load(path, load_external_data=False)
    opset = next(one.version for one in proto.opset_import if not one.domain)
    elsewhere = {
        entry.value for one in proto.graph.initializer for entry in one.external_data if entry.key == "location"
    }
    if opset != OPSET or elsewhere - {DATA}:
        raise UnsupportedModel(
            f"{name}: torch wrote opset {opset} and weights into {', '.join(elsewhere)}; needed are {OPSET} and {DATA}"
        )
    proto.ir_version, proto.producer_name = IR_VERSION, "compressor"
    nodes = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    for noted in (proto, proto.graph, *nodes, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del noted.metadata_props[:]
    del proto.graph.value_info[:]
    for output in proto.graph.output:
        if output.name.startswith("present."):
            output.type.tensor_type.shape.dim[2].dim_param = "total"
    path.write_bytes(proto.SerializeToString())


@contextlib.contextmanager
def _for_export(module: Any) -> Iterator[None]:
    """Inference mode and experts that can be exported, for a while; none of torch's warnings."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, static_sparse_experts)
    logger, was_training = logging.getLogger("torch.onnx"), module.training
    level, experts = logger.level, module.config._experts_implementation
    has_experts = module._can_set_experts_implementation()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        if has_experts:
            module.set_experts_implementation(EXPERTS)
        try:
            module.eval()
            yield
        finally:
            module.train(was_training)
            logger.setLevel(level)
            if has_experts:
                module.set_experts_implementation(experts)
