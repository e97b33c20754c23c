"""How well a model predicts the evaluation texts, and how far it went from the baseline.

N windows, T tokens in each, M tokens in a chunk, D model width, V vocabulary. All figures are over the T - 1 positions
of a window that predict a token of it. Logits and log-softmax are float32, sums are float64; NLL and KL are in nats.
The unit of resampling, and the `n` of an estimate, is the window: neighbouring tokens are not independent.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from compressor.calibration.stream import Progress, last_hidden, release_memory
from compressor.metrics.accuracy_result import AccuracyResult, TextScores, summarise
from compressor.metrics.baseline_states import BaselineStates, TextSet
from compressor.metrics.behaviour.ood import detection_scores
from compressor.models import Head, Model

# One float32 array of chunk x vocabulary; three of them live at the same time (two log-softmaxes and one product).
CHUNK_BYTES = 32_000_000

ObserveRouting = Callable[[int, Tensor], None]


def token_nll(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """The negative log-likelihood of each target token in nats, float64 `[M]`."""
    logits_MV = logits_MV.float()
    chosen_M = logits_MV.gather(-1, targets_M.unsqueeze(-1)).squeeze(-1)
    return logits_MV.logsumexp(-1).double() - chosen_M.double()


def token_kl(baseline_logits_MV: Tensor, logits_MV: Tensor) -> Tensor:
    """KL(baseline || model) of each token's prediction in nats, float64 `[M]`.

    Vocabularies that differ by padding are compared on their common first columns. Rounding may leave values of about
    -1e-7 where the two agree.
    """
    width = min(baseline_logits_MV.shape[-1], logits_MV.shape[-1])
    log_p_MV = torch.log_softmax(baseline_logits_MV[:, :width].float(), -1)
    # In place from here on: the arrays are the largest of the whole evaluation.
    difference_MV = torch.log_softmax(logits_MV[:, :width].float(), -1).neg_().add_(log_p_MV)
    p_MV = log_p_MV.exp_()
    # 0 log 0 = 0: a vocabulary padded with -inf would give 0 * (inf - inf). NaN logits stay NaN, since p is NaN there.
    terms_MV = difference_MV.masked_fill_(p_MV == 0, 0.0).mul_(p_MV)
    return terms_MV.sum(-1, dtype=torch.float64)


def token_agreement(baseline_logits_MV: Tensor, logits_MV: Tensor) -> Tensor:
    """Whether both put the same token first, bool `[M]`, over the common first columns."""
    width = min(baseline_logits_MV.shape[-1], logits_MV.shape[-1])
    return baseline_logits_MV[:, :width].argmax(-1) == logits_MV[:, :width].argmax(-1)


def measure_accuracy(
    model: Model,
    texts: Sequence[TextSet],
    *,
    baseline: BaselineStates | None,
    foreign: Sequence[TextSet] = (),
    observe_routing: ObserveRouting | None = None,
    progress: Progress | None = None,
) -> AccuracyResult:
    """Perplexity of each text and, with a baseline, KL, top-1 agreement and the paired perplexity ratio to it.

    `foreign` texts (unlike the others) are scored too, but stand apart in `scores`: no figure of `accuracy` is about
    them. With any, all scores hold the detectors of foreign text.

    `model` is a compressor Model, streamed block by block in exact arithmetic. `observe_routing(layer, top_k_index)`
    sees every router decision on the way (metrics.routing). ValueError when two texts share a name or a token id is
    outside the vocabulary; IntegrityError when the baseline was kept for other windows.
    """
    head = model.head()
    scores: dict[str, TextScores] = {}
    for text, hidden_NTD in _streamed(model, [*texts, *foreign], observe_routing, progress):
        scores[text.name] = _score(text, hidden_NTD, head, baseline, detect=bool(foreign))
    return _result(texts, foreign, scores, "no baseline was given")


def measure_baseline(
    model: Model,
    texts: Sequence[TextSet],
    folder: Path,
    *,
    foreign: Sequence[TextSet] = (),
    observe_routing: ObserveRouting | None = None,
    progress: Progress | None = None,
) -> tuple[AccuracyResult, BaselineStates]:
    """Measure the model that later ones are compared with, and keep in `folder` what the comparison needs.

    One pass through the model; the head is kept in memory with the returned states. Errors as in `measure_accuracy`.
    """
    states = BaselineStates(Path(folder), model.head())
    scores: dict[str, TextScores] = {}
    for text, hidden_NTD in _streamed(model, [*texts, *foreign], observe_routing, progress):
        scores[text.name] = _score(text, hidden_NTD, states.head, None, detect=bool(foreign))
        states.keep(text, hidden_NTD, scores[text.name].nll_N)
    return _result(texts, foreign, scores, "this is the baseline"), states


def _streamed(
    model: Model, texts: Sequence[TextSet], observe_routing: ObserveRouting | None, progress: Progress | None
) -> Iterator[tuple[TextSet, Tensor]]:
    """Each text with its last hidden states; texts of one window length share a walk, so a block is opened once."""
    if len({text.name for text in texts}) != len(texts):
        raise ValueError(f"texts need names of their own, got {[text.name for text in texts]}")
    by_length: dict[int, list[TextSet]] = {}
    for text in texts:
        by_length.setdefault(text.ids.shape[1], []).append(text)
    for group in by_length.values():
        ids_NT = torch.cat([text.ids for text in group])
        hidden_NTD = last_hidden(model, ids_NT, observe_routing=observe_routing, progress=progress)
        yield from zip(group, hidden_NTD.split([len(text.ids) for text in group]), strict=True)


def _result(
    texts: Sequence[TextSet], foreign: Sequence[TextSet], scores: dict[str, TextScores], no_baseline: str
) -> AccuracyResult:
    own = summarise({text.name: scores[text.name] for text in texts}, no_baseline=no_baseline)
    return replace(own, foreign={text.name: scores[text.name] for text in foreign})


@torch.inference_mode()
def _score(
    text: TextSet, hidden_NTD: Tensor, head: Head, baseline: BaselineStates | None, *, detect: bool
) -> TextScores:
    """Per-token scores of one text, chunk by chunk over all positions; the last of a window predicts nothing in it."""
    states_MD = hidden_NTD.flatten(0, 1)
    targets_M = text.ids.roll(-1, dims=1).flatten()
    kept_MD = kept_nll_N = None
    if baseline is not None:
        kept_NTD, kept_nll_N = baseline.load(text)
        kept_MD = kept_NTD.flatten(0, 1)
    vocab = head.logits(states_MD[:1]).shape[-1]
    kept_vocab = vocab if baseline is None or kept_MD is None else baseline.head.logits(kept_MD[:1]).shape[-1]
    if (largest := int(text.ids.max())) >= vocab:
        raise ValueError(f"text {text.name!r}: token id {largest} is outside the model's vocabulary of {vocab}")
    nll, kl, agreement = [], [], []
    detectors: dict[str, list[Tensor]] = {}
    for part in torch.arange(len(states_MD)).split(max(1, CHUNK_BYTES // (4 * max(vocab, kept_vocab)))):
        rows = slice(int(part[0]), int(part[-1]) + 1)
        logits_MV = head.logits(states_MD[rows])
        targets = targets_M[rows].to(logits_MV.device)
        nll.append(token_nll(logits_MV, targets).cpu())
        if detect:
            for name, by_token in detection_scores(logits_MV.unsqueeze(1), targets.unsqueeze(1)).items():
                detectors.setdefault(name, []).append(by_token.cpu())
        if baseline is not None and kept_MD is not None:
            kept_logits_MV = baseline.head.logits(kept_MD[rows]).to(logits_MV.device)
            kl.append(token_kl(kept_logits_MV, logits_MV).cpu())
            agreement.append(token_agreement(kept_logits_MV, logits_MV).cpu())
        release_memory()  # what a chunk leaves behind in the heap added up to 9 GB over 32,768 tokens of SmolLM2

    def by_window(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).view(text.ids.shape)[:, :-1].double()

    return TextScores(
        text=text,
        vocab=vocab,
        baseline_vocab=kept_vocab,
        nll_N=by_window(nll).mean(1),
        kl_NT=by_window(kl) if kl else None,
        agreement_NT=by_window(agreement) if agreement else None,
        baseline_nll_N=kept_nll_N,
        detectors={name: by_window(parts).mean(1) for name, parts in detectors.items()},
    )
