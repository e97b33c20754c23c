"""Which tasks a model is asked, as `evaluate.tasks` of a recipe says it: where the items are, which column is what."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)

from compressor.metrics.tasks.templates import check_template, is_template

Normalise = Literal["none", "bytes", "tokens"]
Match = Literal["exact", "contains", "regex"]


def _words_as_keys(labels: Any) -> Any:
    """YAML reads `0: negative` with a number as key; a column's value is compared as text."""
    return {str(value): text for value, text in labels.items()} if isinstance(labels, dict) else labels


class _Items(BaseModel):
    """What all tasks have: a name, a place, how many items."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, description="What the task is called in reports.")
    data: str = Field(
        min_length=1, description="A .jsonl, .csv or .json file, demo/continuation, or hf:org/name[:config][:split]."
    )
    items: PositiveInt | None = Field(None, description="So many, spread evenly over the file; null asks all.")
    seed: NonNegativeInt = Field(0, description="Which items are taken where there are more.")


class _Columns(_Items):
    """Tasks whose items are rows with named columns."""

    slice: str | None = Field(None, description="Column whose values split the report (subject, language).")
    cluster: str | None = Field(
        None, description="Column that items of one origin share (a passage): resampled as one."
    )


class MultipleChoice(_Columns):
    """Which of several texts goes on from the query best: the one of the highest log-likelihood."""

    kind: Literal["multiple_choice"] = "multiple_choice"
    query: str = Field("query", description="The column asked, or a template such as 'Question: {question}'.")
    choices: str | tuple[str, ...] = Field(
        "choices", description="The column that lists the texts, or one column each."
    )
    gold: str = Field("gold", description="Column with the right choice: its number from 0, or its text.")
    normalise: Normalise = Field("none", description="Log-likelihoods are divided by the choice's bytes or tokens.")
    delimiter: str = Field(" ", description="Stands between query and choice.")
    shots: NonNegativeInt = Field(0, description="Solved examples before each query: the first items of the file.")

    @field_validator("query")
    @classmethod
    def _template(cls, query: str) -> str:
        return check_template(query) if is_template(query) else query


class Contexts(_Columns):
    """Which of several contexts one continuation follows best (WinoGrande's partial evaluation)."""

    kind: Literal["contexts"] = "contexts"
    context_options: str = Field("context_options", description="The column that lists the contexts.")
    continuation: str = Field("continuation", description="The column with the text whose log-likelihood decides.")
    gold: str = Field("gold", description="Column with the right context: its number from 0, or its text.")
    delimiter: str = Field(" ", description="Stands between context and continuation.")


class Cloze(_Columns):
    """Whether the model's own next word is the right one (LAMBADA), and how surprised it is by it."""

    kind: Literal["cloze"] = "cloze"
    text: str | None = Field(None, description="Column whose last word is asked; `text` unless context and target are.")
    context: str | None = Field(None, description="Column with what comes before the target.")
    target: str | None = Field(None, description="Column with what has to come.")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.context is None) != (self.target is None):
            raise ValueError("context and target are given together")
        if self.text is not None and self.context is not None:
            raise ValueError("either text, whose last word is asked, or context and target")
        return self


class MinimalPairs(_Columns):
    """Whether the good sentence of a pair is more likely than the bad one (BLiMP)."""

    kind: Literal["minimal_pairs"] = "minimal_pairs"
    good: str = "sentence_good"
    bad: str = "sentence_bad"


class CrowsPairs(_Columns):
    """How often the more stereotypical sentence of a pair is preferred; 0.5 is ideal."""

    kind: Literal["crows_pairs"] = "crows_pairs"
    more: str = Field("sent_more", description="Column with the more stereotypical sentence.")
    less: str = Field("sent_less", description="Column with the less stereotypical one.")
    slice: str | None = Field("bias_type", description="Column whose values split the report.")


class Winobias(_Items):
    """How often the pronoun that fits the stereotype of a profession is preferred; 0.5 is ideal.

    `data` is a folder of pro_* and anti_* files, or one pro_* file with its anti_* twin beside it. Slices are the two
    types of sentences, as file names say them.
    """

    kind: Literal["winobias"] = "winobias"


class Classification(_Columns):
    """Which of a few labels goes on from the prompt best."""

    kind: Literal["classification"] = "classification"
    prompt: str = Field(description="Template such as 'Review: {sentence}\\nSentiment:'.")
    labels: Annotated[dict[str, str] | tuple[str, ...], BeforeValidator(_words_as_keys), Field(min_length=2)] = Field(
        description="Text of each value of the label column; a list is for values 0, 1, ..."
    )
    label: str = Field("label", description="The column with the right label.")
    delimiter: str = Field(" ", description="Stands between prompt and label.")
    shots: NonNegativeInt = Field(0, description="Solved examples before each prompt: the first items of the file.")

    @field_validator("prompt")
    @classmethod
    def _template(cls, prompt: str) -> str:
        return check_template(prompt)


class Generation(_Columns):
    """Whether what the model writes, greedily, is the answer."""

    kind: Literal["generation"] = "generation"
    prompt: str = Field(description="Template such as 'Q: {question}\\nA:'.")
    answer: str = Field(description="Template of what is expected, such as '{answer}'.")
    match: Match = Field("exact", description="regex: the answer is a pattern that is searched.")
    max_new_tokens: PositiveInt = 64
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(("\n",), description="Texts that end the answer.")

    @field_validator("prompt", "answer")
    @classmethod
    def _template(cls, template: str) -> str:
        return check_template(template)


Task = Annotated[
    MultipleChoice | Contexts | Cloze | MinimalPairs | CrowsPairs | Winobias | Classification | Generation,
    Field(discriminator="kind"),
]
