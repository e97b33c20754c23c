"""Prune: weights become zero, or whole experts go.

O output features, I input features, E experts, F expert width, M tokens.
"""

from contextlib import closing
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from compressor.algorithms.masks import highest, n_of_m, top_fraction
from compressor.algorithms.saliency import magnitude, reap, wanda
from compressor.calibration import Calibration, ExpertInputs, GatheredInputs, InputNorm, Visit, walk_blocks
from compressor.errors import RecipeError, UnsupportedModel
from compressor.models import Block, ExpertStack, Model
from compressor.passes.base import Context, check_dense, check_patterns, is_ignored, kept_rows, rest_rows, weight_names
from compressor.reports import ExpertRow, Ledger, LedgerRow

TOKENS_PER_INPUT = 2  # below this an expert borrows tokens for its input norms, as in quantize


class Prune(BaseModel):
    """Remove what matters least: single weights (`unstructured`), two of every four (`2:4`), or whole `experts`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str | None = None
    structure: Literal["unstructured", "2:4", "experts"]
    ratio: float = Field(
        0.5, gt=0, lt=1, description="share of weights in each row, or of experts in each layer, that goes"
    )
    score: Literal["wanda", "magnitude", "reap"] = Field(
        "wanda", description="wanda or magnitude for weights; reap (the default there) for experts"
    )
    ignore: tuple[str, ...] = Field(("lm_head",), description="glob patterns of weights to leave alone")
    calibration: Calibration | None = None

    @model_validator(mode="before")
    @classmethod
    def _default_score(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("structure") == "experts":
            return {"score": "reap"} | data
        return data

    @model_validator(mode="after")
    def _fits(self) -> "Prune":
        if (self.structure == "experts") != (self.score == "reap"):
            possible = "reap" if self.structure == "experts" else "wanda, magnitude"
            raise ValueError(f"score {self.score!r} does not fit structure {self.structure!r}; possible: {possible}")
        if self.structure == "2:4" and self.ratio != 0.5:
            raise ValueError(f"structure '2:4' drops half of the weights; ratio {self.ratio} contradicts it")
        return self

    def plan(self, model: Model) -> list[LedgerRow]:
        """One row for each weight; refuses what cannot be cut."""
        check_dense(model, "prune")
        check_patterns(tuple(p for p in self.ignore if p != "lm_head"), weight_names(model))
        if self.structure == "experts":
            self._check_experts(model)
        rows: list[LedgerRow] = []
        for k in range(model.num_blocks):
            rows += self._plan_block(model.anatomy(k), model)
        return rows + rest_rows(model)

    def preview(self, model: Model) -> None:
        """Give the empty skeleton the shapes that it is going to have, for the plans of later passes."""
        if self.structure == "experts":
            for k in range(model.num_blocks):
                stack = model.anatomy(k).experts
                if stack:
                    kept = self.kept_experts(stack.num_experts)
                    stack.keep(torch.arange(kept))
                    model.set_expert_count(kept)

    def apply(self, model: Model, context: Context) -> Ledger:
        """Cut every block; the ledger accounts for all weights as they were before the cut."""
        planned = self.plan(model)
        observes = self.score != "magnitude"
        ids = context.windows(self.calibration, model.tokenizer) if observes else torch.empty(0, 8, dtype=torch.long)
        notes: dict[int, dict[str, Any]] = {}
        walk = walk_blocks(
            model, ids, notes, workplace=context.workplace, label=f"prune ({self.score})", progress=context.progress
        )
        with closing(walk):
            for visit in walk:
                planned_rows = self._plan_block(visit.block, model)
                if self.structure == "experts":
                    self._cut_experts(visit)
                else:
                    self._mask_block(visit)
                visit.note["weights"] = [row.to_json() for row in planned_rows]
        rows = [row for row in planned if not row.name.startswith(f"{model.family.blocks}.")]
        experts, blocks = [], []
        for k in sorted(notes):
            rows += [LedgerRow.from_json(row) for row in notes[k]["weights"]]
            experts += [ExpertRow.from_json(row) for row in notes[k].get("experts", [])]
            blocks.append({"index": k, **{key: v for key, v in notes[k].items() if key not in ("weights", "experts")}})
        self._remember(model, rows, notes)
        return Ledger(weights=tuple(rows), experts=tuple(experts), blocks=tuple(blocks))

    # -- experts ----------------------------------------------------------------------------------------------------

    def kept_experts(self, num_experts: int) -> int:
        """Experts of a layer that stay."""
        return num_experts - round(num_experts * self.ratio)

    def _check_experts(self, model: Model) -> None:
        stacks = [stack for k in range(model.num_blocks) if (stack := model.anatomy(k).experts)]
        if not stacks:
            raise UnsupportedModel(f"prune.structure: {model.name} has no experts")
        if any(is_ignored(stack.name, self.ignore) for stack in stacks):
            raise RecipeError(
                "prune.ignore: all layers must keep the same number of experts, or nothing loads the result"
            )
        kept, top_k = self.kept_experts(stacks[0].num_experts), model.config.num_experts_per_tok
        if kept == stacks[0].num_experts:
            raise RecipeError(f"prune.ratio {self.ratio}: less than half of one of {kept} experts, so none would go")
        if kept < top_k:
            raise UnsupportedModel(
                f"prune.ratio {self.ratio}: {kept} of {stacks[0].num_experts} experts would stay, "
                f"and each token is routed to {top_k}"
            )

    def _cut_experts(self, visit: Visit) -> None:
        stack = visit.block.experts
        if stack is None:
            return
        inputs = ExpertInputs(stack)
        visit.observe(lambda reads, x_MI: None, inputs)
        gathered = inputs.gather()
        scores = _reap_scores(stack, gathered)
        kept = highest(scores, self.kept_experts(stack.num_experts))
        counts = gathered.counts()
        visit.note["kept_experts"] = kept.tolist()
        visit.note["scores"] = [round(score, 6) for score in scores.tolist()]
        starved = [e for e, count in enumerate(counts) if count == 0]
        visit.note["experts"] = [
            ExpertRow(layer=visit.block.index, tokens=tuple(counts), starved=tuple(starved)).to_json()
        ]
        stack.keep(kept)

    def _remember(self, model: Model, rows: list[LedgerRow], notes: dict[int, dict[str, Any]]) -> None:
        if self.structure != "experts":
            model.state.pruned |= {row.name for row in rows if row.action == "pruned"}
            return
        for k, note in notes.items():
            if "kept_experts" in note:
                before = model.state.kept_experts.get(k)
                model.state.kept_experts[k] = [before[e] if before else e for e in note["kept_experts"]]
        model.set_expert_count(len(next(iter(model.state.kept_experts.values()))))

    # -- weights ----------------------------------------------------------------------------------------------------

    def _mask(self, score: Tensor) -> Tensor:
        return n_of_m(score, 2, 4) if self.structure == "2:4" else top_fraction(score, self.ratio)

    def _score(self, weight: Tensor, norm_I: Tensor | None) -> Tensor:
        return magnitude(weight) if norm_I is None else wanda(weight, norm_I)

    def _mask_block(self, visit: Visit) -> None:
        block = visit.block
        norms = {reads: InputNorm(sites[0].shape[1]) for reads, sites in block.shared_inputs().items()}
        stack = block.experts if block.experts and not is_ignored(block.experts.name, self.ignore) else None
        inputs = ExpertInputs(stack) if stack else None
        if self.score == "wanda":
            visit.observe(lambda reads, x_MI: norms[reads].add(x_MI), inputs)
        for site in block.sites:
            if not is_ignored(site.name, self.ignore):
                weight = site.read()
                norm = norms[site.reads].value if self.score == "wanda" else None
                site.write(weight * self._mask(self._score(weight, norm)))
        if stack and inputs is not None:
            self._mask_experts(stack, inputs.gather() if self.score == "wanda" else None)

    def _mask_experts(self, stack: ExpertStack, gathered: GatheredInputs | None) -> None:
        gate_up, down = (weight.clone() for weight in stack.read())
        for expert in range(stack.num_experts):
            gate_up_norm = down_norm = None
            if gathered is not None:
                x, _ = gathered.inputs_of(expert, TOKENS_PER_INPUT * gate_up.shape[-1])
                gate_up_norm, down_norm = InputNorm(gate_up.shape[-1]), InputNorm(down.shape[-1])
                gate_up_norm.add(x)
                down_norm.add(stack.gate(torch.nn.functional.linear(x, gate_up[expert])))
            gate_up[expert] *= self._mask(self._score(gate_up[expert], gate_up_norm.value if gate_up_norm else None))
            down[expert] *= self._mask(self._score(down[expert], down_norm.value if down_norm else None))
        stack.write(gate_up, down)

    def _plan_block(self, block: Block, model: Model) -> list[LedgerRow]:
        rows: list[LedgerRow] = []
        bits = model.dtype.itemsize * 8
        stack = block.experts
        if self.structure != "experts":
            for site in block.sites:
                if not is_ignored(site.name, self.ignore):
                    self._check_width(site.name, site.shape[1])
                    rows.append(_pruned(site.name, site.shape[0] * site.shape[1], bits, self._what()))
        if stack and not is_ignored(stack.name, self.ignore):
            for name, shape in stack.shapes().items():
                if self.structure != "experts":
                    self._check_width(f"{stack.name}.{name}", shape[-1])
                rows.append(_pruned(f"{stack.name}.{name}", torch.Size(shape).numel(), bits, self._what()))
            if self.structure == "experts":
                for name, parameter in stack.router.named_parameters():
                    full = f"{block.name}.{stack.router_path}.{name}"
                    rows.append(_pruned(full, parameter.numel(), bits, "router rows follow the experts"))
        otherwise = "not an expert" if self.structure == "experts" else "ignored"
        return rows + kept_rows(block, {row.name for row in rows}, otherwise)

    def _check_width(self, name: str, width: int) -> None:
        if self.structure == "2:4" and width % 4:
            raise UnsupportedModel(f"prune.structure: {name} has rows of {width} weights, which 2:4 does not divide")

    def _what(self) -> str:
        return {"2:4": "2 of 4 kept", "experts": f"{self.ratio:.0%} of experts dropped"}.get(
            self.structure, f"{self.ratio:.0%} of each row zero"
        )


def _pruned(name: str, count: int, bits: int, reason: str) -> LedgerRow:
    return LedgerRow(name=name, action="pruned", reason=reason, parameters=count, bits=bits)


@torch.no_grad()
def _reap_scores(stack: ExpertStack, gathered: GatheredInputs) -> Tensor:
    """REAP saliency `[E]` from natural routing over all calibration tokens."""
    gate_up, down = stack.read()
    sums = torch.zeros(stack.num_experts, dtype=torch.float64)
    for expert, (rows, gates) in enumerate(zip(gathered.tokens, gathered.gates, strict=True)):
        for part, gate in zip(rows.split(8192), gates.split(8192), strict=True):
            hidden = stack.gate(torch.nn.functional.linear(gathered.hidden[part], gate_up[expert]))
            output = torch.nn.functional.linear(hidden, down[expert])
            sums[expert] += (output.float().norm(dim=-1) * gate.float()).sum(dtype=torch.float64)
    return reap(sums, torch.tensor(gathered.counts()))
