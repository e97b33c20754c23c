"""Texts to the tokens that are scored, as lm-evaluation-harness cuts them, so that log-likelihoods agree with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compressor.errors import RecipeError, UnsupportedModel
from compressor.models import Model

DEFAULT_MAX_LENGTH = 2048
NO_LIMIT = 10**9  # tokenizers that know no limit name an absurd one


@dataclass(frozen=True)
class Request:
    """Tokens that are read and tokens whose log-likelihood is asked after them; `cut`: the context was too long."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    cut: bool = False


def max_length(model: Model) -> int:
    """The most tokens that the model reads at once."""
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if (length := getattr(model.config, name, None)) is not None:
            return length
    known = getattr(model.tokenizer, "model_max_length", NO_LIMIT)
    return known if known < NO_LIMIT else DEFAULT_MAX_LENGTH


def encode(
    tokenizer: Any, asks: Sequence[tuple[str, str]], longest: int, names: Sequence[str] | None = None
) -> list[Request]:
    """Tokens of contexts with their continuations.

    The whole text is encoded, and the context by itself says where the continuation begins; spaces at the end of the
    context go to the continuation. What the tokenizer puts before every text stands before the context; an empty
    context is the beginning-of-text token. What is too long loses tokens from the left of the context. RecipeError
    where a continuation has no tokens of its own, or more than the model reads; `names` say whose it is.
    """
    if not asks:
        return []
    moved = [_spaces_moved(context, continuation) for context, continuation in asks]
    opening = Opening(tokenizer)
    ids = encoded(tokenizer, [text for context, rest in moved for text in (context, context + rest)])
    requests = []
    for number, (context, rest) in enumerate(moved):
        before = opening.of(context) + ids[context]
        after = ids[context + rest][len(ids[context]) :]
        if not context and len(after) > 1 and after[:1] == before:
            after = after[1:]  # the text brings its beginning-of-text token along
        whose = f"{names[number]}: " if names else ""
        if not after:
            raise RecipeError(f"{whose}{rest!r} has no tokens of its own after {context[-40:]!r}: it cannot be scored")
        if len(after) > longest:
            raise RecipeError(f"{whose}{rest[:40]!r}... has {len(after)} tokens, the model reads {longest} at once")
        kept = before[max(0, len(before) + len(after) - 1 - longest) :]
        requests.append(Request(kept, after, cut=len(kept) < len(before)))
    return requests


def encoded(tokenizer: Any, texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The tokens of each text, without special ones."""
    different = [text for text in dict.fromkeys(texts) if text]
    if not different:
        return {"": ()}
    ids = tokenizer(different, add_special_tokens=False, verbose=False)["input_ids"]
    return {"": ()} | {text: tuple(tokens) for text, tokens in zip(different, ids, strict=True)}


class Opening:
    """The tokens that a tokenizer puts before a text: often none, often one that means its beginning."""

    def __init__(self, tokenizer: Any):
        plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        start = next((n for n in range(len(whole)) if whole[n : n + len(plain)] == plain), 0)
        self._usual = tuple(whole[:start])
        prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self._prefix = None if prefix is None else (prefix,)
        self._written = None if prefix is None else tokenizer.decode(prefix)

    def of(self, text: str) -> tuple[int, ...]:
        """What comes before this text; nothing, if it says so itself. UnsupportedModel if it is empty and has to."""
        if text:
            return () if self._written and text.startswith(self._written) else self._usual
        if self._prefix is None:
            raise UnsupportedModel("the tokenizer has neither a beginning- nor an end-of-text token to read first")
        return self._prefix


def _spaces_moved(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation
