"""What a compressed model has to keep (docs/gates.md): limits by metric, margins for paired tasks, waivers."""

import datetime
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

Share = Annotated[FiniteFloat, Field(ge=0, le=1)]
PRESETS = {"strict": 0.999, "default": 0.99, "loose": 0.95}  # share of the baseline's quality that has to be kept


class Rule(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Limit(Rule):
    """At most `max`, or at least `min`: exactly one of them; it applies to the outer end of the 95 % interval."""

    max: FiniteFloat | None = Field(None, description="The upper end of the 95 % interval may not lie above this.")
    min: FiniteFloat | None = Field(None, description="The lower end of the 95 % interval may not lie below this.")

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if (self.max is None) == (self.min is None):
            raise ValueError("a limit has exactly one of max and min, as in {max: 1.05}")
        return self

    @property
    def bound(self) -> float:
        """The number itself, whichever side it limits."""
        bound = self.min if self.max is None else self.max
        assert bound is not None
        return bound

    def __str__(self) -> str:
        return f"at least {self.bound:,.10g}" if self.max is None else f"at most {self.bound:,.10g}"


class TextLimit(Limit):
    """A limit on one evaluation text; without `text` it holds for every text, so the worst one decides."""

    text: str | None = Field(None, description="The evaluation text that is meant; left out: every text.")


class Paired(Rule):
    """How much may be lost on the same items: exactly one of `margin` and `recovery`."""

    margin: Share | None = Field(None, description="Drop that is acceptable, as a share of the items: 0.01 is a point.")
    recovery: Share | None = Field(None, description="Share of the baseline's score that has to be kept, such as 0.99.")
    tolerance: Share | None = Field(None, description="A significant drop up to this is undecided; default the margin.")
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = Field(0.05, description="False alarms that are accepted.")
    only: tuple[str, ...] | None = Field(None, description="The tasks that are meant; left out: all of them.")
    min_items: Annotated[int, Field(ge=1)] = Field(1, description="Fewer items than this are no evidence.")

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if (self.margin is None) == (self.recovery is None):
            raise ValueError("give exactly one of margin and recovery, as in {margin: 0.01} or {recovery: 0.99}")
        return self

    def allowed(self, baseline_score: float) -> float:
        """The margin in points for a baseline that scores so much."""
        if self.margin is not None:
            return self.margin
        assert self.recovery is not None
        return (1 - self.recovery) * baseline_score


class Waiver(Rule):
    """A failure that somebody answers for, until a day; it stays in the report."""

    rule: str = Field(min_length=1, description="Which checks, by their names with * and ?: tasks.lambada, slices.*")
    owner: str = Field(min_length=1, description="Who answers for it.")
    expires: datetime.date = Field(description="The last day on which it holds.")
    reason: str = Field(min_length=1, description="Why it is acceptable.")


class Policy(Rule):
    """What the candidate has to keep. A ratio is after / before: the candidate against the baseline.

    Unknown metrics and a policy that asks for nothing are pydantic ValidationErrors; `load_policy` turns those of a
    file into sentences with file and line.
    """

    preset: Literal["strict", "default", "loose"] | None = Field(
        None, description="Keep 99.9, 99 or 95 % of the task scores and of 1 / perplexity; single rules override it."
    )
    weight_bytes_ratio: Limit | None = Field(None, description="Bytes of the weights held in memory, after / before.")
    file_bytes_ratio: Limit | None = Field(None, description="Bytes of the checkpoint on disk, after / before.")
    perplexity_ratio: TextLimit | None = Field(None, description="Perplexity, after / before.")
    kl_mean: Limit | None = Field(None, description="Mean KL divergence from the baseline in nats a token.")
    kl_p99: Limit | None = Field(None, description="99th percentile of the KL divergence over tokens, in nats.")
    top1_agreement: Limit | None = Field(None, description="Share of tokens with the baseline's first choice, 0 to 1.")
    robustness_gap: Limit | None = Field(
        None, description="How much more the candidate loses on perturbed prompts than the baseline, of each task."
    )
    decode_latency_ratio: Limit | None = Field(None, description="Time for a generated token, after / before.")
    prefill_latency_ratio: Limit | None = Field(None, description="Time to read the prompt, after / before.")
    weight_bytes: Limit | None = Field(None, description="Bytes of the weights held in memory.")
    peak_bytes: Limit | None = Field(None, description="Highest memory use while the model runs, in bytes.")
    tasks: Paired | None = Field(None, description="Drop of each task's score, paired by item.")
    slices: Paired | None = Field(None, description="Drop of each slice of a task, with Holm's correction over them.")
    brier: Paired | None = Field(None, description="Growth of each task's Brier score (margin only), paired by item.")
    bias: Paired | None = Field(None, description="Shift of a stereotype preference away from 0.5 (margin only).")
    waivers: tuple[Waiver, ...] = ()

    @model_validator(mode="after")
    def _some_rule(self) -> Self:
        # A gate that checks nothing would always pass, and the pass would mean nothing.
        if self.preset is None and not self.limits() and not self.paired():
            known = [name for name in type(self).model_fields if name != "waivers"]
            raise ValueError(f"the policy limits nothing; it takes {', '.join(known)}")
        for name in ("brier", "bias"):
            rule = getattr(self, name)
            if rule is not None and rule.margin is None:
                raise ValueError(f"{name} takes a margin, as in {{margin: 0.01}}: there is no score to recover")
        return self

    def resolved(self) -> "Policy":
        """With the rules that the preset stands for written out."""
        if self.preset is None:
            return self
        kept = PRESETS[self.preset]
        rules = {"perplexity_ratio": TextLimit(max=1 / kept), "tasks": Paired(recovery=kept)}
        absent = {name: rule for name, rule in rules.items() if getattr(self, name) is None}
        return self.model_copy(update={**absent, "preset": None})

    def limits(self) -> dict[str, Limit]:
        """The metrics that are limited, in the order in which a verdict lists them."""
        return {name: rule for name in type(self).model_fields if isinstance(rule := getattr(self, name), Limit)}

    def paired(self) -> dict[str, Paired]:
        """The rules that compare item by item."""
        return {name: rule for name in type(self).model_fields if isinstance(rule := getattr(self, name), Paired)}
