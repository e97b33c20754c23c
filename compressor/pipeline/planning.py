"""What a run is going to do and to take, from config and headers only, and what it refuses before any long work."""

import itertools
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from compressor.calibration import DEMO_TEXT, load_texts
from compressor.errors import EnvironmentProblem, RecipeError, UnsupportedModel
from compressor.exporters.sizes import exported_bytes
from compressor.metrics.energy import codecarbon_missing
from compressor.models import DEMO_MODELS, Model, load_model
from compressor.passes import PASSES
from compressor.pipeline.exporting import format_of
from compressor.pipeline.folder import text_digests
from compressor.quant import QuantSpec
from compressor.recipe import Onnx, Recipe
from compressor.recipe.options import EXPORTS, kind_of
from compressor.reports import LedgerRow

# Resident memory of Python, torch and transformers with the buffers of measuring (demo/tiny-moe peaks at 1.2 to 1.5 GB)
BASE_MEMORY = 1_300_000_000
# Share of a bare product's speed that a walk reaches, forwards and statistics together (measured on demo/tiny-moe)
WALK_EFFICIENCY = 0.12


@dataclass(frozen=True)
class Plan:
    """The passes with what each does to how many weights, and the bytes and seconds that the run should take."""

    model: str
    parameters: int
    source_bytes: int
    passes: tuple[dict[str, Any], ...]
    export_bytes: int | None
    memory_bytes: int
    disk_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()
    rows: tuple[LedgerRow, ...] = field(default=(), repr=False)

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "parameters": self.parameters,
            "source_bytes": self.source_bytes,
            "passes": list(self.passes),
            "export_bytes": self.export_bytes,
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
            "seconds": round(self.seconds),
            "notes": list(self.notes),
        }

    def to_text(self) -> str:
        lines = [f"{self.model}: {self.parameters / 1e6:,.1f} M parameters, {_size(self.source_bytes)}"]
        for i, step in enumerate(self.passes, 1):
            done = ", ".join(f"{count / 1e6:,.1f} M {action}" for action, count in step["actions"].items())
            lines.append(f"  {i}. {step['name']}: {done}")
        if self.export_bytes is not None:
            lines.append(f"  model/: {_size(self.export_bytes)} expected")
        lines.append(
            f"  memory about {_size(self.memory_bytes)}, disk about {_size(self.disk_bytes)}, "
            f"time about {max(1, round(self.seconds / 60))} min"
        )
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def check_room(self, out: Path) -> None:
        """EnvironmentProblem if the disk does not hold what the run needs."""
        folder = out.absolute()
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        held = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) if out.is_dir() else 0
        if free + held < self.disk_bytes:
            raise EnvironmentProblem(
                f"{out}: the run needs about {_size(self.disk_bytes)} of disk, {_size(free)} are free"
            )


def make_plan(recipe: Recipe, model: Model) -> Plan:
    """Plan every pass on the model's empty skeleton, which is used up; raises at once what the run would raise."""
    _check_order(recipe)
    text_digests(recipe)  # a missing text is an error now, not after an hour
    latency = recipe.evaluate.latency
    if latency is not None and latency.energy is not None and (missing := codecarbon_missing()):
        raise EnvironmentProblem(f"evaluate.latency.energy: {missing}")
    parameters, source_bytes = model.num_parameters(), _source_bytes(model)
    largest = _largest_block(model)
    flops, seconds, passes, notes = 0.0, 0.0, [], _notes(recipe, model)
    schemes: dict[str, LedgerRow] = {}
    specs: dict[str, QuantSpec] = {}
    rows: list[LedgerRow] = []
    for step in recipe.passes:
        options: Any = step
        rows = options.plan(model)
        actions: Counter[str] = Counter()
        for row in rows:
            actions[row.action] += row.parameters
            if row.action == "quantized":
                schemes[row.name] = row
                specs[row.name] = QuantSpec(int(row.bits), row.group_size, options.symmetric, options.activation_bits)
        _check_experts(recipe, rows, model)
        notes += sorted({f"{kind_of(step, PASSES)}: {row.reason}" for row in rows if "does not divide" in row.reason})
        flops += _flops(options, recipe, parameters)
        seconds += _solve_seconds(options, model)
        options.preview(model)
        passes.append({"name": kind_of(step, PASSES), "actions": dict(actions)})
    for target in recipe.export:
        format_of(target).refuse(target, model, specs)
    windows = recipe.evaluate.windows * recipe.evaluate.length * _num_texts(recipe)
    measured = len(recipe.passes) + 1 if recipe.evaluate.when == "each" else 2
    flops += 2.0 * parameters * windows * measured * 2
    streams = (
        3 * recipe.calibration.samples * recipe.calibration.length * model.config.hidden_size * model.dtype.itemsize
    )
    memory = BASE_MEMORY + _rest_bytes(model) + 3 * largest + streams
    if recipe.memory is not None and memory > recipe.memory:
        raise EnvironmentProblem(f"memory: about {_size(memory)} are needed, the recipe allows {_size(recipe.memory)}")
    if memory > (there := psutil.virtual_memory().total):
        raise EnvironmentProblem(f"memory: about {_size(memory)} are needed, the machine has {_size(there)}")
    export = exported_bytes(model, schemes) if "safetensors" in _formats(recipe) else None
    exports = sum(_about_bytes(target, model, schemes) for target in recipe.export)
    return Plan(
        model=recipe.model,
        parameters=parameters,
        source_bytes=source_bytes,
        passes=tuple(passes),
        export_bytes=export,
        memory_bytes=memory,
        disk_bytes=source_bytes * min(2, len(recipe.passes)) + 2 * streams // 3 + exports,
        seconds=flops / (WALK_EFFICIENCY * _flops_per_second()) + seconds + 30 * measured,
        notes=tuple(notes),
        rows=tuple(rows),
    )


def check(target: Recipe | str) -> Plan:
    """Plan a recipe, or describe a model without one."""
    if isinstance(target, Recipe):
        return make_plan(target, load_model(target.model, dtype=target.dtype))
    model = load_model(target)
    size = _source_bytes(model)
    return Plan(
        model=target, parameters=model.num_parameters(), source_bytes=size, passes=(), export_bytes=None,
        memory_bytes=BASE_MEMORY + _rest_bytes(model) + _largest_block(model), disk_bytes=0, seconds=0.0,
        notes=(f"{model.config.model_type}, {model.num_blocks} blocks, {model.dtype}",),
    )  # fmt: skip


def _check_order(recipe: Recipe) -> None:
    """Nothing can follow `quantize`: rounding twice, or training integers, is not what anyone means."""
    kinds = [kind_of(step, PASSES) for step in recipe.passes]
    for before, after in itertools.pairwise(kinds):
        if before == "quantize":
            raise RecipeError(f"passes: {after!r} comes after 'quantize'; put 'quantize' last")
    for step in recipe.passes:
        asymmetric = kind_of(step, PASSES) == "quantize" and not step.symmetric  # type: ignore[attr-defined]
        if asymmetric and "safetensors" in _formats(recipe):
            raise UnsupportedModel(
                "quantize.symmetric: false cannot be exported to safetensors: stock transformers with "
                "compressed-tensors does not load zero points (docs/decisions.md); use symmetric: true, or export to "
                "another format"
            )


def _check_experts(recipe: Recipe, rows: list[LedgerRow], model: Model) -> None:
    """Dense experts beside quantized layers do not load: transformers 5.17 to 5.23 look for packed ones only."""
    if "safetensors" not in _formats(recipe):
        return
    quantized = {row.name for row in rows if row.action == "quantized"}
    stacks = [stack.name for k in range(model.num_blocks) if (stack := model.anatomy(k).experts)]
    if quantized and stacks and f"{stacks[0]}.down_proj" not in quantized:
        raise UnsupportedModel(
            f"quantize.ignore: {stacks[0]} would stay dense beside quantized layers, which stock transformers does not "
            "load from safetensors (docs/decisions.md); quantize the experts too, or export to something else"
        )


def _formats(recipe: Recipe) -> set[str]:
    return {kind_of(target, EXPORTS) for target in recipe.export}


def _about_bytes(target: Any, model: Model, schemes: dict[str, LedgerRow]) -> int:
    """What an export takes on the disk: dense weights in the format's own precision, packed ones as they are."""
    if isinstance(target, Onnx) and not schemes:
        return model.num_parameters() * (4 if target.dtype == "float32" else 2)
    return exported_bytes(model, schemes)


def _notes(recipe: Recipe, model: Model) -> list[str]:
    notes = []
    data = {recipe.calibration.data} | {getattr(step, "data", recipe.calibration.data) for step in recipe.passes}
    if DEMO_TEXT in data and recipe.model not in DEMO_MODELS:
        notes.append("calibration: demo/text is small and general; give text like what the model will see")
    for step in recipe.passes:
        if getattr(step, "structure", None) == "2:4":
            notes.append("prune: the mask is 2:4, but vLLM no longer has kernels for it, and the file stays dense")
    return notes


def _flops(step: Any, recipe: Recipe, parameters: int) -> float:
    calibration = getattr(step, "calibration", None) or recipe.calibration
    if kind_of(step, PASSES) == "distill":
        return 8.0 * parameters * step.tokens
    return 2.0 * parameters * calibration.samples * calibration.length * 3


def _solve_seconds(step: Any, model: Model) -> float:
    """GPTQ's loop over columns: about 70 microseconds each on a CPU."""
    if getattr(step, "method", None) != "gptq":
        return 0.0
    columns = 0
    for k in range(model.num_blocks):
        block = model.anatomy(k)
        columns += sum(sites[0].shape[1] for sites in block.shared_inputs().values())
        if block.experts:
            columns += sum(shape[0] * shape[-1] for shape in block.experts.shapes().values())
    return 7e-5 * columns


def _flops_per_second() -> float:
    """Speed of a plain product in the usual dtype here, now."""
    x = torch.randn(512, 1024, dtype=torch.bfloat16)
    torch.mm(x, x.T)
    start = time.perf_counter()
    for _ in range(5):
        torch.mm(x, x.T)
    return 5 * 2 * 512 * 512 * 1024 / (time.perf_counter() - start)


def _source_bytes(model: Model) -> int:
    assert model.reader is not None
    return sum(model.reader.bytes(key) for key in model.reader.keys())  # noqa: SIM118


def _largest_block(model: Model) -> int:
    sizes = (sum(p.numel() for p in block.parameters()) for block in model.blocks)
    return max(sizes) * model.dtype.itemsize


def _rest_bytes(model: Model) -> int:
    return sum(tensor.nbytes for tensor in model.rest().values())


def _num_texts(recipe: Recipe) -> int:
    text = recipe.evaluate.text
    return len(text) if isinstance(text, dict) else len(load_texts(text, "held_out"))


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000  # type: ignore[assignment]
    raise AssertionError
