"""Export to GGUF, the format of llama.cpp: one file with weights, tokenizer and chat template, one tensor in memory.

Weights that the model holds as codes are carried over bit by bit where a type of GGUF can hold them.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from compressor.checkpoint.writer import disk_errors
from compressor.exporters.gguf.architectures import Architecture, architecture_of
from compressor.exporters.gguf.blocks import CARRIES, inexact
from compressor.exporters.gguf.encode import encode
from compressor.exporters.gguf.library import require_gguf
from compressor.exporters.gguf.metadata import add_metadata, unsaid
from compressor.exporters.gguf.tokenizer import Vocabulary, add_tokenizer, read_vocabulary
from compressor.exporters.gguf.types import (
    AUTO,
    Chosen,
    carried_type,
    check_type,
    dense_type,
    refuse_scheme,
    refuse_schemes,
    row_bytes,
    use_more_bits,
)
from compressor.exporters.gguf.weights import Weight, block_weights, names_of, rest_weights
from compressor.models import Model
from compressor.quant import QuantSpec

LOSSLESS = "compressor.lossless"  # our own key: whether every tensor holds exactly what the model computed with


@dataclass(frozen=True)
class Exported:
    """What was written: the file, every tensor's type by its name in the file, and what to know of them."""

    folder: Path
    file: Path
    bytes: int
    types: dict[str, str]
    reasons: dict[str, str]  # of tensors that got another type than the expected one
    inexact: dict[str, int]  # scales (and minima) of carried codes that float16 rounds, where there are any
    lossless: bool
    notes: tuple[str, ...]  # what a runtime of the file does otherwise


@dataclass(frozen=True)
class Planned:
    """One tensor of the file before it is written."""

    name: str
    shape: tuple[int, ...]
    chosen: Chosen
    rounded: int
    lossless: bool

    @property
    def bytes(self) -> int:
        return prod(self.shape[:-1]) * row_bytes(self.chosen.type, self.shape[-1])


def refuse_gguf(config: Any, tokenizer: Any, schemes: Mapping[str, QuantSpec], type: str) -> None:
    """Raise what `export_gguf` would raise for this model and these quantized weights, before there are any weights.

    RecipeError: the type does not exist, or would round codes again; UnsupportedModel: the family, a setting of the
    config, a tokenizer or codes that GGUF cannot hold; EnvironmentProblem: the package `gguf` is missing.
    """
    check_type(type)
    require_gguf()
    architecture_of(config)
    refuse_schemes(schemes, type)
    read_vocabulary(tokenizer, config.vocab_size)


def export_gguf(model: Model, folder: Path, *, type: str = AUTO) -> Exported:
    """Write `model-<TYPE>.gguf` into a folder; a type is one of `TYPES`.

    With `auto` codes are carried over and other weights keep their dtype; what float16 scales round of that is counted
    in `inexact`. A type by name is what llama.cpp's quantizer makes under it of dense weights (q4_k_m: its mix); codes
    are carried over there too, or refused. Holds one block of the model at a time; the file appears under its name when
    it is whole and on the disk. Raises what `refuse_gguf` says, and EnvironmentProblem for a full disk.
    """
    check_type(type)
    require_gguf()
    architecture = architecture_of(model.config)
    vocabulary = read_vocabulary(model.tokenizer, model.config.vocab_size)
    planned = _plan(model, architecture, type)
    label = type.upper() if type != AUTO else _commonest(planned)
    file = Path(folder) / f"model-{label}.gguf"
    with disk_errors(file, sum(tensor.bytes for tensor in planned)):
        file.parent.mkdir(parents=True, exist_ok=True)
        _write(model, architecture, vocabulary, planned, file, label)
    return Exported(
        folder=Path(folder),
        file=file,
        bytes=file.stat().st_size,
        types={tensor.name: tensor.chosen.type for tensor in planned},
        reasons={tensor.name: tensor.chosen.reason for tensor in planned if tensor.chosen.reason},
        inexact={tensor.name: tensor.rounded for tensor in planned if tensor.rounded},
        lossless=all(tensor.lossless for tensor in planned),
        notes=(*unsaid(model.config, architecture), *vocabulary.notes),
    )


def _plan(model: Model, architecture: Architecture, type: str) -> list[Planned]:
    """Every tensor with its type; blocks are opened only where there may be codes in them."""
    names = names_of(model, architecture)
    planned = [_planned(weight, 0, model.num_blocks, type) for weight in rest_weights(model, architecture, names)]
    holds_codes = model.is_quantized
    for k in range(model.num_blocks):
        with model.open_block(k) if holds_codes else nullcontext(model.anatomy(k)) as block:
            weights = block_weights(model, block, architecture, names)
            planned += [_planned(weight, k, model.num_blocks, type) for weight in weights]
    return planned


def _planned(weight: Weight, layer: int, num_layers: int, type: str) -> Planned:
    """The type of one tensor, and what it rounds; RecipeError or UnsupportedModel where that would be its codes."""
    width, spec = weight.shape[-1], weight.spec
    if spec is None:
        chosen = dense_type(weight.kind, width, type, weight.dtype, more_bits=use_more_bits(layer, num_layers))
        return Planned(weight.name, weight.shape, chosen, 0, chosen.type in ("F32", weight.dtype))
    refuse_scheme(weight.source, spec, type)
    if type in ("f32", "f16", "bf16"):
        return Planned(weight.name, weight.shape, Chosen(type.upper()), 0, type == "f32")
    scales, zeros = weight.grid()
    # Q4_1 alone rounds minima: not asked for by name, it is taken only where it is as exact as Q5_0
    minima_round = inexact(scales, zeros, spec, "Q5_0") == 0 < inexact(scales, zeros, spec, "Q4_1")
    chosen = carried_type(spec, width, type, minima_round=minima_round)
    rounded = inexact(scales, zeros, spec, chosen.type) if chosen.type in CARRIES else 0
    return Planned(weight.name, weight.shape, chosen, rounded, not rounded)


def _write(
    model: Model, architecture: Architecture, vocabulary: Vocabulary, planned: list[Planned], file: Path, label: str
) -> None:
    """The file under a temporary name, then under its own."""
    import gguf

    partial = file.with_name(f"{file.name}.partial")
    writer: Any = gguf.GGUFWriter(partial, architecture.name)
    try:
        name = Path(model.name).name or architecture.name
        licence = model.source.licence
        add_metadata(writer, model.config, architecture, name=name, licence=licence, file_type=label)
        writer.add_bool(LOSSLESS, all(tensor.lossless for tensor in planned))
        add_tokenizer(writer, vocabulary, model.tokenizer)
        for tensor in planned:
            number = gguf.GGMLQuantizationType[tensor.chosen.type]
            writer.add_tensor_info(tensor.name, tensor.shape, None, tensor.bytes, raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for weight, tensor in zip(_weights(model, architecture), planned, strict=True):
            assert (weight.name, weight.shape) == (tensor.name, tensor.shape)
            writer.write_tensor_data(encode(weight, tensor.chosen.type))
        writer.flush()
        os.fsync(writer.fout[0].fileno())
        writer.close()
        os.replace(partial, file)
    except BaseException:
        writer.close()
        partial.unlink(missing_ok=True)
        raise


def _weights(model: Model, architecture: Architecture) -> Iterator[Weight]:
    """The tensors with their values, in the order of the plan."""
    names = names_of(model, architecture)
    yield from rest_weights(model, architecture, names)
    for k in range(model.num_blocks):
        with model.open_block(k) as block:
            yield from block_weights(model, block, architecture, names)


def _commonest(planned: list[Planned]) -> str:
    """The type of most weights outside embedding and output."""
    inside = [tensor for tensor in planned if tensor.name.startswith("blk.")]
    count: Counter[str] = Counter()
    for tensor in inside:
        count[tensor.chosen.type] += prod(tensor.shape)
    return count.most_common(1)[0][0]
