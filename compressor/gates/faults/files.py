"""Faults in files and config: lost, stale, truncated, or with one setting changed."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from compressor.gates.faults.artefact import CONFIG, INDEX, SINGLE, Artefact, DoesNotApply, Injected

Inject = Callable[[Artefact, Random], Injected]
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"


def setting(key: str, change: Callable[[Any], Any]) -> Inject:
    """A fault that changes one key of config.json."""

    def inject(artefact: Artefact, random: Random) -> Injected:
        config = artefact.config
        if key not in config:
            raise DoesNotApply(f"config.json has no {key}")
        before = config[key]
        artefact.write_json(CONFIG, config | {key: change(before)})
        return Injected(f"{key}: {before!r} became {change(before)!r}", (CONFIG,))

    return inject


def stale_expert_count(artefact: Artefact, random: Random) -> Injected:
    """One of the keys that count experts keeps the number from before pruning."""
    config = artefact.config
    keys = [key for key in artefact.family.expert_counts if key in config]
    if not keys:
        raise DoesNotApply("config.json counts no experts")
    artefact.write_json(CONFIG, config | {keys[-1]: config[keys[-1]] + 2})
    return Injected(f"{keys[-1]}: {config[keys[-1]]} became {config[keys[-1]] + 2}", (CONFIG,))


def changed_rope(artefact: Artefact, random: Random) -> Injected:
    """The base of the rotary embedding falls back to the default of another model."""
    config = artefact.config
    if "rope_parameters" in config:
        rope = dict(config["rope_parameters"])
        before = rope["rope_theta"]
        artefact.write_json(CONFIG, config | {"rope_parameters": rope | {"rope_theta": before * 50}})
    else:
        before = config.get("rope_theta", 10000.0)
        artefact.write_json(CONFIG, config | {"rope_theta": before * 50})
    return Injected(f"rope_theta: {before} became {before * 50}", (CONFIG,))


def remote_code(artefact: Artefact, random: Random) -> Injected:
    """config.json asks for code from the folder."""
    artefact.write_json(CONFIG, artefact.config | {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}})
    return Injected("added auto_map", (CONFIG,))


def lost_quantization_config(artefact: Artefact, random: Random) -> Injected:
    """config.json does not say that weights are packed."""
    config = artefact.config
    if "quantization_config" not in config:
        raise DoesNotApply("nothing of this artefact is quantized")
    del config["quantization_config"]
    artefact.write_json(CONFIG, config)
    return Injected("removed quantization_config", (CONFIG,))


def wrong_bits(artefact: Artefact, random: Random) -> Injected:
    """config.json says other bits than the words hold."""
    config = artefact.config
    if "quantization_config" not in config:
        raise DoesNotApply("nothing of this artefact is quantized")
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"]["num_bits"] = 8 if group["weights"]["num_bits"] != 8 else 4
    artefact.write_json(CONFIG, config)
    return Injected("num_bits is another number", (CONFIG,))


def truncated_shard(artefact: Artefact, random: Random) -> Injected:
    """A copy that broke off."""
    name = random.choice(sorted(set(artefact.files.values())))
    data = (artefact.folder / name).read_bytes()
    artefact.replace(name, data[: len(data) * 9 // 10])
    return Injected(f"{name} ends after nine tenths", (name,))


def missing_shard(artefact: Artefact, random: Random) -> Injected:
    """The index names a shard that was not uploaded."""
    if (artefact.folder / INDEX).is_file():
        name = random.choice(sorted(set(artefact.files.values())))
        artefact.remove(name)
        return Injected(f"removed {name}", (name,))
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    os.replace(artefact.folder / SINGLE, artefact.folder / first)
    names = artefact.names()
    weight_map = {name: first if i < len(names) // 2 else second for i, name in enumerate(names)}
    artefact.write_json(INDEX, {"metadata": {}, "weight_map": weight_map})
    return Injected(f"the index names {second}, which is not there", (second,))


def stale_index(artefact: Artefact, random: Random) -> Injected:
    """The index puts a tensor into another shard than the one that holds it."""
    if not (artefact.folder / INDEX).is_file():
        raise DoesNotApply("the weights are in one file")
    index = artefact.json(INDEX)
    shards = sorted(set(index["weight_map"].values()))
    if len(shards) < 2:
        raise DoesNotApply("there is one shard only")
    name = random.choice(sorted(index["weight_map"]))
    index["weight_map"][name] = next(shard for shard in shards if shard != index["weight_map"][name])
    artefact.write_json(INDEX, index)
    return Injected(f"the index puts {name} into another shard", (name,))


def leftover_shard(artefact: Artefact, random: Random) -> Injected:
    """A shard of an earlier export was not removed."""
    name = "model-00007-of-00009.safetensors"
    source = artefact.folder / next(iter(artefact.files.values()))
    artefact.replace(name, source.read_bytes())
    return Injected(f"{name} is left over", (name,))


def pickle_beside(artefact: Artefact, random: Random) -> Injected:
    """A pickle with optimiser state lies beside the weights."""
    artefact.replace("training_args.bin", pickle.dumps({"learning_rate": 1e-4}))
    return Injected("added training_args.bin", ("training_args.bin",))


def lost_file(name: str) -> Inject:
    """A fault that removes one file."""

    def inject(artefact: Artefact, random: Random) -> Injected:
        if not (artefact.folder / name).is_file():
            raise DoesNotApply(f"the artefact has no {name}")
        artefact.remove(name)
        return Injected(f"removed {name}", (name,))

    return inject


def changed_template(artefact: Artefact, random: Random) -> Injected:
    """The chat template of another model."""
    if not (artefact.folder / TEMPLATE).is_file():
        raise DoesNotApply(f"the artefact has no {TEMPLATE}")
    text = (artefact.folder / TEMPLATE).read_text()
    artefact.replace(TEMPLATE, (text + "{{ '<|im_start|>assistant' }}").encode())
    return Injected("the chat template ends with another prompt", (TEMPLATE,))


def changed_special_token(artefact: Artefact, random: Random) -> Injected:
    """Another token ends the text; it is in the vocabulary, so everything loads."""
    settings = artefact.json(TOKENIZER_CONFIG)
    if "eos_token" not in settings:
        raise DoesNotApply(f"{TOKENIZER_CONFIG} names no eos_token")
    vocabulary = artefact.json(TOKENIZER)["model"]["vocab"]
    other = sorted(token for token in vocabulary if token != settings["eos_token"])[0]
    artefact.write_json(TOKENIZER_CONFIG, settings | {"eos_token": other})
    return Injected(f"eos_token: {settings['eos_token']!r} became {other!r}", (TOKENIZER_CONFIG,))


def wrong_tokenizer(artefact: Artefact, random: Random) -> Injected:
    """A tokenizer with the same tokens under other ids."""
    tokenizer = artefact.json(TOKENIZER)
    vocabulary = tokenizer["model"]["vocab"]
    if not isinstance(vocabulary, dict):
        raise DoesNotApply("the vocabulary is not a table")
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    tokenizer["model"]["vocab"] = {token: vocabulary[tokens[i - 1]] for i, token in enumerate(tokens)}
    artefact.write_json(TOKENIZER, tokenizer)
    return Injected("ids of the vocabulary moved on by one", (TOKENIZER,))


FILE_FAULTS: dict[str, tuple[Inject, str]] = {
    "flipped_norm_topk": (setting("norm_topk_prob", lambda old: not old), "routing weights are normalised differently"),
    "wrong_top_k": (setting("num_experts_per_tok", lambda old: old - 1), "tokens go to one expert less"),
    "stale_expert_count": (stale_expert_count, "a key of config.json counts other experts"),
    "changed_rope": (changed_rope, "the rotary base is another model's"),
    "changed_eos_id": (setting("eos_token_id", lambda old: 1 if old != 1 else 2), "config.json ends texts otherwise"),
    "changed_norm_eps": (setting("rms_norm_eps", lambda old: old * 100), "norms have another epsilon"),
    "remote_code": (remote_code, "config.json asks for code from outside"),
    "lost_quantization_config": (lost_quantization_config, "config.json does not say that weights are packed"),
    "wrong_bits": (wrong_bits, "config.json says other bits than the file holds"),
    "truncated_shard": (truncated_shard, "a shard is truncated"),
    "missing_shard": (missing_shard, "a shard is missing"),
    "stale_index": (stale_index, "the index puts a tensor into the wrong shard"),
    "leftover_shard": (leftover_shard, "a shard of another export lies beside"),
    "pickle_beside": (pickle_beside, "a pickle lies beside the weights"),
    "lost_chat_template": (lost_file(TEMPLATE), "the chat template is lost"),
    "changed_chat_template": (changed_template, "the chat template is another one"),
    "lost_generation_config": (lost_file(GENERATION), "the generation config is lost"),
    "lost_tokenizer": (lost_file(TOKENIZER), "the tokenizer is lost"),
    "changed_special_token": (changed_special_token, "another token ends the text"),
    "wrong_tokenizer": (wrong_tokenizer, "the tokenizer has other ids"),
}


def link_copy(folder: Path, copy: Path) -> None:
    """The folder again under another name, as hard links where the disk has them; faults replace files, never edit."""
    copy.mkdir(parents=True)
    for path in folder.rglob("*"):
        target = copy / path.relative_to(folder)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path.resolve(), target)
        except OSError:
            target.write_bytes(path.read_bytes())
