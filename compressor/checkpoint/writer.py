"""Files that appear whole or not at all: safetensors (one file or shards), JSON and text.

Every file is written under a temporary name in its own folder, flushed to the disk, then renamed. The same content
gives the same bytes. A full disk becomes an EnvironmentProblem and leaves nothing behind.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from compressor.checkpoint.header import build_header
from compressor.errors import EnvironmentProblem, IntegrityError

# transformers refuses files that do not say which framework wrote them.
FORMAT = {"format": "pt"}


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) atomically; raises EnvironmentProblem if the disk does not take it."""
    data = text.encode()
    with replacing(path, len(data)) as file:
        file.write(data)


def write_json(path: Path, obj: object) -> None:
    """Write an object as indented JSON, atomically, keys in the order given.

    Raises ValueError for NaN and infinities, which JSON does not have.
    """
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to one safetensors file atomically; equal tensors and metadata give equal bytes.

    Raises EnvironmentProblem naming the path, the bytes needed and the bytes free if the disk does not take it.
    """
    held = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    header, order = build_header(held, FORMAT | dict(metadata or {}))
    with replacing(path, len(header) + sum(map(_bytes, held.values()))) as file:
        file.write(header)
        for name in order:
            file.write(held[name].reshape(-1).view(torch.uint8).numpy().data)


class ShardWriter:
    """Write a checkpoint too big for memory: add tensors one by one, and a shard is written whenever one is full.

    with ShardWriter(folder, shard_bytes=5_000_000_000) as writer:
        writer.add("model.norm.weight", tensor)

    Leaves `model.safetensors`, or `model-00001-of-000NN.safetensors` and `model.safetensors.index.json`; an older
    checkpoint of the same prefix is replaced. Holds one shard of tensors at most, and an exception inside the block
    removes all that was written. A tensor larger than `shard_bytes` gets a shard of its own. A tensor that was added
    must not be changed afterwards. Raises IntegrityError for a name added twice, EnvironmentProblem for a full disk.
    """

    def __init__(
        self, folder: Path, *, shard_bytes: int, prefix: str = "model", metadata: Mapping[str, str] | None = None
    ):
        if shard_bytes <= 0:
            raise ValueError(f"shard_bytes must be positive, not {shard_bytes}")
        self.folder = Path(folder)
        self.prefix = prefix
        self.shard_bytes = shard_bytes
        self.total_bytes = 0
        self.files: list[Path] = []
        self._metadata = dict(metadata or {})
        self._shard: dict[str, Tensor] = {}
        self._shard_size = 0
        self._written: list[tuple[Path, list[str]]] = []
        self._names: set[str] = set()

    def __enter__(self) -> "ShardWriter":
        with disk_errors(self.folder, 0):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._remove(f".{self.prefix}-*.staged*")  # what a killed process left
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._shard = {}
            self._remove(f".{self.prefix}-*.staged*")

    def add(self, name: str, tensor: Tensor) -> None:
        """Put one tensor into the checkpoint, of any device and layout; writes a shard first if this one is full."""
        if name in self._names or name == "__metadata__":
            raise IntegrityError(f"{self.folder}: the tensor {name!r} is written twice, or its name is reserved")
        size = _bytes(tensor)
        if self._shard and self._shard_size + size > self.shard_bytes:
            self._flush()
        self._names.add(name)
        self._shard[name] = _compact(tensor)
        self._shard_size += size
        self.total_bytes += size

    def _flush(self) -> None:
        staged = self.folder / f".{self.prefix}-{len(self._written) + 1:05d}.staged"
        write_safetensors(staged, self._shard, self._metadata)
        self._written.append((staged, list(self._shard)))
        self._shard, self._shard_size = {}, 0

    def _finish(self) -> None:
        if self._shard or not self._written:
            self._flush()
        count = len(self._written)
        single = count == 1
        names = [
            f"{self.prefix}.safetensors" if single else f"{self.prefix}-{k + 1:05d}-of-{count:05d}.safetensors"
            for k in range(count)
        ]
        index = self.folder / f"{self.prefix}.safetensors.index.json"
        try:
            with disk_errors(index, 0):
                # The index goes first and comes last: in between, the folder cannot be taken for a whole checkpoint.
                index.unlink(missing_ok=True)
                self._remove(f"{self.prefix}.safetensors")
                self._remove(f"{self.prefix}-?????-of-?????.safetensors")
                for (staged, _), name in zip(self._written, names, strict=True):
                    os.replace(staged, self.folder / name)
                _sync_folder(self.folder)
            if not single:
                weight_map = {key: name for (_, keys), name in zip(self._written, names, strict=True) for key in keys}
                size = {"total_size": self.total_bytes}
                write_json(index, {"metadata": size, "weight_map": dict(sorted(weight_map.items()))})
        except BaseException:
            for name in names:
                self._remove(name)
            raise
        self.files = [self.folder / name for name in names]

    def _remove(self, pattern: str) -> None:
        for path in self.folder.glob(pattern):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path, needed: int) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name only when it is whole and on the disk.

    `needed` is the number of bytes to come, for the message of the EnvironmentProblem that an OSError becomes.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    with disk_errors(path, needed):
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


@contextlib.contextmanager
def disk_errors(path: Path, needed: int) -> Iterator[None]:
    """Turn an OSError while writing into an EnvironmentProblem that says how much was needed and how much is free."""
    try:
        yield
    except OSError as error:
        place = next((folder for folder in (path, *path.parents) if folder.is_dir()), None)
        free = f"{shutil.disk_usage(place).free:,} bytes are free on that disk" if place else "no such disk"
        raise EnvironmentProblem(
            f"{path}: cannot be written: {error.strerror or error}; {needed:,} bytes are needed, {free}"
        ) from error


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _compact(tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor that keeps only its own memory alive: one expert must not hold its whole stack."""
    tensor = tensor.detach().to("cpu").contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() > _bytes(tensor) else tensor
