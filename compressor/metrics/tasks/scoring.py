"""How likely a model finds each continuation: exact arithmetic, batched, one block of the model at a time.

A *row* is one line of tokens through the model; requests that read the same tokens, or the beginning of another's,
share one. Rows are sorted by length and padded on the right, where causal attention never looks. A *slab* is as many
rows as fit the memory budget between two blocks: a stored model reads its blocks once for each slab.

N rows in a batch, T tokens in its longest row, D model width, P scored positions, S scored tokens (several may be asked
at one position), V vocabulary, R requests.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compressor.calibration.stream import BATCH_TOKENS, Progress, release_memory, through_block
from compressor.errors import IntegrityError
from compressor.metrics.accuracy import CHUNK_BYTES
from compressor.metrics.tasks.encoding import Request
from compressor.models import Head, Model

SLAB_BYTES = 512_000_000  # hidden states held between two blocks; their scored positions are copied at the end
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Scored:
    """What a model thinks of one continuation.

    `loglik` is in nats. `lead` is how far, in nats, the weakest token of the continuation is ahead of the next best
    one (below 0: behind the best); `greedy` says that every token is the model's own choice. `top` is that choice at
    each position.
    """

    loglik: float
    greedy: bool
    lead: float
    top: Tokens


@dataclass(frozen=True)
class Batch:
    """Rows of similar length that go through a block together."""

    rows: tuple[int, ...]
    ids_NT: Tensor


def loglikelihoods(
    model: Model,
    requests: Sequence[Request],
    *,
    batch_size: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    slab_bytes: int = SLAB_BYTES,
    progress: Progress | None = None,
) -> list[Scored]:
    """Log-likelihood of every continuation after its context, in the order of the requests.

    Batches hold `batch_size` rows, or without it as many as make `batch_tokens` tokens. IntegrityError where the
    tokenizer knows tokens that the model does not.
    """
    if not requests:
        return []
    different = list(dict.fromkeys(requests))
    rows, row_of = shared_rows([request.context + request.continuation[:-1] for request in different])
    _check_vocabulary(model, different)
    head = model.head()
    scored: dict[Request, Scored] = {}
    by_row: dict[int, list[Request]] = {}
    for request, row in zip(different, row_of, strict=True):
        by_row.setdefault(row, []).append(request)
    row_bytes = model.config.hidden_size * torch.empty(0, dtype=model.dtype).element_size()
    slabs = list(_slabs(_batches(rows, batch_size, batch_tokens), slab_bytes // row_bytes))
    for number, slab in enumerate(slabs):
        done, total = number * model.num_blocks, len(slabs) * model.num_blocks
        step = None if progress is None else _shifted(progress, done, total)
        here = [(row, request) for batch in slab for row in batch.rows for request in by_row[row]]
        states_PD, position_S = _scored_states(model, slab, here, step)
        results = _scores(head, states_PD, position_S, [request for _, request in here])
        scored |= zip([request for _, request in here], results, strict=True)
    return [scored[request] for request in requests]


def shared_rows(inputs: Sequence[Tokens]) -> tuple[list[Tokens], list[int]]:
    """The rows to run and the row of each input: one that begins another is read on the way."""
    rows: list[Tokens] = []
    row_of: dict[Tokens, int] = {}
    # Backwards in the order of a dictionary, whatever an input begins stands right before it
    for tokens in sorted(set(inputs), reverse=True):
        if not rows or rows[-1][: len(tokens)] != tokens:
            rows.append(tokens)
        row_of[tokens] = len(rows) - 1
    return rows, [row_of[tokens] for tokens in inputs]


def measure_noise(
    model: Model,
    scored: Mapping[str, Sequence[tuple[Request, Scored]]],
    *,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> dict[str, float]:
    """How many nats two equal runs may differ by, for each named sample of requests and what they scored.

    The sample is scored again in other batches, where sums are taken in another order: twice the largest difference,
    since a margin is the difference of two log-likelihoods, and at least what float32 resolves.
    """
    again = loglikelihoods(
        model,
        [request for sample in scored.values() for request, _ in sample],
        batch_size=batch_size,
        progress=progress,
    )
    noise, start = {}, 0
    for name, sample in scored.items():
        pairs = zip(sample, again[start : start + len(sample)], strict=True)
        values = [(before.loglik, after.loglik) for (_, before), after in pairs]
        finite = [(one, other) for one, other in values if np.isfinite(one) and np.isfinite(other)]
        apart = max((abs(one - other) for one, other in finite), default=0.0)
        resolved = max((abs(one) for one, _ in finite), default=0.0) * torch.finfo(torch.float32).eps
        noise[name] = 2 * max(apart, resolved)
        start += len(sample)
    return noise


def _batches(rows: Sequence[Tokens], batch_size: int | None, batch_tokens: int) -> Iterator[Batch]:
    """Longest first: what does not fit in memory shows at once."""
    order = sorted(range(len(rows)), key=lambda row: (-len(rows[row]), row))
    start = 0
    while start < len(order):
        longest = len(rows[order[start]])
        count = batch_size or max(1, batch_tokens // longest)
        taken = order[start : start + count]
        ids_NT = torch.zeros(len(taken), longest, dtype=torch.long)
        for line, row in enumerate(taken):
            ids_NT[line, : len(rows[row])] = torch.tensor(rows[row])
        yield Batch(tuple(taken), ids_NT)
        start += count


def _slabs(batches: Iterator[Batch], most_tokens: int) -> Iterator[list[Batch]]:
    slab: list[Batch] = []
    tokens = 0
    for batch in batches:
        if slab and tokens + batch.ids_NT.numel() > most_tokens:
            yield slab
            slab, tokens = [], 0
        slab.append(batch)
        tokens += batch.ids_NT.numel()
    if slab:
        yield slab


@torch.no_grad()
def _scored_states(
    model: Model, slab: list[Batch], here: Sequence[tuple[int, Request]], step: Callable[[int], None] | None
) -> tuple[Tensor, Tensor]:
    """Last hidden states of the positions that are scored `[P, D]`, and which of them each scored token reads `[S]`."""
    hidden = [model.embed(batch.ids_NT) for batch in slab]
    for k in range(model.num_blocks):
        with model.open_block(k, dense=True) as block:
            for number, hidden_NTD in enumerate(hidden):
                tokens = hidden_NTD.shape[0] * hidden_NTD.shape[1]
                hidden[number] = through_block(model, block, hidden_NTD, batch_tokens=tokens)
        release_memory()
        if step is not None:
            step(k + 1)
    asked: dict[int, dict[int, int]] = {}  # row -> position -> its place in P
    position_S = []
    for row, request in here:
        places = asked.setdefault(row, {})
        first = len(request.context) - 1
        position_S += [(row, places.setdefault(first + n, len(places))) for n in range(len(request.continuation))]
    start_of: dict[int, int] = {}
    states_PD = hidden[0].new_empty(sum(map(len, asked.values())), hidden[0].shape[-1])
    start = 0
    for batch in slab:
        hidden_NTD = hidden.pop(0)  # freed as soon as its scored positions are copied
        for line, row in enumerate(batch.rows):
            positions = list(asked[row])
            states_PD[start : start + len(positions)] = hidden_NTD[line, positions]
            start_of[row], start = start, start + len(positions)
    return states_PD, torch.tensor([start_of[row] + place for row, place in position_S])


@torch.inference_mode()
def _scores(head: Head, states_PD: Tensor, position_S: Tensor, requests: Sequence[Request]) -> list[Scored]:
    """Log-softmax at the scored positions, in chunks of positions that keep the logits small."""
    target_S = torch.tensor([token for request in requests for token in request.continuation])
    loglik_S = torch.empty(len(target_S), dtype=torch.float64)
    lead_S, top_S = torch.empty_like(loglik_S), torch.empty_like(target_S)
    order_S = position_S.argsort(stable=True)
    sorted_S = position_S[order_S]
    vocab = head.vocab_size
    for chunk in torch.arange(len(states_PD)).split(max(1, CHUNK_BYTES // (4 * vocab))):
        first, end = int(chunk[0]), int(chunk[-1]) + 1
        low, high = torch.searchsorted(sorted_S, torch.tensor([first, end])).tolist()
        where = order_S[low:high]
        logits_PV = head.logits(states_PD[first:end])
        best = logits_PV.topk(2, dim=-1)
        line, target = position_S[where] - first, target_S[where]
        chosen = logits_PV[line, target].double()
        loglik_S[where] = chosen - logits_PV.logsumexp(-1).double()[line]
        top_S[where] = best.indices[line, 0]
        rival = torch.where(best.indices[line, 0] == target, best.values[line, 1], best.values[line, 0])
        lead_S[where] = chosen - rival.double()
        release_memory()
    lengths = [len(request.continuation) for request in requests]
    parts = zip(
        loglik_S.split(lengths), lead_S.split(lengths), top_S.split(lengths), target_S.split(lengths), strict=True
    )
    return [
        Scored(float(loglik.sum()), bool(top.equal(target)), float(lead.min()), tuple(top.tolist()))
        for loglik, lead, top, target in parts
    ]


def _check_vocabulary(model: Model, requests: Sequence[Request]) -> None:
    largest = max(max(request.context + request.continuation) for request in requests)
    if largest >= model.config.vocab_size:
        raise IntegrityError(
            f"{model.name}: its tokenizer gives token {largest}, its vocabulary ends at {model.config.vocab_size - 1}"
        )


def _shifted(progress: Progress, done: int, total: int) -> Callable[[int], None]:
    return lambda block: progress("evaluating tasks", done + block, total)
