"""What `quantization_config` claims: which linear layers are packed, and how (docs/format.md)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from compressor.models.packed_source import INPUTS, LAYOUTS
from compressor.quant import QuantSpec


class BadScheme(ValueError):
    """The `quantization_config` says something that docs/format.md does not allow; the message names the key."""


@dataclass(frozen=True)
class Claims:
    """Groups of targets with their scheme, in order, and what is left alone."""

    groups: tuple[tuple[tuple[str, ...], QuantSpec], ...] = ()
    ignore: tuple[str, ...] = ()

    @cached_property
    def _specs(self) -> dict[str, QuantSpec | None]:
        return {}

    def spec_of(self, name: str) -> QuantSpec | None:
        """The scheme that a loader would use for a linear layer; None where it loads it dense."""
        if name not in self._specs:  # a model has tens of thousands of experts, and each rule asks for all of them
            self._specs[name] = self._find(name)
        return self._specs[name]

    def _find(self, name: str) -> QuantSpec | None:
        if any(_matches(pattern, name) for pattern in self.ignore):
            return None
        for targets, spec in self.groups:
            if any(target == "Linear" or _matches(target, name) for target in targets):
                return spec
        return None


def read_claims(config: Mapping[str, Any]) -> Claims:
    """The claims of a config.json; none where nothing is quantized. Raises BadScheme."""
    settings = config.get("quantization_config")
    if settings is None:
        return Claims()
    try:
        for key, wanted in {"quant_method": ("compressed-tensors",), "format": LAYOUTS}.items():
            if settings.get(key) not in wanted:
                raise BadScheme(f"{key} is {settings.get(key)!r}, expected {' or '.join(map(repr, wanted))}")
        groups = tuple(
            (tuple(group["targets"]), _spec(name, group, settings["format"]))
            for name, group in settings["config_groups"].items()
        )
        ignore = tuple(settings.get("ignore") or ())
        for pattern in (*ignore, *(target for targets, _ in groups for target in targets)):
            if pattern.startswith("re:"):
                re.compile(pattern[3:])
    except (KeyError, TypeError, AttributeError, re.error) as error:
        raise BadScheme(f"malformed ({error!r})") from error
    if not groups:
        raise BadScheme("config_groups is empty: nothing would be loaded as quantized")
    return Claims(groups, ignore)


def _spec(name: str, scheme: Mapping[str, Any], layout: str) -> QuantSpec:
    weights, inputs = scheme["weights"], scheme.get("input_activations") or {}
    strategy, group = weights["strategy"], weights["group_size"]
    wanted = INPUTS if layout == "int-quantized" else {}
    if bool(inputs) != bool(wanted) or any(inputs[key] != value for key, value in wanted.items()):
        raise BadScheme(f"{name}: input_activations are {inputs or None}; {layout} takes {wanted or None}")
    if weights.get("type", "int") != "int" or weights.get("dynamic") or weights.get("actorder") == "group":
        raise BadScheme(
            f"{name}: weights are {dict(weights)}; expected static integers in the order of the row (no g_idx)"
        )
    if strategy not in ("group", "channel") or (strategy == "channel") != (group in (None, -1)):
        raise BadScheme(f"{name}: strategy {strategy!r} with group_size {group!r} contradict each other")
    try:
        group_size = None if strategy == "channel" else group
        return QuantSpec(weights["num_bits"], group_size, weights["symmetric"], inputs.get("num_bits"))
    except ValueError as error:
        raise BadScheme(f"{name}: {error}") from error


def _matches(pattern: str, name: str) -> bool:
    """Exact, or a regular expression from the name's beginning, as compressed-tensors reads them."""
    return bool(re.match(pattern[3:], name)) if pattern.startswith("re:") else pattern == name
