"""A copy of a model folder that faults are planted into: files are rewritten with plain safetensors and JSON.

Every write makes a new file and renames it, so that a hard link to the original never changes. O outputs, I inputs,
G groups in a row.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.algorithms.rounding import round_to_nearest
from compressor.checkpoint import write_json
from compressor.models.families import Family, family_of
from compressor.quant import QuantizedTensor, QuantSpec, pack_codes, unpack_codes

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PARTS = ("weight_packed", "weight_scale", "weight_shape")


class DoesNotApply(Exception):
    """This artefact has nothing that the fault could break; the message says what is missing."""


@dataclass(frozen=True)
class Injected:
    """What was done to the folder, and the tensors (or their common prefix) and files that a rule has to name."""

    text: str
    named: tuple[str, ...]

    def __str__(self) -> str:
        return self.text


class Artefact:
    """Reads and rewrites tensors, config and files of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, str] = {}  # tensor -> its file
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self.files |= {name: path.name for name in file.keys()}  # noqa: SIM118  (no dict)

    # -- what is there ----------------------------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        return self.json(CONFIG)

    @property
    def family(self) -> Family:
        return family_of(self.config["model_type"], str(self.folder))

    @property
    def num_blocks(self) -> int:
        return int(self.config["num_hidden_layers"])

    def block(self, k: int) -> str:
        return f"{self.family.blocks}.{k}"

    def names(self, prefix: str = "") -> list[str]:
        """Tensors below a prefix."""
        return sorted(name for name in self.files if name.startswith(prefix))

    def packed(self) -> list[str]:
        """Names of the packed linear layers; DoesNotApply where there are none."""
        names = [name.removesuffix(".weight_packed") for name in self.names() if name.endswith(".weight_packed")]
        if not names:
            raise DoesNotApply("no weight of this artefact is packed")
        return names

    def packed_sites(self) -> list[str]:
        """Packed linear layers that are no experts."""
        names = [name for name in self.packed() if f".{self.family.experts_on_disk}." not in name]
        if not names:
            raise DoesNotApply("only experts are packed in this artefact")
        return names

    def experts(self, k: int | None = None) -> dict[int, dict[int, list[str]]]:
        """Linear layers of experts: block -> expert -> names; DoesNotApply for a dense model."""
        found: dict[int, dict[int, list[str]]] = {}
        marker = f".{self.family.experts_on_disk}."
        linears = {name.rpartition(".weight")[0] for name in self.names() if marker in name}
        for name in sorted(linears):
            block, rest = name.split(marker)
            found.setdefault(int(block.rpartition(".")[2]), {}).setdefault(int(rest.split(".")[0]), []).append(name)
        if not found:
            raise DoesNotApply("the model has no experts")
        return found

    def router(self, k: int) -> str:
        name = f"{self.block(k)}.{self.family.router_on_disk}.weight"
        if name not in self.files:
            raise DoesNotApply("the model has no router")
        return name

    # -- tensors ----------------------------------------------------------------------------------------------------

    def read(self, name: str) -> Tensor:
        with safe_open(self.folder / self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def write(self, tensors: Mapping[str, Tensor | None], *, index: bool = True) -> None:
        """Rewrite the files of these tensors; None removes one, a new name goes beside the others of its layer."""
        by_file: dict[str, dict[str, Tensor | None]] = {}
        for name, tensor in tensors.items():
            by_file.setdefault(self.files.get(name) or self._neighbour(name), {})[name] = tensor
        for file, changes in by_file.items():
            held = load_file(self.folder / file)
            for name, tensor in changes.items():
                held.pop(name, None)
                self.files.pop(name, None)
                if tensor is not None:
                    held[name] = tensor.contiguous().clone()
                    self.files[name] = file
            staged = self.folder / f".{file}.staged"
            save_file(held, staged, metadata={"format": "pt"})
            os.replace(staged, self.folder / file)
        if index and (self.folder / INDEX).exists():
            self._write_index()

    def move(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Put what `source` holds where `target` was, for all tensors below both prefixes at once."""
        changes: dict[str, Tensor | None] = {}
        for source, target in pairs:
            for name in self.names(f"{source}."):
                changes[target + name.removeprefix(source)] = self.read(name)
        self.write(changes)

    def _neighbour(self, name: str) -> str:
        layer = name.rpartition(".weight")[0]
        return next((self.files[other] for other in self.names(layer)), next(iter(self.files.values())))

    def _write_index(self) -> None:
        size = 0
        for path in sorted({self.folder / file for file in self.files.values()}):
            with path.open("rb") as file:
                size += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
        self.write_json(INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(self.files.items()))})

    # -- packed weights ---------------------------------------------------------------------------------------------

    def quantized(self, name: str) -> QuantizedTensor:
        """Codes and scales of a packed linear layer, its scheme told from the shapes."""
        words, scales, shape = (self.read(f"{name}.{part}") for part in PARTS)
        columns = int(shape[1])
        bits, groups = words.shape[1] * 32 // columns, scales.shape[1]
        spec = QuantSpec(bits, None if groups == 1 else columns // groups)
        return QuantizedTensor(unpack_codes(words, bits, columns), scales, None, spec)

    def write_quantized(self, weights: Mapping[str, QuantizedTensor]) -> None:
        changes: dict[str, Tensor | None] = {}
        for name, weight in weights.items():
            changes |= {
                f"{name}.weight_packed": pack_codes(weight.codes, weight.spec.bits),
                f"{name}.weight_scale": weight.scales,
                f"{name}.weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
            }
        self.write(changes)

    def round(self, weight_OI: Tensor, like: QuantizedTensor, *, bits: int | None = None) -> QuantizedTensor:
        """Quantize a weight in the scheme of another one."""
        spec = QuantSpec(bits or like.spec.bits, like.spec.group_size)
        return round_to_nearest(weight_OI, spec, search=False, dtype=like.scales.dtype)

    # -- files ------------------------------------------------------------------------------------------------------

    def json(self, name: str) -> Any:
        if not (self.folder / name).is_file():
            raise DoesNotApply(f"the artefact has no {name}")
        return json.loads((self.folder / name).read_bytes())

    def write_json(self, name: str, value: Any) -> None:
        write_json(self.folder / name, value)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink()

    def replace(self, name: str, data: bytes) -> None:
        """New content under an old name, without writing through a hard link."""
        staged = self.folder / f".{name}.staged"
        staged.write_bytes(data)
        os.replace(staged, self.folder / name)
