"""Every planted corruption is caught by a rule that names what was broken; the original stays as it was."""

from pathlib import Path

import pytest

from compressor.errors import IntegrityError
from compressor.gates.faults import FAULTS, DoesNotApply, self_test
from compressor.gates.faults.files import link_copy
from compressor.gates.faults.weights import WEIGHT_FAULTS
from compressor.gates.structure import check_structure
from compressor.passes import Quantize
from tests.gates.structure_exports import export, one_thread, tiny_source

# What is told from the figures of a weight, which depend on its bits
ON_THE_GRID = (
    "swapped_gate_up", "rotary_permutation", "reversed_codes", "shifted_codes", "rolled_scales", "foreign_scales",
    "transposed_weight", "stale_shard", "coarse_shard", "permuted_experts", "random_experts", "dropped_expert",
    "absurd_expert_scale", "other_bits_expert", "mixed_expert_schemes", "unquantized_layer",
)  # fmt: skip
# Faults that are planted, and those of them that this artefact has nothing for
ARTEFACTS = {
    "llama int4 gptq, one file": (WEIGHT_FAULTS, set()),
    "moe int4 rtn, shards, tied": (FAULTS, {"random_head"}),
    "moe int8 gptq, one file": (ON_THE_GRID, set()),
}
CASES = [(artefact, fault) for artefact, (faults, _) in ARTEFACTS.items() for fault in faults]


@pytest.fixture(scope="module", autouse=True)
def quick():
    """See `one_thread`."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    """By name: the exported folder, its ledgers, its source."""
    root = tmp_path_factory.mktemp("faults")
    llama = tiny_source(root / "llama", "llama")
    tied = tiny_source(root / "tied", "qwen3_moe", tie_word_embeddings=True)
    moe = tiny_source(root / "moe", "qwen3_moe")
    int4 = {"bits": 4, "group_size": 32}
    made = [
        (llama, Quantize(method="gptq", **int4), 10**9),
        (tied, Quantize(method="rtn", scale_search="mse", **int4), 60_000),
        (moe, Quantize(method="gptq", bits=8, group_size="channel"), 10**9),
    ]
    return {
        name: (*export(source, [step], root / f"export-{i}", shard_bytes=shard), source)
        for i, (name, (source, step, shard)) in enumerate(zip(ARTEFACTS, made, strict=True))
    }


@pytest.fixture(scope="module")
def trials(artefacts):
    """Outcomes by artefact and fault, and the artefacts' bytes before and after."""
    outcomes = {}
    for name, (folder, ledgers, source) in artefacts.items():
        before = contents(folder)
        tried = self_test(folder, source, ledgers=ledgers, faults=ARTEFACTS[name][0])
        outcomes[name] = {trial.fault: trial for trial in tried}
        assert contents(folder) == before, "a fault was written through a hard link"
    return outcomes


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(("artefact", "fault"), CASES)
def test_a_fault_is_caught_and_named(artefact, fault, trials):
    """A failing rule names the tensor or file that was broken, and no finding names anything else."""
    trial = trials[artefact][fault]
    if fault in ARTEFACTS[artefact][1]:
        assert trial.caught is None, trial
        assert trial.text.startswith("not tried: ")
    else:
        assert trial.caught, trial
        assert trial.named in trial.text or trial.named.rpartition(".")[0] in trial.text
        assert trial.elsewhere == (), trial


def test_there_are_as_many_faults_as_the_gate_promises():
    """At least 20 of them, each with a sentence of its own."""
    assert len(FAULTS) >= 22
    assert len({fault.text for fault in FAULTS.values()}) == len(FAULTS)


def test_without_a_baseline_what_is_wrong_in_itself_is_caught(artefacts):
    """Other faults are not tried, and say what they need."""
    folder, _, _ = artefacts["moe int4 rtn, shards, tied"]
    for trial in self_test(folder):
        needs = FAULTS[trial.fault].needs
        if needs:
            assert (trial.caught, trial.text) == (None, f"not tried: needs {', '.join(needs)}")
        else:
            assert trial.caught, trial


@pytest.mark.parametrize("fault", ["stale_shard", "random_experts", "nan_norm"])
def test_the_seed_decides_what_is_planted(fault, artefacts, tmp_path):
    """The same bytes for the same seed, others for another one."""
    folder, _, _ = artefacts["moe int8 gptq, one file"]
    planted = []
    for i, seed in enumerate((3, 3, 5)):
        link_copy(folder, tmp_path / f"{i}")
        FAULTS[fault].inject(tmp_path / f"{i}", seed)
        planted.append(contents(tmp_path / f"{i}"))
    assert planted[0] == planted[1]
    assert planted[0] != planted[2]


def test_a_fault_of_experts_does_not_apply_to_a_dense_model(artefacts, tmp_path):
    """The message says what is missing, and nothing is changed."""
    folder, _, _ = artefacts["llama int4 gptq, one file"]
    link_copy(folder, tmp_path / "copy")
    with pytest.raises(DoesNotApply, match="no experts"):
        FAULTS["nan_expert_scale"].inject(tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(folder)


def test_an_artefact_that_is_broken_already_proves_nothing(artefacts, tmp_path):
    """Every fault would count as caught; the rule that fails is named instead."""
    folder, _, source = artefacts["llama int4 gptq, one file"]
    link_copy(folder, tmp_path / "copy")
    (tmp_path / "copy" / "chat_template.jinja").unlink()
    with pytest.raises(IntegrityError, match=r"not healthy itself: tokenizer\.template"):
        self_test(tmp_path / "copy", source)


def test_a_finding_says_what_a_weight_holds_instead(artefacts, tmp_path):
    """Exchanged projections are told from weights that are merely wrong."""
    folder, ledgers, source = artefacts["moe int8 gptq, one file"]
    link_copy(folder, tmp_path / "copy")
    injected = FAULTS["swapped_gate_up"].inject(tmp_path / "copy", 0)
    gate, up = injected.named
    found = {f.where: f.text for f in check_structure(tmp_path / "copy", source, ledgers=ledgers) if f.status == "fail"}
    assert found[f"{gate}.weight_packed"].endswith(f"it holds the baseline's {up}")
    assert found[f"{up}.weight_packed"].endswith(f"it holds the baseline's {gate}")
    assert len(found) == 2
