"""Export to safetensors in layouts of compressed-tensors (docs/format.md), one block at a time.

`pack-quantized` for weights alone, `int-quantized` for int8 weights that meet int8 activations.

O output features, I input features, G groups, E experts.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint import ShardWriter, write_json
from compressor.layers import PackedWeight
from compressor.models import Block, ExpertStack, Model, disk_names
from compressor.models.packed_source import INPUTS
from compressor.quant import QuantizedTensor, QuantSpec, pack_codes

# Files that travel with the weights, byte for byte, where the source has them
COMPANIONS = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "generation_config.json", "*.model", "preprocessor_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """What was written: the folder, its bytes, and the scheme of every quantized weight by its name on disk."""

    folder: Path
    bytes: int
    schemes: dict[str, QuantSpec]


def export_safetensors(model: Model, folder: Path, *, shard_bytes: int) -> Exported:
    """Write a checkpoint that stock transformers loads; never more than one shard and one block in memory.

    Writes weights, then config, tokenizer and the source's other files. `folder` is taken as it is: the caller makes it
    appear under its final name when it is complete. Raises EnvironmentProblem where the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    schemes: dict[str, QuantSpec] = {}
    dense: list[str] = []
    with ShardWriter(folder, shard_bytes=shard_bytes) as writer:
        for name, tensor in disk_names(model.skeleton, model.rest()).items():
            writer.add(name, tensor)
        for k in range(model.num_blocks):
            with model.open_block(k) as block:
                for name, tensor in _block_tensors(model, block, schemes, dense):
                    writer.add(name, tensor)
    config = export_config(model, schemes, dense)
    write_json(folder / "config.json", config)
    copy_companions(model, folder)
    return Exported(folder, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()), schemes)


def packed_tensors(name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors on disk of one quantized weight `[O, I]`."""
    if quantized.spec.activation_bits:
        return {f"{name}.weight": quantized.codes, f"{name}.weight_scale": quantized.scales}
    bits = quantized.spec.bits
    tensors = {
        f"{name}.weight_packed": pack_codes(quantized.codes, bits),
        f"{name}.weight_scale": quantized.scales,
        f"{name}.weight_shape": torch.tensor(quantized.codes.shape, dtype=torch.int64),
    }
    if quantized.zeros is not None:  # packed along the outputs
        tensors[f"{name}.weight_zero_point"] = pack_codes(quantized.zeros.T.contiguous(), bits).T.contiguous()
    return tensors


def export_config(model: Model, schemes: dict[str, QuantSpec], dense: list[str]) -> dict[str, Any]:
    """The model's config with `quantization_config`, and every name that versions give the expert count."""
    config = json.loads(model.config.to_json_string(use_diff=True))
    config["architectures"] = [type(model.skeleton).__name__]
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    if model.anatomy(0).experts or any(model.anatomy(k).experts for k in range(model.num_blocks)):
        config |= {key: getattr(model.config, model.family.expert_counts[0]) for key in model.family.expert_counts}
    config.pop("quantization_config", None)
    if schemes:
        config["quantization_config"] = quantization_config(schemes, dense, model.family.experts_on_disk)
    return config


def quantization_config(schemes: dict[str, QuantSpec], dense: list[str], experts_path: str) -> dict[str, Any]:
    """What compressed-tensors needs to know: one config group for each scheme, and what was left alone.

    With one scheme the target is every `Linear`; with several, each group names its weights by patterns over layers,
    and that of the experts contains `experts`, by which loaders find theirs.
    """
    by_scheme: dict[QuantSpec, list[str]] = {}
    for name, spec in schemes.items():
        by_scheme.setdefault(spec, []).append(name)
    layout = "int-quantized" if any(spec.activation_bits for spec in by_scheme) else "pack-quantized"
    groups = {}
    for i, (spec, names) in enumerate(sorted(by_scheme.items(), key=lambda item: str(item[0]))):
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(by_scheme) == 1 else _patterns(names, experts_path),
            "weights": {
                "num_bits": spec.bits,
                "type": "int",
                "symmetric": spec.symmetric,
                "strategy": "channel" if spec.group_size is None else "group",
                "group_size": spec.group_size,
                "dynamic": False,
                "actorder": None,
            },
            "input_activations": INPUTS | {"group_size": None, "actorder": None} if spec.activation_bits else None,
            "output_activations": None,
            "format": layout,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(dense),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def copy_companions(model: Model, folder: Path) -> None:
    """Tokenizer, chat template, generation config and licence: the source's own files; live models save theirs."""
    if model.path is None:
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(folder)
        generation = getattr(model.skeleton, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
        return
    copy_files(model.path, folder)


def copy_files(source: Path, folder: Path, patterns: Iterable[str] = COMPANIONS) -> None:
    """Files that travel with the weights, from the source's folder."""
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def _block_tensors(
    model: Model, block: Block, schemes: dict[str, QuantSpec], dense: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a block by its name on disk; notes which weights are quantized and which are left dense."""
    for site in block.sites:
        if site.is_packed:
            yield from _packed_site(site.name, site.module.packed, schemes)  # type: ignore[arg-type]
        else:
            dense.append(site.name)
    stack = block.experts
    if stack and stack.is_packed:
        yield from _packed_experts(stack, schemes)
    elif stack:
        dense.append(f"re:.*{model.family.experts_on_disk.replace('.', chr(92) + '.')}\\..*")
    if stack:
        dense.append(stack.router_disk_name)
        if stack.shared_gate_path:
            dense.append(f"{block.name}.{stack.shared_gate_path}")
    parameters = {f"{block.name}.{name}": p.detach() for name, p in block.module.named_parameters()}
    yield from disk_names(model.skeleton, parameters).items()
    if block.index == 0:
        dense.append(model.family.head)


def _packed_site(name: str, packed: PackedWeight, schemes: dict[str, QuantSpec]) -> Iterator[tuple[str, Tensor]]:
    schemes[name] = packed.spec
    yield from packed_tensors(name, packed.quantized()).items()


def _packed_experts(stack: ExpertStack, schemes: dict[str, QuantSpec]) -> Iterator[tuple[str, Tensor]]:
    """Stacked experts come apart: gate, up and down of each expert under a name of its own."""
    name, gate_up, down = stack.disk_name, stack.module.gate_up, stack.module.down
    gate_name, up_name, down_name = stack.expert_names
    both, downs = gate_up.quantized(), down.quantized()
    half = gate_up.shape[1] // 2
    for expert in range(gate_up.shape[0]):
        zeros = None if both.zeros is None else both.zeros[expert]
        for part, rows in ((gate_name, slice(0, half)), (up_name, slice(half, None))):
            quantized = QuantizedTensor(
                both.codes[expert, rows], both.scales[expert, rows], None if zeros is None else zeros[rows], both.spec
            )
            schemes[f"{name}.{expert}.{part}"] = both.spec
            yield from packed_tensors(f"{name}.{expert}.{part}", quantized).items()
        schemes[f"{name}.{expert}.{down_name}"] = downs.spec
        yield from packed_tensors(f"{name}.{expert}.{down_name}", downs[expert]).items()


def _patterns(names: list[str], experts_path: str) -> list[str]:
    """Regular expressions over layers that match exactly the names' paths inside a block."""
    paths = set()
    for name in names:
        layer, _, path = name.partition(".layers.")[2].partition(".")
        assert layer.isdigit(), name
        paths.add(f"{experts_path}." if path.startswith(f"{experts_path}.") else path)
    patterns = []
    for path in sorted(paths):
        escaped = path.replace(".", "\\.")
        patterns.append(f"re:.*\\.{escaped}.*" if path.endswith(".") else f"re:.*\\.{escaped}$")
    return patterns
