"""Whole runs on tiny models: what is in the folder, what survives a kill, what is refused before any work."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compressor.checkpoint import CheckpointReader
from compressor.errors import IntegrityError, RecipeError, UnsupportedModel
from compressor.exporters import verify_manifest
from compressor.pipeline import run
from compressor.recipe import load_recipe

INT4 = {"quantize": {"bits": 4, "group_size": 32}}

# Runs a recipe and kills itself, without any chance to clean up, when the journal gets its nth line of a kind.
KILLED = """
import os, signal, sys
from compressor.checkpoint import Journal
recipe, out, kind, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
append, seen = Journal.append, []
def dying(self, what, **fields):
    if what == kind:
        seen.append(what)
        if len(seen) == count:
            os.kill(os.getpid(), signal.SIGKILL)
    return append(self, what, **fields)
Journal.append = dying
from compressor.pipeline import run
run(recipe, out)
"""


def kill_at(recipe: Path, out: Path, kind: str, count: int) -> int:
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", KILLED, str(recipe), str(out), kind, str(count)]
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode


def model_bytes(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((out / "model").iterdir())}


@pytest.fixture(scope="module")
def finished(moe_folder, tmp_path_factory):
    """One finished run: its recipe, its folder, its result."""
    root = tmp_path_factory.mktemp("finished")
    text = root / "text.txt"
    text.write_text("A small text that is long enough for a few windows of bytes. " * 40)
    evaluate = {
        "text": {"small": str(text)},
        "windows": 4,
        "length": 64,
        "latency": {"batch": [1], "prompt": 8, "generate": 4},
    }
    recipe = root / "recipe.yaml"
    recipe.write_text(
        json.dumps({
            "model": str(moe_folder), "calibration": {"data": str(text), "samples": 8, "length": 64},
            "passes": [INT4], "evaluate": evaluate, "gate": {"weight_bytes_ratio": {"max": 0.9}},
        })
    )  # fmt: skip
    return recipe, root / "out", run(recipe, root / "out")


def test_a_run_leaves_what_the_contract_lists(finished):
    """Every file of design section 5 is there, and the manifest covers all of them."""
    _, out, result = finished
    names = {path.name for path in out.iterdir()}
    assert {"model", "report.json", "report.md", "items", "manifest.json", "recipe.yaml", "README.md"} <= names
    assert result.exit_code == 0
    assert set(verify_manifest(out)["files"]) >= {"report.json", "model/config.json", "items/quantize.jsonl"}


def test_the_ledger_accounts_for_every_parameter(finished, moe_folder):
    """Rows add up to the parameters of the checkpoint."""
    reader = CheckpointReader(moe_folder)
    total = sum(torch.Size(reader.shape(key)).numel() for key in reader.keys())  # noqa: SIM118
    assert finished[2].report.steps[0].ledger.accounted()[0] == total


def test_the_report_reads_back(finished):
    """report.json is the report."""
    _, out, result = finished
    data = json.loads((out / "report.json").read_text())
    assert data["schema"] == "compressor.report/1"
    assert data["steps"][0]["measurement"]["accuracy"]["kl_mean"]["value"] > 0
    assert data["steps"][0]["measurement"]["latency"]["decode_ms_per_token"]["1"]["value"] > 0
    assert type(result.report).load(out / "report.json").to_json() == data


def test_running_again_changes_nothing(finished):
    """A finished run is not repeated."""
    recipe, out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "lock"}
    run(recipe, out)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("block", 2),
        pytest.param("block", 1, marks=pytest.mark.slow),
        pytest.param("step", 1, marks=pytest.mark.slow),
        pytest.param("export", 1, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_continues_with_the_same_bytes(kind, count, moe_folder, recipe_file, tmp_path):
    """kill -9 before a journal line; afterwards at most one block is computed twice and model/ is identical."""
    recipe = recipe_file(moe_folder, [INT4])
    run(recipe, tmp_path / "unbroken")
    assert kill_at(recipe, tmp_path / "killed", kind, count) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "report.json").exists()
    run(recipe, tmp_path / "killed")
    lines = [json.loads(line) for line in (tmp_path / "killed" / "work" / "journal.jsonl").read_text().splitlines()]
    assert [line["block"] for line in lines if line["kind"] == "block"] == [0, 1]
    assert model_bytes(tmp_path / "killed") == model_bytes(tmp_path / "unbroken")


def test_all_three_kinds_of_pass_in_one_run(moe_folder, recipe_file, tmp_path):
    """Experts go, distillation follows, int4 closes; stock transformers loads what is left."""
    passes = [
        {"prune": {"structure": "experts", "ratio": 0.25}},
        {"distill": {"data": str(tmp_path / "text.txt"), "tokens": 1024, "length": 64, "batch_tokens": 256}},
        INT4,
    ]
    result = run(recipe_file(moe_folder, passes), tmp_path / "out")
    assert [step.name for step in result.report.steps] == ["prune", "distill", "quantize"]
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert loaded.config.num_experts == 6
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert (config["num_experts"], config["num_local_experts"]) == (6, 6)


def test_a_dense_export_has_the_names_of_its_source(llama_folder, recipe_file, tmp_path):
    """Unquantized weights keep names, dtypes and, where no pass touched them, values."""
    run(recipe_file(llama_folder, [{"prune": {"structure": "2:4"}}]), tmp_path / "out")
    source = load_file(llama_folder / "model.safetensors")
    written = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert written.keys() == source.keys()
    assert torch.equal(written["model.embed_tokens.weight"], source["model.embed_tokens.weight"])
    mask = written["model.layers.1.mlp.down_proj.weight"] == 0
    assert (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()


def test_shards_hold_what_was_asked(moe_folder, recipe_file, tmp_path):
    """Small shards give several files and an index, and load as one checkpoint."""
    out = tmp_path / "out"
    run(recipe_file(moe_folder, [INT4], export=[{"safetensors": {"shard": "40kB"}}]), out)
    assert (out / "model" / "model.safetensors.index.json").exists()
    assert len(list((out / "model").glob("*.safetensors"))) > 2


@pytest.mark.parametrize(
    ("passes", "sections", "error", "message"),
    [
        ([INT4, {"prune": {"structure": "2:4"}}], {}, RecipeError, "put 'quantize' last"),
        (
            [{"quantize": {"symmetric": False, "ignore": ["lm_head", "mlp.experts"]}}],
            {},
            UnsupportedModel,
            "zero points",
        ),
        ([{"quantize": {"ignore": ["lm_head", "mlp.experts"]}}], {}, UnsupportedModel, "would stay dense"),
        ([{"prune": {"structure": "experts", "ratio": 0.9}}], {}, UnsupportedModel, "routed to 2"),
        ([{"quantize": {"ignore": ["lm_head", "q_prjo"]}}], {}, RecipeError, "q_prjo"),
        ([INT4], {"memory": "100MB"}, Exception, "memory"),
        ([INT4], {"calibration": {"data": "nowhere.txt"}}, RecipeError, "nowhere.txt"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    passes, sections, error, message, moe_folder, recipe_file, tmp_path
):
    """No folder appears, and the error names the key or the file."""
    with pytest.raises(error, match=message):
        run(recipe_file(moe_folder, passes, **sections), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_else_is_left_alone(moe_folder, recipe_file, tmp_path):
    """An existing folder that no run made is refused."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(RecipeError, match="was not made by a run"):
        run(recipe_file(moe_folder, [INT4]), tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"


def test_another_recipe_does_not_continue_this_run(moe_folder, recipe_file, tmp_path):
    """The journal's key differs: the error names --fresh, and --fresh starts over."""
    run(recipe_file(moe_folder, [INT4]), tmp_path / "out")
    other = recipe_file(moe_folder, [{"quantize": {"bits": 8, "group_size": "channel"}}])
    with pytest.raises(RecipeError, match="--fresh"):
        run(other, tmp_path / "out")
    assert run(other, tmp_path / "out", fresh=True).report.steps[0].options["bits"] == 8


def test_a_truncated_shard_is_an_integrity_error(moe_folder, recipe_file, tmp_path):
    """Half a file is named, and nothing that looks complete is left."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in moe_folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        run(recipe_file(broken, [INT4]), tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()


def test_an_export_that_differs_is_never_published(moe_folder, recipe_file, tmp_path, monkeypatch):
    """One wrong scale in the file: exit code 4, no model/."""
    from compressor.exporters import safetensors as exporter

    packed_tensors = exporter.packed_tensors

    def corrupt(name, quantized):
        tensors = packed_tensors(name, quantized)
        if name.endswith("layers.1.self_attn.q_proj"):
            tensors[f"{name}.weight_scale"] = tensors[f"{name}.weight_scale"] * 1.5
        return tensors

    monkeypatch.setattr(exporter, "packed_tensors", corrupt)
    with pytest.raises(IntegrityError, match="logits differ") as caught:
        run(recipe_file(moe_folder, [INT4]), tmp_path / "out")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out" / "model").exists()


def test_memory_only_between_passes_when_asked(moe_folder, recipe_file, tmp_path):
    """`when: end` measures accuracy after the last pass alone, and says so in the others."""
    recipe = recipe_file(moe_folder, [{"prune": {"structure": "2:4"}}, INT4])
    loaded = load_recipe(recipe, ["evaluate.when=end"])
    steps = run(loaded, tmp_path / "out").report.to_json()["steps"]
    assert steps[0]["measurement"]["accuracy"]["perplexity"] is None
    assert "end" in steps[0]["measurement"]["accuracy"]["perplexity_reason"]
    assert steps[1]["measurement"]["accuracy"]["perplexity"]["beer"]["value"] > 1
