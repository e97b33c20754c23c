"""Rules about the files beside the weights: tokenizer, chat template, generation config are the baseline's."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compressor.gates.structure.finding import Finding, failed
from compressor.gates.structure.settings import TOKENIZER_CONFIG, differences

RULES = {
    "tokenizer.present": "there is a tokenizer, and its files are JSON where they say so",
    "tokenizer.vocabulary": "every token has a row in the embedding, and named special tokens are in the vocabulary",
}
BASELINE_RULES = {
    "tokenizer.files": "tokenizer files are the baseline's",
    "tokenizer.template": "the chat template is the baseline's",
    "generation.config": "the generation config is the baseline's",
}
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
TOKENIZER = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model",
    "*processor_config.json",
)  # fmt: skip
TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")


def companion_failures(folder: Path, embedding_rows: int | None) -> Iterator[Finding]:
    """Whatever is wrong with the tokenizer by itself; `embedding_rows` is None where that is not known."""
    if not any((folder / name).is_file() for name in VOCABULARIES):
        yield failed("tokenizer.present", VOCABULARIES[0], f"there is no tokenizer: none of {', '.join(VOCABULARIES)}")
    broken = False
    for name in (*_names(folder, TOKENIZER), GENERATION):
        if name.endswith(".json") and (folder / name).is_file():
            try:
                json.loads((folder / name).read_bytes())
            except ValueError as error:
                broken = True
                yield failed("tokenizer.present", name, f"{name} is not JSON ({error})")
    if broken or not (folder / "tokenizer.json").is_file():
        return
    ids = _vocabulary(_json(folder / "tokenizer.json"))
    highest = max(ids.values(), default=-1)
    if embedding_rows is not None and highest >= embedding_rows:
        token = next(token for token, number in ids.items() if number == highest)
        text = f"token {token!r} has id {highest}, the embedding has {embedding_rows} rows"
        yield failed("tokenizer.vocabulary", "tokenizer.json", text)
    for name in (TOKENIZER_CONFIG, "special_tokens_map.json"):
        settings = _json(folder / name) if (folder / name).is_file() else {}
        for key in NAMED_TOKENS:
            value = settings.get(key)
            special = value.get("content") if isinstance(value, dict) else value
            if special is not None and special not in ids:
                text = f"{name}: {key} is {special!r}, which the vocabulary does not hold"
                yield failed("tokenizer.vocabulary", name, text)


def companion_differences(folder: Path, baseline: Path) -> Iterator[Finding]:
    """Where a file beside the weights differs from the baseline's, with the first place."""
    ours, theirs = _template(folder), _template(baseline)
    if ours[1] != theirs[1]:
        where = ours[0] or theirs[0] or TEMPLATE
        yield failed("tokenizer.template", where, f"{where}: {_template_text(ours[1], theirs[1])}")
    for name in dict.fromkeys((*_names(baseline, TOKENIZER), *_names(folder, TOKENIZER))):
        if text := _difference(folder / name, baseline / name, without=("chat_template",)):
            yield failed("tokenizer.files", name, text)
    if text := _difference(folder / GENERATION, baseline / GENERATION, without=("transformers_version",)):
        yield failed("generation.config", GENERATION, text)


def _difference(ours: Path, theirs: Path, without: tuple[str, ...]) -> str | None:
    """How a file differs from the baseline's; None where it says the same."""
    if not theirs.is_file():
        return f"{ours.name} is here, the baseline has none" if ours.is_file() else None
    if not ours.is_file():
        return f"{ours.name} is missing, the baseline has it"
    one, other = ours.read_bytes(), theirs.read_bytes()
    if one == other:
        return None
    if ours.suffix == ".json":
        try:
            one_json, other_json = json.loads(one), json.loads(other)
        except ValueError as error:
            return f"{ours.name} is not JSON ({error})"
        if isinstance(one_json, dict) and isinstance(other_json, dict):
            one_json, other_json = ({k: v for k, v in d.items() if k not in without} for d in (one_json, other_json))
        first = next(differences(one_json, other_json, ""), None)
        if first is None:
            return None
        path, found, expected = first
        return f"{ours.name}: {path} is {_short(found)}, the baseline has {_short(expected)}"
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    line = other[:at].count(b"\n") + 1
    return (
        f"{ours.name} differs from the baseline's in line {line} ({len(one):,} bytes, the baseline has {len(other):,})"
    )


def _template(folder: Path) -> tuple[str | None, str | None]:
    """The chat template and the file that holds it: a file of its own, or a key of tokenizer_config.json."""
    if (folder / TEMPLATE).is_file():
        return TEMPLATE, (folder / TEMPLATE).read_text(encoding="utf-8", errors="replace")
    for name in ("chat_template.json", TOKENIZER_CONFIG):
        if (folder / name).is_file():
            template = _json(folder / name).get("chat_template")
            if template is not None:
                return name, template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return None, None


def _template_text(ours: str | None, theirs: str | None) -> str:
    if ours is None:
        return "the chat template is missing, the baseline has one"
    if theirs is None:
        return "there is a chat template, the baseline has none"
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    one, other = (_short(text[at : at + 40]) for text in (ours, theirs))
    return f"the chat template differs from character {at} on: {one}, the baseline has {other}"


def _vocabulary(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Tokens and their ids, added ones included."""
    vocab = tokenizer.get("model", {}).get("vocab", {})
    ids = dict(vocab) if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}
    return ids | {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}


def _names(folder: Path, patterns: tuple[str, ...]) -> list[str]:
    return sorted({path.name for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        return {}  # `tokenizer.present` names it
    return value if isinstance(value, dict) else {}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
