"""What stands at the beginning of a safetensors file, read and written here rather than by the library.

The library keeps metadata in a hash map, so the same tensors give other bytes in every process; and it maps whole
files, so pages stay resident. A file is: header length (8 bytes, little-endian), JSON header padded with spaces to
8 bytes, data.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from compressor.errors import IntegrityError, UnsupportedModel

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format; a larger number means that this is no such file


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in a file: `start` and `stop` count bytes from the beginning of the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read which tensors a safetensors file holds, and its metadata, and check both against the size of the file.

    Raises IntegrityError if the file is truncated, has bytes that no tensor owns, or says something impossible;
    UnsupportedModel for a dtype that torch does not have.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MAX_HEADER_BYTES:
            raise IntegrityError(f"{path}: not a safetensors file ({size:,} bytes, header length {length:,})")
        if 8 + length > size:
            raise IntegrityError(
                f"{path}: truncated inside the header: it takes {length:,} bytes, {size - 8:,} are there"
            )
        header = _parse(path, file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise IntegrityError(f"{path}: __metadata__ is not a table of strings")
    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    _check_layout(path, entries, 8 + length, size)
    return entries, metadata


def build_header(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> tuple[bytes, list[str]]:
    """Return the bytes that go before the data, and the order in which the tensors' data must follow.

    Wide dtypes come first, so that every tensor is aligned to its own item size.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in NAMES:
            raise UnsupportedModel(f"{name}: safetensors has no dtype {tensor.dtype}; it takes {', '.join(DTYPES)}")
        stop = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def _parse(path: Path, text: bytes) -> dict:
    def once(pairs: list[tuple[str, object]]) -> dict:
        table = dict(pairs)
        if len(table) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in table if names.count(name) > 1)
            raise IntegrityError(f"{path}: the header lists {twice!r} twice")
        return table

    try:
        header = json.loads(text, object_pairs_hook=once)
    except ValueError as error:
        raise IntegrityError(f"{path}: the header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise IntegrityError(f"{path}: the header is not a table of tensors")
    return header


def _entry(path: Path, name: str, value: object, data_start: int) -> TensorEntry:
    try:
        dtype_name, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]  # type: ignore[index]
        well_formed = all(isinstance(n, int) and n >= 0 for n in (*shape, start, stop)) and start <= stop
    except (KeyError, TypeError, ValueError):
        well_formed = False
    if not well_formed:
        raise IntegrityError(f"{path}: the header's entry for {name!r} is malformed: {value!r}")
    if dtype_name not in DTYPES:
        raise UnsupportedModel(f"{path}: {name!r} has dtype {dtype_name!r}; known are {', '.join(DTYPES)}")
    dtype = DTYPES[dtype_name]
    expected = math.prod(shape) * dtype.itemsize
    if stop - start != expected:
        raise IntegrityError(
            f"{path}: {name!r} of shape {shape} and dtype {dtype_name} takes {expected:,} bytes, "
            f"the header gives it {stop - start:,}"
        )
    return TensorEntry(path, dtype, tuple(shape), data_start + start, data_start + stop)


def _check_layout(path: Path, entries: dict[str, TensorEntry], data_start: int, size: int) -> None:
    """The format allows no gap and no overlap: either would hide bytes, or let two tensors share them."""
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            what = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            raise IntegrityError(f"{path}: {name!r} {what} (starts at byte {entry.start:,}, expected {position:,})")
        if entry.stop > size:
            raise IntegrityError(
                f"{path}: truncated: {name!r} ends at byte {entry.stop:,}, the file ends at byte {size:,}; "
                "copy or download it again"
            )
        position = entry.stop
    if position != size:
        raise IntegrityError(f"{path}: {size - position:,} bytes after the last tensor belong to none")
