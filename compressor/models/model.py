"""A model as passes see it: an embedding, blocks that come and go, and a head; live in memory or stored on disk.

N windows, T tokens in a window, D model width, M tokens, V vocabulary.
"""

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.checkpoint import CheckpointReader, write_json, write_safetensors
from compressor.errors import IntegrityError, UnsupportedModel
from compressor.layers import CPU, PackedWeight, packed_weights, relayout
from compressor.models import packed_source
from compressor.models.anatomy import Block, dequantized, find_block
from compressor.models.families import Family
from compressor.models.layer_arguments import layer_arguments
from compressor.models.transformers_io import build_skeleton, load_tensors, missing_weights
from compressor.quant import QuantSpec

REST = "rest.safetensors"  # embedding, norm and head of a generation, where a pass changed them
TABLES = ("_parameters", "_buffers", "_modules")  # what a torch module keeps its parts in


@dataclass(frozen=True)
class Source:
    """Where a model came from: what the user wrote, the folder that was read, the resolved revision."""

    name: str
    path: Path
    revision: str | None = None
    licence: str | None = None


@dataclass
class State:
    """What passes have done to a model so far, beside its weights."""

    pruned: set[str] = field(default_factory=set)  # sites whose zeros are a mask: later passes keep them
    kept_experts: dict[int, list[int]] = field(default_factory=dict)  # layer -> original numbers, ascending

    def to_json(self) -> dict[str, Any]:
        kept = {str(layer): numbers for layer, numbers in self.kept_experts.items()}
        return {"pruned": sorted(self.pruned), "kept_experts": kept}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "State":
        kept = {int(layer): list(numbers) for layer, numbers in data["kept_experts"].items()}
        return cls(set(data["pruned"]), kept)


class Head:
    """Final norm and output projection in float32 arithmetic (design decision 8); a copy, to outlive training.

    `softcap`: logits are bent to stay below it, `softcap · tanh(logits / softcap)` (Gemma 2).
    """

    def __init__(self, norm: nn.Module, projection: nn.Module, softcap: float | None = None):
        self.norm, self.softcap = copy.deepcopy(norm), softcap
        self.weight_VD = projection.weight.detach().clone()  # type: ignore[operator]
        bias = getattr(projection, "bias", None)
        self.bias_V = None if bias is None else bias.detach().float()

    @property
    def vocab_size(self) -> int:
        return self.weight_VD.shape[0]

    @torch.no_grad()
    def logits(self, hidden_MD: Tensor) -> Tensor:
        """Float32 logits `[M, V]` of hidden states before the final norm."""
        normed = self.norm(hidden_MD.float()).float()
        # The weight is widened a slice at a time: a float32 copy of a large vocabulary would be the biggest tensor held
        parts = [nn.functional.linear(normed, part.float()) for part in self.weight_VD.split(8192)]
        logits = torch.cat(parts, dim=-1)
        if self.bias_V is not None:
            logits += self.bias_V
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)


class Model:
    """A causal language model in blocks.

    Stored models (the default for folders) keep only embedding, norm and head in memory; `open_block` brings one block
    in. Live models (an `nn.Module` in a training script) are the same with loading and saving doing nothing.
    """

    def __init__(
        self, source: Source, skeleton: Any, tokenizer: Any, family: Family, reader: CheckpointReader | None
    ) -> None:
        self.source, self.skeleton, self.tokenizer, self.family = source, skeleton, tokenizer, family
        self.reader = reader
        self.generation: Path | None = None  # work/NN of the last finished pass; None: the source itself
        self.state = State()
        if reader is not None:
            self._snapshot()
            self._load_rest()

    # -- what it is -------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def path(self) -> Path | None:
        return self.source.path if self.is_stored else None

    @property
    def config(self) -> Any:
        return self.skeleton.config

    @property
    def dtype(self) -> torch.dtype:
        return self.skeleton.get_submodule(self.family.norm).weight.dtype

    @property
    def is_stored(self) -> bool:
        return self.reader is not None

    @property
    def is_quantized(self) -> bool:
        """Whether any weight is packed; of a stored model only headers are read."""
        if not self.is_stored:
            return bool(packed_weights(self.skeleton))
        if self.generation is None:
            return packed_source.is_packed(self.config)
        files = [self._block_file(self.generation, k) for k in range(self.num_blocks)]
        return any(json.loads(CheckpointReader(file).metadata()["packed"]) for file in files)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.skeleton.get_submodule(self.family.blocks)

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    def anatomy(self, k: int) -> Block:
        """Block k with whatever weights are present (shapes are right in any case, before packing)."""
        return find_block(k, f"{self.family.blocks}.{k}", self.blocks[k], self.family)

    def num_parameters(self) -> int:
        """Logical weights: a packed weight counts as what it stands for, tied ones once."""
        return sum(self.parameter_counts().values())

    def parameter_counts(self) -> dict[str, int]:
        """Logical weights of every parameter by its name in memory, tied ones once."""
        counts: dict[str, int] = {}
        for k in range(self.num_blocks):
            with self.open_block(k) as block:
                for name, parameter in block.module.named_parameters():
                    counts[f"{block.name}.{name}"] = parameter.numel()
                for name, packed in packed_weights(block.module).items():
                    counts[f"{block.name}.{name}"] = torch.Size(packed.shape).numel()
        counts |= {name: parameter.numel() for name, parameter in self.rest().items()}
        return counts

    def weight_bytes(self) -> int:
        """Bytes over the storages held: codes, scales, embeddings; tied tensors once."""
        total = _storage_bytes(self.rest().values())
        for k in range(self.num_blocks):
            with self.open_block(k) as block:
                total += _storage_bytes(block.module.state_dict().values())
        return total

    def bits_per_weight(self) -> float:
        return self.weight_bytes() * 8 / self.num_parameters()

    # -- computing with it ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Input of the first block, `[N, T, D]`."""
        return self.skeleton.get_submodule(self.family.embedding)(ids)

    @torch.no_grad()
    def run_block(self, block: Block, hidden_NTD: Tensor) -> Tensor:
        """Output of one block for full windows (causal, no padding)."""
        given = layer_arguments(self.skeleton.base_model, self.blocks, block.index, hidden_NTD)
        result = block.module(hidden_NTD, **given)
        return result[0] if isinstance(result, tuple) else result

    def head(self) -> Head:
        """Final norm and output projection, copied."""
        norm, projection = (self.skeleton.get_submodule(path) for path in (self.family.norm, self.family.head))
        return Head(norm, projection, getattr(self.config, "final_logit_softcapping", None))

    # -- bringing blocks in and out ---------------------------------------------------------------------------------

    @contextmanager
    def open_block(self, k: int, *, dense: bool = False) -> Iterator[Block]:
        """Block k with its weights present; `dense=True` dequantizes packed ones meanwhile (exact arithmetic)."""
        absent = self.is_stored and bool(missing_weights(self.blocks[k]))
        try:
            if absent:
                self._load_block(k)
            block = self.anatomy(k)
            if dense:
                with dequantized(block, self.dtype):
                    yield block
            else:
                yield block
        finally:
            if absent:
                self._unload_block(k)

    def save_block(self, block: Block, folder: Path) -> None:
        """Write a block of a stored model into a new generation (`work/NN`), atomically; nothing to do when live."""
        if not self.is_stored:
            return
        tensors, packed = block.state()
        path = self._block_file(folder, block.index)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_safetensors(path, tensors, {"packed": json.dumps(packed, sort_keys=True)})

    def save_rest(self, folder: Path) -> None:
        """Write embedding, norm and head into a new generation (only passes that change them need to)."""
        if self.is_stored:
            folder.mkdir(parents=True, exist_ok=True)
            write_safetensors(folder / REST, {name: tensor.contiguous() for name, tensor in self.rest().items()}, {})

    def set_expert_count(self, count: int) -> None:
        """Follow a cut of experts in every place that counts them, beside the modules of the blocks."""
        for key in self.family.expert_counts:
            setattr(self.config, key, count)
        if hasattr(self.skeleton, "num_experts"):  # ForCausalLM's own copy: a stale one breaks output_router_logits
            self.skeleton.num_experts = count

    def finish_generation(self, folder: Path) -> None:
        """Make `folder` the model's weights from here on, with config and state beside the blocks."""
        if not self.is_stored:
            return
        if not (folder / REST).exists() and self.generation and (self.generation / REST).exists():
            shutil.copyfile(self.generation / REST, folder / REST)
        write_json(folder / "config.json", self.config.to_dict())
        write_json(folder / "state.json", self.state.to_json())
        self.generation = folder
        self._rebuild()

    def use_generation(self, folder: Path) -> None:
        """Continue from a generation that an earlier, interrupted run finished."""
        self.state = State.from_json(json.loads((folder / "state.json").read_text()))
        self.generation = folder
        self._rebuild()

    @contextmanager
    def live(self, *, layout: str = CPU) -> Iterator[nn.Module]:
        """The whole transformers model in memory; packed weights in the given layout meanwhile."""
        opened = [k for k in range(self.num_blocks) if self.is_stored and missing_weights(self.blocks[k])]
        before: list[tuple[PackedWeight, str]] = []
        try:
            for k in opened:
                self._load_block(k)
            before = [(weight, weight.layout) for weight in packed_weights(self.skeleton).values()]
            # The fast ops round scales to bfloat16; a stored model reads its own again, one in memory would lose them
            relayout(self.skeleton, layout, lambda weight: self.is_stored or weight.scales.dtype == torch.bfloat16)
            yield self.skeleton
        finally:
            for weight, was in before:
                weight.relayout(was)
            for k in opened:
                self._unload_block(k)

    def take_live(self) -> nn.Module:
        """Hand over the transformers model with all its weights; this Model is used up."""
        for k in range(self.num_blocks):
            if missing_weights(self.blocks[k]):
                self._load_block(k)
        self.reader = None
        return self.skeleton

    # -- storage ----------------------------------------------------------------------------------------------------

    def rest(self) -> dict[str, Tensor]:
        """Parameters outside the blocks by name, tied ones once."""
        prefix = f"{self.family.blocks}."
        return {
            name: parameter.detach()
            for name, parameter in self.skeleton.named_parameters()
            if not name.startswith(prefix)
        }

    @staticmethod
    def _block_file(generation: Path, k: int) -> Path:
        return generation / "blocks" / f"{k}.safetensors"

    def _snapshot(self) -> None:
        """Remember the empty blocks, to which `_unload_block` returns.

        Every dict as a copy: a module's own ones are filled when it is loaded, and would keep its weights for good.
        """
        self._empty = [
            [(m, {name: dict(v) if name in TABLES else v for name, v in vars(m).items()}) for m in block.modules()]
            for block in self.blocks
        ]

    def _unload_block(self, k: int) -> None:
        for module, attributes in self._empty[k]:
            vars(module).update({name: dict(v) if name in TABLES else v for name, v in attributes.items()})

    def _rebuild(self) -> None:
        """A new skeleton for the generation's config (expert counts may have changed)."""
        assert self.generation is not None
        data = json.loads((self.generation / "config.json").read_text())
        config = type(self.config).from_dict(data)
        self.skeleton = build_skeleton(config, self.dtype, self.family)
        self._snapshot()
        self._load_rest()

    def _load_rest(self) -> None:
        assert self.reader is not None
        own = self.generation / REST if self.generation else None
        if own and own.exists():
            self.skeleton.load_state_dict(_read_file(own)[0], strict=False, assign=True)
        else:
            inside = tuple(f"{self.family.blocks}.{k}." for k in range(self.num_blocks))
            self._fill(self.reader.tensors(key for key in self.reader.keys() if not key.startswith(inside)))  # noqa: SIM118
        self.skeleton.tie_weights()
        self.skeleton.requires_grad_(False)
        missing = [name for name, tensor in self.rest().items() if tensor.is_meta]
        if missing:
            raise IntegrityError(f"{self.source.path}: the checkpoint has no {', '.join(missing)}")

    def _fill(self, tensors: dict[str, Tensor]) -> None:
        """Put checkpoint tensors into the skeleton; one without a place is refused, or it would be lost silently."""
        unexpected = load_tensors(self.skeleton, tensors, self.dtype, str(self.source.path))
        if unexpected:
            raise UnsupportedModel(f"{self.source.path}: the model has no place for {', '.join(sorted(unexpected))}")

    def _load_block(self, k: int) -> None:
        assert self.reader is not None
        name = f"{self.family.blocks}.{k}"
        if self.generation is not None:
            _restore(self.anatomy(k), self._block_file(self.generation, k))
        else:
            keys = [key for key in self.reader.keys() if key.startswith(f"{name}.")]  # noqa: SIM118
            tensors = self.reader.tensors(keys)
            if packed_source.is_packed(self.config):
                tensors = packed_source.install(self.anatomy(k), tensors, self.config)
            self._fill(tensors)
        missing = missing_weights(self.blocks[k])
        if missing:
            raise IntegrityError(
                f"{self.source.path}: the checkpoint has no {name}.{missing[0]} ({len(missing)} missing)"
            )
        self.blocks[k].requires_grad_(False)


def _restore(block: Block, path: Path) -> None:
    """A block as `save_block` wrote it, packed modules included."""
    tensors, metadata = _read_file(path)
    packed = {where: _empty_packed(entry) for where, entry in json.loads(metadata["packed"]).items()}
    for site in block.sites:
        if f"{site.path}.packed" in packed:
            packed_source.install_site(site, packed.pop(f"{site.path}.packed"), tensors.get(f"{site.path}.bias"))
    if block.experts and packed:
        stack = block.experts
        stack.install_packed(packed.pop(f"{stack.path}.gate_up"), packed.pop(f"{stack.path}.down"))
    if packed:
        raise IntegrityError(f"{path}: no place for packed {', '.join(packed)}")
    block.module.load_state_dict(tensors, assign=True)


def _empty_packed(entry: dict[str, Any]) -> PackedWeight:
    spec = QuantSpec(entry["bits"], entry["group_size"], entry["symmetric"], entry["activation_bits"])
    return PackedWeight(spec, tuple(entry["shape"]), getattr(torch, entry["dtype"]), device="meta")


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file of a generation, and its metadata."""
    reader = CheckpointReader(path)
    return reader.tensors(), reader.metadata()


def _storage_bytes(tensors: Any) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
