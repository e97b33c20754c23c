"""Ask a model its tasks: texts to tokens, tokens to log-likelihoods, those to items."""

import contextlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import psutil

from compressor.calibration.stream import Progress
from compressor.errors import RecipeError
from compressor.metrics.tasks.encoding import encode, max_length
from compressor.metrics.tasks.generating import Generated, generate_greedily
from compressor.metrics.tasks.judging import Asked, judge, judge_written
from compressor.metrics.tasks.options import Task
from compressor.metrics.tasks.questions import Question, perturbed, read_task
from compressor.metrics.tasks.scoring import loglikelihoods, measure_noise
from compressor.metrics.tasks.summary import TasksResult, summarise
from compressor.models import Model
from compressor.reports.items import CLEAN

Perturb = Mapping[str, Callable[[str, int], str]]  # variant -> (prompt, seed) -> another prompt
NOISE_QUESTIONS = 16  # of each task, which are scored twice
FREE_SHARE = 0.8  # of the free memory, which a model may take while it writes


def measure_tasks(
    model: Model,
    tasks: Sequence[Task],
    *,
    batch_size: int | None = None,
    perturb: Perturb | None = None,
    progress: Progress | None = None,
) -> TasksResult:
    """Ask a model all tasks, in exact arithmetic; what is scored goes through the blocks together.

    `perturb` asks everything again with changed prompts; the seed that it is given follows from task and item.
    `batch_size` counts rows (default: as many as make 2,048 tokens). RecipeError for tasks of one name, and for
    whatever a file does not have.
    """
    if len({task.name for task in tasks}) < len(tasks):
        raise RecipeError(f"tasks need names of their own, got {', '.join(task.name for task in tasks)}")
    questions, notes = _questions(tasks, perturb or {})
    asked, cut = _asked(model, [question for question in questions if question.writing is None], batch_size, progress)
    noise = _noise(model, asked, batch_size, progress)
    items = {key(question): judge(question, pairs, model.tokenizer, noise[question.task]) for question, pairs in asked}
    to_write = [question for question in questions if question.writing is not None]
    reasons = _too_big(model, to_write)
    if not reasons:
        for question, generated in _written(model, to_write, progress):
            items[key(question)] = judge_written(question, generated)
            cut[question.task] += generated.cut
    notes += [
        f"{task}: {count} prompts lost tokens on the left, to fit the model" for task, count in cut.items() if count
    ]
    in_order = [items[key(question)] for question in questions if key(question) in items]
    return summarise(in_order, reasons=reasons, notes=notes)


def key(question: Question) -> tuple[str, str, int]:
    """What tells a question from all others of a measurement."""
    return question.task, question.variant, question.item


def _questions(tasks: Sequence[Task], perturb: Perturb) -> tuple[list[Question], list[str]]:
    clean = [question for task in tasks for question in read_task(task)]
    questions, notes = list(clean), []
    for variant, change in perturb.items():
        if variant == CLEAN:
            raise ValueError(f"{CLEAN!r} is what prompts are called that nothing changed")
        changed = []
        for question in clean:
            changed += perturbed([question], _seeded(change, question), variant)
        questions += changed
        same = {question.task for question in clean} - {question.task for question in changed}
        notes += [f"{name}: not asked as {variant!r}, no prompt stands apart from the choices" for name in sorted(same)]
    return questions, notes


def _seeded(change: Callable[[str, int], str], question: Question) -> Callable[[str], str]:
    seed = zlib.crc32(f"{question.task}:{question.item}".encode())
    return lambda prompt: change(prompt, seed)


def _asked(
    model: Model, questions: Sequence[Question], batch_size: int | None, progress: Progress | None
) -> tuple[list[tuple[Question, list[Asked]]], Counter[str]]:
    """Every question with its requests and what they scored; and how many prompts of each task were too long."""
    asks = [question.asks for question in questions]
    names = [f"task {question.task!r}, item {question.item}" for question in questions for _ in question.asks]
    requests = encode(model.tokenizer, [ask for part in asks for ask in part], max_length(model), names)
    scored = loglikelihoods(model, requests, batch_size=batch_size, progress=progress)
    pairs = list(zip(requests, scored, strict=True))
    cut: Counter[str] = Counter()
    asked, start = [], 0
    for question, part in zip(questions, asks, strict=True):
        own = pairs[start : start + len(part)]
        asked.append((question, own))
        cut[question.task] += any(request.cut for request, _ in own)
        start += len(part)
    return asked, cut


def _noise(
    model: Model, asked: Sequence[tuple[Question, list[Asked]]], batch_size: int | None, progress: Progress | None
) -> dict[str, float]:
    by_task: dict[str, list[list[Asked]]] = {}
    for question, pairs in asked:
        if question.variant == CLEAN:
            by_task.setdefault(question.task, []).append(pairs)
    sample = {}
    for task, parts in by_task.items():
        taken = parts[:: max(1, len(parts) // NOISE_QUESTIONS)][:NOISE_QUESTIONS]
        sample[task] = [pair for pairs in taken for pair in pairs]
    return measure_noise(model, sample, batch_size=5 if batch_size == 1 else 1, progress=progress) if sample else {}


def _too_big(model: Model, questions: Sequence[Question]) -> dict[str, str]:
    """Why tasks in which the model writes cannot be measured here, if so."""
    if not questions or not (model.is_stored or model.is_quantized):
        return {}
    # The skeleton of a stored model has its dense shapes, without data; a live model knows what its packed weights are
    numbers = sum(p.numel() for p in model.skeleton.parameters()) if model.is_stored else model.num_parameters()
    needed, free = numbers * model.dtype.itemsize, psutil.virtual_memory().available
    if needed <= FREE_SHARE * free:
        return {}
    reason = f"to write, all weights have to be in memory: {needed:,} bytes dense, {free:,} are free"
    return {question.task: reason for question in questions}


def _written(
    model: Model, questions: Sequence[Question], progress: Progress | None
) -> Iterator[tuple[Question, Generated]]:
    """What the model writes for each question, with dense weights in place of packed ones: exact arithmetic."""
    if not questions:
        return
    with contextlib.ExitStack() as opened:
        for k in range(model.num_blocks):
            opened.enter_context(model.open_block(k, dense=True))
        for (limit, stop), group in _alike(questions).items():
            written = generate_greedily(
                model.skeleton,
                model.tokenizer,
                [question.context for question in group],
                max_new_tokens=limit,
                stop=stop,
                longest=max_length(model),
                progress=progress,
            )
            yield from zip(group, written, strict=True)


def _alike(questions: Sequence[Question]) -> dict[tuple[int, tuple[str, ...]], list[Question]]:
    groups: dict[tuple[int, tuple[str, ...]], list[Question]] = {}
    for question in questions:
        assert question.writing is not None
        groups.setdefault((question.writing.max_new_tokens, question.writing.stop), []).append(question)
    return groups
