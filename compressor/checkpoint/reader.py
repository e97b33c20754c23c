"""Tensors of a checkpoint, one at a time: only headers are read when it is opened, and nothing stays mapped."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import torch
from torch import Tensor

from compressor.checkpoint.digest import file_sha256
from compressor.checkpoint.header import TensorEntry, read_header
from compressor.errors import EnvironmentProblem, IntegrityError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class CheckpointReader:
    """Read tensors by name from a folder with `model.safetensors` or shards and their index, or from one such file.

    Opening reads the headers and checks them: every name of the index is in its shard and nowhere else, every shard is
    there, inside the folder and as long as its header says. Tensors come back as copies of their own on the CPU.
    Raises IntegrityError when the files contradict each other, EnvironmentProblem when there are no weights to read.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        weight_map, self.files = _locate(self.folder)
        self._entries: dict[str, TensorEntry] = {}
        self._metadata: dict[str, str] = {}
        for file in self.files:
            entries, metadata = read_header(file)
            for name in entries.keys() & self._entries.keys():
                raise IntegrityError(f"{name!r} is in two files: {self._entries[name].file} and {file}")
            self._entries |= entries
            self._metadata |= metadata
        if weight_map is not None:
            _check_index(self.folder / INDEX, weight_map, self._entries)

    def keys(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return self._entry(key).shape

    def dtype(self, key: str) -> torch.dtype:
        """Return a tensor's dtype without reading it."""
        return self._entry(key).dtype

    def bytes(self, key: str) -> int:
        """Return how many bytes a tensor takes in its file."""
        entry = self._entry(key)
        return entry.stop - entry.start

    def file(self, key: str) -> Path:
        """Return the file that holds a tensor."""
        return self._entry(key).file

    def metadata(self) -> dict[str, str]:
        """Return the metadata of all files together; a later shard's value replaces an earlier one's."""
        return dict(self._metadata)

    def tensor(self, key: str) -> Tensor:
        """Read one tensor into memory of its own."""
        return self.tensors([key])[key]

    def tensors(self, keys: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Read several tensors (all, if no names are given), opening each file once and going through it in order.

        The result has the order of `keys`.
        """
        wanted = {key: self._entry(key) for key in (self.keys() if keys is None else keys)}
        read = {}
        for path in sorted({entry.file for entry in wanted.values()}):
            inside = sorted((entry.start, key) for key, entry in wanted.items() if entry.file == path)
            with path.open("rb", buffering=0) as file:
                for _, key in inside:
                    read[key] = _read(file, key, wanted[key])
        return {key: read[key] for key in wanted}

    def digest(self) -> str:
        """Return one SHA-256 for all weight files, what `sha256sum *.safetensors | sha256sum` prints for them.

        Reads every file once; the answer is kept.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        lines = (f"{file_sha256(file)}  {file.name}\n" for file in self.files)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def _entry(self, key: str) -> TensorEntry:
        if key not in self._entries:
            raise IntegrityError(f"{self.folder}: no tensor {key!r} among the {len(self._entries)} of the checkpoint")
        return self._entries[key]


def _read(file: BinaryIO, key: str, entry: TensorEntry) -> Tensor:
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    # 0-d and empty tensors have no byte view of their own, hence the reshape.
    buffer = tensor.reshape(-1).view(torch.uint8).numpy().data
    file.seek(entry.start)
    position = 0
    while position < len(buffer):  # Linux reads at most 2 GiB a call
        count = file.readinto(buffer[position:])  # type: ignore[attr-defined]
        if not count:
            raise IntegrityError(f"{entry.file}: ends inside {key!r}; the file became shorter after it was opened")
        position += count
    return tensor


def _locate(folder: Path) -> tuple[dict[str, str] | None, list[Path]]:
    """Return the index (None for a single file) and the files; the single file is preferred, as in transformers."""
    if folder.is_file():
        _refuse_pickle(folder)
        return None, [folder]
    if not folder.is_dir():
        raise EnvironmentProblem(f"{folder}: no such checkpoint folder")
    if (folder / SINGLE).is_file():
        return None, [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        raise EnvironmentProblem(_nothing_to_read(folder))
    weight_map = _read_index(index)
    return weight_map, [_shard(folder, index, name) for name in sorted(set(weight_map.values()))]


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        is_table = all(isinstance(name, str) for name in weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{index}: not an index of shards ({error})") from error
    if not is_table or not weight_map:
        raise IntegrityError(f"{index}: weight_map must give a file name for each tensor")
    return weight_map


def _shard(folder: Path, index: Path, name: str) -> Path:
    """Return the path of a shard; a downloaded index must not choose files elsewhere."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
        raise IntegrityError(f"{index}: the shard name {name!r} leaves the folder")
    path = folder / name
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":  # the hub's cache links each file of a snapshot to ../../blobs
        allowed.append(root.parent.parent / "blobs")
    target = path.resolve()
    if not any(target.is_relative_to(place) for place in allowed):
        raise IntegrityError(f"{index}: the shard {name!r} is a link that leaves the folder, to {target}")
    if not path.is_file():
        raise IntegrityError(f"{path}: missing, but {index.name} lists it; copy or download it again")
    _refuse_pickle(path)
    return path


def _check_index(index: Path, weight_map: dict[str, str], entries: dict[str, TensorEntry]) -> None:
    for name, shard in sorted(weight_map.items()):
        if name not in entries:
            raise IntegrityError(f"{index.parent / shard}: has no tensor {name!r}, but {index.name} says so")
        if entries[name].file.name != PurePosixPath(shard).name:
            raise IntegrityError(f"{index.parent / shard}: {name!r} is in {entries[name].file.name} instead")
    for name in sorted(entries.keys() - weight_map.keys()):
        raise IntegrityError(f"{entries[name].file}: holds {name!r}, which {index.name} does not list")


def _refuse_pickle(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise EnvironmentProblem(f"{path}: only safetensors files are read; pickles can run code when they are opened")


def _pickles(folder: Path) -> Iterator[Path]:
    for pattern in PICKLES:
        yield from sorted(folder.glob(pattern))


def _nothing_to_read(folder: Path) -> str:
    pickle = next(_pickles(folder), None)
    if pickle is not None:
        return (
            f"{pickle}: only safetensors files are read; pickles can run code when they are opened. Convert it first: "
            "load it with transformers where you trust it, then save_pretrained"
        )
    return f"{folder}: no weights: neither {SINGLE} nor {INDEX} is there"
