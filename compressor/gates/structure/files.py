"""Rules about files: shards and index agree, nothing is truncated, nothing runs code, nothing leaves the folder."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from compressor.checkpoint.header import TensorEntry, read_header
from compressor.checkpoint.reader import INDEX, SINGLE
from compressor.errors import IntegrityError, UnsupportedModel
from compressor.gates.structure.finding import Finding, failed

RULES = {
    "files.weights": "every shard is whole and holds exactly what the index says",
    "files.stray": "no weight file is left over from another export",
    "files.pickle": "no file is a pickle or code",
    "files.inside": "every file lies in the folder",
}
RUNS_CODE = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".py", ".so"}
# First bytes of pickles (protocols 2 to 5) and of torch's zip files, under whatever name
PICKLE_HEADS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
SHARD_NAME = re.compile(r"^(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors$")


def file_failures(folder: Path) -> Iterator[Finding]:
    """Whatever is wrong with the files of a model folder; only headers of weights are read."""
    yield from _code_and_links(folder)
    yield from _weights(folder)


def _code_and_links(folder: Path) -> Iterator[Finding]:
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":  # the hub's cache links each file of a snapshot to ../../blobs
        allowed.append(root.parent.parent / "blobs")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        target = path.resolve()
        if not any(target.is_relative_to(place) for place in allowed):
            yield failed("files.inside", name, f"{name} is a link that leaves the folder, to {target}")
        elif path.is_file():
            with path.open("rb") as file:
                head = file.read(4)
            if path.suffix in RUNS_CODE or head.startswith(PICKLE_HEADS):
                text = f"{name} can run code when it is loaded; an artefact holds safetensors, JSON and text only"
                yield failed("files.pickle", name, text)


def _weights(folder: Path) -> Iterator[Finding]:
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    has_index = (folder / INDEX).is_file()
    if SINGLE in files:  # transformers prefers it, whatever else is there
        yield from (
            failed("files.stray", name, f"{name} lies beside {SINGLE}, which loaders prefer: one of them is stale")
            for name in [name for name in files if name != SINGLE] + ([INDEX] if has_index else [])
        )
        yield from _shard(folder, SINGLE)[1]
    elif has_index:
        yield from _sharded(folder, files)
    elif files:
        yield failed("files.weights", INDEX, f"{INDEX} is missing: nothing says which of {', '.join(files)} belongs")
    else:
        yield failed("files.weights", SINGLE, f"there are no weights: neither {SINGLE} nor {INDEX}")


def _sharded(folder: Path, files: list[str]) -> Iterator[Finding]:
    try:
        index = json.loads((folder / INDEX).read_bytes())
        weight_map: dict[str, str] = index["weight_map"]
        listed = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield failed("files.weights", INDEX, f"{INDEX} is not an index of shards ({error!r})")
        return
    yield from _shard_names(listed)
    held: dict[str, tuple[str, TensorEntry]] = {}
    whole = True
    for name in listed:
        if PurePosixPath(name).name != name or "\\" in name:
            yield failed("files.inside", INDEX, f"{INDEX} names the shard {name!r}, which lies outside the folder")
            whole = False
            continue
        entries, failures = _shard(folder, name)
        yield from failures
        whole = whole and not failures
        for key, entry in entries.items():
            if key in held:
                yield failed("files.weights", key, f"{key} is in two shards: {held[key][0]} and {name}")
            held[key] = (name, entry)
    for name in files:
        if name not in listed:
            yield failed("files.stray", name, f"{name} is not in {INDEX}: it is left over from another export")
    if whole:
        yield from _agreement(index, weight_map, held)


def _shard_names(listed: list[str]) -> Iterator[Finding]:
    """`-of-000NN` has to be the number of shards, or one of another export is among them."""
    for name in listed:
        match = SHARD_NAME.match(name)
        if match and int(match["count"]) != len(listed):
            text = f"{INDEX} lists {len(listed)} shards, {name} says that there are {int(match['count'])}"
            yield failed("files.weights", name, text)


def _shard(folder: Path, name: str) -> tuple[dict[str, TensorEntry], list[Finding]]:
    """The tensors of one shard by its header, and what is wrong with it."""
    path = folder / name
    if not path.is_file():
        return {}, [failed("files.weights", name, f"{name} is missing, but {INDEX} lists it")]
    try:
        entries, metadata = read_header(path)
    except (IntegrityError, UnsupportedModel) as error:
        return {}, [failed("files.weights", name, str(error).replace(f"{path}", name))]
    if metadata.get("format") != "pt":
        text = f'{name}: the metadata lacks {{"format": "pt"}}, without which transformers refuses the file'
        return entries, [failed("files.weights", name, text)]
    return entries, []


def _agreement(index: dict, weight_map: dict[str, str], held: dict[str, tuple[str, TensorEntry]]) -> Iterator[Finding]:
    for key, shard in sorted(weight_map.items()):
        if key not in held:
            yield failed("files.weights", key, f"{INDEX} puts {key} into {shard}, which does not hold it")
        elif held[key][0] != shard:
            yield failed("files.weights", key, f"{INDEX} puts {key} into {shard}, it is in {held[key][0]}")
    for key in sorted(held.keys() - weight_map.keys()):
        yield failed("files.weights", key, f"{held[key][0]} holds {key}, which {INDEX} does not list")
    metadata = index.get("metadata")
    declared = metadata.get("total_size") if isinstance(metadata, dict) else None
    real = sum(math.prod(entry.shape) * entry.dtype.itemsize for _, entry in held.values())
    if declared is not None and int(declared) != real:
        yield failed(
            "files.weights", INDEX, f"{INDEX} declares {declared:,} bytes of tensors, the shards hold {real:,}"
        )
