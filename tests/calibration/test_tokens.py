"""From text to windows of tokens; the tokenizer gives one token for each byte."""

import json

import pytest
import torch

from compressor.calibration import Calibration, calibration_windows, load_texts, windows
from compressor.errors import RecipeError
from tests.tiny_models import tiny_tokenizer

TEXT = "".join(chr(97 + i % 26) for i in range(100))


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def texts_folder(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return str(folder)


def first_letters(tokenizer, rows):
    return [tokenizer.decode(row)[0] for row in rows]


def test_windows_are_consecutive_and_whole(tokenizer):
    """100 bytes are 12 windows of 8; together they are the text's first 96 bytes, and the rest is left out."""
    found = windows(TEXT, tokenizer, 8)
    assert found.shape == (12, 8)
    assert tokenizer.decode(found.flatten()) == TEXT[:96]


def test_windows_hold_no_special_tokens(tokenizer):
    """Neither padding nor an end of text is put in."""
    assert int(windows(TEXT, tokenizer, 8).max()) < 256


@pytest.mark.parametrize(("count", "found"), [(3, 3), (12, 12), (50, 12)])
def test_the_first_windows_are_taken(tokenizer, count, found):
    """`count` of them, or as many as there are; they are the first of all windows."""
    assert torch.equal(windows(TEXT, tokenizer, 8, count), windows(TEXT, tokenizer, 8)[:found])


@pytest.mark.parametrize("text", ["", "short"])
def test_a_text_shorter_than_a_window_gives_none(tokenizer, text):
    """An empty set of the right shape and dtype."""
    found = windows(text, tokenizer, 8)
    assert found.shape == (0, 8)
    assert found.dtype == torch.long


def test_calibration_takes_texts_in_turn(tokenizer, tmp_path):
    """Four windows out of two texts: a, b, a, b."""
    data = texts_folder(tmp_path, one="a" * 100, two="b" * 100)
    found = calibration_windows(Calibration(data=data, samples=4, length=8), tokenizer)
    assert first_letters(tokenizer, found) == ["a", "b", "a", "b"]


def test_a_text_that_runs_out_leaves_its_turns_to_the_others(tokenizer, tmp_path):
    """One window of a, then b only."""
    data = texts_folder(tmp_path, one="a" * 8, two="b" * 100)
    found = calibration_windows(Calibration(data=data, samples=5, length=8), tokenizer)
    assert first_letters(tokenizer, found) == ["a", "b", "b", "b", "b"]


def test_too_little_text_says_how_much_there_is(tokenizer, tmp_path):
    """12 and 1 windows are there, 14 were asked for."""
    data = texts_folder(tmp_path, one=TEXT, two="b" * 8)
    with pytest.raises(RecipeError, match=r"holds 13 windows of 8 tokens, 14 were asked for"):
        calibration_windows(Calibration(data=data, samples=14, length=8), tokenizer)


def test_the_bundled_texts_are_five_domains(tokenizer):
    """demo/text has calibration and held-out texts of the same five names."""
    calibration, held_out = load_texts("demo/text"), load_texts("demo/text", "held_out")
    assert len(calibration) == 5
    assert calibration.keys() == held_out.keys()
    assert all(calibration[name] != held_out[name] for name in calibration)


def jsonl(path, *records):
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n")
    return str(path)


def test_jsonl_lines_are_joined_by_blank_lines(tmp_path):
    """`text`, or `prompt` and `response` together."""
    data = jsonl(tmp_path / "data.jsonl", {"text": "one"}, {"prompt": "two ", "response": "three"})
    assert load_texts(data) == {"data": "one\n\ntwo three"}


def test_jsonl_lines_may_hold_other_line_separators(tmp_path):
    """U+2028 and U+0085 stand inside JSON strings; only a newline ends a record."""
    text = "one\u2028two\u0085three"
    assert load_texts(jsonl(tmp_path / "data.jsonl", {"text": text})) == {"data": text}


@pytest.mark.parametrize(
    ("line", "problem"), [('{"text": ', "not JSON"), ('{"words": "x"}', "no key 'text'"), ("7", "no key 'text'")]
)
def test_a_bad_jsonl_line_is_named(tmp_path, line, problem):
    """File and line number."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(RecipeError, match=rf"data\.jsonl, line 2: {problem}"):
        load_texts(str(path))


def test_texts_by_name(tmp_path):
    """A mapping keeps its own names."""
    texts_folder(tmp_path, one="a")
    assert load_texts({"mine": str(tmp_path / "one.txt")}) == {"mine": "a"}


def test_a_missing_text_says_what_is_possible():
    """RecipeError with the path."""
    with pytest.raises(RecipeError, match=r"no text at .*absent\.txt; possible are demo/text"):
        load_texts("/no/absent.txt")


def test_a_folder_without_texts_is_named(tmp_path):
    """RecipeError, not an empty set."""
    with pytest.raises(RecipeError, match=r"no \.txt or \.jsonl"):
        load_texts(str(tmp_path))


def test_bytes_that_are_no_utf8_are_named(tmp_path):
    """RecipeError with the file."""
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(RecipeError, match=r"latin\.txt: not readable"):
        load_texts(str(tmp_path / "latin.txt"))
