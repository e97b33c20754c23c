"""From rows of a file to questions: what is read before what, what is right, and what is said of a bad row."""

import csv
import json

import pytest

from compressor.errors import EnvironmentProblem, RecipeError
from compressor.metrics.tasks import reading
from compressor.metrics.tasks.options import (
    Classification,
    Cloze,
    Contexts,
    CrowsPairs,
    Generation,
    MinimalPairs,
    MultipleChoice,
    Winobias,
)
from compressor.metrics.tasks.questions import perturbed, read_task


@pytest.fixture
def lines(tmp_path):
    """`lines(row, ...)`: a .jsonl file of these rows."""

    def write(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def test_multiple_choice_asks_each_choice_after_the_query(lines):
    """The delimiter's words stay with the context, its space goes to the choice."""
    data = lines({"query": "Q?", "choices": ["a", "bc"], "gold": 1})
    [question] = read_task(MultipleChoice(name="t", data=data, delimiter="\nAnswer: "))
    assert question.asks == [("Q?\nAnswer:", " a"), ("Q?\nAnswer:", " bc")]
    assert (question.gold, question.answer, question.shown) == (1, "bc", "Q?\nAnswer:")


def test_queries_may_be_templates_and_choices_columns(lines):
    """As data sets with one column for each ending have it; gold may be the text."""
    data = lines({"ctx": "He", "one": "ran", "two": "sat", "right": "sat"})
    task = MultipleChoice(name="t", data=data, query="So: {ctx}", choices=["one", "two"], gold="right")
    [question] = read_task(task)
    assert question.asks == [("So: He", " ran"), ("So: He", " sat")]
    assert question.gold == 1


def test_examples_are_the_first_items_solved_and_not_asked(lines):
    """One example: the second item is asked, after the first with its right answer."""
    rows = [{"query": q, "choices": ["x", "y"], "gold": g} for q, g in (("one", 1), ("two", 0))]
    [question] = read_task(MultipleChoice(name="t", data=lines(*rows), shots=1))
    assert question.context == "one y\n\ntwo"
    assert (question.item, question.shown) == (1, "two")


def test_contexts_are_the_choices_of_a_contexts_task(lines):
    """One continuation after each."""
    data = lines({"context_options": ["so Ann", "so Bob"], "continuation": "left.", "gold": 0})
    [question] = read_task(Contexts(name="t", data=data))
    assert question.asks == [("so Ann", " left."), ("so Bob", " left.")]
    assert (question.answer, question.shown) == ("so Ann", "left.")


def test_a_cloze_asks_the_last_word(lines):
    """After the last space, as LAMBADA is cut; or a column of its own."""
    [question] = read_task(Cloze(name="t", data=lines({"text": "I like\n\nbig dogs"})))
    assert question.asks == [("I like\n\nbig", " dogs")]
    [question] = read_task(Cloze(name="t", data=lines({"c": "I like", "t": "dogs"}), context="c", target="t"))
    assert question.asks == [("I like", " dogs")]


def test_pairs_have_no_context(lines):
    """The good sentence is the right one; of stereotypes none is."""
    [question] = read_task(MinimalPairs(name="t", data=lines({"sentence_good": "A b.", "sentence_bad": "B a."})))
    assert question.asks == [("", "A b."), ("", "B a.")]
    assert question.answer == "A b."


def test_crows_pairs_are_read_from_csv(tmp_path):
    """A quoted comma is no new column; the slice is the kind of bias, and no answer is right."""
    path = tmp_path / "crows.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["", "sent_more", "sent_less", "bias_type"], ["0", "He, a man.", "She, a man.", "gender"]])
    [question] = read_task(CrowsPairs(name="t", data=str(path)))
    assert question.asks == [("", "He, a man."), ("", "She, a man.")]
    assert (question.slice, question.answer, question.gold) == ("gender", None, 0)


def test_winobias_pairs_a_file_with_its_twin(tmp_path):
    """Numbers and brackets go; the type is the slice; the one that fits the stereotype scores."""
    (tmp_path / "pro_stereotyped_type1.txt.dev").write_text("1 [The cook] said [she] left.\n")
    (tmp_path / "anti_stereotyped_type1.txt.dev").write_text("1 [The cook] said [he] left.\n")
    for data in (tmp_path, tmp_path / "pro_stereotyped_type1.txt.dev"):
        [question] = read_task(Winobias(name="t", data=str(data)))
        assert question.answers == ("The cook said she left.", "The cook said he left.")
        assert (question.slice, question.answer) == ("type1", None)


def test_winobias_files_of_different_length_are_refused(tmp_path):
    """With both numbers."""
    (tmp_path / "pro_x.txt").write_text("1 a\n2 b\n")
    (tmp_path / "anti_x.txt").write_text("1 a\n")
    with pytest.raises(RecipeError, match=r"has 2 sentences, its twin .*anti_x.txt has 1"):
        read_task(Winobias(name="t", data=str(tmp_path)))


def test_classification_asks_every_label(lines):
    """In the order of the recipe; the row's value says which is right."""
    task = Classification(
        name="t", data=lines({"s": "fine", "label": 1}), prompt="{s}\nMood:", labels={0: "bad", 1: "good"}
    )
    [question] = read_task(task)
    assert question.asks == [("fine\nMood:", " bad"), ("fine\nMood:", " good")]
    assert question.gold == 1


def test_letters_stand_for_entries_of_a_list(lines):
    """MMLU's form: the choices in the prompt, their letters as labels."""
    data = lines({"question": "Q", "choices": ["x", "y"], "answer": 0})
    task = Classification(
        name="t", data=data, prompt="{question}\nA. {choices[0]}\nB. {choices[1]}", labels=["A", "B"], label="answer"
    )
    [question] = read_task(task)
    assert question.asks == [("Q\nA. x\nB. y", " A"), ("Q\nA. x\nB. y", " B")]


@pytest.mark.parametrize(
    ("match", "expected", "text", "accepted"),
    [
        ("exact", "42", " 42 ", True),
        ("exact", "42", "42.", False),
        ("contains", "42", "it is 42.", True),
        ("contains", "42", "it is 4 2", False),
        ("regex", r"\b42\b", "it is 42.", True),
        ("regex", r"\b42\b", "it is 420", False),
    ],
)
def test_a_written_answer_is_matched_as_asked(lines, match, expected, text, accepted):
    """Exactly but for spaces around it, contained, or by a pattern."""
    task = Generation(name="t", data=lines({"q": "6*7", "a": expected}), prompt="{q}=", answer="{a}", match=match)
    [question] = read_task(task)
    assert question.writing.accepts(text) == accepted


def test_items_are_spread_over_the_file_and_keep_their_numbers(lines):
    """Five of a hundred: one from each fifth, the same for the same seed, others for another."""
    data = lines(*({"text": f"word {n}"} for n in range(100)))

    def taken(seed):
        return [question.item for question in read_task(Cloze(name="t", data=data, items=5, seed=seed))]

    assert [item // 20 for item in taken(0)] == [0, 1, 2, 3, 4]
    assert taken(0) == taken(0) != taken(1)


def test_slices_and_clusters_are_columns(lines):
    """Numbers become text."""
    data = lines({"text": "a b", "subject": "law", "passage": 7})
    [question] = read_task(Cloze(name="t", data=data, slice="subject", cluster="passage"))
    assert (question.slice, question.cluster) == ("law", "7")


def test_the_hash_covers_all_that_is_asked(lines):
    """Another prompt, gold, choice or normalisation has another hash; the same question has the same."""
    row = {"query": "Q", "choices": ["a", "b"], "gold": 0}

    def digest(normalise="none", **changed):
        task = MultipleChoice(name="t", data=lines(row | changed), normalise=normalise)
        return read_task(task)[0].sha256

    hashes = [digest(), digest(query="R"), digest(gold=1), digest(choices=["a", "c"]), digest("bytes")]
    assert len(set(hashes)) == 5
    assert digest() == hashes[0]


def test_perturbing_changes_the_prompt_and_nothing_else(lines):
    """Not the examples before it, not the choices; the hash and the variant tell."""
    rows = [{"query": q, "choices": ["x", "y"], "gold": 0} for q in ("one", "two")]
    [question] = read_task(MultipleChoice(name="t", data=lines(*rows), shots=1, delimiter=" is "))
    [changed] = perturbed([question], str.upper, "upper")
    assert changed.asks == [("one is x\n\nTWO is", " x"), ("one is x\n\nTWO is", " y")]
    assert changed.variant == "upper"
    assert changed.sha256 != question.sha256


def test_pairs_have_nothing_to_perturb(lines):
    """Both sentences are choices."""
    data = lines({"sentence_good": "A b.", "sentence_bad": "B a."})
    assert perturbed(read_task(MinimalPairs(name="t", data=data)), str.upper, "upper") == []


def test_a_wrong_column_is_named_with_its_place_and_the_others(lines):
    """File, line, key, the nearest one and all that are there."""
    data = lines({"query": "Q", "choices": ["a", "b"], "gold": 0}, {"question": "Q", "choices": ["a", "b"], "gold": 0})
    with pytest.raises(
        RecipeError, match=r"rows.jsonl, line 2, task 't': there is no key 'query'.*there are 'question', 'choices'"
    ):
        read_task(MultipleChoice(name="t", data=data))
    with pytest.raises(RecipeError, match=r"line 1.*no key 'glod' \(did you mean 'gold'\?\)"):
        read_task(MultipleChoice(name="t", data=data, gold="glod"))


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"query": "Q", "choices": ["a", "b"], "gold": 2}, "'gold' is '2': neither a number below 2"),
        ({"query": "Q", "choices": ["a"], "gold": 0}, "there are 1 choices"),
        ({"query": "Q", "choices": ["a", " "], "gold": 0}, "choice 1 is empty"),
        ({"query": "Q", "choices": "a, b", "gold": 0}, "no list of texts"),
        ({"query": ["Q"], "choices": ["a", "b"], "gold": 0}, "which is no text"),
    ],
)
def test_a_bad_row_says_what_is_wrong(lines, row, complaint):
    """With file and line."""
    with pytest.raises(RecipeError, match=rf"rows.jsonl, line 1, task 't': .*{complaint}"):
        read_task(MultipleChoice(name="t", data=lines(row)))


def test_a_label_without_a_text_is_refused(lines):
    """With the values that have one."""
    task = Classification(name="t", data=lines({"s": "so-so", "label": 2}), prompt="{s}", labels=["bad", "good"])
    with pytest.raises(RecipeError, match="'label' is '2', for which there is no label; there are labels for '0', '1'"):
        read_task(task)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("empty.jsonl", "\n", "empty.jsonl holds no items"),
        ("empty.json", "", "empty.json holds no items"),
        ("bad.jsonl", '{"text": "a b"}\n{', r"bad.jsonl, line 2, task 't': not JSON"),
        ("list.jsonl", "[1]", "line 1, task 't': an item is an object"),
        ("object.json", "{}", "has to be a list of objects"),
        ("short.csv", "text,more\na b\n", "short.csv, line 2, task 't': the row has not the 2 columns"),
        ("rows.parquet", "x", "has to end in .jsonl, .csv, .json"),
    ],
)
def test_a_bad_file_says_what_is_wrong(tmp_path, name, content, complaint):
    """Empty, not what its name says, or of no kind that is read."""
    (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match=complaint):
        read_task(Cloze(name="t", data=str(tmp_path / name)))


def test_a_missing_file_names_the_nearest_one(lines):
    """A typo in a file name."""
    data = lines({"text": "a b"})
    with pytest.raises(RecipeError, match=r"there is no file .*row.jsonl \(did you mean 'rows.jsonl'\?\)"):
        read_task(Cloze(name="t", data=data.replace("rows", "row")))


def test_data_of_the_hub_needs_the_package_datasets(monkeypatch):
    """Where it is missing, the error gives the command."""
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'compressor\[eval\]'"):
        read_task(Cloze(name="t", data="hf:org/name"))


@pytest.mark.parametrize(
    ("data", "asked"),
    [
        ("hf:org/name:config:test", ("org/name", "config", "test")),
        ("hf:org/name::test", ("org/name", None, "test")),
        ("hf:org/name:config", ("org/name", "config", None)),
    ],
)
def test_data_of_the_hub_is_asked_by_name_configuration_and_split(monkeypatch, data, asked):
    """Through `datasets`, of which a stand-in records what it is asked."""
    seen = []

    class Datasets:
        @staticmethod
        def load_dataset(name, config, *, split):
            seen.append((name, config, split))
            return [{"text": "a b"}]

    monkeypatch.setitem(__import__("sys").modules, "datasets", Datasets)
    assert [row.values for row in reading.read_rows(data, "t")] == [{"text": "a b"}]
    assert seen == [asked]
