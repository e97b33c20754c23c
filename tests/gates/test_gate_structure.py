"""Structural rules: silent on healthy exports of every kind, and right about what they measure."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.errors import EnvironmentProblem, IntegrityError
from compressor.gates.faults.artefact import Artefact
from compressor.gates.faults.files import link_copy
from compressor.gates.structure import check_structure, smoke
from compressor.gates.structure.history import read_history
from compressor.passes import Distill, Prune, Quantize
from tests.gates.structure_exports import export, one_thread, tiny_source
from tests.tiny_models import tiny_ids

RTN = {"method": "rtn", "scale_search": "mse"}
INT4 = {"bits": 4, "group_size": 32}
EXPERTS = Prune(structure="experts", ratio=0.25)


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
