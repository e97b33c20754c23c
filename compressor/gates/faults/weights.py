"""Faults in weights of any model: wrong order, wrong place, wrong grid, stale, lost."""

from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

from compressor.gates.faults.artefact import CONFIG, PARTS, Artefact, DoesNotApply, Injected
from compressor.quant import QuantizedTensor, pack_codes, unpack_codes

Inject = Callable[[Artefact, Random], Injected]


def _generator(random: Random) -> torch.Generator:
    return torch.Generator().manual_seed(random.randrange(1 << 30))


def swapped_gate_up(artefact: Artefact, random: Random) -> Injected:
    """gate_proj and up_proj exchanged: the shapes are the same, the activation goes to the wrong half."""
    gate_name, up_name, _ = artefact.family.expert_names
    layers = {name.rpartition(".weight")[0] for name in artefact.names()}
    gates = sorted(name for name in layers if name.endswith(f".{gate_name}"))
    if not gates:
        raise DoesNotApply(f"no layer is called {gate_name}")
    gate = random.choice(gates)
    up = f"{gate.removesuffix(gate_name)}{up_name}"
    artefact.move([(gate, up), (up, gate)])
    return Injected(f"{gate} and {up} exchanged", (gate, up))


def unquantized(artefact: Artefact, random: Random) -> Injected:
    """GPTQModel#1680: a layer stays dense, config.json says that it is quantized."""
    name = random.choice(artefact.packed())
    _make_dense(artefact, name)
    return Injected(f"{name} is dense, config.json does not know", (name,))


def quietly_unquantized(artefact: Artefact, random: Random) -> Injected:
    """llm-compressor#1533: a layer stays dense, and `ignore` lists it: only the run knows that it was to be packed."""
    name = random.choice(artefact.packed_sites())
    _make_dense(artefact, name)
    config = artefact.config
    config["quantization_config"]["ignore"] = sorted([*config["quantization_config"]["ignore"], name])
    artefact.write_json(CONFIG, config)
    return Injected(f"{name} is dense and ignored", (name,))


def _make_dense(artefact: Artefact, name: str) -> None:
    dense = artefact.quantized(name)
    changes: dict[str, Tensor | None] = {f"{name}.weight": dense.dequantize(dense.scales.dtype)}
    artefact.write(changes | {f"{name}.{part}": None for part in PARTS})


def ignored_but_packed(artefact: Artefact, random: Random) -> Injected:
    """A packed layer in `ignore`: loaders look for its dense weight and initialise it."""
    name = random.choice(artefact.packed())
    config = artefact.config
    config["quantization_config"]["ignore"] = sorted([*config["quantization_config"]["ignore"], name])
    artefact.write_json(CONFIG, config)
    return Injected(f"{name} is packed and ignored", (name,))


def rotary_permutation(artefact: Artefact, random: Random) -> Injected:
    """Rows of q_proj interleaved as other runtimes want them (the two halves of each head take turns)."""
    names = [name for name in {n.rpartition(".weight")[0] for n in artefact.names()} if name.endswith("q_proj")]
    if not names:
        raise DoesNotApply("no layer is called q_proj")
    name = random.choice(sorted(names))
    config = artefact.config
    heads = config["num_attention_heads"]
    changes: dict[str, Tensor | None] = {}
    for part in ("weight", "weight_packed", "weight_scale"):
        if f"{name}.{part}" in artefact.files:
            rows = artefact.read(f"{name}.{part}")
            head = rows.shape[0] // heads
            order = torch.arange(rows.shape[0]).reshape(heads, 2, head // 2).transpose(1, 2).flatten()
            changes[f"{name}.{part}"] = rows[order]
    artefact.write(changes)
    return Injected(f"rows of {name} interleaved", (name,))


def duplicated_layer(artefact: Artefact, random: Random) -> Injected:
    """One block holds another one's weights."""
    if artefact.num_blocks < 2:
        raise DoesNotApply("the model has one block only")
    source, target = random.sample(range(artefact.num_blocks), 2)
    artefact.move([(artefact.block(source), artefact.block(target))])
    return Injected(f"block {target} holds block {source}", (artefact.block(target),))


def exchanged_layers(artefact: Artefact, random: Random) -> Injected:
    """Two neighbouring blocks are off by one."""
    if artefact.num_blocks < 2:
        raise DoesNotApply("the model has one block only")
    first = random.randrange(artefact.num_blocks - 1)
    one, other = artefact.block(first), artefact.block(first + 1)
    artefact.move([(one, other), (other, one)])
    return Injected(f"blocks {first} and {first + 1} exchanged", (one, other))


def reversed_codes(artefact: Artefact, random: Random) -> Injected:
    """Codes of every word in the opposite order: highest nibble first."""
    name = random.choice(artefact.packed())
    old = artefact.quantized(name)
    if old.spec.bits == 3:
        raise DoesNotApply("3-bit codes cross words: there is no opposite order")
    per_word = 32 // old.spec.bits
    width = old.codes.shape[1]
    words = pack_codes(old.codes, old.spec.bits)
    flipped = unpack_codes(words, old.spec.bits, words.shape[1] * per_word).unflatten(1, (-1, per_word)).flip(-1)
    if width % per_word:
        raise DoesNotApply("the last word of a row is partly empty")
    artefact.write({f"{name}.weight_packed": pack_codes(flipped.flatten(1), old.spec.bits)})
    return Injected(f"codes of {name} in the opposite order in each word", (name,))


def shifted_codes(artefact: Artefact, random: Random) -> Injected:
    """All codes one too high: an offset of 2^(bits-1) - 1 in place of 2^(bits-1)."""
    name = random.choice(artefact.packed())
    old = artefact.quantized(name)
    codes = (old.codes.to(torch.int16) + 1).clamp(max=old.spec.highest).to(torch.int8)
    artefact.write_quantized({name: QuantizedTensor(codes, old.scales, None, old.spec)})
    return Injected(f"codes of {name} are one too high", (name,))


def rolled_scales(artefact: Artefact, random: Random) -> Injected:
    """Every group has the scale of the group before it."""
    name = random.choice(artefact.packed())
    scales = artefact.read(f"{name}.weight_scale")
    artefact.write({f"{name}.weight_scale": scales.roll(1, dims=1 if scales.shape[1] > 1 else 0)})
    return Injected(f"scales of {name} moved on by one group", (name,))


def foreign_scales(artefact: Artefact, random: Random) -> Injected:
    """A weight has the scales of the same weight in another block."""
    names = artefact.packed()
    name = random.choice(names)
    blocks = artefact.family.blocks
    place = name.removeprefix(f"{blocks}.").partition(".")[2]
    others = [n for n in names if n != name and n.removeprefix(f"{blocks}.").partition(".")[2] == place]
    if not others:
        raise DoesNotApply("no other block has this weight packed")
    other = random.choice(others)
    artefact.write({f"{name}.weight_scale": artefact.read(f"{other}.weight_scale")})
    return Injected(f"{name} has the scales of {other}", (name,))


def nan_scale(artefact: Artefact, random: Random) -> Injected:
    """One scale of a layer is NaN."""
    name = f"{random.choice(artefact.packed_sites())}.weight_scale"
    scales = artefact.read(name)
    scales[-1, -1] = float("nan")
    artefact.write({name: scales})
    return Injected(f"the last scale of {name} is NaN", (name,))


def transposed(artefact: Artefact, random: Random) -> Injected:
    """A square weight was transposed before it was quantized (layouts of Conv1D and nn.Linear)."""
    names = [n for n in artefact.packed() if len(set(artefact.read(f"{n}.weight_shape").tolist())) == 1]
    if not names:
        raise DoesNotApply("no packed weight is square")
    name = random.choice(names)
    old = artefact.quantized(name)
    artefact.write_quantized({name: artefact.round(old.dequantize().T.contiguous(), old)})
    return Injected(f"{name} is transposed", (name,))


def _some_shard(artefact: Artefact, random: Random) -> tuple[str, list[str]]:
    """A shard with packed weights, or the last block of a model in one file; and the packed weights in it."""
    packed = artefact.packed()
    files = sorted({artefact.files[f"{name}.weight_packed"] for name in packed})
    if len(files) > 1:
        file = random.choice(files)
        return file, [name for name in packed if artefact.files[f"{name}.weight_packed"] == file]
    block = artefact.block(artefact.num_blocks - 1)
    return block, [name for name in packed if name.startswith(f"{block}.")]


def stale_shard(artefact: Artefact, random: Random) -> Injected:
    """A shard of an export whose columns were scaled and whose norms, in another shard, made up for it (AWQ)."""
    where, names = _some_shard(artefact, random)
    generator = _generator(random)
    weights = {}
    for name in names:
        old = artefact.quantized(name)
        scaled = old.dequantize() * torch.exp(0.5 * torch.randn(old.codes.shape[1], generator=generator))
        weights[name] = artefact.round(scaled, old)
    artefact.write_quantized(weights)
    return Injected(f"{where} comes from an export with scaled columns", tuple(names))


def coarse_shard(artefact: Artefact, random: Random) -> Injected:
    """A shard of an export in fewer bits, stored in the same words."""
    where, names = _some_shard(artefact, random)
    fewer = {8: 4, 4: 3, 3: 2}
    weights = {}
    for name in names:
        old = artefact.quantized(name)
        if old.spec.bits not in fewer:
            raise DoesNotApply("there are no fewer bits than 2")
        coarse = artefact.round(old.dequantize(), old, bits=fewer[old.spec.bits])
        weights[name] = QuantizedTensor(coarse.codes, coarse.scales, None, old.spec)
    artefact.write_quantized(weights)
    return Injected(f"{where} comes from an export in fewer bits", tuple(names))


def random_head(artefact: Artefact, random: Random) -> Injected:
    """The output head is freshly initialised."""
    return _randomise(artefact, random, f"{artefact.family.head}.weight")


def random_embedding(artefact: Artefact, random: Random) -> Injected:
    """The embedding is freshly initialised."""
    return _randomise(artefact, random, f"{artefact.family.embedding}.weight")


def _randomise(artefact: Artefact, random: Random, name: str) -> Injected:
    if name not in artefact.files:
        raise DoesNotApply(f"the artefact has no {name}: it is tied")
    old = artefact.read(name)
    artefact.write({name: (0.02 * torch.randn(old.shape, generator=_generator(random))).to(old.dtype)})
    return Injected(f"{name} is random", (name,))


def _norm(artefact: Artefact, random: Random) -> str:
    names = [name for name in artefact.names() if "norm" in name and name.endswith(".weight")]
    names = [name for name in names if not bool((artefact.read(name) == 1).all())]
    if not names:
        raise DoesNotApply("all norms of this artefact are ones anyway")
    return random.choice(names)


def lost_norm(artefact: Artefact, random: Random) -> Injected:
    """A norm is as a fresh module starts: ones."""
    name = _norm(artefact, random)
    artefact.write({name: torch.ones_like(artefact.read(name))})
    return Injected(f"{name} is ones", (name,))


def nan_norm(artefact: Artefact, random: Random) -> Injected:
    """One element of a norm is NaN."""
    name = _norm(artefact, random)
    norm = artefact.read(name)
    norm[0] = float("nan")
    artefact.write({name: norm})
    return Injected(f"{name} holds a NaN", (name,))


def missing_tensor(artefact: Artefact, random: Random) -> Injected:
    """The final norm is not saved."""
    name = f"{artefact.family.norm}.weight"
    artefact.write({name: None})
    return Injected(f"removed {name}", (name,))


def unexpected_tensor(artefact: Artefact, random: Random) -> Injected:
    """A tensor under a name in memory, which no loader asks for."""
    name = f"{artefact.block(0)}._orig_mod.weight"
    artefact.write({name: torch.ones(4)})
    return Injected(f"added {name}", (name,))


def flipped_tie(artefact: Artefact, random: Random) -> Injected:
    """Tied embeddings come apart with a fresh head; separate ones become tied and lose their head."""
    config, head = artefact.config, f"{artefact.family.head}.weight"
    tied = bool(config.get("tie_word_embeddings", False))
    embedding = artefact.read(f"{artefact.family.embedding}.weight")
    fresh = (0.02 * torch.randn(embedding.shape, generator=_generator(random))).to(embedding.dtype)
    artefact.write({head: fresh if tied else None})
    artefact.write_json(CONFIG, config | {"tie_word_embeddings": not tied})
    text = "the tied head came apart, freshly initialised" if tied else "the head is tied and its weight lost"
    return Injected(text, (CONFIG, artefact.family.head))


WEIGHT_FAULTS: dict[str, tuple[Inject, str]] = {
    "swapped_gate_up": (swapped_gate_up, "gate and up projections are exchanged"),
    "unquantized_layer": (unquantized, "a layer is dense though config.json says that it is quantized"),
    "quietly_unquantized_layer": (quietly_unquantized, "a layer is dense and listed in `ignore`, against the recipe"),
    "ignored_but_packed": (ignored_but_packed, "a packed layer is listed in `ignore`"),
    "rotary_permutation": (rotary_permutation, "rows of q_proj are interleaved for another runtime"),
    "duplicated_layer": (duplicated_layer, "a block holds another one's weights"),
    "exchanged_layers": (exchanged_layers, "two neighbouring blocks are exchanged"),
    "reversed_codes": (reversed_codes, "codes (nibbles) are in the opposite order"),
    "shifted_codes": (shifted_codes, "codes are off by one"),
    "rolled_scales": (rolled_scales, "scales are off by one group"),
    "foreign_scales": (foreign_scales, "a weight has another block's scales"),
    "nan_scale": (nan_scale, "one scale of a layer is NaN"),
    "transposed_weight": (transposed, "a square weight is transposed"),
    "stale_shard": (stale_shard, "a shard comes from another quantization of the same model"),
    "coarse_shard": (coarse_shard, "a shard comes from an export in fewer bits"),
    "random_head": (random_head, "the output head is freshly initialised"),
    "random_embedding": (random_embedding, "the embedding is freshly initialised"),
    "lost_norm": (lost_norm, "a norm is all ones"),
    "nan_norm": (nan_norm, "a norm holds a NaN"),
    "missing_tensor": (missing_tensor, "the final norm is missing"),
    "unexpected_tensor": (unexpected_tensor, "a tensor has a name that no loader asks for"),
    "flipped_tie": (flipped_tie, "tied embeddings came apart, or separate ones were tied"),
}
