"""What `evaluate` asks beside text: tasks, perturbed prompts, people in sentences, writing, refusals."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from compressor.calibration import Progress, load_texts, windows
from compressor.errors import RecipeError
from compressor.metrics.behaviour import (
    VARIANTS,
    Figures,
    WindowScores,
    generation_change,
    generation_health,
    joined,
    ood_figures,
    preference,
    preference_shift,
    read_refusal_prompts,
    read_templates,
    refusal_figures,
    refusal_items,
    robustness_gaps,
    score_swaps,
    swaps,
    template_bias,
)
from compressor.metrics.tasks import (
    TasksResult,
    encode,
    flips,
    generate_greedily,
    loglikelihoods,
    max_length,
    measure_tasks,
    summarise,
)
from compressor.models import Model
from compressor.recipe import Evaluate
from compressor.reports import Behaviour, Estimate, TaskItem
from compressor.reports.items import PREFERENCE


@dataclass(frozen=True)
class Evidence:
    """What a model did, raw: a later one is compared with it, pair by pair.

    `swaps` are the log-odds of the bias templates, `written` the tokens that followed each prompt, `replies` the
    answers to the refusal prompts, `texts` {text: {score: by window}} for what is compared over texts.
    """

    items: tuple[TaskItem, ...] = ()
    swaps: tuple[float, ...] = ()
    written: tuple[tuple[int, ...], ...] = ()
    replies: tuple[str, ...] = ()
    texts: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For the journal of a run."""
        return {
            "items": [item.to_json() for item in self.items],
            "swaps": list(self.swaps),
            "written": [list(tokens) for tokens in self.written],
            "replies": list(self.replies),
            "texts": {text: {name: list(scores) for name, scores in by.items()} for text, by in self.texts.items()},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Read what `to_json` gives."""
        return cls(
            items=tuple(map(TaskItem.from_json, data["items"])),
            swaps=tuple(data["swaps"]),
            written=tuple(map(tuple, data["written"])),
            replies=tuple(data["replies"]),
            texts=data["texts"],
        )


@dataclass(frozen=True)
class SuiteResult:
    """Scores of the tasks, the behaviour section of a measurement, and the evidence behind both."""

    tasks: dict[str, Estimate | None] | None
    task_reasons: dict[str, str]
    behaviour: Behaviour
    evidence: Evidence


def measure_suite(
    model: Model,
    evaluate: Evaluate,
    baseline: Evidence | None,
    *,
    texts: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    progress: Progress | None = None,
) -> SuiteResult:
    """Ask a model everything that `evaluate` holds beside its texts; against a baseline where there is one.

    `texts` are the scores by window of texts that were measured already, for the comparison with foreign text.
    """
    asked = _asked(model, evaluate, progress)
    replies = _replies(model, evaluate, progress)
    evidence = Evidence(
        items=(*asked.items, *_refusal_items(evaluate, replies)),
        swaps=tuple(_swaps(model, evaluate, progress)),
        written=tuple(_written(model, evaluate, progress)),
        replies=tuple(replies),
        texts=texts or {},
    )
    groups = _groups(evaluate, evidence, baseline, model)
    figures: dict[str, Any] = {name: part.values for name, part in groups.items()}
    reasons = dict(joined(groups).reasons)
    if asked.items:
        figures |= {"calibration": asked.calibration or None, "slices": asked.slices or None}
        if baseline is not None:
            figures["flips"] = flips(baseline.items, evidence.items) or None
        extra: dict[str, Any] = {
            "reliability": {task: [part.to_json() for part in bins] for task, bins in asked.reliability.items()},
            "cloze_perplexity": asked.perplexity,
            "notes": list(asked.notes),
        }
        figures["extra"] = {name: value for name, value in extra.items() if value}
    names = [task.name for task in evaluate.tasks]
    return SuiteResult(
        tasks={name: asked.tasks.get(name) for name in names if name not in asked.bias} if names else None,
        task_reasons={f"tasks.{task}": why for task, why in asked.reasons.items()},
        behaviour=Behaviour(**figures, reasons=reasons),
        evidence=evidence,
    )


def _asked(model: Model, evaluate: Evaluate, progress: Progress | None) -> TasksResult:
    """The tasks, and once more with perturbed prompts those that robustness names."""
    robustness = evaluate.robustness
    if robustness is None:
        return measure_tasks(model, evaluate.tasks, progress=progress)
    if unknown := set(robustness.tasks or ()) - {task.name for task in evaluate.tasks}:
        raise RecipeError(
            f"evaluate.robustness.tasks: there is no task {min(unknown)!r}; "
            f"evaluate.tasks has {', '.join(task.name for task in evaluate.tasks) or 'none'}"
        )
    chosen = [task for task in evaluate.tasks if robustness.tasks is None or task.name in robustness.tasks]
    others = [task for task in evaluate.tasks if task not in chosen]
    change = {name: _seeded(VARIANTS[name], robustness.seed) for name in robustness.variants}
    changed = measure_tasks(model, chosen, perturb=change, progress=progress)
    plain = measure_tasks(model, others, progress=progress)
    return summarise(
        [*changed.items, *plain.items],
        reasons={**changed.reasons, **plain.reasons},
        notes=(*changed.notes, *plain.notes),
    )


def _seeded(change: Callable[[str, int], str], seed: int) -> Callable[[str, int], str]:
    return lambda prompt, own: change(prompt, own + seed)


def _groups(evaluate: Evaluate, evidence: Evidence, baseline: Evidence | None, model: Model) -> dict[str, Figures]:
    groups: dict[str, Figures] = {}
    preferences = [item for item in evidence.items if item.measures == PREFERENCE]
    bias: dict[str, Figures] = {}
    if preferences:
        own = [item for item in baseline.items if item.measures == PREFERENCE] if baseline else None
        bias["preference"] = preference(preferences) if own is None else preference_shift(own, preferences)
    if evaluate.bias is not None:
        asked = swaps(read_templates(evaluate.bias.templates))
        bias["templates"] = template_bias(asked, evidence.swaps, baseline.swaps if baseline else None)
    if bias:
        groups["bias"] = joined(bias)
    if evaluate.robustness is not None and baseline is not None:
        groups["robustness"] = robustness_gaps(baseline.items, evidence.items)
    if evaluate.generation is not None:
        limit, eos = evaluate.generation.max_new_tokens, model.tokenizer.eos_token_id
        parts = {"health": generation_health(evidence.written, eos, limit)}
        if baseline is not None:
            parts["change"] = generation_change(baseline.written, evidence.written, eos, limit)
        groups["generation"] = joined(parts)
    if evaluate.refusals is not None:
        prompts = read_refusal_prompts(evaluate.refusals.prompts)
        groups["refusals"] = refusal_figures(prompts, evidence.replies, baseline.replies if baseline else None)
    if evaluate.ood is not None:
        groups["ood"] = _ood(evaluate, evidence, baseline)
    return groups


def _ood(evaluate: Evaluate, evidence: Evidence, baseline: Evidence | None) -> Figures:
    assert evaluate.ood is not None
    foreign = evaluate.ood.text

    def split(texts: Mapping[str, Mapping[str, Sequence[float]]]) -> tuple[WindowScores, dict[str, WindowScores]]:
        inside = [scores for name, scores in texts.items() if name not in foreign]
        together = {key: [value for scores in inside for value in scores[key]] for key in inside[0]}
        return _window_scores(together), {name: _window_scores(texts[name]) for name in foreign}

    within, outside = split(evidence.texts)
    before = split(baseline.texts) if baseline else (None, None)
    return ood_figures(within, outside, baseline_within=before[0], baseline_foreign=before[1])


def _window_scores(scores: Mapping[str, Sequence[float]]) -> WindowScores:
    kl = scores.get("kl")
    return WindowScores(
        torch.tensor(kl) if kl is not None else None,
        {name: torch.tensor(values) for name, values in scores.items() if name != "kl"},
    )


def _swaps(model: Model, evaluate: Evaluate, progress: Progress | None) -> list[float]:
    if evaluate.bias is None:
        return []

    def loglik(asks: Sequence[tuple[str, str]]) -> list[float]:
        requests = encode(model.tokenizer, asks, max_length(model))
        return [scored.loglik for scored in loglikelihoods(model, requests, progress=progress)]

    return [float(score) for score in score_swaps(swaps(read_templates(evaluate.bias.templates)), loglik)]


def _written(model: Model, evaluate: Evaluate, progress: Progress | None) -> list[tuple[int, ...]]:
    wanted = evaluate.generation
    if wanted is None:
        return []
    prompts: list[str] = []
    for content in load_texts(wanted.text, "held_out").values():
        ids = windows(content, model.tokenizer, wanted.prompt_tokens, wanted.prompts)
        prompts += [model.tokenizer.decode(row) for row in ids]
    if not prompts:
        raise RecipeError(f"evaluate.generation.text: {wanted.text!r} holds less than {wanted.prompt_tokens} tokens")
    step = max(1, len(prompts) // wanted.prompts)  # a few of each text
    return _generated(model, prompts[::step][: wanted.prompts], wanted.max_new_tokens, progress)


def _replies(model: Model, evaluate: Evaluate, progress: Progress | None) -> list[str]:
    wanted = evaluate.refusals
    if wanted is None:
        return []
    prompts = [_as_chat(model.tokenizer, entry.prompt) for entry in read_refusal_prompts(wanted.prompts)]
    tokens = _generated(model, prompts, wanted.max_new_tokens, progress)
    return [model.tokenizer.decode(row, skip_special_tokens=True) for row in tokens]


def _as_chat(tokenizer: Any, prompt: str) -> str:
    """As an assistant is asked, where the model has a template for that."""
    if not getattr(tokenizer, "chat_template", None):
        return f"{prompt}\n"
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )


def _generated(model: Model, prompts: Sequence[str], limit: int, progress: Progress | None) -> list[tuple[int, ...]]:
    with model.live() as module:
        written = generate_greedily(
            module, model.tokenizer, prompts, max_new_tokens=limit, longest=max_length(model), progress=progress
        )
    return [one.tokens for one in written]


def _refusal_items(evaluate: Evaluate, replies: Sequence[str]) -> list[TaskItem]:
    if evaluate.refusals is None:
        return []
    return refusal_items(read_refusal_prompts(evaluate.refusals.prompts), replies)
