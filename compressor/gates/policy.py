"""The limits that a compressed model has to keep (docs/gates.md)."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator


class Limit(BaseModel):
    """At most `max`, or at least `min`: exactly one of them; it applies to the outer end of the 95 % interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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


class Policy(BaseModel):
    """Limits by metric. A ratio is after / before: the last step against the uncompressed model.

    Unknown metrics and a policy without any limit are pydantic ValidationErrors; `load_policy` turns those of a file
    into sentences with file and line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight_bytes_ratio: Limit | None = Field(None, description="Bytes of the weights held in memory, after / before.")
    file_bytes_ratio: Limit | None = Field(None, description="Bytes of the checkpoint on disk, after / before.")
    perplexity_ratio: TextLimit | None = Field(None, description="Perplexity, after / before.")
    kl_mean: Limit | None = Field(None, description="Mean KL divergence from the baseline in nats a token.")
    kl_p99: Limit | None = Field(None, description="99th percentile of the KL divergence over tokens, in nats.")
    top1_agreement: Limit | None = Field(None, description="Share of tokens with the baseline's first choice, 0 to 1.")
    decode_latency_ratio: Limit | None = Field(None, description="Time for a generated token, after / before.")
    prefill_latency_ratio: Limit | None = Field(None, description="Time to read the prompt, after / before.")
    weight_bytes: Limit | None = Field(None, description="Bytes of the weights held in memory.")
    peak_bytes: Limit | None = Field(None, description="Highest memory use while the model runs, in bytes.")

    @model_validator(mode="after")
    def _some_limit(self) -> Self:
        # A gate that checks nothing would always pass, and the pass would mean nothing.
        if not self.limits():
            raise ValueError(f"the policy limits nothing; it takes {', '.join(type(self).model_fields)}")
        return self

    def limits(self) -> dict[str, Limit]:
        """The metrics that are limited, in the order in which a verdict lists them."""
        limits = {metric: getattr(self, metric) for metric in type(self).model_fields}
        return {metric: limit for metric, limit in limits.items() if limit is not None}
