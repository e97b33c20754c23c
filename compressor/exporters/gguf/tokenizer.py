"""A tokenizer as a GGUF file holds it: tokens with types, merges or scores, special ids, chat template."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from compressor.errors import UnsupportedModel

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unk_token_id", "pad": "pad_token_id"}

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
)
# How a byte-level BPE splits text before merging, and what llama.cpp calls it (tokenizer.ggml.pre)
SPLITS = {
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORDS}|\p{{N}}{{1,3}}{_TAIL}": "llama-bpe",
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORDS}|\p{{N}}{_TAIL}": "qwen2",
    rf"{_CASED}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
UNKNOWN_SPLIT = "default"


@dataclass
class Vocabulary:
    """Everything that is written, and what a runtime of the file will do otherwise."""

    model: str  # "gpt2" (byte-level BPE) or "llama" (sentencepiece)
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    pre: str | None = None
    add_space_prefix: bool | None = None
    notes: list[str] = field(default_factory=list)


def read_vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """The vocabulary of a fast tokenizer, padded with unused tokens to the embedding's `size`.

    UnsupportedModel where there is no tokenizer, or it is no BPE over bytes.
    """
    if tokenizer is None or not getattr(tokenizer, "is_fast", False):
        raise UnsupportedModel(
            "export.gguf: a GGUF file holds its tokenizer, and this model has none with a tokenizer.json"
        )
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    model = document["model"]
    if model["type"] != "BPE":
        raise UnsupportedModel(f"export.gguf: tokenizers of type {model['type']} are not possible; possible is BPE")
    tokens, types = _tokens(document, size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        scores = _scores(tokens, merges)
        return Vocabulary("llama", tokens, types, scores=scores, add_space_prefix=_has_space_prefix(document))
    if not _is_byte_level(document):
        raise UnsupportedModel(
            "export.gguf: a BPE tokenizer without bytes (byte_fallback, or a ByteLevel pre-tokenizer) is not possible"
        )
    if any(" " in part for merge in model["merges"] if not isinstance(merge, str) for part in merge):
        raise UnsupportedModel("export.gguf: merges of tokens that hold spaces are not possible in GGUF")
    vocabulary = Vocabulary("gpt2", tokens, types, merges=merges, pre=split_name(document["pre_tokenizer"]))
    if vocabulary.pre == UNKNOWN_SPLIT:
        vocabulary.notes.append(
            "tokenizer: how this one splits text has no name known here, so llama.cpp splits as its default does; "
            "compare token ids before relying on the file there"
        )
    if not merges:
        vocabulary.notes.append("tokenizer: it has no merges, without which llama.cpp does not load a file")
    return vocabulary


def add_tokenizer(writer: Any, vocabulary: Vocabulary, tokenizer: Any) -> None:
    """Put vocabulary, special ids and chat template into a GGUFWriter."""
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.pre is not None:
        writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.add_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    for kind, attribute in SPECIAL.items():
        if (number := getattr(tokenizer, attribute)) is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    ids = tokenizer("a")["input_ids"]  # what it does, whatever its settings say
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def split_name(pre_tokenizer: dict[str, Any] | None) -> str:
    """What llama.cpp calls this pre-tokenizer; `default` where it is none of those known here."""
    steps = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return UNKNOWN_SPLIT
    *before, last = steps
    if last["use_regex"]:
        if not before:
            return "gpt-2"
        digits = before[0]["type"] == "Digits" and before[0]["individual_digits"]
        return "smollm" if len(before) == 1 and digits else UNKNOWN_SPLIT
    if len(before) == 1 and before[0]["type"] == "Split" and not before[0]["invert"]:
        return SPLITS.get(before[0]["pattern"].get("Regex", ""), UNKNOWN_SPLIT)
    return UNKNOWN_SPLIT


def _is_byte_level(document: dict[str, Any]) -> bool:
    """Whether text is split into the characters that stand for bytes before merging."""
    pre = document.get("pre_tokenizer") or {}
    return any(step.get("type") == "ByteLevel" for step in pre.get("pretokenizers", [pre]))


def _tokens(document: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Tokens and their types by id; ids that no token has are unused ones."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [UNUSED] * size
    unknown = document["model"].get("unk_token")
    entries = [(text, number, _plain_type(text, unknown)) for text, number in document["model"]["vocab"].items()]
    entries += [
        (added["content"], added["id"], _added_type(added, unknown)) for added in document.get("added_tokens", [])
    ]
    for text, number, kind in entries:
        if number >= size:
            raise UnsupportedModel(
                f"export.gguf: token {text!r} has id {number}, the model's embedding has {size} rows"
            )
        tokens[number], types[number] = text, kind
    return tokens, types


def _plain_type(text: str, unknown: str | None) -> int:
    if text == unknown:
        return UNKNOWN
    return BYTE if BYTE_TOKEN.fullmatch(text) else NORMAL


def _added_type(added: dict[str, Any], unknown: str | None) -> int:
    if added["content"] == unknown:
        return UNKNOWN
    return CONTROL if added["special"] else USER_DEFINED


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Sentencepiece merges what gives the best-scored token first: the rank of its merge, negated."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault("".join(merge.split(" ")), number)
    return [-float(rank[token]) if token in rank else 0.0 for token in tokens]


def _has_space_prefix(document: dict[str, Any]) -> bool:
    """Whether text gets a blank in front: a Prepend normalizer, or Metaspace."""
    normalizer, pre = document.get("normalizer") or {}, document.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer]) + pre.get("pretokenizers", [pre])
    return any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )
