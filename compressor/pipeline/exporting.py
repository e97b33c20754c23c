"""The formats that a model is written in: how each is planned, written, proven, and where it lies in a run's folder."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.calibration import DEMO_TEXT, load_texts, windows
from compressor.errors import UnsupportedModel
from compressor.exporters import compare_reloaded, export_safetensors
from compressor.exporters.gguf import compare_gguf, export_gguf, refuse_gguf
from compressor.exporters.onnx import (
    ENCODERS,
    compare_encoder,
    compare_onnx,
    compare_with_torch,
    export_encoder,
    export_onnx,
    export_with_torch,
    refuse_onnx,
)
from compressor.exporters.safetensors import Exported, copy_files
from compressor.models import FAMILIES, Model, load_tokenizer, read_model_type, resolve
from compressor.quant import QuantSpec
from compressor.recipe import Gguf, Onnx, Safetensors

PARITY_WINDOWS, PARITY_LENGTH = 2, 64
PARITY_TEXT = 256  # tokens on which a graph is compared with its model


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


def is_modelled(name: str | Path) -> bool:
    """Whether passes and our own writers know the family of a local model; what is no local model counts as known."""
    folder = Path(name)
    known = (folder / "model" / "config.json").exists() or not (folder / "config.json").exists()
    return known or read_model_type(folder) in FAMILIES


def export_unmodelled(name: str, options: Onnx, out: Path) -> Written:
    """Write a model of a family that passes do not know as ONNX, in float32: an encoder, or a decoder through torch.

    Nothing of it is quantized. Raises UnsupportedModel for options that only our own decoder graphs have.
    """
    if options != Onnx():
        raise UnsupportedModel(f"{name}: a model of this family is written in float32, without options")
    source = resolve(name).path
    staged = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        if read_model_type(source) in ENCODERS:
            exported = export_encoder(source, staged)
            parity = compare_encoder(source, staged)
        else:
            exported, parity = _through_torch(source, staged)
        staged.rename(out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return Written(exported.bytes, parity)


def _through_torch(source: Path, folder: Path) -> tuple[Exported, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    module: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    exported = export_with_torch(module.eval(), module.config, folder)
    copy_files(source, folder)
    text = next(iter(load_texts(DEMO_TEXT, "held_out").values()))
    ids = windows(text, load_tokenizer(source), PARITY_TEXT, 1)
    return exported, compare_with_torch(module, folder, ids.flatten())


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
    if settings.dtype == "float32":
        exported = export_onnx(model, folder, settings)
        return Written(exported.bytes, compare_onnx(model, folder, ids_NT.flatten(), settings))
    # The CPU has no kernels for a 16-bit graph: its float32 twin, from the same writer and codes, is what can be proven
    twin, exact = folder.with_name(f"{folder.name}.float32"), replace(settings, dtype="float32")
    try:
        export_onnx(model, twin, exact)
        parity = compare_onnx(model, twin, ids_NT.flatten(), exact)
    finally:
        shutil.rmtree(twin, ignore_errors=True)
    return Written(export_onnx(model, folder, settings).bytes, parity | {"of": "its float32 twin"})


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
