"""From scores by window to the figures of a report: perplexity, KL, agreement, each with its interval.

N windows, T predicted tokens in each.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.metrics.baseline_states import TextSet
from compressor.metrics.bootstrap import bootstrap_mean, mapped
from compressor.reports.delta import paired_ratio
from compressor.reports.estimate import Estimate
from compressor.reports.measurement import Accuracy, finite

NO_BYTES = "the number of bytes in its windows was not given"


@dataclass(frozen=True)
class TextScores:
    """What was measured on one text, float64: mean NLL by window `[N]`; KL and agreement by token `[N, T]`."""

    text: TextSet
    vocab: int
    baseline_vocab: int
    nll_N: Tensor
    kl_NT: Tensor | None = None
    agreement_NT: Tensor | None = None
    baseline_nll_N: Tensor | None = None
    detectors: Mapping[str, Tensor] = field(default_factory=dict)  # of foreign text, by window: higher is more foreign


@dataclass(frozen=True)
class AccuracyResult:
    """How well a model predicts each text and how far it is from the baseline.

    `accuracy` is the section of the report; `perplexity_ratio` is after / before by text, paired by window, None
    without a baseline. A broken model gives figures that are not finite (null in the report) and a note in `extra` that
    names the windows.
    """

    accuracy: Accuracy
    perplexity_ratio: dict[str, Estimate] | None
    scores: dict[str, TextScores] = field(repr=False)
    foreign: dict[str, TextScores] = field(default_factory=dict, repr=False)

    def by_window(self) -> dict[str, dict[str, list[float]]]:
        """{text: {score: by window}} of own and foreign texts: mean KL where there is a baseline, and detectors."""
        texts = {}
        for name, score in {**self.scores, **self.foreign}.items():
            kl = {} if score.kl_NT is None else {"kl": score.kl_NT.mean(1).tolist()}
            texts[name] = kl | {detector: values.tolist() for detector, values in score.detectors.items()}
        return texts

    def items(self) -> Iterator[dict[str, Any]]:
        """One JSON-ready line per window, for items/*.jsonl: two runs pair by text, window and `ids_sha256`."""
        for name, score in self.scores.items():
            digest = score.text.sha256
            for window, nll in enumerate(score.nll_N.tolist()):
                kl = None if score.kl_NT is None else finite(float(score.kl_NT[window].mean()))
                top1 = None if score.agreement_NT is None else float(score.agreement_NT[window].mean())
                yield {
                    "text": name,
                    "window": window,
                    "ids_sha256": digest,
                    "tokens": score.text.ids.shape[1] - 1,
                    "nll": finite(nll),
                    "kl": kl,
                    "top1_agreement": top1,
                }


def summarise(scores: Mapping[str, TextScores], *, no_baseline: str) -> AccuracyResult:
    """The figures of some texts; `no_baseline` is the reason written where nothing was compared."""
    compared = {name: score for name, score in scores.items() if score.kl_NT is not None}
    reasons = {f"bits_per_byte.{name}": NO_BYTES for name, score in scores.items() if score.text.bytes_N is None}
    has_bytes = len(reasons) < len(scores)
    reasons = reasons if has_bytes else {"bits_per_byte": NO_BYTES}
    extra: dict[str, object] = {}
    if not compared:
        reasons |= {figure: no_baseline for figure in ("kl", "kl_mean", "kl_p99", "top1_agreement")}
    else:
        extra["top1_agreement_by_text"] = {name: _agreement([score]) for name, score in compared.items()}
    if notes := [*_vocabulary_notes(compared), *_broken_notes(scores)]:
        extra["notes"] = notes
    accuracy = Accuracy(
        perplexity={name: mapped(_mean(score.nll_N), _exp) for name, score in scores.items()},
        bits_per_byte={name: _bits_per_byte(score) for name, score in scores.items()} if has_bytes else None,
        kl={name: _kl([score]) for name, score in compared.items()} or None,
        kl_mean=_kl(list(compared.values())) if compared else None,
        kl_p99=_kl_p99(list(compared.values())) if compared else None,
        top1_agreement=_agreement(list(compared.values())) if compared else None,
        extra=extra,
        reasons=reasons,
        window_nll={name: tuple(score.nll_N.tolist()) for name, score in scores.items()},
    )
    ratios = {
        name: paired_ratio(accuracy.window_nll[name], tuple(score.baseline_nll_N.tolist()))
        for name, score in compared.items()
        if score.baseline_nll_N is not None
    }
    return AccuracyResult(accuracy, ratios or None, dict(scores))


def _bits_per_byte(score: TextScores) -> Estimate | None:
    if score.text.bytes_N is None:
        return None
    bytes_N = score.text.bytes_N.double()
    bits_N = score.nll_N * (score.text.ids.shape[1] - 1) / math.log(2)
    return _mean(bits_N / bytes_N, bytes_N)


def _kl(scores: Sequence[TextScores]) -> Estimate:
    return _token_mean([score.kl_NT for score in scores if score.kl_NT is not None])


def _kl_p99(scores: Sequence[TextScores]) -> float:
    kl = torch.cat([score.kl_NT.flatten() for score in scores if score.kl_NT is not None])
    return float(np.quantile(kl.numpy(), 0.99)) if kl.isfinite().all() else math.nan


def _agreement(scores: Sequence[TextScores]) -> Estimate:
    # The first place among NaN logits means nothing, so a text with any has no agreement.
    broken = any(not score.nll_N.isfinite().all() for score in scores)
    parts = [score.agreement_NT for score in scores if score.agreement_NT is not None]
    return _token_mean([part * math.nan if broken else part for part in parts])


def _token_mean(parts_NT: list[Tensor]) -> Estimate:
    """The mean over the tokens of all texts, every token counting the same; windows are resampled."""
    tokens_N = torch.cat([torch.full((len(part),), float(part.shape[1]), dtype=torch.float64) for part in parts_NT])
    return _mean(torch.cat([part.mean(1) for part in parts_NT]), tokens_N)


def _mean(values_N: Tensor, weights_N: Tensor | None = None) -> Estimate:
    return bootstrap_mean(values_N, weights_N) if values_N.isfinite().all() else Estimate(math.nan, None, len(values_N))


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 or math.isnan(nats) else math.inf  # a float ends at exp(709.8)


def _broken_notes(scores: Mapping[str, TextScores]) -> Iterator[str]:
    for name, score in scores.items():
        for what, values in (("NLL", score.nll_N), ("KL", score.kl_NT)):
            if values is not None and not values.isfinite().all():
                bad_N = ~values.isfinite().view(len(values), -1).all(1)
                first = int(bad_N.int().argmax())
                yield f"{name}: {what} is not finite in {int(bad_N.sum())} of {len(bad_N)} windows, first in {first}"


def _vocabulary_notes(scores: Mapping[str, TextScores]) -> Iterator[str]:
    for before, after in sorted({(score.baseline_vocab, score.vocab) for score in scores.values()}):
        if before != after:
            yield (
                f"the baseline has {before} vocabulary columns, the model {after}: KL and top-1 agreement compare the "
                f"first {min(before, after)}, perplexities use each model's own"
            )
