"""Quantize: weights become integers with a scale for each group, block by block.

O output features, I input features, E experts, H model width, F expert width, M tokens.
"""

from contextlib import closing
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from compressor.algorithms.gptq import NotPositiveDefinite, gptq
from compressor.algorithms.rounding import round_to_nearest
from compressor.calibration import Calibration, ExpertInputs, Hessian, Visit, walk_blocks
from compressor.errors import RecipeError, UnsupportedModel
from compressor.models import Block, Model, WeightSite
from compressor.passes.base import Context, check_dense, check_patterns, is_ignored, kept_rows, rest_rows, weight_names
from compressor.passes.quantize_experts import quantize_experts
from compressor.quant import GROUP_SIZES, QuantizedTensor, QuantSpec, split_rows
from compressor.quant import stack as stacked
from compressor.reports import ExpertRow, Ledger, LedgerRow


class Quantize(BaseModel):
    """Replace weights by integers with shared scales: the nearest ones (rtn), or those that keep the outputs (gptq)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str | None = None
    method: Literal["gptq", "rtn"] = Field("gptq", description="gptq compensates errors, rtn rounds to nearest")
    bits: Literal[2, 3, 4, 8] = 4
    group_size: Literal[32, 64, 128, "channel"] = Field(
        128,
        description="weights that share a scale; where it does not divide a row, the largest smaller group that does",
    )
    symmetric: bool = True
    activations: Literal["int8"] | None = Field(
        None,
        description="int8: inputs are rounded to int8 too while the model runs, one scale a token (W8A8); needs "
        "bits: 8, group_size: channel, symmetric: true",
    )
    scale_search: Literal["weighted", "mse", "minmax"] = Field(
        "weighted",
        description="what a scale is chosen by: activation-weighted error, plain error, or the largest weight",
    )
    damping: float = Field(0.01, gt=0, le=1, description="share of the Hessian's mean diagonal added to it (gptq)")
    ignore: tuple[str, ...] = Field(("lm_head",), description="glob patterns of weights to leave alone")
    calibration: Calibration | None = None

    @model_validator(mode="after")
    def _fits(self) -> "Quantize":
        if self.activations and (self.bits != 8 or self.group_size != "channel" or not self.symmetric):
            raise ValueError(
                f"activations: {self.activations} needs bits: 8, group_size: channel and symmetric: true; they are "
                f"{self.bits}, {self.group_size} and {str(self.symmetric).lower()}"
            )
        return self

    @property
    def activation_bits(self) -> int | None:
        """Bits that inputs are rounded to while the model runs."""
        return 8 if self.activations else None

    @property
    def observes(self) -> bool:
        """Whether inputs have to be seen; rounding by the weights alone needs no data."""
        return self.method == "gptq" or self.scale_search == "weighted"

    def spec_for(self, widths: set[int], names: str) -> QuantSpec:
        """The scheme of weights that share one: the asked group, or the largest smaller one that divides all rows."""
        if self.group_size == "channel":
            return QuantSpec(self.bits, None, self.symmetric, self.activation_bits)
        for group in sorted((g for g in GROUP_SIZES if g <= self.group_size), reverse=True):
            if all(width % group == 0 for width in widths):
                return QuantSpec(bits=self.bits, group_size=group, symmetric=self.symmetric)
        raise UnsupportedModel(
            f"{names}: rows of {', '.join(map(str, sorted(widths)))} weights divide into no group of at most "
            f"{self.group_size}; use group_size: channel"
        )

    def plan(self, model: Model) -> list[LedgerRow]:
        """One row for each weight; refuses what would not load again (design decision 7)."""
        check_dense(model, "quantize")
        check_patterns(tuple(p for p in self.ignore if p != "lm_head"), weight_names(model))
        if "lm_head" not in self.ignore:
            raise RecipeError(
                "quantize.ignore: the output head is not quantized in this version; keep lm_head in `ignore`"
            )
        rows: list[LedgerRow] = []
        stacks = []
        for k in range(model.num_blocks):
            block = model.anatomy(k)
            rows += self._plan_block(block)
            if block.experts:
                stacks.append(is_ignored(block.experts.name, self.ignore))
        if any(stacks) and not all(stacks):
            raise RecipeError(
                "quantize.ignore: experts of all layers share one scheme; ignore those of all layers or of none"
            )
        if stacks and not all(stacks) and not self.symmetric:
            raise UnsupportedModel(
                "quantize.symmetric: stock transformers cannot load asymmetric experts (docs/decisions.md); "
                "use symmetric: true, or ignore the experts"
            )
        if stacks and not all(stacks) and self.activations:
            raise UnsupportedModel(
                "quantize.activations: stock transformers neither loads int8 experts with int8 activations nor would "
                "round what reaches them (docs/decisions.md); leave `activations` out, or ignore the experts"
            )
        return rows + rest_rows(model)

    def preview(self, model: Model) -> None:
        """No shape changes."""

    def apply(self, model: Model, context: Context) -> Ledger:
        """Quantize every block's sites and experts and leave them packed; the ledger accounts for all weights."""
        planned = self.plan(model)
        ids = (
            context.windows(self.calibration, model.tokenizer) if self.observes else torch.empty(0, 8, dtype=torch.long)
        )
        notes: dict[int, dict[str, Any]] = {}
        walk = walk_blocks(
            model, ids, notes, workplace=context.workplace, label=f"quantize ({self.method})", progress=context.progress
        )
        with closing(walk):
            for visit in walk:
                self._quantize_block(visit, model, context)
        ledger = Ledger(weights=tuple(row for row in planned if not row.name.startswith(f"{model.family.blocks}.")))
        for k in sorted(notes):
            ledger = Ledger(
                weights=ledger.weights + tuple(LedgerRow.from_json(row) for row in notes[k]["weights"]),
                experts=ledger.experts + tuple(ExpertRow.from_json(row) for row in notes[k]["experts"]),
                blocks=(*ledger.blocks, {"index": k, "change": notes[k]["change"]}),
            )
        return ledger

    def _plan_block(self, block: Block) -> list[LedgerRow]:
        rows: list[LedgerRow] = []
        treated = set()
        for sites in self._groups(block):
            spec = self._site_spec(sites)
            for site in sites:
                treated.add(site.name)
                rows.append(self._row(site.name, site.shape[0] * site.shape[1], spec, None, self._fallback(spec)))
        stack = block.experts
        if stack and not is_ignored(stack.name, self.ignore):
            spec = self.expert_spec(block)
            for name, shape in stack.shapes().items():
                treated.add(f"{stack.name}.{name}")
                count = torch.Size(shape).numel()
                rows.append(self._row(f"{stack.name}.{name}", count, spec, None, self._fallback(spec)))
        return rows + kept_rows(block, treated)

    def _quantize_block(self, visit: Visit, model: Model, context: Context) -> None:
        block = visit.block
        untouched = kept_rows(block, {row.name for row in self._plan_block(block) if row.action == "quantized"})
        hessians: dict[str, Hessian] = {}
        stack = block.experts if block.experts and not is_ignored(block.experts.name, self.ignore) else None
        inputs = ExpertInputs(stack) if stack else None
        if self.observes:
            for reads, sites in block.shared_inputs().items():
                hessians[reads] = Hessian(sites[0].shape[1])
            visit.observe(lambda reads, x_MI: hessians[reads].add(x_MI), inputs)
        rows = []
        for sites in self._groups(block):
            hessian = hessians.pop(sites[0].reads).value if self.observes else None
            rows += self._quantize_sites(sites, hessian, model)
        experts = []
        if stack and inputs is not None:
            spec = self.expert_spec(block)
            outcome = quantize_experts(
                stack,
                inputs.gather() if self.observes else None,
                self.solve,
                spec,
                model.dtype,
                context.memory_bytes,
                pruned=f"{stack.name}.gate_up_proj" in model.state.pruned,
            )
            reason = "; ".join(filter(None, (self._fallback(spec), outcome.reason)))
            for name, error in outcome.errors.items():
                count = torch.Size(stack.shapes()[name]).numel()
                rows.append(self._row(f"{stack.name}.{name}", count, spec, error, reason))
            if outcome.counts is not None:
                experts.append(
                    ExpertRow(layer=block.index, tokens=outcome.counts, starved=outcome.starved, policy=outcome.policy)
                )
        visit.note["weights"] = [row.to_json() for row in rows + untouched]
        visit.note["experts"] = [row.to_json() for row in experts]

    def _quantize_sites(self, sites: list[WeightSite], hessian: Tensor | None, model: Model) -> list[LedgerRow]:
        """Sites that read one input are solved as one matrix: rows are independent given the Hessian."""
        spec = self._site_spec(sites)
        weight = torch.cat([site.read() for site in sites])
        pruned = any(site.name in model.state.pruned for site in sites)
        quantized, problem = self.solve(weight, hessian, spec, model.dtype, weight != 0 if pruned else None)
        rows = []
        reason = "; ".join(filter(None, (self._fallback(spec), problem)))
        for site, part in zip(sites, split_rows(quantized, [site.shape[0] for site in sites]), strict=True):
            error = relative_error(site.read(), part, hessian)
            rows.append(self._row(site.name, site.shape[0] * site.shape[1], spec, error, reason))
            site.install(part)
        return rows

    def solve(
        self, weight: Tensor, hessian: Tensor | None, spec: QuantSpec, dtype: torch.dtype, keep: Tensor | None = None
    ) -> tuple[QuantizedTensor, str]:
        """Quantize one weight or stack; where GPTQ cannot factorise, rounding in the same format, with the reason."""
        if self.method == "gptq":
            assert hessian is not None
            try:
                return gptq(
                    weight, hessian, spec, damping=self.damping, search=self.scale_search, dtype=dtype, keep_OI=keep
                ), ""
            except NotPositiveDefinite as problem:
                if weight.dim() == 3:  # one expert without statistics does not cost the others theirs
                    return self._solve_each(weight, hessian, spec, dtype, keep)
                return round_to_nearest(
                    weight, spec, search=self.scale_search != "minmax", dtype=dtype
                ), f"rounded: {problem}"
        weighted = self.scale_search == "weighted" and hessian is not None
        importance = hessian.diagonal(dim1=-2, dim2=-1) if weighted and hessian is not None else None
        search = self.scale_search != "minmax"
        return round_to_nearest(weight, spec, importance_I=importance, search=search, dtype=dtype), ""

    def _solve_each(
        self, weight: Tensor, hessian: Tensor, spec: QuantSpec, dtype: torch.dtype, keep: Tensor | None
    ) -> tuple[QuantizedTensor, str]:
        solved = [
            self.solve(weight[e], hessian[e], spec, dtype, None if keep is None else keep[e])
            for e in range(len(weight))
        ]
        problems = [problem for _, problem in solved if problem]
        return stacked([quantized for quantized, _ in solved]), f"{len(problems)} experts {problems[0]}"

    def expert_spec(self, block: Block) -> QuantSpec:
        """One scheme for all experts: the group divides the model width and the expert width."""
        assert block.experts
        widths = {shape[-1] for shape in block.experts.shapes().values()}
        return self.spec_for(widths, block.experts.name)

    def _site_spec(self, sites: list[WeightSite]) -> QuantSpec:
        return self.spec_for({site.shape[1] for site in sites}, "+".join(site.name for site in sites))

    def _groups(self, block: Block) -> list[list[WeightSite]]:
        groups = [
            [site for site in sites if not is_ignored(site.name, self.ignore)]
            for sites in block.shared_inputs().values()
        ]
        return [sites for sites in groups if sites]

    def _fallback(self, spec: QuantSpec) -> str:
        if self.group_size == "channel" or spec.group_size == self.group_size:
            return ""
        return f"group {self.group_size} does not divide the rows, {spec.group_size} does"

    def _row(self, name: str, count: int, spec: QuantSpec, error: float | None, reason: str) -> LedgerRow:
        return LedgerRow(
            name=name, action="quantized", reason=reason, parameters=count, bits=spec.bits,
            group_size=spec.group_size, error=error,
        )  # fmt: skip


def relative_error(weight: Tensor, quantized: QuantizedTensor, hessian: Tensor | None) -> float:
    """The output's error relative to the output on the calibration inputs; the weight's where none were seen."""
    dense = weight.float()
    moved = quantized.dequantize() - dense
    if hessian is None:
        return float(moved.norm() / dense.norm())
    squared = ((moved @ hessian) * moved).sum() / ((dense @ hessian) * dense).sum()
    return float(squared.clamp(min=0).sqrt())
