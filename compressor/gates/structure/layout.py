"""What the architecture of a config needs on the disk: every tensor by name and shape, and which of them are linear.

Built from the config alone, on a skeleton without weights. O output features, I input features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from compressor.models import disk_names
from compressor.models.anatomy import find_block
from compressor.models.families import Family, family_of
from compressor.models.transformers_io import build_skeleton

Kind = Literal["site", "expert", "router", "head"]


@dataclass(frozen=True)
class Linear:
    """One 2-D weight that a loader computes as a linear layer; `name` is its name on the disk without `.weight`.

    Linears with the same `fused` are one kernel for servers and must share a scheme. `ledger` is the name under which
    ledgers list it (experts of a layer together), `role` what it is in every layer (`mlp.experts.up_proj`).
    """

    name: str
    shape: tuple[int, int]
    kind: Kind
    block: int | None
    fused: str
    ledger: str
    role: str
    expert: int | None = None


@dataclass(frozen=True)
class Layout:
    """Every tensor that belongs on the disk while nothing is quantized, and the linear layers among them.

    `tied` maps a tensor that must not be written to the one that it shares.
    """

    shapes: Mapping[str, tuple[int, ...]]
    linears: tuple[Linear, ...]
    tied: Mapping[str, str]
    family: Family
    num_experts: int | None

    @cached_property
    def by_name(self) -> dict[str, Linear]:
        return {linear.name: linear for linear in self.linears}

    @property
    def routers(self) -> list[Linear]:
        return [linear for linear in self.linears if linear.kind == "router"]


def read_layout(config: Any, where: str) -> Layout:
    """The layout of a config as transformers reads it; raises what transformers raises where no model can be built."""
    family = family_of(config.model_type, where)
    skeleton = build_skeleton(config, torch.bfloat16, family)
    skeleton.tie_weights()
    own: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[int, str] = {}
    for name, tensor in skeleton.state_dict(keep_vars=True).items():
        first = seen.setdefault(id(tensor), name)
        if first == name:
            own[name] = tensor.detach()
        else:
            tied[name] = first
    shapes = {name: tuple(tensor.shape) for name, tensor in disk_names(skeleton, own).items()}
    blocks: Any = skeleton.get_submodule(family.blocks)
    linears, num_experts = [], None
    for k, module in enumerate(blocks):
        linears += _block_linears(k, module, family, shapes)
        stack = find_block(k, f"{family.blocks}.{k}", module, family).experts
        num_experts = stack.num_experts if stack else num_experts
    head = f"{family.head}.weight"
    head_shape = shapes.get(head) or shapes[tied[head]]
    linears.append(Linear(family.head, _two(head_shape), "head", None, family.head, family.head, family.head))
    return Layout(shapes, tuple(linears), tied, family, num_experts)


def _block_linears(k: int, module: nn.Module, family: Family, shapes: Mapping[str, tuple[int, ...]]) -> list[Linear]:
    block = find_block(k, f"{family.blocks}.{k}", module, family)
    linears = [
        Linear(site.name, _two(shapes[f"{site.name}.weight"]), "site", k, f"{k}:{site.reads}", site.name, site.path)
        for site in block.sites
    ]
    stack = block.experts
    if stack is None:
        return linears
    *_, down = stack.expert_names
    for expert in range(stack.num_experts):
        for part in stack.expert_names:
            name = f"{stack.disk_name}.{expert}.{part}"
            ledger = f"{stack.name}.{'down_proj' if part == down else 'gate_up_proj'}"
            shape = _two(shapes[f"{name}.weight"])
            linears.append(Linear(name, shape, "expert", k, "experts", ledger, f"{stack.path}.{part}", expert))
    if stack.shared_gate_path:
        gate = f"{block.name}.{stack.shared_gate_path}"
        linears.append(Linear(gate, _two(shapes[f"{gate}.weight"]), "site", k, gate, gate, stack.shared_gate_path))
    router, ledger = stack.router_disk_name, f"{block.name}.{stack.router_path}"
    shape = _two(shapes[f"{router}.weight"])
    return [*linears, Linear(router, shape, "router", k, router, ledger, stack.router_path)]


def _two(shape: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = shape
    return rows, columns
