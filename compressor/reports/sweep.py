"""What a sweep found: every run, variants by KL, the Pareto front, what each pass contributes, what failed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compressor.reports.estimate import Estimate
from compressor.reports.markdown import NOTHING, estimate_text, megabytes, number
from compressor.reports.pareto import Point, dominators, front_table, markdown_table, pareto_svg
from compressor.reports.ranking import Place, WindowLosses

SCHEMA = "compressor.sweep/1"
UNKNOWN = math.nan


@dataclass(frozen=True, kw_only=True)
class SweptRun:
    """One run: a variant with a seed. Ratios are to the baseline; figures are of the last step, None if unmeasured."""

    variant: str
    seed: int
    folder: str
    recipe_sha256: str
    weight_bytes: int | None
    weight_bytes_ratio: float | None
    file_bytes: int | None
    kl_mean: Estimate | None
    kl_reason: str | None
    perplexity_ratio: Mapping[str, Estimate]
    tasks: Mapping[str, Estimate]
    decode_ratio: Mapping[str, Estimate]
    seconds: float
    verdict: str | None
    losses: WindowLosses = field(repr=False)

    @property
    def worst_text(self) -> str | None:
        """The text whose perplexity grew most."""
        return max(self.perplexity_ratio, key=lambda text: self.perplexity_ratio[text].value, default=None)

    def to_json(self) -> dict[str, Any]:
        worst = self.worst_text
        return {
            "variant": self.variant,
            "seed": self.seed,
            "folder": self.folder,
            "recipe_sha256": self.recipe_sha256,
            "weight_bytes": self.weight_bytes,
            "weight_bytes_ratio": self.weight_bytes_ratio,
            "file_bytes": self.file_bytes,
            "kl_mean": _estimate(self.kl_mean),
            **({"kl_mean_reason": self.kl_reason} if self.kl_mean is None else {}),
            "worst_perplexity_ratio": {"text": worst} | self.perplexity_ratio[worst].to_json() if worst else None,
            "perplexity_ratio": _estimates(self.perplexity_ratio),
            "tasks": _estimates(self.tasks),
            "decode_latency_ratio": _estimates(self.decode_ratio),
            "seconds": round(self.seconds, 3),
            "gate": self.verdict,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to write the recipe, over its seeds.

    `kl` has the interval of other windows (None if a run's KL is not finite), `kl_over_seeds` that of other seeds (None
    for one seed). `place` says which variants it cannot be told apart from.
    """

    name: str
    settings: tuple[str, ...]
    without: str | None
    runs: tuple[SweptRun, ...]
    kl: Estimate | None
    kl_over_seeds: Estimate | None
    place: Place

    @property
    def weight_bytes(self) -> float | None:
        return _mean([run.weight_bytes for run in self.runs])

    @property
    def file_bytes(self) -> float | None:
        return _mean([run.file_bytes for run in self.runs])

    @property
    def point(self) -> Point | None:
        """Where it stands in bytes and KL, if both are known."""
        size = self.weight_bytes
        return None if self.kl is None or size is None else Point(self.name, size, self.kl)

    def to_json(self) -> dict[str, Any]:
        means = [run.kl_mean.value for run in self.runs if run.kl_mean is not None]
        return {
            "name": self.name,
            "settings": list(self.settings),
            "without": self.without,
            "seeds": [run.seed for run in self.runs],
            "kl_mean": _estimate(self.kl),
            "kl_over_seeds": _estimate(self.kl_over_seeds),
            "kl_seed_range": [min(means), max(means)] if len(means) > 1 else None,
            "weight_bytes": self.weight_bytes,
            "file_bytes": self.file_bytes,
            "group": self.place.group,
            "cannot_be_told_apart_from": list(self.place.alike),
        }


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """What a pass contributes: the whole recipe (`with_`) against the same without the pass.

    `kl_added` is the growth of KL through the pass, paired by window; ratios are with / without.
    """

    step: str
    with_: Variant
    without: Variant
    kl_added: Estimate | None
    kl_reason: str | None = None

    @property
    def bytes_ratio(self) -> float | None:
        before, after = self.without.weight_bytes, self.with_.weight_bytes
        return after / before if before and after is not None else None

    def decode(self, variant: Variant) -> dict[str, float]:
        """Decode latency of a side as a ratio to the baseline, by batch, the mean over seeds."""
        batches = dict.fromkeys(batch for run in variant.runs for batch in run.decode_ratio)
        return {b: float(_mean([r.decode_ratio[b].value for r in variant.runs if b in r.decode_ratio]) or UNKNOWN)
                for b in batches}  # fmt: skip

    def decode_ratio(self) -> dict[str, float]:
        """How much slower (above 1) decoding is through the pass, by batch."""
        before, after = self.decode(self.without), self.decode(self.with_)
        return {batch: after[batch] / before[batch] for batch in after if batch in before}

    def to_json(self) -> dict[str, Any]:
        return {
            "pass": self.step,
            "with": self.with_.name,
            "without": self.without.name,
            "kl_with": _estimate(self.with_.kl),
            "kl_without": _estimate(self.without.kl),
            "kl_added": _estimate(self.kl_added),
            **({"kl_added_reason": self.kl_reason} if self.kl_added is None else {}),
            "weight_bytes_ratio": self.bytes_ratio,
            "decode_latency_ratio": self.decode_ratio(),
        }


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that did not finish, and why; what can be repaired is tried again when the sweep is started again."""

    variant: str
    seed: int
    folder: str
    kind: str
    message: str
    exit_code: int

    def to_json(self) -> dict[str, Any]:
        return {"variant": self.variant, "seed": self.seed, "folder": self.folder, "error": self.kind,
                "message": self.message, "exit_code": self.exit_code}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """All of a sweep, variants by KL, lowest first."""

    recipe: str
    command: str
    variants: tuple[Variant, ...]
    ablations: tuple[Ablation, ...]
    failures: tuple[Failure, ...]

    @property
    def exit_code(self) -> int:
        """0, or the worst of what stopped runs (3, or 4 for files that lie); verdicts of gates do not count."""
        return max((failure.exit_code for failure in self.failures), default=0)

    @property
    def points(self) -> list[Point]:
        return [variant.point for variant in self.variants if variant.point is not None]

    def to_json(self) -> dict[str, Any]:
        beaten = dominators(self.points)
        return {
            "schema": SCHEMA,
            "recipe": self.recipe,
            "command": self.command,
            "variants": [variant.to_json() for variant in self.variants],
            "pareto": {
                "front": [name for name, by in beaten.items() if not by],
                "dominated": {name: list(by) for name, by in beaten.items() if by},
            },
            "ablation": [ablation.to_json() for ablation in self.ablations],
            "runs": [run.to_json() for variant in self.variants for run in variant.runs],
            "failures": [failure.to_json() for failure in self.failures],
        }

    def to_text(self) -> str:
        """The sweep as Markdown: the ranking first, then the front, the ablation, every run, what failed."""
        sections = [f"# Sweep of {self.recipe}", self._summary()]
        if self.failures:
            sections.append("## Not finished\n\n" + self._failures())
        if self.variants:
            sections.append("## Ranking\n\n" + self._ranking())
            sections.append("## Bytes against KL\n\n" + front_table(self.points, self._alike))
        if self.ablations:
            sections.append("## What each pass contributes\n\n" + self._ablation())
        if any(len(variant.runs) > 1 for variant in self.variants):
            sections.append("## Runs\n\n" + self._runs())
        sections.append(f"## Reproduce\n\n```sh\n{self.command}\n```")
        return "\n\n".join(sections) + "\n"

    def to_svg(self) -> str:
        """Bytes against KL, drawn."""
        labels = {"x_label": "bytes of the weights (MB)", "y_label": "KL to the baseline (nats a token)"}
        return pareto_svg(self.points, title=f"{self.recipe}: bytes against KL", **labels)

    def _alike(self, one: str, other: str) -> bool:
        return any(variant.name == one and other in variant.place.alike for variant in self.variants)

    def _summary(self) -> str:
        finished = sum(len(variant.runs) for variant in self.variants)
        lines = [f"{finished} of {finished + len(self.failures)} runs finished."]
        ranked = [variant for variant in self.variants if variant.kl is not None]
        if ranked:
            best = ranked[0]
            lines.append(f"Lowest KL: **{best.name}**, {estimate_text(best.kl)} nats a token.")
            alike = [variant for variant in ranked if variant.place.group == 1]
            if len(alike) > 1:
                smallest = min(alike, key=lambda variant: variant.weight_bytes or math.inf)
                size = _size(smallest.weight_bytes)
                lines.append(
                    f"{len(alike) - 1} more cannot be told apart from it; the smallest is **{smallest.name}**, {size}."
                )
        if len(ranked) > 1 and all(len(variant.runs) == 1 for variant in ranked):
            lines.append("One seed each: how much another seed would change is not known.")
        elif ranked and all(_same([r.kl_mean.value for r in v.runs if r.kl_mean]) and len(v.runs) > 1 for v in ranked):
            lines.append("The seeds made no difference to any KL.")
        return "\n".join(f"- {line}" for line in lines)

    def _failures(self) -> str:
        return "\n".join(
            f"- {failure.variant} (seed {failure.seed}): {failure.kind}: {failure.message}" for failure in self.failures
        )

    def _ranking(self) -> str:
        tasks = list(dict.fromkeys(task for v in self.variants for run in v.runs for task in run.tasks))
        header = ["group", "variant", "KL", "KL over seeds", "weights", "files", "worst perplexity", "decode", *tasks]
        rows = []
        for variant in self.variants:
            worst = max((run for run in variant.runs), key=_worst_ratio)
            rows.append([
                NOTHING if variant.place.group is None else str(variant.place.group),
                variant.name,
                estimate_text(variant.kl) if variant.kl else f"{NOTHING} ({variant.runs[0].kl_reason or 'not finite'})",
                estimate_text(variant.kl_over_seeds),
                _size(variant.weight_bytes) + _times(_mean([run.weight_bytes_ratio for run in variant.runs])),
                _size(variant.file_bytes),
                NOTHING if worst.worst_text is None
                else f"×{estimate_text(worst.perplexity_ratio[worst.worst_text])} ({worst.worst_text})",
                _by_batch(variant.runs[0].decode_ratio) if len(variant.runs) == 1 else _slowest(variant.runs),
                *(_task(variant.runs, task) for task in tasks),
                _verdicts(variant),
            ])  # fmt: skip
        return markdown_table([*header, "gate"], rows) + (
            "\n\nVariants of a group cannot be told apart from its first (all pairs together). In brackets the 95 % "
            "interval of other windows; for KL over seeds, of other seeds. × is the ratio to the baseline."
        )

    def _ablation(self) -> str:
        rows = []
        for one in self.ablations:
            added = estimate_text(one.kl_added) if one.kl_added else f"{NOTHING} ({one.kl_reason})"
            decode = ", ".join(f"×{number(ratio)} at {batch}" for batch, ratio in one.decode_ratio().items())
            whole = [] if len({a.with_.name for a in self.ablations}) == 1 else [one.with_.name]
            rows.append([
                *whole, one.step, estimate_text(one.with_.kl), estimate_text(one.without.kl), added,
                _times(one.bytes_ratio).strip() or NOTHING, decode or NOTHING,
            ])  # fmt: skip
        header = ["pass", "KL with", "KL without", "KL it adds", "weights with / without", "decode with / without"]
        if rows and len(rows[0]) > len(header):
            header = ["recipe", *header]
        note = "Each row leaves one pass out of the whole recipe; KL it adds is paired by window."
        return f"{markdown_table(header, rows)}\n\n{note}"

    def _runs(self) -> str:
        header = ["variant", "seed", "KL", "weights", "seconds", "folder"]
        rows = [
            [
                variant.name, str(run.seed), estimate_text(run.kl_mean), megabytes(run.weight_bytes),
                number(run.seconds), f"`{run.folder}`",
            ]
            for variant in self.variants
            for run in variant.runs
        ]  # fmt: skip
        return markdown_table(header, rows)


def _worst_ratio(run: SweptRun) -> float:
    return run.perplexity_ratio[run.worst_text].value if run.worst_text is not None else -math.inf


def _slowest(runs: Sequence[SweptRun]) -> str:
    """Decode ratios of several runs by batch: the mean over them."""
    batches = dict.fromkeys(batch for run in runs for batch in run.decode_ratio)
    means = {b: _mean([run.decode_ratio[b].value for run in runs if b in run.decode_ratio]) for b in batches}
    return ", ".join(f"×{number(mean)} at {batch}" for batch, mean in means.items()) or NOTHING


def _by_batch(ratios: Mapping[str, Estimate]) -> str:
    return ", ".join(f"×{estimate_text(ratio)} at {batch}" for batch, ratio in ratios.items()) or NOTHING


def _task(runs: Sequence[SweptRun], task: str) -> str:
    if len(runs) == 1:
        return estimate_text(runs[0].tasks.get(task))
    return number(_mean([run.tasks[task].value for run in runs if task in run.tasks]))


def _verdicts(variant: Variant) -> str:
    return ", ".join(dict.fromkeys(run.verdict for run in variant.runs if run.verdict)) or NOTHING


def _size(count: float | None) -> str:
    return megabytes(None if count is None else round(count))


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f" ×{number(ratio)}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _same(values: Sequence[float]) -> bool:
    return len(set(values)) == 1


def _estimate(estimate: Estimate | None) -> dict[str, Any] | None:
    return estimate.to_json() if estimate is not None and estimate.is_finite else None


def _estimates(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: _estimate(estimate) for name, estimate in estimates.items()}
