"""What each expert of a layer saw, and what it would have seen: inputs for statistics of stacked experts.

E experts, M tokens, D model width, k experts per token.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compressor.layers import routed
from compressor.models import ExpertStack, Routed


@dataclass
class ExpertInputs:
    """Layer inputs and routing over all calibration tokens, saved once; each expert's rows are gathered from them.

    Fill it as the `on_experts` observer of a visit. Counts are of natural routing: every window is full, so no token is
    padding.
    """

    stack: ExpertStack
    _calls: list[Routed] = field(default_factory=list)

    def __call__(self, call: Routed) -> None:
        self._calls.append(call)

    def gather(self) -> "GatheredInputs":
        """All calls as one, with the tokens of each expert."""
        hidden = torch.cat([call.hidden for call in self._calls])
        index = torch.cat([call.top_k_index for call in self._calls])
        gates = torch.cat([call.top_k_weights for call in self._calls])
        self._calls.clear()
        tokens = [torch.empty(0, dtype=torch.long)] * self.stack.num_experts
        weights = [gates.new_empty(0)] * self.stack.num_experts
        for expert, rows, slots in routed(index, self.stack.num_experts):
            tokens[expert], weights[expert] = rows, gates[rows, slots]
        return GatheredInputs(self.stack, hidden, tokens, weights)


@dataclass(frozen=True)
class GatheredInputs:
    """Inputs `hidden [M, D]`; for each expert the rows routed to it and the gates they got."""

    stack: ExpertStack
    hidden: Tensor
    tokens: list[Tensor]
    gates: list[Tensor]

    def counts(self) -> list[int]:
        return [len(rows) for rows in self.tokens]

    def inputs_of(self, expert: int, at_least: int) -> tuple[Tensor, Tensor | None]:
        """Inputs `[M, D]` of an expert; below `at_least` tokens it also borrows those that would come to it next.

        The second value is the affinity of each token (1 for its own), or None where nothing was borrowed.
        """
        rows = self.tokens[expert]
        if len(rows) >= at_least:
            return self.hidden[rows], None
        borrowed, affinity = self.next_best(expert, at_least - len(rows))
        return self.hidden[torch.cat([rows, borrowed])], torch.cat([torch.ones(len(rows)), affinity])

    @torch.no_grad()
    def next_best(self, expert: int, count: int) -> tuple[Tensor, Tensor]:
        """The `count` tokens that would come to an expert next, by router probability, and their affinity.

        For starved experts only: top-k is widened for them, and the outputs are discarded. Affinity is the token's
        router probability relative to the mean over the expert's own tokens (or the largest of the borrowed), at most
        1.
        """
        # Logarithms, so that an expert whose probability underflows everywhere still gets finite affinities
        scores = self._router_log_probabilities(expert)
        own = self.tokens[expert]
        mean = scores[own].logsumexp(0) - math.log(len(own)) if len(own) else None
        scores[own] = -torch.inf
        best = scores.topk(min(count, len(scores) - len(own)))
        reference = best.values.max() if mean is None else mean
        return best.indices, (best.values - reference).exp().clamp(max=1)

    def _router_log_probabilities(self, expert: int) -> Tensor:
        parts = []
        for part in self.hidden.split(8192):
            logits = self.stack.router(part)[0]
            parts.append(torch.log_softmax(logits.float(), dim=-1)[:, expert])
        return torch.cat(parts)
