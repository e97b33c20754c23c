"""Checkpoints that are quantized already: our own layouts (compressed-tensors) go in packed.

docs/format.md defines the names; O output features, I input features, G groups, E experts, F expert width.
"""

from typing import Any

import torch
from torch import Tensor

from compressor.errors import IntegrityError, UnsupportedModel
from compressor.layers import PackedLinear, PackedWeight
from compressor.models.anatomy import Block, WeightSite
from compressor.quant import QuantSpec, pack_codes, unpack_codes

LAYOUTS = ("pack-quantized", "int-quantized")
# What `int-quantized` has to say of the inputs: int8, rounded as they arrive, one scale a token
INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}


def is_packed(config: Any) -> bool:
    """True for a checkpoint in one of our layouts; UnsupportedModel for any other quantized one."""
    settings = _settings(config)
    if settings is None:
        return False
    method, layout = settings.get("quant_method"), settings.get("format")
    if method != "compressed-tensors" or layout not in LAYOUTS:
        raise UnsupportedModel(
            f"the checkpoint is quantized already ({method}, format {layout}); readable are dense checkpoints "
            f"and compressed-tensors {' and '.join(f'`{name}`' for name in LAYOUTS)}"
        )
    for group in list(settings.get("config_groups", {}).values()) or [{}]:
        found = group.get("input_activations") or {}
        wanted = INPUTS if layout == "int-quantized" else {}
        if bool(found) != bool(wanted) or any(found.get(key) != value for key, value in wanted.items()):
            raise UnsupportedModel(
                f"the checkpoint is quantized already ({method}, format {layout}) with input_activations "
                f"{found or None}; readable with this format is {wanted or None}"
            )
    return True


def _settings(config: Any) -> dict[str, Any] | None:
    quantization = getattr(config, "quantization_config", None)
    return quantization if quantization is None or isinstance(quantization, dict) else quantization.to_dict()


def install(block: Block, tensors: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Put the packed weights of a block in place and return the tensors that are left (dense ones)."""
    settings = _settings(config) or {}
    left = dict(tensors)
    if settings.get("format") == "int-quantized":
        return _install_int8(block, left)
    # One scale in a row may mean "channel"; a group as wide as the row has one as well, and is another scheme
    groups = settings.get("config_groups", {}).values()
    channel = any(group["weights"]["strategy"] == "channel" for group in groups)
    for site in block.sites:
        if f"{site.name}.weight_packed" in left:
            weight = _take([_parts(left, site.name)], channel)[0]
            install_site(site, weight, left.pop(f"{site.name}.bias", None))
    stack = block.experts
    if stack and any(key.startswith(f"{stack.disk_name}.") and key.endswith("weight_packed") for key in left):
        gates, ups, downs = (
            [_parts(left, f"{stack.disk_name}.{expert}.{name}") for expert in range(stack.num_experts)]
            for name in stack.expert_names
        )
        both = [
            {name: torch.cat([gate[name], up[name]]) if name != "shape" else gate[name] + up[name] * torch.tensor([1,
            0])
             for name in gate}
            for gate, up in zip(gates, ups, strict=True)
        ]  # fmt: skip
        stack.install_packed(_stacked(both, channel), _stacked(downs, channel))
    return left


def _install_int8(block: Block, left: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same for `int-quantized`: plain int8 weights with one scale a row, which meet int8 activations."""
    for site in block.sites:
        codes, scales = (left.get(f"{site.name}.{part}") for part in ("weight", "weight_scale"))
        if scales is None and (codes is None or codes.is_floating_point()):
            continue  # left dense
        if codes is None or codes.dtype != torch.int8 or scales is None or scales.shape != (len(codes), 1):
            raise IntegrityError(f"{site.name}: not an int8 weight with one weight_scale a row")
        spec = QuantSpec(bits=8, group_size=None, activation_bits=8)
        weight = PackedWeight(spec, tuple(codes.shape), scales.dtype, device="meta")
        weight.words, weight.scales = pack_codes(codes, 8), scales
        del left[f"{site.name}.weight"], left[f"{site.name}.weight_scale"]
        install_site(site, weight, left.pop(f"{site.name}.bias", None))
    return left


def install_site(site: WeightSite, weight: PackedWeight, bias: Tensor | None) -> None:
    """Put a packed weight where the site's linear is."""
    site.block.set_submodule(site.path, PackedLinear(weight, bias))


def _parts(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one packed weight, removed from `tensors`; zero points unpacked to `[O, G]`."""
    try:
        parts = {part: tensors.pop(f"{name}.weight_{part}") for part in ("packed", "scale", "shape")}
    except KeyError as missing:
        raise IntegrityError(f"the checkpoint has no {missing.args[0]}") from None
    packed_zeros = tensors.pop(f"{name}.weight_zero_point", None)
    if packed_zeros is not None:
        rows, columns = parts["shape"].tolist()
        bits = parts["packed"].shape[-1] * 32 // columns
        parts["zeros"] = unpack_codes(packed_zeros.T.contiguous(), bits, rows).T.contiguous()
    return parts


def _take(parts: list[dict[str, Tensor]], channel: bool) -> list[PackedWeight]:
    weights = []
    for part in parts:
        rows, columns = part["shape"].tolist()
        groups = part["scale"].shape[-1]
        bits = part["packed"].shape[-1] * 32 // columns
        spec = QuantSpec(bits=bits, group_size=None if channel else columns // groups, symmetric="zeros" not in part)
        weight = PackedWeight(spec, (rows, columns), part["scale"].dtype, device="meta")
        weight.words, weight.scales, weight.zeros = part["packed"], part["scale"], part.get("zeros")
        weights.append(weight)
    return weights


def _stacked(parts: list[dict[str, Tensor]], channel: bool) -> PackedWeight:
    weights = _take(parts, channel)
    first = weights[0]
    stack = PackedWeight(first.spec, (len(weights), *first.shape), first.scales.dtype, device="meta")
    stack.words = torch.stack([weight.words for weight in weights])
    stack.scales = torch.stack([weight.scales for weight in weights])
    zeros = [weight.zeros for weight in weights if weight.zeros is not None]
    stack.zeros = torch.stack(zeros) if zeros else None
    return stack
