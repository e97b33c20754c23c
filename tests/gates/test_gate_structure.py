"""Structural rules: silent on healthy exports of every kind, and right about what they measure."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.algorithms.rounding import round_to_nearest
from compressor.errors import EnvironmentProblem, IntegrityError
from compressor.gates.faults.artefact import Artefact
from compressor.gates.faults.files import link_copy
from compressor.gates.structure import check_structure, smoke
from compressor.gates.structure.content import packed_failures
from compressor.gates.structure.files import file_failures
from compressor.gates.structure.finding import MOST_SHOWN, failed, settled
from compressor.gates.structure.history import Sparsity, read_history
from compressor.gates.structure.nearness import measure_nearness
from compressor.gates.structure.scheme import BadScheme, read_claims
from compressor.gates.structure.stored import Packed
from compressor.passes import Distill, Prune, Quantize
from compressor.quant import QuantizedTensor, QuantSpec, pack_codes
from tests.gates.structure_exports import export, one_thread, tiny_source
from tests.tiny_models import tiny_ids

RTN = {"method": "rtn", "scale_search": "mse"}
INT4 = {"bits": 4, "group_size": 32}
EXPERTS = Prune(structure="experts", ratio=0.25)
INDEX = "model.safetensors.index.json"


def distill(text: Path) -> Distill:
    return Distill(data=str(text), tokens=2048, length=64, batch_tokens=512)


# Passes by name; `text` is what distillation learns from
KINDS = {
    "dense": lambda text: [],
    "rtn int4": lambda text: [Quantize(**RTN, **INT4)],
    "gptq int4": lambda text: [Quantize(**INT4)],
    "rtn int8": lambda text: [Quantize(**RTN, bits=8, group_size="channel")],
    "gptq int8": lambda text: [Quantize(bits=8, group_size="channel")],
    "gptq int2": lambda text: [Quantize(bits=2, group_size=32)],
    "gptq int3 row": lambda text: [Quantize(bits=3, group_size="channel")],
    "one layer ignored": lambda text: [Quantize(**RTN, **INT4, ignore=("lm_head", "model.layers.0.self_attn.q_proj"))],
    "2:4, int4": lambda text: [Prune(structure="2:4"), Quantize(**INT4)],
    "half zero": lambda text: [Prune(structure="unstructured", ratio=0.5, score="magnitude")],
    "2:4, distill, int4": lambda text: [Prune(structure="2:4", score="magnitude"), distill(text), Quantize(**INT4)],
}
EXPERT_KINDS = {
    "experts": lambda text: [EXPERTS],
    "experts twice, int4": lambda text: [EXPERTS, Prune(structure="experts", ratio=0.34), Quantize(**RTN, **INT4)],
    "experts, distill, int4": lambda text: [EXPERTS, distill(text), Quantize(**INT4)],
}
CASES = [("llama", kind) for kind in KINDS] + [("qwen3_moe", kind) for kind in KINDS | EXPERT_KINDS]


@pytest.fixture(scope="module", autouse=True)
def quick():
    """See `one_thread`."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A dense checkpoint of each family. Do not write here."""
    root = tmp_path_factory.mktemp("sources")
    tied = {"llama": True, "qwen3_moe": False}
    return {family: tiny_source(root / family, family, tie_word_embeddings=tie) for family, tie in tied.items()}


@pytest.fixture(scope="module")
def exports(sources, tmp_path_factory):
    """`exports(family, kind)`: source, exported folder, ledgers; each made once. Do not write there."""
    root = tmp_path_factory.mktemp("exports")
    text = root / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog while 1,2,3 sheep count themselves. " * 60)
    made: dict = {}

    def get(family: str, kind: str):
        if (family, kind) not in made:
            passes = (KINDS | EXPERT_KINDS)[kind](text)
            folder, ledgers = export(sources[family], passes, root / f"{len(made)}", shard_bytes=100_000)
            made[family, kind] = (sources[family], folder, ledgers)
        return made[family, kind]

    return get


def failing(folder, baseline=None, **more):
    return [finding for finding in check_structure(folder, baseline, **more) if finding.status == "fail"]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_healthy_export_keeps_every_rule(family, kind, exports):
    """No failure, and with baseline and ledgers nothing is skipped either."""
    source, folder, ledgers = exports(family, kind)
    assert [f for f in check_structure(folder, source, ledgers=ledgers) if f.status != "pass"] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_healthy_too(dtype, tmp_path):
    """The config's dtype is what tensors and scales are held to."""
    source = tiny_source(tmp_path / "source", "qwen3_moe", dtype=dtype)
    folder, ledgers = export(source, [Quantize(**RTN, **INT4)], tmp_path / "export")
    assert failing(folder, source, ledgers=ledgers) == []
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert {f.rule for f in failing(folder)} == {"tensors.dtype"}


@pytest.mark.parametrize("kind", ["gptq int4", "experts", "2:4, int4"])
def test_without_baseline_and_ledger_rules_are_skipped_not_passed(kind, exports):
    """What can be told of the folder alone passes; the rest says what it lacks."""
    _, folder, ledgers = exports("qwen3_moe", kind)
    findings = {f.rule: f for f in check_structure(folder)}
    skipped = {rule for rule, finding in findings.items() if finding.status == "skipped"}
    assert {f.status for f in findings.values()} == {"pass", "skipped"}
    assert skipped >= {"baseline.near", "baseline.equal", "config.routing", "tokenizer.template", "quantized.asked"}
    assert findings["values.scales"].status == "pass"
    assert findings["baseline.near"].text == "not checked: no baseline was given"
    with_ledger = {f.rule: f.status for f in check_structure(folder, ledgers=ledgers)}
    assert with_ledger["quantized.asked"] == with_ledger["pruned.sparsity"] == "pass"


def test_experts_that_stayed_are_told_from_the_router_where_no_ledger_says_it(exports):
    """Rows of the router lead each expert to the one that it was."""
    source, folder, ledgers = exports("qwen3_moe", "experts")
    assert failing(folder, source) == []
    kept = read_history(ledgers).kept_experts
    assert set(kept) == {0, 1}
    assert all(len(numbers) == 6 and list(numbers) == sorted(numbers) for numbers in kept.values())


def test_a_ledger_that_names_other_experts_is_contradicted(exports):
    """The content decides: experts that the ledger says stayed are not those in the file."""
    source, folder, ledgers = exports("qwen3_moe", "experts")
    wrong = json.loads(json.dumps(ledgers))
    dropped = sorted(set(range(8)) - set(wrong[0]["blocks"][0]["kept_experts"]))
    wrong[0]["blocks"][0]["kept_experts"][0] = dropped[0]
    named = {finding.where for finding in failing(folder, source, ledgers=wrong)}
    assert named == {"model.layers.0.mlp.gate.weight"} | {
        f"model.layers.0.mlp.experts.0.{part}_proj.weight" for part in ("gate", "up", "down")
    }


def test_pruned_and_trained_weights_need_their_ledger(exports):
    """Without it zeros and changes are differences from the baseline like any others."""
    source, folder, _ = exports("llama", "half zero")
    assert {finding.rule for finding in failing(folder, source)} == {"baseline.equal"}
    source, folder, _ = exports("llama", "2:4, distill, int4")
    assert {f.rule for f in failing(folder, source)} >= {"baseline.equal", "baseline.near"}


def test_sparsity_that_is_not_there_is_noticed(exports, tmp_path):
    """A dense export beside a ledger that says 2:4."""
    source, folder, _ = exports("llama", "dense")
    _, _, ledgers = exports("llama", "2:4, int4")
    found = [f for f in failing(folder, source, ledgers=ledgers[:1]) if f.rule == "pruned.sparsity"]
    assert {f.where for f in found} >= {"model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"}
    assert "groups of 4 hold more than the 2 weights that were kept" in found[0].text


def test_a_packed_baseline_is_compared_with_too(exports):
    """The last accepted artefact as the baseline: the same file again is equal to it."""
    _, folder, ledgers = exports("qwen3_moe", "gptq int4")
    assert failing(folder, folder, ledgers=ledgers) == []


def test_workers_change_nothing(exports):
    """Tensors are looked at side by side; findings come in the order of the tensors."""
    source, folder, _ = exports("qwen3_moe", "experts, distill, int4")
    found = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        found.append(check_structure(folder, source))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    assert found[0] == found[1]
    assert len([finding for finding in found[0] if finding.status == "fail"]) > 2


def test_a_folder_that_is_not_there_is_no_finding(tmp_path, exports):
    """Nor is a baseline that cannot be read: the artefact is not to blame."""
    with pytest.raises(EnvironmentProblem, match="no model folder"):
        check_structure(tmp_path / "none")
    _, folder, _ = exports("llama", "dense")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(IntegrityError):
        check_structure(folder, tmp_path / "broken")


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    """Two shards with their index."""
    parts = {
        "model-00001-of-00002.safetensors": {"a": torch.ones(2, 2), "b": torch.ones(3)},
        "model-00002-of-00002.safetensors": {"c": torch.ones(4)},
    }
    for name, tensors in parts.items():
        save_file(tensors, tmp_path / name, metadata={"format": "pt"})
    weight_map = {key: name for name, tensors in parts.items() for key in tensors}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 44}, "weight_map": weight_map}))
    return tmp_path


def files_found(folder):
    return {(finding.rule, finding.where) for finding in file_failures(folder)}


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def test_shards_that_agree_with_their_index_pass(shards):
    """4 + 3 + 4 numbers of 4 bytes are the 44 that the index declares."""
    assert files_found(shards) == set()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda i: i["weight_map"].update(a="model-00002-of-00002.safetensors"), "a"),
        (lambda i: i["weight_map"].pop("b"), "b"),
        (lambda i: i["weight_map"].update(d="model-00001-of-00002.safetensors"), "d"),
        (lambda i: i["metadata"].update(total_size=45), INDEX),
        (lambda i: i.pop("weight_map"), INDEX),
    ],
)
def test_an_index_that_lies_is_found(shards, change, expected):
    """A key in the wrong shard, unlisted, listed but absent; a wrong total; no map at all."""
    edit_index(shards, change)
    assert files_found(shards) == {("files.weights", expected)}


def test_a_key_in_two_shards_is_found(shards):
    """Loaders would take either."""
    save_file({"c": torch.zeros(4), "b": torch.ones(3)}, shards / "model-00002-of-00002.safetensors", {"format": "pt"})
    edit_index(shards, lambda i: i["metadata"].pop("total_size"))
    assert ("files.weights", "b") in files_found(shards)


def test_a_shard_of_an_export_with_more_shards_is_found(shards):
    """`-of-00003` among two shards."""
    os.rename(shards / "model-00002-of-00002.safetensors", shards / "model-00002-of-00003.safetensors")
    edit_index(shards, lambda i: i["weight_map"].update(c="model-00002-of-00003.safetensors"))
    assert files_found(shards) == {("files.weights", "model-00002-of-00003.safetensors")}


def test_nothing_outside_the_folder_is_read(shards):
    """Neither by an index nor by a link."""
    edit_index(shards, lambda i: i["weight_map"].update(c="../elsewhere.safetensors"))
    (shards / "vocab.txt").symlink_to("/etc/hostname")
    assert files_found(shards) >= {("files.inside", INDEX), ("files.inside", "vocab.txt")}


def test_a_pickle_is_known_by_its_content(shards):
    """A torch file is a zip, whatever it is called."""
    torch.save({"a": torch.ones(2)}, shards / "notes.dat")
    assert files_found(shards) == {("files.pickle", "notes.dat")}


# -- what is measured --------------------------------------------------------------------------------------------------


def packed(quantized: QuantizedTensor) -> Packed:
    shape = (quantized.codes.shape[0], quantized.codes.shape[1])
    return Packed(pack_codes(quantized.codes, quantized.spec.bits), quantized.scales, None, quantized.spec, shape)


def weight(rows: int = 256, columns: int = 512) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("group", [32, None])
def test_rounding_costs_one_unit_of_noise(bits, group):
    """The unit is the error of rounding to the grid that just holds the largest weight: uniform, step^2 / 12."""
    quantized = round_to_nearest(weight(), QuantSpec(bits, group), search=False, dtype=torch.float32)
    near = measure_nearness(packed(quantized), weight())
    assert near.noise == pytest.approx(1.0, abs=0.03)
    assert near.offset == pytest.approx(0.0, abs=0.01)
    assert (near.over, near.far) == (0.0, 0.0)


def test_correlation_and_noise_follow_their_definitions():
    """Against float64 over the whole matrix at once."""
    spec = QuantSpec(4, 32)
    quantized = round_to_nearest(weight(), spec, dtype=torch.bfloat16)
    near = measure_nearness(packed(quantized), weight())
    ours, theirs = quantized.dequantize().double(), weight().double()
    assert near.correlation == pytest.approx(float((ours * theirs).sum() / (ours.norm() * theirs.norm())), rel=1e-6)
    groups = theirs.unflatten(1, (-1, 32))
    step = torch.maximum(-groups.amin(-1) / 8, groups.amax(-1) / 7)
    unit = (32 * step.square().sum() / 12).sqrt()
    assert near.noise == pytest.approx(float((ours - theirs).norm() / unit), rel=1e-6)


def test_scales_of_the_next_group_spread_the_gains():
    """Codes are right, so correlation stays high: the spread of gains and steps beyond the largest weight tell."""
    quantized = round_to_nearest(weight(), QuantSpec(4, 32), dtype=torch.float32)
    rolled = QuantizedTensor(quantized.codes, quantized.scales.roll(1, 1), None, quantized.spec)
    good, bad = measure_nearness(packed(quantized), weight()), measure_nearness(packed(rolled), weight())
    assert good.complaint(4, trained=False) is None
    assert bad.correlation > 0.9
    assert bad.complaint(4, trained=False).about == "scales"
    assert good.spread < 0.02 < 0.15 < bad.spread


def test_one_scale_out_of_thousands_is_noticed():
    """A tenfold scale of a single group hardly moves any figure of the whole weight."""
    quantized = round_to_nearest(weight(), QuantSpec(4, 32), dtype=torch.float32)
    scales = quantized.scales.clone()
    scales[17, 3] *= 10
    near = measure_nearness(packed(QuantizedTensor(quantized.codes, scales, None, quantized.spec)), weight())
    assert near.far == 1 / scales.numel()
    assert near.complaint(4, trained=False).about == "scales"


def test_zeros_of_a_pruned_weight_do_not_count():
    """With half of the weights zero the rest is as near as before."""
    dense = weight()
    kept = dense.abs() > dense.abs().median()
    quantized = round_to_nearest(dense * kept, QuantSpec(4, 32), dtype=torch.float32)
    share = float((dense * kept).norm() / dense.norm())  # what is left of the weight correlates by its share
    assert measure_nearness(packed(quantized), dense).correlation == pytest.approx(share, abs=0.005)
    assert measure_nearness(packed(quantized), dense, pruned=True).correlation > 0.99


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("search", [False, True])
def test_codes_of_every_width_reach_the_ends_of_their_grid(bits, search):
    """Codes that were made for one bit fewer do not."""
    shape = torch.tensor([256, 512])
    quantized = round_to_nearest(weight(), QuantSpec(bits, 64), search=search, dtype=torch.bfloat16)
    assert list(packed_failures("w", packed(quantized), shape)) == []
    if bits in (4, 3):
        fewer = round_to_nearest(weight(), QuantSpec(bits - 1, 64), search=search, dtype=torch.bfloat16)
        coarse = packed(QuantizedTensor(fewer.codes, fewer.scales, None, quantized.spec))
        [finding] = packed_failures("w", coarse, shape)
        assert (finding.rule, finding.where) == ("values.codes", "w.weight_packed")


def test_bits_after_the_end_of_a_row_must_be_zero():
    """A row of 36 codes of 4 bits leaves half a word."""
    spec = QuantSpec(4, None)
    quantized = round_to_nearest(weight(8, 36), spec, dtype=torch.bfloat16)
    whole = packed(quantized)
    assert list(packed_failures("w", whole, torch.tensor([8, 36]))) == []
    whole.words[3, -1] |= 1 << 20
    assert [f.rule for f in packed_failures("w", whole, torch.tensor([8, 36]))] == ["values.codes"]


# -- config, history ---------------------------------------------------------------------------------------------------


def claims(**changes):
    group = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64, "dynamic": False}
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": group | changes}},
            "ignore": ["lm_head", "re:.*mlp\\.gate$"],
        }
    }


def test_claims_are_read_as_loaders_read_them():
    """Exact names, or patterns from the beginning of the name."""
    read = read_claims(claims())
    assert read.spec_of("model.layers.0.mlp.gate_proj") == QuantSpec(4, 64)
    assert read.spec_of("lm_head") is None
    assert read.spec_of("model.layers.3.mlp.gate") is None
    assert read.spec_of("my.lm_head") == QuantSpec(4, 64)
    assert read_claims({}).spec_of("model.layers.0.mlp.gate_proj") is None


@pytest.mark.parametrize(
    "changes",
    [{"num_bits": 5}, {"strategy": "channel"}, {"group_size": None}, {"actorder": "group"}, {"type": "float"}],
)
def test_a_scheme_that_the_format_does_not_have_is_refused(changes):
    """Bits, group and strategy that contradict each other, activation order, floats."""
    with pytest.raises(BadScheme, match="group_0"):
        read_claims(claims(**changes))


@pytest.mark.parametrize(("factor", "rules"), [(1, set()), (2, {"tensors.tied"})])
def test_a_tied_head_may_be_stored_again_if_it_is_the_same(factor, rules, exports, tmp_path):
    """Loaders drop one of the two: it matters only where they differ."""
    _, folder, _ = exports("llama", "dense")
    link_copy(folder, tmp_path / "copy")
    artefact = Artefact(tmp_path / "copy")
    artefact.write({"lm_head.weight": artefact.read("model.embed_tokens.weight") * factor})
    assert {finding.rule for finding in failing(tmp_path / "copy")} == rules


def test_code_that_the_tokenizer_asks_for_is_refused(exports, tmp_path):
    """As that of config.json; the file is named."""
    _, folder, _ = exports("llama", "dense")
    link_copy(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}
    path.unlink()
    path.write_text(json.dumps(settings))
    assert [(f.rule, f.where) for f in failing(tmp_path / "copy")] == [("config.code", "tokenizer_config.json")]


def row(name, action, reason="", **more):
    return {"name": name, "action": action, "reason": reason, "bits": 16, "group_size": None, **more}


def test_a_history_puts_ledgers_together():
    """Experts that were cut twice are counted from the source; pruned weights stay pruned through training."""
    cut = [{"weights": [], "blocks": [{"index": 2, "kept_experts": kept}]} for kept in ([1, 3, 5, 7], [0, 2])]
    masked = {"weights": [row("a", "pruned", "2 of 4 kept"), row("b", "pruned", "50% of each row zero")]}
    trained = {"weights": [row("a.weight", "trained"), row("n.weight", "trained")]}
    packed = {"weights": [row("a", "quantized", bits=4, group_size=64)]}
    history = read_history([*cut, masked, trained, packed])
    assert history.kept_experts == {2: (1, 5)}
    assert history.sparsity("a") == Sparsity(kept=2, group=4)
    assert history.sparsity("b") == Sparsity(share=0.5)
    assert history.trained == {"a", "n"}
    assert history.quantized == {"a": (4, 64)}
    assert not read_history(None).known


def test_long_lists_of_failures_are_cut():
    """The last line says how many more there are."""
    found = settled({"r": "holds", "s": "holds too"}, [failed("r", f"t{i}", "broken") for i in range(50)])
    assert [f.status for f in found] == ["fail"] * (MOST_SHOWN + 1) + ["pass"]
    assert found[MOST_SHOWN].text == f"and {50 - MOST_SHOWN} more like the ones before"


# -- smoke -------------------------------------------------------------------------------------------------------------


def test_a_healthy_export_passes_the_smoke_test(exports):
    """Two windows of 64 tokens, exact arithmetic."""
    source, folder, _ = exports("qwen3_moe", "gptq int4")
    assert {f.status for f in smoke(folder, source, tiny_ids(2, 64))} == {"pass"}


@pytest.mark.parametrize(
    ("value", "rule"), [(float("nan"), "smoke.finite"), (40.0, "smoke.kl")], ids=["a NaN", "a huge norm"]
)
def test_the_smoke_test_notices_what_computes_nonsense(value, rule, exports, tmp_path):
    """A NaN in a norm; a final norm that makes every prediction certain."""
    source, folder, _ = exports("llama", "dense")
    link_copy(folder, tmp_path / "copy")
    shard = next(p for p in (tmp_path / "copy").glob("*.safetensors") if "model.norm.weight" in load_file(p))
    tensors = load_file(shard)
    name = "model.layers.0.input_layernorm.weight" if value != value else "model.norm.weight"
    shard = next(p for p in (tmp_path / "copy").glob("*.safetensors") if name in load_file(p))
    tensors = load_file(shard)
    tensors[name] = torch.full_like(tensors[name], value)
    shard.unlink()
    save_file(tensors, shard, metadata={"format": "pt"})
    assert [f.rule for f in smoke(tmp_path / "copy", source, tiny_ids(2, 64)) if f.status == "fail"] == [rule]
