"""The formats that a model is written in: how each is planned, written, proven, and where it lies in a run's folder."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor.exporters import compare_reloaded, export_safetensors
from compressor.exporters.gguf import compare_gguf, export_gguf, refuse_gguf
from compressor.exporters.onnx import compare_onnx, export_onnx, refuse_onnx
from compressor.models import Model
from compressor.quant import QuantSpec
from compressor.recipe import Gguf, Onnx, Safetensors

PARITY_WINDOWS, PARITY_LENGTH = 2, 64


@dataclass(frozen=True)
class Written:
    """One export that is complete: its bytes, how near it is to the live model, and what a user should know of it."""

    bytes: int
    parity: dict[str, Any]


@dataclass(frozen=True)
class Format:
    """`refuse` raises before any work what `write` would raise; `write` fills a folder and loads it back."""

    folder: str
    refuse: Callable[[Any, Model, Mapping[str, QuantSpec]], None]
    write: Callable[[Any, Model, Path, Tensor], Written]


def write_export(options: Any, model: Model, out: Path, ids_NT: Tensor, staged: Path | None = None) -> Written:
    """Write a model into a folder, which appears under its name when it was loaded back and is right.

    `ids_NT` are token windows on which both are compared, `staged` is where it lies until then (on the same disk).
    Raises IntegrityError where they differ.
    """
    staged = staged or out.with_name(f".{out.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        written = format_of(options).write(options, model, staged, ids_NT)
        shutil.rmtree(out, ignore_errors=True)
        staged.rename(out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return written


def format_of(options: Any) -> Format:
    """What to do for some export options."""
    return FORMATS[type(options)]


def _few(ids_NT: Tensor) -> Tensor:
    return ids_NT[:PARITY_WINDOWS, :PARITY_LENGTH].contiguous()


def _write_safetensors(options: Safetensors, model: Model, folder: Path, ids_NT: Tensor) -> Written:
    exported = export_safetensors(model, folder, shard_bytes=options.shard)
    return Written(exported.bytes, compare_reloaded(model, folder, _few(ids_NT)))


def _write_onnx(options: Onnx, model: Model, folder: Path, ids_NT: Tensor) -> Written:
    settings = options.settings()
    exported = export_onnx(model, folder, settings)
    return Written(exported.bytes, compare_onnx(model, folder, ids_NT.flatten(), settings))


def _write_gguf(options: Gguf, model: Model, folder: Path, ids_NT: Tensor) -> Written:
    exported = export_gguf(model, folder, type=options.type)
    parity: dict[str, Any] = compare_gguf(model, exported.file, _few(ids_NT))
    about = {"file": exported.file.name, "lossless": exported.lossless, "notes": list(exported.notes)}
    return Written(exported.bytes, parity | about)


FORMATS: dict[type, Format] = {
    Safetensors: Format("model", lambda *_: None, _write_safetensors),
    Onnx: Format("onnx", lambda options, model, _: refuse_onnx(model, options.settings()), _write_onnx),
    Gguf: Format("gguf", lambda options, model, schemes: refuse_gguf(model.config, schemes, options.type), _write_gguf),
}
