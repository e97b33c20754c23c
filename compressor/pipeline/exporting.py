"""The formats that a model is written in: how each is planned, written, proven, and where it lies in a run's folder."""

import errno
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.calibration import DEMO_TEXT, load_texts, windows
from compressor.errors import EnvironmentProblem, UnsupportedModel
from compressor.exporters import compare_reloaded, export_safetensors
from compressor.exporters.gguf import compare_gguf, export_gguf, refuse_gguf
from compressor.exporters.onnx import (
    ENCODERS,
    Rounding,
    compare_encoder,
    compare_onnx,
    compare_with_torch,
    export_encoder,
    export_onnx,
    export_with_torch,
    refuse_onnx,
    round_with_torch,
)
from compressor.exporters.safetensors import Exported, copy_files
from compressor.metrics import file_bytes
from compressor.models import FAMILIES, Model, load_tokenizer, read_model_type, resolve
from compressor.quant import QuantSpec
from compressor.recipe import Gguf, Onnx, Safetensors

PARITY_WINDOWS, PARITY_LENGTH = 2, 64
FULL = (errno.ENOSPC, errno.EDQUOT)
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
    with _appearing(out, staged or out.with_name(f".{out.name}.partial")) as folder:
        return format_of(options).write(options, model, folder, ids_NT)


@contextmanager
def _appearing(out: Path, staged: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name, and the place of what was there, when nothing went wrong."""
    shutil.rmtree(staged, ignore_errors=True)
    try:
        yield staged
        shutil.rmtree(out, ignore_errors=True)
        staged.rename(out)
    except OSError as error:
        if error.errno not in FULL:
            raise
        written, free = file_bytes(staged), shutil.disk_usage(staged.parent).free
        raise EnvironmentProblem(
            f"{out}: the disk is full: {written:,} bytes of it were written, {free:,} are free"
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def is_modelled(name: str | Path) -> bool:
    """Whether passes and our own writers know the family of a local model; what is no local model counts as known."""
    folder = Path(name)
    known = (folder / "model" / "config.json").exists() or not (folder / "config.json").exists()
    return known or read_model_type(folder) in FAMILIES


def export_unmodelled(name: str, options: Onnx, out: Path) -> Written:
    """Write a model of a family that passes do not know as ONNX: an encoder, or a decoder through torch.

    Its weights stay float32 unless `weights` rounds them, which needs no calibration. Raises UnsupportedModel for
    options that do nothing here.
    """
    _refuse_unused(name, options)
    source, rounding = resolve(name).path, options.rounding()
    with _appearing(out, out.with_name(f".{out.name}.partial")) as folder:
        if read_model_type(source) in ENCODERS:
            if options.head is not None:
                raise UnsupportedModel(f"{name} is an encoder; it has no head to store as {options.head}")
            exported = export_encoder(source, folder, rounding=rounding)
            return Written(exported.bytes, compare_encoder(source, folder, rounding))
        exported, parity = _through_torch(source, folder, rounding)
        return Written(exported.bytes, parity)


def _refuse_unused(name: str, options: Onnx) -> None:
    default = Onnx()
    for option in ("dtype", "embedding"):
        if getattr(options, option) != getattr(default, option):
            raise UnsupportedModel(f"{name}: {option} is for families that passes know; this one is written in float32")
    if options.weights is None and options.accuracy_level != default.accuracy_level:
        raise UnsupportedModel(f"{name}: accuracy_level is for rounded weights; give weights=int4 or weights=int8")


def _through_torch(source: Path, folder: Path, rounding: Rounding | None) -> tuple[Exported, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    module: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    exported = export_with_torch(module.eval(), module.config, folder)
    copy_files(source, folder)
    text = next(iter(load_texts(DEMO_TEXT, "held_out").values()))
    ids = windows(text, load_tokenizer(source), PARITY_TEXT, 1).flatten()
    parity = compare_with_torch(module, folder, ids)
    if rounding is None:
        return exported, parity
    exported, rounded = round_with_torch(module, folder, rounding, ids)
    return exported, rounded | {"float32": parity}


def measured_files(out: Path, formats: Iterable[Any]) -> Path | None:
    """What the figures of a run's files are of, where it writes several formats: those nearest to the model itself."""
    written = {format_of(options).folder for options in formats}
    return next((out / format.folder for format in FORMATS.values() if format.folder in written), None)


def format_of(options: Any) -> Format:
    """What to do for some export options."""
    return FORMATS[type(options)]


def _few(ids_NT: Tensor) -> Tensor:
    return ids_NT[:PARITY_WINDOWS, :PARITY_LENGTH].contiguous()


def _write_safetensors(options: Safetensors, model: Model, folder: Path, ids_NT: Tensor) -> Written:
    exported = export_safetensors(model, folder, shard_bytes=options.shard)
    return Written(exported.bytes, compare_reloaded(model, folder, _few(ids_NT)))


def _refuse_onnx(options: Onnx, model: Model, _: Mapping[str, QuantSpec]) -> None:
    if options.weights is not None:
        raise UnsupportedModel(
            f"{model.name}: `weights` rounds families that passes do not know; this one is quantized by a pass, "
            f"`quantize: {{bits: {options.weights[3:]}}}` in a recipe for `compress run`, and exported with its codes"
        )
    refuse_onnx(model, options.settings())


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
    about = {
        "file": exported.file.name,
        "lossless": exported.lossless,
        "notes": list(exported.notes),
        "types": exported.types,
        "reasons": exported.reasons,
        "inexact": exported.inexact,
    }
    return Written(exported.bytes, parity | about)


FORMATS: dict[type, Format] = {
    Safetensors: Format("model", lambda *_: None, _write_safetensors),
    Onnx: Format("onnx", _refuse_onnx, _write_onnx),
    Gguf: Format(
        "gguf",
        lambda options, model, schemes: refuse_gguf(model.config, model.tokenizer, schemes, options.type),
        _write_gguf,
    ),
}
