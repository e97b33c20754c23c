"""The parts of a model that passes work on: weight sites, stacks of experts, blocks.

O output features, I input features, E experts, H model width, F expert width, M tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import UnsupportedModel
from compressor.layers import PackedExperts, PackedLinear, PackedWeight
from compressor.models.families import Family
from compressor.quant import QuantizedTensor


@dataclass(frozen=True)
class WeightSite:
    """A named 2-D weight `[out, in]` of a block: read it, write it, or put a quantized one in its place."""

    name: str  # full: "model.layers.3.self_attn.q_proj"
    path: str  # inside the block: "self_attn.q_proj"
    reads: str  # sites with the same value read the same input
    block: nn.Module

    @property
    def module(self) -> nn.Module:
        return self.block.get_submodule(self.path)

    @property
    def shape(self) -> tuple[int, int]:
        module = self.module
        return module.out_features, module.in_features  # type: ignore[return-value]

    @property
    def is_packed(self) -> bool:
        return isinstance(self.module, PackedLinear)

    def read(self) -> Tensor:
        """The dense weight; a packed one is refused, since writing it back would round it twice."""
        module = self.module
        if not isinstance(module, nn.Linear):
            raise UnsupportedModel(f"{self.name} is quantized already; put `quantize` after the other passes")
        return module.weight.detach()

    def write(self, weight_OI: Tensor) -> None:
        """Replace the weight in place; the shape stays."""
        module = self.module
        assert isinstance(module, nn.Linear)
        assert module.weight.shape == weight_OI.shape
        module.weight.data = weight_OI.to(module.weight.dtype)

    def install(self, quantized: QuantizedTensor) -> None:
        """Put a packed linear where the dense one is."""
        bias = getattr(self.module, "bias", None)
        self.block.set_submodule(self.path, PackedLinear(PackedWeight.of(quantized), bias))


@dataclass(frozen=True)
class ExpertStack:
    """All experts of a layer: `gate_up [E, 2F, H]` and `down [E, H, F]`, and the router that chooses among them.

    Beside them there may be a shared expert, whose linears are sites of the block, and its gate, which stays dense.
    """

    name: str  # full: "model.layers.3.mlp.experts"
    path: str
    router_path: str
    shared_path: str | None  # "mlp.shared_expert"
    shared_gate_path: str | None
    disk_name: str  # full, in a checkpoint: "model.layers.3.block_sparse_moe.experts"
    router_disk_name: str
    expert_names: tuple[str, str, str]  # of gate, up and down of one expert in a checkpoint
    block: nn.Module

    @property
    def module(self) -> Any:
        return self.block.get_submodule(self.path)

    @property
    def router(self) -> Any:
        return self.block.get_submodule(self.router_path)

    @property
    def num_experts(self) -> int:
        return self.module.num_experts

    @property
    def top_k(self) -> int:
        """Experts that each token goes to."""
        return self.router.top_k

    @property
    def normalises_gates(self) -> bool:
        """Whether the gates of a token's experts are divided by their sum; a router without a switch always does it."""
        return getattr(self.router, "norm_topk_prob", True)

    @property
    def is_packed(self) -> bool:
        return isinstance(self.module, PackedExperts)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The stacked weights and their shapes, by name in the module."""
        if self.is_packed:
            return {"gate_up_proj": self.module.gate_up.shape, "down_proj": self.module.down.shape}
        return {name: tuple(getattr(self.module, name).shape) for name in ("gate_up_proj", "down_proj")}

    def read(self) -> tuple[Tensor, Tensor]:
        """Dense `gate_up` and `down`; packed ones are refused, since writing them back would round them twice."""
        if self.is_packed:
            raise UnsupportedModel(f"{self.name} is quantized already; put `quantize` after the other passes")
        return self.module.gate_up_proj.detach(), self.module.down_proj.detach()

    def write(self, gate_up: Tensor, down: Tensor) -> None:
        """Replace the weights of all experts in place."""
        self.module.gate_up_proj.data = gate_up.to(self.module.gate_up_proj.dtype)
        self.module.down_proj.data = down.to(self.module.down_proj.dtype)

    def gate(self, gate_up_out: Tensor) -> Tensor:
        """Activation and gating between the two products, as this family does it."""
        return self.module._apply_gate(gate_up_out)

    def install(self, gate_up: QuantizedTensor, down: QuantizedTensor) -> None:
        """Put packed experts where the dense stack is."""
        self.install_packed(PackedWeight.of(gate_up), PackedWeight.of(down))

    def install_packed(self, gate_up: PackedWeight, down: PackedWeight) -> None:
        template = self.module
        template._parameters.clear()
        self.block.set_submodule(self.path, PackedExperts(gate_up, down, template))

    def keep(self, kept: Tensor) -> None:
        """Drop all experts but `kept` (ascending), with the router's rows and every count in the modules."""
        experts, router = self.module, self.router
        for name in list(experts._parameters):
            setattr(experts, name, nn.Parameter(getattr(experts, name).detach()[kept].clone(), requires_grad=False))
        for name in list(router._parameters):
            setattr(router, name, nn.Parameter(getattr(router, name).detach()[kept].clone(), requires_grad=False))
        experts.num_experts = router.num_experts = len(kept)


@dataclass(frozen=True)
class Block:
    """One decoder block with its weights present."""

    index: int
    name: str  # "model.layers.3"
    module: nn.Module
    sites: tuple[WeightSite, ...]
    experts: ExpertStack | None

    def shared_inputs(self) -> dict[str, list[WeightSite]]:
        """Sites by the input that they read."""
        groups: dict[str, list[WeightSite]] = {}
        for site in self.sites:
            groups.setdefault(site.reads, []).append(site)
        return groups

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All tensors of the block by name inside it, and what is needed to build its packed modules again."""
        packed = {}
        for path, weight in _packed_by_path(self.module):
            spec = weight.spec
            packed[path] = {
                "bits": spec.bits,
                "group_size": spec.group_size,
                "symmetric": spec.symmetric,
                "activation_bits": spec.activation_bits,
                "shape": list(weight.shape),
                "dtype": str(weight.scales.dtype).removeprefix("torch."),
            }
        return {name: tensor.detach() for name, tensor in self.module.state_dict().items()}, packed


def find_block(index: int, name: str, module: nn.Module, family: Family) -> Block:
    """Read a block's anatomy off its modules: every linear is a site, but for those that choose among experts.

    Stacked experts are recognised by the flags on their class.
    """
    experts = _find_experts(name, module, family)
    inside_experts = f"{family.experts}."
    sites = []
    for path, child in module.named_modules():
        if not isinstance(child, nn.Linear | PackedLinear) or (experts and path.startswith(inside_experts)):
            continue
        if path in (family.router, family.shared_gate):
            continue
        shared = next((group for group in family.shared_inputs if path in group), (path,))
        sites.append(WeightSite(f"{name}.{path}", path, "+".join(shared), module))
    return Block(index, name, module, tuple(sites), experts)


def _find_experts(name: str, module: nn.Module, family: Family) -> ExpertStack | None:
    try:
        experts: Any = module.get_submodule(family.experts)
    except AttributeError:
        return None
    children = {path for path, _ in module.named_modules()}
    stack = ExpertStack(
        name=f"{name}.{family.experts}",
        path=family.experts,
        router_path=family.router,
        shared_path=family.shared_expert if family.shared_expert in children else None,
        shared_gate_path=family.shared_gate if family.shared_gate in children else None,
        disk_name=f"{name}.{family.experts_on_disk}",
        router_disk_name=f"{name}.{family.router_on_disk}",
        expert_names=family.expert_names,
        block=module,
    )
    if isinstance(experts, PackedExperts):
        return stack
    # The flags that `use_experts_implementation` puts on the class decide, not the family's name
    odd = [flag for flag in ("is_transposed", "has_bias", "has_post_expert_norm") if getattr(experts, flag, False)]
    odd += [f"no {flag}" for flag in ("has_gate", "is_concatenated") if not getattr(experts, flag, False)]
    if odd:
        raise UnsupportedModel(f"{stack.name}: experts of this layout are not supported ({', '.join(odd)})")
    return stack


def _packed_by_path(module: nn.Module) -> Iterator[tuple[str, PackedWeight]]:
    for path, child in module.named_modules():
        if isinstance(child, PackedWeight):
            yield path, child


@contextmanager
def dequantized(block: Block, dtype: torch.dtype) -> Iterator[None]:
    """Dense weights in place of packed ones for a while: exact arithmetic over many batches unpacks only once."""
    replaced: list[tuple[str, nn.Module]] = []
    try:
        for site in block.sites:
            packed = site.module
            if isinstance(packed, PackedLinear):
                block.module.set_submodule(site.path, packed.dense(dtype))
                replaced.append((site.path, packed))
        if block.experts and block.experts.is_packed:
            packed = block.experts.module
            template = packed.template
            template.gate_up_proj = nn.Parameter(packed.gate_up.dequantize(dtype), requires_grad=False)
            template.down_proj = nn.Parameter(packed.down.dequantize(dtype), requires_grad=False)
            block.module.set_submodule(block.experts.path, template)
            replaced.append((block.experts.path, packed))
        yield
    finally:
        for path, packed in replaced:
            if isinstance(packed, PackedExperts):
                packed.template._parameters.clear()
            block.module.set_submodule(path, packed)


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """Everything that is floating point in float32 for a while; each tensor returns to the dtype that it had.

    (`module.to(dtype)` would not do: rotary frequencies are float32 in a bfloat16 model.)
    """
    dtypes = {name: tensor.dtype for name, tensor in _named_tensors(module)}
    nn.Module.float(module)
    try:
        yield
    finally:
        for name, tensor in _named_tensors(module):
            tensor.data = tensor.data.to(dtypes[name])


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
