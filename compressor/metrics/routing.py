"""Which experts the tokens of the evaluation texts went to, and how far that moved from the baseline.

E experts in a layer, M tokens, K experts chosen for a token. A token counts once for each expert that it was sent to.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compressor.reports.measurement import LayerRouting

NO_MAP = "the number of experts changed from {before} to {after} and which ones were kept is not known"


class RoutingCounts:
    """Count the tokens of each expert while a model is evaluated: pass `counts.observe` as `observe_routing`.

    `tokens` maps a layer to int64 counts `[E]`, on the CPU.
    """

    def __init__(self, num_experts: int):
        self.num_experts = num_experts
        self.tokens: dict[int, Tensor] = {}

    def observe(self, layer: int, top_k_index: Tensor) -> None:
        """Add the experts chosen for M tokens, `[M, K]`. ValueError for an expert that the layer does not have."""
        # A router may mark dropped tokens with num_experts; none of our walks does, so anything outside is an error.
        counts_E = torch.bincount(top_k_index.flatten().cpu(), minlength=self.num_experts)
        if len(counts_E) > self.num_experts:
            raise ValueError(f"layer {layer} routed to expert {len(counts_E) - 1} of {self.num_experts}")
        self.tokens[layer] = self.tokens.get(layer, torch.zeros_like(counts_E)) + counts_E


@dataclass(frozen=True)
class LayerUse:
    """How the experts of one layer are used; shares sum to 1.

    `entropy` is in nats; `effective_experts` is its exponential: E when all are used alike, 1 when one takes all.
    `shift` is the total variation distance to the baseline's shares, 0 to 1: the part of the load that went elsewhere.
    `removed_share` is the part that the baseline sent to experts that were removed since.
    """

    layer: int
    tokens: tuple[int, ...]
    share: tuple[float, ...]
    entropy: float
    effective_experts: float
    dead: tuple[int, ...]
    shift: float | None = None
    shift_reason: str | None = None
    removed_share: float | None = None


@dataclass(frozen=True)
class RoutingResult:
    """The routing of every mixture-of-experts layer, in their order."""

    layers: tuple[LayerUse, ...] = field(default_factory=tuple)

    @property
    def shift_max(self) -> float | None:
        """The shift of the layer that moved most."""
        return max((layer.shift for layer in self.layers if layer.shift is not None), default=None)

    def section(self) -> tuple[LayerRouting, ...]:
        """The routing section of the report."""
        return tuple(LayerRouting(layer=use.layer, tokens=use.tokens, shift=use.shift) for use in self.layers)

    def to_json(self) -> dict[str, Any]:
        """`{shift_max, layers: [{layer, tokens, share, entropy, effective_experts, dead, shift, removed_share}]}`."""
        layers = []
        for layer in self.layers:
            document = {
                "layer": layer.layer,
                "tokens": list(layer.tokens),
                "share": list(layer.share),
                "entropy": layer.entropy,
                "effective_experts": layer.effective_experts,
                "dead": list(layer.dead),
                "shift": layer.shift,
            }
            if layer.shift is None:
                document["shift_reason"] = layer.shift_reason
            if layer.removed_share is not None:
                document["removed_share"] = layer.removed_share
            layers.append(document)
        return {"shift_max": self.shift_max, "layers": layers}


def measure_routing(
    tokens: Mapping[int, Tensor],
    baseline: Mapping[int, Tensor] | None = None,
    *,
    kept: Mapping[int, Sequence[int]] | None = None,
) -> RoutingResult:
    """Shares, dead experts and the shift against the baseline, from `RoutingCounts.tokens` of both.

    `kept[layer]` lists the baseline's experts that are still there, in their new order; the baseline's shares are then
    restricted to them and sum to 1 again. Layers left out kept all. ValueError when it does not fit the counts.
    """
    return RoutingResult(
        tuple(
            _layer(layer, tokens[layer], (baseline or {}).get(layer), baseline is not None, (kept or {}).get(layer))
            for layer in sorted(tokens)
        )
    )


def total_variation(p_E: Tensor, q_E: Tensor) -> float:
    """Half the sum of the absolute differences of two distributions: the mass that has to move between them."""
    return float((p_E.double() - q_E.double()).abs().sum() / 2)


def _layer(
    layer: int, tokens_E: Tensor, before_E: Tensor | None, has_baseline: bool, kept: Sequence[int] | None
) -> LayerUse:
    total = int(tokens_E.sum())
    share_E = tokens_E.double() / max(total, 1)
    used = share_E[share_E > 0]
    entropy = float(-(used * used.log()).sum()) + 0.0  # -0.0 reads badly
    shift, reason, removed = _shift(layer, share_E, before_E, has_baseline, kept)
    return LayerUse(
        layer=layer,
        tokens=tuple(tokens_E.tolist()),
        share=tuple(share_E.tolist()),
        entropy=entropy,
        effective_experts=math.exp(entropy),
        dead=tuple(torch.nonzero(tokens_E == 0).flatten().tolist()),
        shift=shift,
        shift_reason=reason,
        removed_share=removed,
    )


def _shift(
    layer: int, share_E: Tensor, before_E: Tensor | None, has_baseline: bool, kept: Sequence[int] | None
) -> tuple[float | None, str | None, float | None]:
    """The shift, or why there is none, and the baseline's share of experts that are gone."""
    if before_E is None:
        return None, "the baseline has no such layer" if has_baseline else "no baseline was given", None
    removed = None
    total = max(int(before_E.sum()), 1)
    if kept is not None:
        if len(kept) != len(share_E) or not all(0 <= expert < len(before_E) for expert in kept):
            raise ValueError(
                f"layer {layer}: kept lists {list(kept)}, but the baseline has {len(before_E)} experts, "
                f"the model {len(share_E)}"
            )
        before_E = before_E[torch.tensor(list(kept))]
        removed = 1 - int(before_E.sum()) / total
    elif len(before_E) != len(share_E):
        return None, NO_MAP.format(before=len(before_E), after=len(share_E)), None
    if not before_E.sum() or not share_E.sum():
        return None, "no token was counted in the experts compared", removed
    return total_variation(share_E, before_E.double() / before_E.sum()), None, removed
