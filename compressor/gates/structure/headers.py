"""Rules about names, shapes and dtypes: every tensor is there, packed where it should be, in one scheme.

Only headers are read, but for tied weights stored twice. O output features, I input features, G groups in a row.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

import torch

from compressor.gates.structure.finding import Finding, failed
from compressor.gates.structure.history import History
from compressor.gates.structure.layout import Layout, Linear
from compressor.gates.structure.scheme import Claims
from compressor.gates.structure.stored import Stored
from compressor.quant import QuantSpec, packed_bytes

RULES = {
    "tensors.present": "every tensor that the architecture needs is there",
    "tensors.unexpected": "no tensor is there that the architecture has no place for",
    "tensors.tied": "tied weights are one",
    "tensors.shape": "every tensor has the shape that the config asks for",
    "tensors.dtype": "every tensor has the dtype that the config or the format asks for",
    "quantized.config": "quantization_config describes what the files hold",
    "quantized.coverage": "what quantization_config targets is packed, and nothing else is",
    "quantized.scheme": "all experts share one scheme, and so do weights that are fused",
}
LEDGER_RULES = {"quantized.asked": "every weight is packed in the bits and groups that the run's ledger says"}


def header_failures(stored: Stored, layout: Layout, dtype: torch.dtype, baseline: Stored | None) -> Iterator[Finding]:
    """Whatever names, shapes and dtypes say is wrong."""
    reader, claims = stored.reader, stored.claims
    mistaken = _mistaken_config(stored, layout)
    if mistaken:
        yield failed("quantized.config", "config.json", mistaken)
    wanted: set[str] = set()
    for name, shape in layout.shapes.items():
        linear = layout.by_name.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if linear is not None and (stored.is_packed(linear.name) or f"{linear.name}.weight_scale" in reader):
            wanted |= _packed_keys(linear, claims)
            if not mistaken:
                yield from _packed_failures(stored, linear, dtype)
        elif name not in reader:
            yield failed("tensors.present", name, f"{name} is missing; the architecture needs it, {list(shape)}")
        else:
            wanted.add(name)
            yield from _dense_failures(stored, name, shape, dtype, baseline)
        if linear is not None and not mistaken:
            yield from _coverage(stored, linear)
    for name, first in layout.tied.items():
        if name in reader:  # other tools write it twice, which does no harm while both are the same
            wanted.add(name)
            if first in reader and not torch.equal(reader.tensor(name), reader.tensor(first)):
                text = f"{name} is tied to {first} and stored beside it with another content: loaders drop one of them"
                yield failed("tensors.tied", name, text)
    for name in reader.keys():  # noqa: SIM118  (a reader, not a dict)
        if name not in wanted and not name.endswith("rotary_emb.inv_freq"):
            yield failed("tensors.unexpected", name, f"the architecture has no place for {name}")
    yield from _schemes(stored, layout)


def asked_failures(stored: Stored, layout: Layout, history: History, baseline: Stored | None) -> Iterator[Finding]:
    """Weights that are not stored as the run's ledger says: a layer left dense, or in other bits."""
    quantized = history.quantized or {}
    for linear in layout.linears:
        asked = quantized.get(linear.ledger)
        packed = stored.is_packed(linear.name)
        if asked is not None and not packed:
            text = f"{linear.name} is stored dense, the run quantized it to {asked[0]} bits"
            yield failed("quantized.asked", linear.name, text)
        elif asked is None and packed and not (baseline is not None and baseline.is_packed(linear.name)):
            yield failed("quantized.asked", linear.name, f"{linear.name} is packed, but no pass quantized it")
        elif asked is not None:
            spec = stored.claims.spec_of(linear.name)
            if spec is not None and (spec.bits, spec.group_size) != asked:
                wanted = QuantSpec(asked[0], asked[1], spec.symmetric)
                yield failed(
                    "quantized.asked", linear.name, f"{linear.name} is {spec}, the run quantized it to {wanted}"
                )


def _mistaken_config(stored: Stored, layout: Layout) -> str | None:
    """One sentence where all packed weights contradict the config in the same way: then the config is at fault."""
    held: set[tuple[int, int]] = set()
    for linear in layout.linears:
        if stored.is_packed(linear.name) and f"{linear.name}.weight_scale" in stored.reader:
            width, scales = linear.shape[1], stored.reader.shape(f"{linear.name}.weight_scale")
            is_int8 = stored.is_int8(linear.name)
            code_bits = 8 if is_int8 else stored.reader.shape(f"{linear.name}.weight_packed")[-1] * 32 // width
            held.add((code_bits, width // max(1, scales[-1])))
    claimed = {spec for _, spec in stored.claims.groups}
    if held and not claimed:
        return "config.json: there is no quantization_config, but weights are packed: they would load as random ones"
    bits, told = {bits for bits, _ in held}, {spec.bits for spec in claimed}
    if len(bits) == 1 and not bits & told:
        return f"config.json: quantization_config says {_list(told)} bits, all packed weights hold {_list(bits)}"
    groups, told_groups = {group for _, group in held}, {spec.group_size for spec in claimed}
    if len(groups) == 1 and None not in told_groups and not groups & told_groups:
        return f"config.json: quantization_config says groups of {_list(told_groups)}, scales are for {_list(groups)}"
    return None


def _packed_keys(linear: Linear, claims: Claims) -> set[str]:
    spec = claims.spec_of(linear.name)
    if spec is not None and spec.activation_bits:
        return {f"{linear.name}.{part}" for part in ("weight", "weight_scale")}
    zeros = {f"{linear.name}.weight_zero_point"} if spec is not None and not spec.symmetric else set()
    return {f"{linear.name}.{part}" for part in ("weight_packed", "weight_scale", "weight_shape")} | zeros


def _packed_failures(stored: Stored, linear: Linear, dtype: torch.dtype) -> Iterator[Finding]:
    reader, claims = stored.reader, stored.claims
    spec = claims.spec_of(linear.name)
    present = True
    for key in sorted(_packed_keys(linear, claims)):
        if key not in reader:
            present = False
            yield failed("tensors.present", key, f"{key} is missing: the packed weight cannot be read without it")
    if spec is None or not present:
        return  # `quantized.coverage` says that nothing claims it
    rows, columns = linear.shape
    try:
        groups = spec.num_groups(columns)
    except ValueError as error:
        yield failed("quantized.scheme", linear.name, f"{linear.name}: {error}")
        return
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"weight_scale": ((rows, groups), dtype)}
    if spec.activation_bits:
        expected["weight"] = ((rows, columns), torch.int8)
    else:
        expected["weight_packed"] = ((rows, packed_bytes(columns, spec.bits) // 4), torch.int32)
        expected["weight_shape"] = ((2,), torch.int64)
    if not spec.symmetric:
        expected["weight_zero_point"] = ((packed_bytes(rows, spec.bits) // 4, groups), torch.int32)
    for part, (shape, wanted) in expected.items():
        key = f"{linear.name}.{part}"
        if reader.shape(key) != shape:
            text = f"{key} has shape {list(reader.shape(key))}, {spec} of {list(linear.shape)} takes {list(shape)}"
            yield failed("tensors.shape", key, text)
        if reader.dtype(key) != wanted:
            yield failed("tensors.dtype", key, f"{key} is {_word(reader.dtype(key))}, expected {_word(wanted)}")


def _dense_failures(
    stored: Stored, name: str, shape: tuple[int, ...], dtype: torch.dtype, baseline: Stored | None
) -> Iterator[Finding]:
    reader = stored.reader
    if reader.shape(name) != shape:
        text = f"{name} has shape {list(reader.shape(name))}, the config asks for {list(shape)}"
        yield failed("tensors.shape", name, text)
    allowed = {dtype}
    if baseline is not None and name in baseline.reader:
        allowed.add(baseline.reader.dtype(name))  # some families keep routers in float32
    if reader.dtype(name) not in allowed:
        text = f"{name} is {_word(reader.dtype(name))}, expected {' or '.join(sorted(map(_word, allowed)))}"
        yield failed("tensors.dtype", name, text)


def _coverage(stored: Stored, linear: Linear) -> Iterator[Finding]:
    packed, spec = stored.is_packed(linear.name), stored.claims.spec_of(linear.name)
    if packed and f"{linear.name}.weight" in stored.reader and not stored.is_int8(linear.name):
        text = f"{linear.name} is stored twice, packed and dense"
        yield failed("quantized.coverage", linear.name, text)
    elif packed and spec is None:
        text = f"{linear.name} is packed, but quantization_config does not say so: it would be loaded as random weights"
        yield failed("quantized.coverage", linear.name, text)
    elif not packed and spec is not None and f"{linear.name}.weight" in stored.reader:
        text = f"{linear.name} is stored dense, but quantization_config says that it is {spec}; `ignore` must name it"
        yield failed("quantized.coverage", linear.name, text)


def _schemes(stored: Stored, layout: Layout) -> Iterator[Finding]:
    """Loaders use one scheme for all experts and for fused weights: another one loads into wrong weights, silently."""
    groups: dict[str, list[Linear]] = {}
    for linear in layout.linears:
        groups.setdefault(linear.fused, []).append(linear)
    for members in groups.values():
        specs = {linear.name: stored.claims.spec_of(linear.name) for linear in members}
        if members[0].kind != "expert":  # a recipe may leave one of them dense
            specs = {name: spec for name, spec in specs.items() if spec is not None}
        usual = Counter(specs.values()).most_common(1)[0][0] if specs else None
        which = "other experts are" if members[0].kind == "expert" else "what it is fused with is"
        for name, spec in specs.items():
            if spec != usual:
                text = f"{name} is {spec or 'dense'}, {which} {usual or 'dense'}; they must share one scheme"
                yield failed("quantized.scheme", name, text)


def _list(values: Iterable[int | None]) -> str:
    return ", ".join(map(str, sorted(filter(None, values))))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
