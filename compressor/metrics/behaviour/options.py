"""What is measured of a model's behaviour, as `evaluate` of a recipe says it."""

import difflib
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, WithJsonSchema

from compressor.calibration.tokens import DEMO_TEXT
from compressor.metrics.behaviour.bias import DEMO
from compressor.metrics.behaviour.perturbations import VARIANTS

# Capitals and small letters alone are left out: each variant asks every item once more
DEFAULT_VARIANTS = ("typos", "case_random", "drops", "paraphrase", "distractor")


def _known(variant: str) -> str:
    if variant not in VARIANTS:
        near = difflib.get_close_matches(variant, VARIANTS, n=1)
        guess = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"there is no variant {variant!r}{guess}; possible are {', '.join(VARIANTS)}")
    return variant


def _once(variants: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(variants)) < len(variants):
        raise ValueError(f"a variant is asked once, not twice: {', '.join(variants)}")
    return variants


Variant = Annotated[str, AfterValidator(_known), WithJsonSchema({"type": "string", "enum": list(VARIANTS)})]
Words = Annotated[str, Field(min_length=1)]


class _Options(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Robustness(_Options):
    """The tasks once more with perturbed prompts: how much more is lost than by the baseline."""

    tasks: Annotated[tuple[Words, ...], Field(min_length=1)] | None = Field(
        None, description="Tasks whose prompts are perturbed; left out: all tasks with a prompt of their own."
    )
    variants: Annotated[tuple[Variant, ...], Field(min_length=1), AfterValidator(_once)] = Field(
        DEFAULT_VARIANTS, description="How the prompts are changed; each variant asks every item once more."
    )
    seed: NonNegativeInt = Field(0, description="Which letters and words are hit.")


class Ood(_Options):
    """Texts unlike those of `evaluate.text`: is more lost there, and are they still recognised?"""

    text: Annotated[dict[Words, Words], Field(min_length=1)] = Field(description="Files by name.")


class Bias(_Options):
    """Sentences with different people in them; stereotype pairs are tasks (crows_pairs, winobias)."""

    templates: Words = Field(DEMO, description="demo, or a .json file made like compressor/demo/bias.json.")


class Generation(_Options):
    """Health of what the model writes after the first tokens of a text: repetition, length, endings."""

    text: Words = Field(DEMO_TEXT, description="demo/text, or a file that the prompts are taken from.")
    prompts: PositiveInt = Field(16, description="How many prompts.")
    prompt_tokens: PositiveInt = Field(32, description="Tokens in a prompt.")
    max_new_tokens: PositiveInt = Field(64, description="Tokens written after it, at most.")


class Refusals(_Options):
    """Which prompts the model refuses, those that it should and harmless ones that look alike."""

    prompts: Words = Field(DEMO, description='demo, or a .jsonl file: {"prompt": ..., "expect": refuse or answer}.')
    max_new_tokens: PositiveInt = Field(32, description="Tokens of a reply that are read, at most.")


class Similarity(_Options):
    """Sentence embeddings of an encoder against what people find alike (STS-B)."""

    data: Words = Field(description="A .csv or .jsonl file with sentence1, sentence2 and score.")
    items: Annotated[int, Field(ge=3)] | None = Field(None, description="So many pairs, evenly spaced; left out: all.")
