"""Export of a BERT-like encoder to ONNX, read tensor by tensor.

B sequences, S tokens, D width, H heads, V vocabulary.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from compressor.checkpoint import CheckpointReader, write_json
from compressor.errors import EnvironmentProblem, UnsupportedModel
from compressor.exporters.onnx.graph import MICROSOFT, Graph, require_onnx
from compressor.exporters.onnx.linear import Linears
from compressor.exporters.onnx.rounding import Rounding
from compressor.exporters.onnx.weights import to_nbits
from compressor.exporters.safetensors import COMPANIONS, Exported, copy_files
from compressor.runtimes.configuration import read_config

DTYPES = {"float32": torch.float32, "float16": torch.float16}
ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "relu": "relu"}
# sentence-transformers' own: how it pools, and layers after the pooling.
SENTENCE_FILES = ("modules.json", "sentence_*_config.json", "config_sentence_transformers.json")
SENTENCE_FOLDERS = "[0-9]*_[A-Z]*"

EncoderPrecision = Literal["float32", "float16"]


@dataclass(frozen=True)
class Names:
    """Where a family keeps its weights; those of a layer lie under `layers`, a number, and a dot."""

    layers: str
    query: str
    key: str
    value: str
    attended: str
    attention_norm: str
    up: str
    down: str
    output_norm: str


BERT = Names(
    "encoder.layer.", "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm",
)  # fmt: skip
DISTILBERT = Names(
    "transformer.layer.", "attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin",
    "sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm",
)  # fmt: skip
FAMILIES = {"bert": BERT, "distilbert": DISTILBERT, "roberta": BERT, "xlm-roberta": BERT}
# Positions are counted from the padding token's number on, over the tokens that are not padding.
COUNTED_POSITIONS = ("roberta", "xlm-roberta")


def export_encoder(
    folder: Path, out: Path, *, dtype: EncoderPrecision = "float32", rounding: Rounding | None = None
) -> Exported:
    """Write the encoder of a checkpoint folder as ONNX, with its tokenizer and sentence-transformers files.

    The graph reads input_ids, attention_mask and token_type_ids (not for DistilBERT), int64 `[B, S]`, and gives
    last_hidden_state `[B, S, D]` in float32. `dtype` is how weights are stored; it computes in float32, since
    onnxruntime's CPU kernels would only convert back and forth. `rounding` makes the layers' matrices codes. Pooling is
    left to whoever runs it. Raises UnsupportedModel for families and settings that are not known, IntegrityError where
    a weight is missing.
    """
    require_onnx()
    folder, out = Path(folder), Path(out)
    config = _config(folder)
    if dtype not in DTYPES:
        raise UnsupportedModel(f"{folder}: an encoder cannot be stored as {dtype!r}; possible are {', '.join(DTYPES)}")
    reader = CheckpointReader(folder)
    out.mkdir(parents=True, exist_ok=True)
    graph = Graph(out, config.model_type)
    try:
        _EncoderWriter(graph, config, reader, DTYPES[dtype], rounding).write()
        graph.save()
    finally:
        graph.close()
    shutil.copyfile(folder / "config.json", out / "config.json")
    _copy_companions(folder, out)
    about = {} if rounding is None else {"weights": str(rounding), "accuracy_level": rounding.accuracy_level}
    write_json(out / "compressor.json", {"schema": "compressor.onnx/1", "dtype": dtype, **about})
    return Exported(out, sum(file.stat().st_size for file in out.rglob("*") if file.is_file()), {})


class _EncoderWriter:
    """Writes one encoder into a graph, each weight as soon as it is read."""

    def __init__(
        self, graph: Graph, config: Any, reader: CheckpointReader, stored: torch.dtype, rounding: Rounding | None
    ):
        self.graph, self.config, self.reader, self.stored = graph, config, reader, stored
        self.rounding = rounding
        self.names = FAMILIES[config.model_type]
        self.eps = getattr(config, "layer_norm_eps", 1e-12)  # DistilBERT's is a constant of its code
        base = config.model_type.replace("-", "_").removeprefix("xlm_")
        # checkpoints with a head on top keep the encoder under a name of its own
        self.prefix = f"{base}." if f"{base}.embeddings.word_embeddings.weight" in reader else ""
        self.ids = graph.input("input_ids", torch.int64, ["batch", "sequence"])
        mask = graph.input("attention_mask", torch.int64, ["batch", "sequence"])
        self.mask = graph.node("Cast", [mask], name="mask/int32", to=graph.type_of(torch.int32))

    def write(self) -> None:
        """Embeddings, layers, the output."""
        hidden = self._embeddings()
        for k in range(self.config.num_hidden_layers):
            hidden = self._layer(f"{self.names.layers}{k}", hidden)
        self.graph.output(hidden, "last_hidden_state", torch.float32, ["batch", "sequence", self.config.hidden_size])

    def _embeddings(self) -> str:
        graph, table = self.graph, "embeddings.position_embeddings"
        total = self._rows("embeddings.word_embeddings", self.ids)
        if self.config.model_type != "distilbert":
            types = graph.input("token_type_ids", torch.int64, ["batch", "sequence"])
            total = graph.node("Add", [total, self._rows("embeddings.token_type_embeddings", types)], name="add_types")
        total = graph.node("Add", [total, self._rows(table, self._positions())], name="add_positions")
        scale, bias = self._norm_weights("embeddings.LayerNorm")
        return graph.node(
            "LayerNormalization", [total, scale, bias], name="embeddings.LayerNorm", axis=-1, epsilon=self.eps
        )

    def _positions(self) -> str:
        """Numbers of the tokens' positions: `[S]`, or `[B, S]` where padding has none."""
        graph, zero, one = self.graph, self.graph.constant(0), self.graph.constant(1)
        if self.config.model_type in COUNTED_POSITIONS:
            pad = graph.constant(self.config.pad_token_id)
            is_padding = graph.node("Equal", [self.ids, pad], name="positions/padding")
            counts = graph.node("Where", [is_padding, zero, one], name="positions/tokens")
            running = graph.node("CumSum", [counts, one], name="positions/running")
            counted = graph.node("Mul", [running, counts], name="positions/counted")
            return graph.node("Add", [counted, pad], name="positions")
        shape = graph.node("Shape", [self.ids], name="shape")
        return graph.node("Range", [zero, graph.node("Gather", [shape, one], name="sequence"), one], name="positions")

    def _layer(self, name: str, hidden: str) -> str:
        """Attention and feed-forward, each added to what came in and then normalised."""
        graph, names, width = self.graph, self.names, self.config.hidden_size
        projections = [f"{name}.{part}" for part in (names.query, names.key, names.value)]
        fused = self._product(f"{name}.attention.qkv", projections, hidden)
        parts = graph.nodes_of(
            "Split", [fused, graph.constant([width] * 3)], 3, name=f"{name}.attention.split", axis=-1
        )
        biases = self._weight(f"{name}.attention.qkv.bias", torch.cat([self._read(f"{p}.bias") for p in projections]))
        attended = graph.node(
            "MultiHeadAttention", [*parts, biases, self.mask], name=f"{name}.attention", domain=MICROSOFT,
            num_heads=self.config.num_attention_heads, mask_filter_value=torch.finfo(torch.float32).min,
        )  # fmt: skip
        hidden = self._added(name, names.attended, names.attention_norm, attended, hidden)
        up = f"{name}.{names.up}"
        wide = self._product(up, [up], hidden)
        wide = graph.node("Add", [wide, self._weight(f"{up}.bias", self._read(f"{up}.bias"))], name=f"{up}/bias")
        return self._added(name, names.down, names.output_norm, self._activated(f"{name}.act", wide), hidden)

    def _added(self, name: str, linear: str, norm: str, x: str, residual: str) -> str:
        """LayerNorm of the residual stream plus a linear layer of x."""
        linear, norm = f"{name}.{linear}", f"{name}.{norm}"
        product = self._product(linear, [linear], x)
        inputs = [
            product,
            residual,
            *self._norm_weights(norm),
            self._weight(f"{linear}.bias", self._read(f"{linear}.bias")),
        ]
        return self.graph.node("SkipLayerNormalization", inputs, name=norm, domain=MICROSOFT, epsilon=self.eps)

    def _activated(self, name: str, x: str) -> str:
        kind = ACTIVATIONS[_activation(self.config)]
        if kind == "relu":
            return self.graph.node("Relu", [x], name=name)
        return self.graph.node("Gelu", [x], name=name, approximate=kind)

    # -- weights ----------------------------------------------------------------------------------------------------

    def _read(self, name: str) -> Tensor:
        """A tensor of the checkpoint; files made from TensorFlow call a norm's weight gamma and its bias beta."""
        name = self.prefix + name
        if name not in self.reader:
            old = name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
            name = old if old in self.reader else name
        return self.reader.tensor(name)

    def _weight(self, name: str, tensor: Tensor) -> str:
        """A weight in the file, and its value in float32."""
        return self._in_float32(self.graph.weight(name, tensor, self.stored))

    def _in_float32(self, value: str) -> str:
        if self.stored == torch.float32:
            return value
        return self.graph.node("Cast", [value], name=f"{value}/float32", to=self.graph.type_of(torch.float32))

    def _rows(self, name: str, numbers: str) -> str:
        """Rows of a table; only they are converted, not the table."""
        table = self.graph.weight(f"{name}.weight", self._read(f"{name}.weight"), self.stored)
        return self._in_float32(self.graph.node("Gather", [table, numbers], name=name))

    def _product(self, name: str, linears: list[str], x: str) -> str:
        """x times the transposed weights of some linear layers beside each other."""
        weight_OI = torch.cat([self._read(f"{linear}.weight") for linear in linears])
        if self.rounding is not None and self.rounding.why_not(weight_OI) is None:
            packed = to_nbits(self.rounding.codes(weight_OI), torch.float32, name)
            return Linears(self.graph, torch.float32, self.rounding.accuracy_level).nbits(name, packed, x)
        return self.graph.node("MatMul", [x, self._weight(f"{name}.weight", weight_OI.T)], name=name)

    def _norm_weights(self, name: str) -> list[str]:
        return [self._weight(f"{name}.{part}", self._read(f"{name}.{part}")) for part in ("weight", "bias")]


def _config(folder: Path) -> Any:
    """The folder's config; UnsupportedModel for what the writer would get wrong."""
    if not (folder / "config.json").is_file():
        raise EnvironmentProblem(f"{folder}: no config.json here; give the folder of a transformers checkpoint")
    config = read_config(folder)
    if config.model_type not in FAMILIES:
        raise UnsupportedModel(
            f"{folder}: no encoder of type {config.model_type!r} is known; possible are {', '.join(FAMILIES)}"
        )
    if _activation(config) not in ACTIVATIONS:
        raise UnsupportedModel(
            f"{folder}: its activation is {_activation(config)!r}; possible are {', '.join(ACTIVATIONS)}"
        )
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    if positions != "absolute":
        raise UnsupportedModel(f"{folder}: position_embedding_type {positions!r}; only 'absolute' is known")
    if getattr(config, "is_decoder", False):
        raise UnsupportedModel(f"{folder}: is_decoder is true, but only encoders are written this way")
    if getattr(config, "quantization_config", None):
        raise UnsupportedModel(f"{folder}: its weights are quantized; give the folder with the original weights")
    return config


def _activation(config: Any) -> str:
    return config.activation if config.model_type == "distilbert" else config.hidden_act


def _copy_companions(folder: Path, out: Path) -> None:
    copy_files(folder, out, (*COMPANIONS, *SENTENCE_FILES))
    for part in folder.glob(SENTENCE_FOLDERS):
        if part.is_dir():
            shutil.copytree(part, out / part.name, dirs_exist_ok=True)
