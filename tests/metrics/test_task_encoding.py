"""Where a context ends and its continuation begins, in tokens."""

import pytest
from tokenizers.processors import TemplateProcessing

from compressor.errors import RecipeError, UnsupportedModel
from compressor.metrics.tasks.encoding import Request, encode
from tests.tiny_models import EOS, tiny_tokenizer


def ids(text: str) -> tuple[int, ...]:
    return tuple(tiny_tokenizer()(text)["input_ids"])


def test_spaces_at_the_end_of_a_context_go_to_the_continuation():
    """`a ` + `b` is asked as `a` + ` b`."""
    assert encode(tiny_tokenizer(), [("a ", "b")], 64) == [Request(ids("a"), ids(" b"))]


def test_an_empty_context_is_the_end_of_text_token_where_there_is_no_beginning():
    """The tiny tokenizer has <eos> only."""
    assert encode(tiny_tokenizer(), [("", "ab")], 64) == [Request((EOS,), ids("ab"))]


def test_a_tokenizer_that_begins_every_text_begins_the_context_once():
    """With a beginning-of-text token added by itself; a text that brings its own gets no second one."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", bos)]
    )
    assert tokenizer("a")["input_ids"] == [bos, *ids("a")]
    found = encode(tokenizer, [("a", "b"), ("", "b"), ("<bos>a", "b")], 64)
    assert found == [
        Request((bos, *ids("a")), ids("b")),
        Request((bos,), ids("b")),
        Request((bos, *ids("a")), ids("b")),
    ]


def test_long_contexts_lose_their_beginning_and_say_so():
    """A model of 5 tokens reads the last 4 of the context and the first of the two asked."""
    assert encode(tiny_tokenizer(), [("abcdefgh", "xy")], 5) == [Request(ids("efgh"), ids("xy"), cut=True)]


def test_a_context_that_just_fits_is_not_cut():
    """4 + 2 - 1 tokens go through a model of 5."""
    assert encode(tiny_tokenizer(), [("efgh", "xy")], 5) == [Request(ids("efgh"), ids("xy"), cut=False)]


def test_a_continuation_longer_than_the_model_is_refused():
    """Six tokens into five do not go."""
    with pytest.raises(RecipeError, match="has 6 tokens, the model reads 5 at once"):
        encode(tiny_tokenizer(), [("a", "uvwxyz")], 5)


def test_a_continuation_without_tokens_is_refused():
    """Nothing after the context cannot be scored."""
    with pytest.raises(RecipeError, match="no tokens of its own"):
        encode(tiny_tokenizer(), [("a", "")], 5)


def test_a_tokenizer_without_any_such_token_cannot_begin_a_sentence():
    """Neither beginning nor end of text: refused with the reason."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UnsupportedModel, match="neither a beginning- nor an end-of-text token"):
        encode(tokenizer, [("", "ab")], 64)
