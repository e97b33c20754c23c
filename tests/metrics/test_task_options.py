"""What a recipe may say about tasks."""

import pytest
from pydantic import TypeAdapter, ValidationError

from compressor.metrics.tasks.options import Classification, Cloze, MultipleChoice, Task
from compressor.metrics.tasks.templates import check_template, fill

TASK = TypeAdapter(Task)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("multiple_choice", {}),
        ("contexts", {}),
        ("cloze", {}),
        ("minimal_pairs", {}),
        ("crows_pairs", {}),
        ("winobias", {}),
        ("classification", {"prompt": "{a}:", "labels": ["no", "yes"]}),
        ("generation", {"prompt": "{a}:", "answer": "{b}"}),
    ],
)
def test_the_kind_says_which_options_there_are(kind, more):
    """Every kind is read from a mapping, and back from its own dump."""
    task = TASK.validate_python({"kind": kind, "name": "t", "data": "f.jsonl", **more})
    assert task.kind == kind
    assert TASK.validate_json(task.model_dump_json()) == task


def test_an_option_of_another_kind_is_refused():
    """Pairs of files have no columns to slice by."""
    with pytest.raises(ValidationError, match="slice"):
        TASK.validate_python({"kind": "winobias", "name": "t", "data": "f", "slice": "type"})


def test_a_cloze_is_one_text_or_context_and_target():
    """A context without a target, or beside a text, is refused."""
    with pytest.raises(ValidationError, match="together"):
        Cloze(name="t", data="f", context="a")
    with pytest.raises(ValidationError, match="either"):
        Cloze(name="t", data="f", text="t", context="a", target="b")


def test_labels_are_keyed_by_text_whatever_yaml_made_of_them():
    """`0: negative` has a number as key."""
    task = Classification(name="t", data="f", prompt="{a}:", labels={0: "negative", 1: "positive"})
    assert task.labels == {"0": "negative", "1": "positive"}


def test_one_label_is_no_choice():
    """Two are the fewest."""
    with pytest.raises(ValidationError, match="at least 2"):
        Classification(name="t", data="f", prompt="{a}:", labels=["only"])


def test_a_template_fills_columns_and_entries_of_lists():
    """Doubled braces stay braces, and nothing but columns is looked up."""
    columns = {("question", None): "Why {x}?", ("choices", 1): "B"}
    text = fill("{{}} {question} {choices[1]}", lambda column, index: columns[column, index])
    assert text == "{} Why {x}? B"


@pytest.mark.parametrize("template", ["a {b", "a } {b}", "{}{b}", "{a[x]}", "{a[0][1]}"])
def test_a_lonely_brace_is_refused(template):
    """With the character where it stands."""
    with pytest.raises(ValueError, match="the brace at character"):
        check_template(template)


def test_a_prompt_without_a_column_is_refused():
    """It would ask the same for every item."""
    with pytest.raises(ValidationError, match="every item would ask the same"):
        Classification(name="t", data="f", prompt="Sentiment:", labels=["no", "yes"])
    assert MultipleChoice(name="t", data="f", query="question").query == "question"
