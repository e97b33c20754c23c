"""Export of a decoder to ONNX: graph, data, configs and tokenizer in one folder that other runtimes load.

V vocabulary, D model width.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from compressor.algorithms.rounding import round_to_nearest
from compressor.checkpoint import write_json
from compressor.errors import UnsupportedModel
from compressor.exporters.onnx.architecture import decoder_of
from compressor.exporters.onnx.decoder import DecoderWriter, Stream
from compressor.exporters.onnx.genai import genai_config
from compressor.exporters.onnx.graph import MICROSOFT, Graph, require_onnx
from compressor.exporters.onnx.linear import Linears
from compressor.exporters.onnx.weights import to_nbits
from compressor.exporters.safetensors import Exported, copy_companions, export_config
from compressor.models import Model
from compressor.quant import QuantizedTensor, QuantSpec, concatenate

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# int8 with a scale for so many neighbours, the first that divides the model's width: 1 bit or half a bit a weight more.
EMBEDDING_GROUPS = (64, 32)

Precision = Literal["float32", "float16", "bfloat16"]
Embedding = Literal["auto", "float32", "float16", "bfloat16", "int8"]


@dataclass(frozen=True)
class OnnxSettings:
    """How a graph computes (`dtype`), how exactly (`accuracy_level`), and how embedding and head are stored."""

    dtype: Precision = "float32"
    accuracy_level: Literal[0, 1, 4] = 4
    embedding: Embedding = "auto"

    def embedding_of(self, model: Model) -> str:
        """What `auto` means: int8 for a quantized model, the graph's own precision otherwise."""
        if self.embedding != "auto":
            return self.embedding
        return "int8" if model.is_quantized else self.dtype


def refuse_onnx(model: Model, settings: OnnxSettings) -> None:
    """Raise what `export_onnx` would raise for this model, before there are any weights."""
    require_onnx()
    decoder_of(model)
    if settings.embedding_of(model) == "int8" and model.config.hidden_size % EMBEDDING_GROUPS[-1]:
        raise UnsupportedModel(
            f"{model.name}: a width of {model.config.hidden_size} does not divide into groups of "
            f"{EMBEDDING_GROUPS[-1]}; export with embedding: float16"
        )


def export_onnx(model: Model, folder: Path, settings: OnnxSettings | None = None) -> Exported:
    """Write a decoder as ONNX: packed codes as they are, one block in memory at a time.

    `folder` is taken as it is: the caller makes it appear under its final name when it is complete. Raises
    UnsupportedModel for what a graph cannot say, EnvironmentProblem where `onnx` is missing or the disk is full.
    """
    settings = settings or OnnxSettings()
    refuse_onnx(model, settings)
    decoder, dtype = decoder_of(model), DTYPES[settings.dtype]
    folder.mkdir(parents=True, exist_ok=True)
    graph = Graph(folder, model.config.model_type)
    try:
        linears = Linears(graph, dtype, settings.accuracy_level)
        writer = DecoderWriter(graph, decoder, linears, dtype)
        table = _Table(graph, linears, model, settings.embedding_of(model), dtype)
        hidden = table.embed(writer.input_ids)
        if decoder.embedding_scale is not None:
            scale = graph.weight("embedding/scale", torch.tensor(decoder.embedding_scale, dtype=dtype))
            hidden = graph.node("Mul", [hidden, scale], name="embedding/scaled")
        stream = Stream(hidden)
        for k in range(model.num_blocks):
            with model.open_block(k) as block:
                stream = writer.write_block(block, stream)
        hidden, _ = writer.add_and_norm("norm", model.skeleton.get_submodule(model.family.norm), stream)
        logits = table.head(hidden)
        if decoder.final_softcap is not None:
            cap = graph.weight("logits/cap", torch.tensor(decoder.final_softcap, dtype=dtype))
            logits = graph.node("Tanh", [graph.node("Div", [logits, cap])], name="logits/tanh")
            logits = graph.node("Mul", [logits, cap], name="logits/capped")
        graph.output(logits, "logits", dtype, ["batch", "sequence", decoder.vocab_size])
        graph.metadata = {"accuracy_level": str(settings.accuracy_level), "embedding": table.kind}
        graph.save()
    finally:
        graph.close()
    config = export_config(model, {}, [])
    write_json(folder / "config.json", config)
    copy_companions(model, folder)
    write_json(folder / "genai_config.json", genai_config(folder, config, decoder))
    about = {"accuracy_level": settings.accuracy_level, "dtype": settings.dtype, "embedding": table.kind}
    write_json(folder / "compressor.json", {"schema": "compressor.onnx/1", **about})
    return Exported(folder, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()), {})


def quantized_table(weight_VD: Tensor) -> QuantizedTensor:
    """The int8 codes that stand for an embedding or a head in an export; what parity is held against, too."""
    group = next((size for size in EMBEDDING_GROUPS if weight_VD.shape[-1] % size == 0), None)
    spec = QuantSpec(8, group)
    # a slice at a time: a float32 copy of a large vocabulary would be the biggest tensor held
    parts = [round_to_nearest(part, spec, search=False, dtype=torch.float32) for part in weight_VD.split(8192)]
    return concatenate(parts)


class _Table:
    """Embedding and output head; tied ones lie in the file once."""

    def __init__(self, graph: Graph, linears: Linears, model: Model, kind: str, dtype: torch.dtype):
        self.graph, self.linears, self.kind, self.dtype = graph, linears, kind, dtype
        self.table_VD: Tensor = model.skeleton.get_submodule(model.family.embedding).weight.detach()
        head = model.skeleton.get_submodule(model.family.head)
        self.head_VD: Tensor = head.weight.detach()
        self.head_bias: Tensor | None = getattr(head, "bias", None)
        self.is_tied = self.table_VD.data_ptr() == self.head_VD.data_ptr()

    def embed(self, ids: str) -> str:
        graph = self.graph
        if self.kind == "int8":
            packed = to_nbits(quantized_table(self.table_VD), self.dtype, "embedding")
            inputs = [
                graph.weight("embedding.codes", packed.codes),
                ids,
                graph.weight("embedding.scales", packed.scales),
            ]
            settings = {"gather_axis": 0, "quantize_axis": 1, "block_size": packed.block_size, "bits": 8}
            return graph.node("GatherBlockQuantized", inputs, name="embedding", domain=MICROSOFT, **settings)
        table = graph.weight("embedding.weight", self.table_VD, DTYPES[self.kind])
        rows = graph.node("Gather", [table, ids], name="embedding")
        return rows if DTYPES[self.kind] == self.dtype else self._cast("embedding/cast", rows)

    def head(self, hidden: str) -> str:
        logits = self._quantized_head(hidden) if self.kind == "int8" else self._dense_head(hidden)
        if self.head_bias is None:
            return logits
        bias = self.graph.weight("head.bias", self.head_bias.detach().to(self.dtype))
        return self.graph.node("Add", [logits, bias], name="head/bias")

    def _quantized_head(self, hidden: str) -> str:
        packed = to_nbits(quantized_table(self.head_VD), self.dtype, "head")
        if self.is_tied:
            blocks = (packed.shape[0], packed.num_blocks, packed.block_size)
            self.graph.view("head.codes", "embedding.codes", blocks)
            self.graph.view("head.scales", "embedding.scales", tuple(packed.scales.shape))
        return self.linears.nbits("head", packed, hidden)

    def _dense_head(self, hidden: str) -> str:
        """As a Gemm, which reads the table as it lies there; a MatMul would need it turned round, a second copy."""
        graph = self.graph
        name = "embedding.weight" if self.is_tied else "head.weight"
        table = graph.weight(name, self.head_VD, DTYPES[self.kind])
        if DTYPES[self.kind] != self.dtype:
            table = self._cast("head/cast", table)
        width = self.head_VD.shape[1]
        flat = graph.node("Reshape", [hidden, graph.constant([-1, width])], name="head/flat")
        logits = graph.node("Gemm", [flat, table], name="head", transB=1)
        shape = graph.node("Shape", [hidden], name="head/shape")
        lengths = graph.node("Slice", [shape, graph.constant([0]), graph.constant([2])], name="head/lengths")
        target = graph.node("Concat", [lengths, graph.constant([-1])], name="head/target", axis=0)
        return graph.node("Reshape", [logits, target], name="head/unflat")

    def _cast(self, name: str, value: str) -> str:
        return self.graph.node("Cast", [value], name=name, to=self.graph.type_of(self.dtype))
