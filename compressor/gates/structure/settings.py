"""Rules about config.json: it is the baseline's but for what compression may change, as transformers reads both."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compressor.errors import CompressorError
from compressor.gates.structure.finding import Finding, failed
from compressor.gates.structure.history import History
from compressor.gates.structure.scheme import BadScheme, read_claims
from compressor.models.families import FAMILIES
from compressor.models.transformers_io import read_config

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
RULES = {
    "config.readable": "config.json is read by transformers",
    "config.code": "nothing asks for code from outside (trust_remote_code)",
    "config.experts": "every key that counts experts says the same",
    "config.quantization": "quantization_config is one that loaders understand",
}
BASELINE_RULES = {
    "config.routing": "routing settings are the baseline's",
    "config.rope": "rotary settings are the baseline's",
    "config.tied": "tie_word_embeddings is the baseline's",
    "config.tokens": "the ids of special tokens are the baseline's",
    "config.architecture": "every other setting of the architecture is the baseline's",
    "config.expert_count": "there are as many experts as pruning left",
}
# What compression may change, and what says nothing of the model
FREE = {"quantization_config", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures"}
ROUTING = (
    "norm_topk", "top_k", "topk", "router", "scoring_func", "n_group", "routed_scaling", "moe_layer", "sparse_step",
    "mlp_only", "per_tok", "shared_expert",
)  # fmt: skip
ROPE = ("rope", "rotary", "max_position")
MISSING = "(missing)"


def config_failures(folder: Path) -> Iterator[Finding]:
    """Whatever is wrong with a config by itself."""
    try:
        raw = json.loads((folder / CONFIG).read_bytes())
        config = read_config(folder)
    except FileNotFoundError:
        yield failed("config.readable", CONFIG, "config.json is missing")
        return
    except Exception as error:  # transformers raises what it likes
        text = str(error) if isinstance(error, CompressorError) else f"transformers cannot read it: {error!r}"
        yield failed("config.readable", CONFIG, text)
        return
    yield from _remote_code(folder, raw)
    counts = {key: raw[key] for key in FAMILIES[config.model_type].expert_counts if key in raw}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{key} {value}" for key, value in counts.items())
        yield failed("config.experts", CONFIG, f"config.json: the number of experts is given twice: {said}")
    try:
        read_claims(raw)
    except BadScheme as error:
        yield failed("config.quantization", CONFIG, f"config.json: quantization_config: {error}")


def _remote_code(folder: Path, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Keys by which loaders find code in the folder or on the hub."""
    try:
        tokenizer = json.loads((folder / TOKENIZER_CONFIG).read_bytes())
    except (OSError, ValueError):
        tokenizer = {}  # companions' rules speak of it
    for name, settings in {CONFIG: config, TOKENIZER_CONFIG: tokenizer}.items():
        for key in ("auto_map", "trust_remote_code"):
            if settings.get(key):
                text = f"{name}: {key} is {settings[key]!r}: loading would run code that is not transformers'"
                yield failed("config.code", name, text)


def config_differences(folder: Path, baseline: Path, history: History) -> Iterator[Finding]:
    """Where a config differs from the baseline's, both as transformers reads them, so that spelling does not matter."""
    ours, theirs = _plain(folder), _plain(baseline)
    counts = FAMILIES[ours["model_type"]].expert_counts if ours["model_type"] in FAMILIES else ()
    for key in sorted(ours.keys() | theirs.keys()):
        if key in FREE or key in counts:
            continue
        for path, found, expected in differences(ours.get(key, MISSING), theirs.get(key, MISSING), key):
            text = f"config.json: {path} is {_short(found)}, the baseline has {_short(expected)}"
            yield failed(_rule_of(key), CONFIG, text)
    written, original = (_raw(place).get("architectures") for place in (folder, baseline))
    if written and original and written != original:
        text = f"config.json: architectures is {_short(written)}, the baseline has {_short(original)}"
        yield failed("config.architecture", CONFIG, text)
    if counts:
        yield from _expert_count(ours.get(counts[0]), theirs.get(counts[0]), counts[0], history)


def differences(ours: Any, theirs: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Where two JSON values differ: the path, what is there, what was expected."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in dict.fromkeys((*theirs, *ours)):
            yield from differences(ours.get(key, MISSING), theirs.get(key, MISSING), f"{path}.{key}" if path else key)
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(one, other, f"{path}[{i}]")
    elif ours != theirs:
        yield path, ours, theirs


def _expert_count(ours: Any, theirs: Any, key: str, history: History) -> Iterator[Finding]:
    if ours is None or theirs is None:
        return
    if ours > theirs:
        text = f"config.json: {key} is {ours}, more than the {theirs} of the baseline"
        yield failed("config.expert_count", CONFIG, text)
    elif history.known:
        kept = {len(numbers) for numbers in (history.kept_experts or {}).values()} or {theirs}
        if kept != {ours}:
            left = ", ".join(map(str, sorted(kept)))
            text = f"config.json: {key} is {ours}, pruning left {left} of {theirs}"
            yield failed("config.expert_count", CONFIG, text)


def _rule_of(key: str) -> str:
    if key == "tie_word_embeddings":
        return "config.tied"
    if any(part in key for part in ROPE):
        return "config.rope"
    if any(part in key for part in ROUTING):
        return "config.routing"
    return "config.tokens" if key.endswith("token_id") else "config.architecture"


def _plain(folder: Path) -> dict[str, Any]:
    """The config as transformers reads it, in values that JSON has."""
    return json.loads(json.dumps(read_config(folder).to_dict(), default=str))


def _raw(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_bytes())


def _short(value: Any) -> str:
    text = value if value == MISSING else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
