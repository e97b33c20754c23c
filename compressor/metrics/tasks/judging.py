"""From what a model gave each choice to the line of an items file: which one it takes, how surely, and is it right."""

import math
from collections.abc import Sequence
from typing import Any

from compressor.metrics.tasks.calibration import brier, choice_nll, choice_probabilities
from compressor.metrics.tasks.encoding import Request
from compressor.metrics.tasks.generating import Generated
from compressor.metrics.tasks.questions import PREFERENCES, Question
from compressor.metrics.tasks.scoring import Scored
from compressor.reports.items import ACCURACY, PREFERENCE, TaskItem

NOT_A_NUMBER = "(not a number)"
Asked = tuple[Request, Scored]


def judge(question: Question, asked: Sequence[Asked], tokenizer: Any, noise: float) -> TaskItem:
    """The item of a question whose choices were scored.

    Probabilities are those of the choices as they stand, whatever divides the log-likelihoods that decide. NaN, from a
    broken model, is a wrong answer without a margin.
    """
    if any(math.isnan(scored.loglik) for _, scored in asked):
        return _item(question, 0.0, NOT_A_NUMBER, noise=noise)
    if question.kind == "cloze":
        return _cloze(question, *asked[0], tokenizer, noise)
    weights = _weights(question, asked)
    logliks = [scored.loglik for _, scored in asked]
    values = [loglik / weight for loglik, weight in zip(logliks, weights, strict=True)]
    best = max(range(len(values)), key=values.__getitem__)
    figures: dict[str, float | None] = {"margin": _margin(values, weights)}
    if question.kind not in PREFERENCES and max(logliks) > -math.inf:
        probability_C = choice_probabilities(logliks)
        figures |= {
            "nll": _finite(choice_nll(logliks, question.gold)),
            "brier": brier(probability_C, question.gold),
            "confidence": float(probability_C[best]),
        }
    return _item(question, float(best == question.gold), question.answers[best], noise=noise, **figures)


def judge_written(question: Question, generated: Generated) -> TaskItem:
    """The item of a question whose answer was written."""
    assert question.writing is not None
    return _item(question, float(question.writing.accepts(generated.text)), generated.text)


def _cloze(question: Question, request: Request, scored: Scored, tokenizer: Any, noise: float) -> TaskItem:
    # Up to where the model goes its own way: what would come after that was never computed
    same = [own == token for own, token in zip(scored.top, request.continuation, strict=True)]
    own_way = scored.top[: same.index(False) + 1] if False in same else scored.top
    return _item(
        question,
        float(scored.greedy),
        tokenizer.decode(own_way).strip(),
        noise=noise,
        margin=_finite(abs(scored.lead)),
        nll=_finite(-scored.loglik),
    )


def _weights(question: Question, asked: Sequence[Asked]) -> list[int]:
    """What log-likelihoods are divided by before they are compared."""
    if question.normalise == "bytes":
        return [len(answer.encode()) for answer in question.answers]
    if question.normalise == "tokens":
        return [len(request.continuation) for request, _ in asked]
    return [1] * len(asked)


def _margin(values: Sequence[float], weights: Sequence[int]) -> float | None:
    """How many nats the best two choices are apart.

    Divided log-likelihoods are brought back to nats by the harmonic mean of the two weights: noise of so many nats, up
    in one and down in the other, makes them change places.
    """
    first, second = sorted(range(len(values)), key=values.__getitem__, reverse=True)[:2]
    scale = 2 / (1 / weights[first] + 1 / weights[second])
    return _finite((values[first] - values[second]) * scale)


def _item(question: Question, score: float, prediction: str, **figures: Any) -> TaskItem:
    return TaskItem(
        task=question.task,
        item=question.item,
        sha256=question.sha256,
        score=score,
        prompt=question.shown,
        prediction=prediction,
        measures=PREFERENCE if question.kind in PREFERENCES else ACCURACY,
        answer=question.answer,
        variant=question.variant,
        slice=question.slice,
        cluster=question.cluster,
        **figures,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
