"""Models put together from two, all in one walk: some blocks of the baseline, the others of the candidate.

A model has units: its embedding, its blocks, its head (final norm and output projection). A mixture says for each where
it comes from. Mixtures that begin alike share what comes out of their common units, and every block is brought in once
for all of them.

N windows, T tokens in a window, D model width, M tokens, V vocabulary, E experts.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.calibration import ExpertInputs, Progress, release_memory, through_block
from compressor.metrics import TextSet, token_kl, token_nll
from compressor.metrics.accuracy import CHUNK_BYTES
from compressor.models import Block, ExpertStack, Head, Model

BASELINE, CANDIDATE = "baseline", "candidate"


@dataclass(frozen=True)
class Part:
    """A piece of a block that can be exchanged by itself: parameters by their names in it, whole or of one expert.

    `together` marks all experts of a layer, which are parts one by one as well.
    """

    name: str
    parameters: tuple[str, ...]
    expert: int | None = None
    together: bool = False


Choice = str | Part  # of a unit: BASELINE, CANDIDATE, or the candidate's with one part of the baseline's
Mixture = tuple[Choice, ...]  # the embedding, each block, the head
States = dict[Mixture, Tensor]  # what comes out of the first units of some mixtures, `[N, T, D]`


@dataclass(frozen=True)
class Losses:
    """KL to the baseline and negative log-likelihood of each window, float64 `[N]`, in nats a token."""

    kl_N: Tensor
    nll_N: Tensor


@dataclass(frozen=True)
class Pair:
    """The two models, and the windows that they are compared on (all of one length)."""

    baseline: Model
    candidate: Model
    texts: Sequence[TextSet]

    @property
    def ids_NT(self) -> Tensor:
        return torch.cat([text.ids for text in self.texts])

    @property
    def num_blocks(self) -> int:
        return self.baseline.num_blocks

    def mixture(self, candidate_units: Sequence[int], *, otherwise: Choice = BASELINE) -> Mixture:
        """The candidate's units (0 the embedding, 1 the first block, ...) in the baseline."""
        chosen = set(candidate_units)
        return tuple(CANDIDATE if unit in chosen else otherwise for unit in range(self.num_blocks + 2))

    def embeddings(self, mixtures: Sequence[Mixture]) -> States:
        """What the embeddings give."""
        models = {BASELINE: self.baseline, CANDIDATE: self.candidate}
        return {(choice,): models[str(choice)].embed(self.ids_NT) for choice in {mixture[0] for mixture in mixtures}}

    def through(
        self,
        mixtures: Sequence[Mixture],
        states: States,
        start: int,
        stop: int,
        progress: Progress | None = None,
        label: str = "comparing blocks",
    ) -> States:
        """The mixtures from block `start` to the one before `stop`; `states` holds what reaches block `start`."""
        for k in range(start, stop):
            wanted = {mixture[: k + 2] for mixture in mixtures}
            with self._opened(k, {prefix[-1] for prefix in wanted}) as (ours, theirs):
                states = {prefix: self._one(prefix[-1], ours, theirs, states[prefix[:-1]]) for prefix in wanted}
            release_memory()
            if progress is not None:
                progress(label, k + 1 - start, stop - start)
        return states

    @torch.inference_mode()
    def losses(self, mixtures: Sequence[Mixture], states: States) -> dict[Mixture, Losses]:
        """How far the mixtures' predictions are from the baseline's; `states` holds their last hidden states."""
        heads = {BASELINE: self.baseline.head(), CANDIDATE: self.candidate.head()}
        baseline_MD = states[self.mixture([])[:-1]].flatten(0, 1)
        targets_M = self.ids_NT.roll(-1, dims=1).flatten()
        vocab = max(head.vocab_size for head in heads.values())
        kl: dict[Mixture, list[Tensor]] = {mixture: [] for mixture in mixtures}
        nll: dict[Mixture, list[Tensor]] = {mixture: [] for mixture in mixtures}
        for rows in torch.arange(len(targets_M)).split(max(1, CHUNK_BYTES // (4 * vocab))):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            expected_MV = heads[BASELINE].logits(baseline_MD[part])
            for mixture in mixtures:
                head: Head = heads[str(mixture[-1])]
                logits_MV = head.logits(states[mixture[:-1]].flatten(0, 1)[part])
                kl[mixture].append(token_kl(expected_MV, logits_MV))
                nll[mixture].append(token_nll(logits_MV, targets_M[part]))
            release_memory()
        return {mixture: Losses(self._by_window(kl[mixture]), self._by_window(nll[mixture])) for mixture in mixtures}

    def _by_window(self, parts: list[Tensor]) -> Tensor:
        """The mean over the positions of each window that predict a token of it."""
        return torch.cat(parts).view(self.ids_NT.shape)[:, :-1].mean(1)

    @contextmanager
    def _opened(self, k: int, choices: set[Choice]) -> Iterator[tuple[Block | None, Block | None]]:
        """Block k of the candidate and of the baseline, dense, if any of the choices needs it."""
        with _open_if(choices != {BASELINE}, self.candidate, k) as ours:
            with _open_if(choices != {CANDIDATE}, self.baseline, k) as theirs:
                yield ours, theirs

    @torch.no_grad()
    def _one(self, choice: Choice, ours: Block | None, theirs: Block | None, hidden_NTD: Tensor) -> Tensor:
        if choice == BASELINE:
            assert theirs is not None
            return through_block(self.baseline, theirs, hidden_NTD.to(self.baseline.dtype))
        assert ours is not None
        hidden_NTD = hidden_NTD.to(self.candidate.dtype)
        if isinstance(choice, Part):
            assert theirs is not None
            with restored(ours, theirs, choice):
                return through_block(self.candidate, ours, hidden_NTD)
        return through_block(self.candidate, ours, hidden_NTD)


@contextmanager
def _open_if(needed: bool, model: Model, k: int) -> Iterator[Block | None]:
    if not needed:
        yield None
        return
    with model.open_block(k, dense=True) as block:
        yield block


@contextmanager
def restored(candidate: Block, baseline: Block, part: Part) -> Iterator[None]:
    """The baseline's weights of one part in the candidate's block for a while; both dense."""
    ours, theirs = dict(candidate.module.named_parameters()), dict(baseline.module.named_parameters())
    kept: dict[str, Tensor] = {}
    try:
        for name in part.parameters:
            held, other = ours[name].data, theirs[name].data.to(ours[name].dtype)
            if part.expert is None:
                kept[name], ours[name].data = held, other
            else:  # in place: a copy of all experts for each of them would be the largest tensor held
                kept[name] = held[part.expert].clone()
                held[part.expert] = other[part.expert]
        yield
    finally:
        for name, tensor in kept.items():
            if part.expert is None:
                ours[name].data = tensor
            else:
                ours[name].data[part.expert] = tensor


def different_parts(candidate: Block, baseline: Block) -> tuple[list[Part], list[str]]:
    """What can be exchanged between two dense blocks and is not the same in both, and what cannot be, in words."""
    ours, theirs = dict(candidate.module.named_parameters()), dict(baseline.module.named_parameters())
    inside = f"{candidate.experts.path}." if candidate.experts else None
    groups: dict[str, list[str]] = {}
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        if inside is None or not name.startswith(inside):
            groups.setdefault(name.rpartition(".")[0], []).append(name)
    parts, refused = [], []
    for path, names in groups.items():
        if any(n not in ours or n not in theirs or ours[n].shape != theirs[n].shape for n in names):
            refused.append(f"{candidate.name}.{path} has another shape than in the baseline: it cannot be exchanged")
        elif not all(torch.equal(ours[n], theirs[n].to(ours[n].dtype)) for n in names):
            parts.append(Part(path, tuple(names)))
    if candidate.experts and baseline.experts:
        found, reason = _different_experts(candidate.experts, baseline.experts)
        parts += found
        refused += [reason] if reason else []
    return parts, refused


def _different_experts(ours: ExpertStack, theirs: ExpertStack) -> tuple[list[Part], str | None]:
    if ours.num_experts != theirs.num_experts:
        return [], (
            f"{ours.name} has {ours.num_experts} experts, the baseline {theirs.num_experts}: "
            "which belong together is not known, so they cannot be exchanged one by one"
        )
    if ours.shapes() != theirs.shapes():
        return [], f"{ours.name} has experts of another width than the baseline's: they cannot be exchanged"
    names = tuple(f"{ours.path}.{name}" for name in ours.shapes())
    pairs = list(zip(ours.read(), theirs.read(), strict=True))
    numbers = [
        expert
        for expert in range(ours.num_experts)
        if not all(torch.equal(one[expert], other[expert].to(one.dtype)) for one, other in pairs)
    ]
    whole = [Part(f"{ours.path} (all)", names, together=True)] if len(numbers) > 1 else []
    return whole + [Part(f"expert {expert}", names, expert) for expert in numbers], None


@torch.no_grad()
def expert_errors(model: Model, candidate: Block, baseline: Block, inputs_NTD: Tensor) -> dict[int, float]:
    """The share of the layer's error (squared) that restoring each expert takes away, for those that got tokens.

    The output is a sum over experts, so restoring one takes exactly its own difference out of it: one run of the layer
    judges all experts. An expert whose output is not finite has an infinite share.
    """
    ours, theirs = candidate.experts, baseline.experts
    assert ours is not None
    assert theirs is not None
    inputs = ExpertInputs(ours)
    through_block(model, candidate, inputs_NTD, observe=inputs)
    gathered = inputs.gather()
    differences: dict[int, Tensor] = {}
    total_MD = torch.zeros(gathered.hidden.shape, dtype=torch.float32)
    for expert, rows in enumerate(gathered.tokens):
        if len(rows):
            x_MD, gates_M = gathered.hidden[rows], gathered.gates[expert].float()
            difference_MD = (_expert(ours, expert, x_MD) - _expert(theirs, expert, x_MD)) * gates_M[:, None]
            differences[expert] = difference_MD
            if difference_MD.isfinite().all():
                total_MD.index_add_(0, rows, difference_MD)
    size = float(total_MD.square().sum(dtype=torch.float64))
    return {
        expert: _taken_away(total_MD[gathered.tokens[expert]], difference_MD, size)
        for expert, difference_MD in differences.items()
    }


def _expert(stack: ExpertStack, expert: int, x_MD: Tensor) -> Tensor:
    gate_up, down = stack.read()
    x_MD = x_MD.to(gate_up.dtype)
    gated = stack.gate(torch.nn.functional.linear(x_MD, gate_up[expert]))
    return torch.nn.functional.linear(gated, down[expert]).float()


def _taken_away(total_MD: Tensor, difference_MD: Tensor, size: float) -> float:
    """|total|² - |total - difference|² over |total|²."""
    if not difference_MD.isfinite().all():
        return float("inf")
    gain = (2 * total_MD - difference_MD) * difference_MD
    return float(gain.sum(dtype=torch.float64)) / size if size else 0.0


def same_rest(pair: Pair) -> Mapping[str, bool]:
    """Whether the two models have the same embedding, and the same head (final norm and output projection)."""
    family = pair.baseline.family
    ours, theirs = pair.candidate.rest(), pair.baseline.rest()
    names = {"embedding": (family.embedding,), "head": (family.norm, family.head, family.embedding)}
    if not _is_tied(pair.baseline) and not _is_tied(pair.candidate):
        names["head"] = (family.norm, family.head)
    return {
        unit: all(
            name in ours and name in theirs and torch.equal(ours[name], theirs[name].to(ours[name].dtype))
            for name in ours.keys() | theirs.keys()
            if name.startswith(tuple(f"{path}." for path in paths))
        )
        for unit, paths in names.items()
    }


def _is_tied(model: Model) -> bool:
    return not any(name.startswith(f"{model.family.head}.") for name in model.rest())
