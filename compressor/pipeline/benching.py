"""`compress bench`: how fast a model is beside the one that it came from, in turns, and what each takes."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from compressor.calibration import Progress
from compressor.metrics import describe_environment, measure_memory
from compressor.metrics.bootstrap import mapped
from compressor.models import Model
from compressor.pipeline.costs import add_peaks, measure_speed
from compressor.pipeline.onnx_subject import OnnxSubject
from compressor.pipeline.sides import REPORT, Side, find_side, original_of
from compressor.recipe import Latency
from compressor.reports import Latency as LatencyFigures
from compressor.reports import Memory
from compressor.reports.bench import BYTES, Bench, Subject

NO_BASELINE = "none"
# Peaks take a fresh process that loads the model once more; beyond this many bytes of weights that is not cheap.
PROBED_BYTES = 4 * 10**9


def bench(
    model: str | Path,
    baseline: str | Path | None = None,
    *,
    batch: Sequence[int] = (1, 8),
    prompt: int = 128,
    generate: int = 32,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Bench:
    """Time a model in turns with a baseline: reading `prompt` tokens, then `generate` greedy steps, at each batch size.

    `model` is a run's folder or its `model/` or `onnx/`, an ONNX folder, or a model by name. The baseline is by default
    the model that the run's manifest names as its source, in its own dtype; "none" for none. `threads` holds for torch
    and onnxruntime. IntegrityError for a run whose files were changed.
    """
    wanted = Latency(batch=tuple(batch), prompt=prompt, generate=generate)
    side = find_subject(model)
    name, notes = baseline_of(side, None if baseline is None else str(baseline))
    with _threads(threads):
        subject = side.load()
        reference = None if name is None else find_side(name).load()
        latency = measure_speed(subject, reference, wanted, progress=progress)
        used = latency.extra.get("threads", torch.get_num_threads())
        if used != torch.get_num_threads() and any(isinstance(one, OnnxSubject) for one in (subject, reference)):
            notes = (*notes, f"onnxruntime computed with {torch.get_num_threads()} threads, torch with {used}")
    return Bench(
        model=_described(side.name, subject, wanted),
        baseline=None if reference is None else _described(str(name), reference, wanted),
        latency=_with_tokens_per_s(latency),
        notes=notes,
        environment=describe_environment(),
    )


def find_subject(name: str | Path) -> Side:
    """A run, one of the folders in it (`model/`, `onnx/`), or a bare model; the first two know what they came from."""
    path = Path(name).expanduser()
    run = path.absolute().parent
    if path.is_dir() and not (path / REPORT).is_file() and (run / REPORT).is_file():
        return replace(find_side(run), name=str(name), model=str(path))
    return find_side(name)


def baseline_of(side: Side, wanted: str | None) -> tuple[str | None, tuple[str, ...]]:
    """The name of the model to time beside a side, and a note where there is none although nobody said so."""
    if wanted is not None:
        return (None if wanted == NO_BASELINE else wanted), ()
    if side.source is None:
        return None, (f"{side.name} is no run, so nothing says what it came from: give --baseline to compare",)
    original = original_of(side)
    if original.model is None:
        return None, (f"the run's source, {side.source['name']}, is not here: give --baseline to compare",)
    return original.model, ()


def _described(name: str, model: Model, wanted: Latency) -> Subject:
    kind = "onnx" if isinstance(model, OnnxSubject) else "packed" if model.is_quantized else "dense"
    return Subject(name=name, kind=kind, dtype=str(model.dtype).removeprefix("torch."), memory=_memory(model, wanted))


def _memory(model: Model, wanted: Latency) -> Memory:
    memory = measure_memory(model, files=model.path)
    if model.weight_bytes() <= PROBED_BYTES:
        return add_peaks(memory, model.path, wanted)
    reason = f"peaks are measured of models up to {PROBED_BYTES:,} bytes of weights"
    return replace(memory, extra=dict.fromkeys(BYTES), reasons={**memory.reasons, **dict.fromkeys(BYTES, reason)})


def _with_tokens_per_s(latency: LatencyFigures) -> LatencyFigures:
    """With what the baseline decodes in a second, as it is said of the model."""
    theirs = latency.extra.get("baseline")
    if not isinstance(theirs, dict):
        return latency
    speeds = {
        batch: None if step_ms is None else mapped(step_ms, partial(_per_second, int(batch)))
        for batch, step_ms in theirs["decode_ms_per_token"].items()
    }
    return replace(latency, extra={**latency.extra, "baseline": {**theirs, "tokens_per_s": speeds}})


def _per_second(batch: int, step_ms: float) -> float:
    return 1000 * batch / step_ms


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many threads for torch, and for what onnxruntime opens meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
