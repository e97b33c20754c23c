"""`compress gate` on finished runs and bare models of two layers."""

import json
import math
import shutil

import pytest
import yaml

from compressor.errors import IntegrityError, RecipeError
from compressor.gates import Policy
from compressor.pipeline import gate, run
from compressor.recipe import Evaluate
from tests.tiny_models import save_tiny

EASY = Policy(perplexity_ratio={"max": 3}, tasks={"margin": 0.9})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A dense model, its int8 and its 2-bit run, and the section that measured them."""
    root = tmp_path_factory.mktemp("gating")
    model = save_tiny(root / "dense", "qwen3_moe")
    text = root / "text.txt"
    text.write_text("A small text that is long enough for a few windows of bytes. " * 40)
    questions = root / "questions.jsonl"
    lines = [{"query": f"{n} and {n + 1} and", "choices": [str(n + 2), str(n)], "gold": n % 2} for n in range(40)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluate = {
        "text": {"small": str(text)},
        "windows": 4,
        "length": 64,
        "latency": False,
        "tasks": [{"name": "counting", "kind": "multiple_choice", "data": str(questions)}],
    }
    runs = {}
    for bits in (8, 2):
        recipe = {
            "model": str(model),
            "passes": [{"quantize": {"bits": bits, "group_size": 32, "method": "rtn"}}],
            "evaluate": evaluate,
        }
        path = root / f"int{bits}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        runs[bits] = run(path, root / f"int{bits}").out
    return {"dense": model, "evaluate": Evaluate.model_validate(evaluate), **runs}


def test_a_run_is_held_against_the_model_it_started_from(world):
    """Without --baseline; structure first, then fidelity, then tasks."""
    result = gate(world[8], None, EASY)
    assert (result.status, result.exit_code) == ("pass", 0)
    groups = [check.group for check in result.verdict.checks]
    assert groups == sorted(groups, key=["structure", "fidelity", "tasks"].index)
    assert result.baselines == (str(world["dense"]),)


def test_two_runs_pair_without_a_model(world, tmp_path):
    """The records are enough: the ratio is the mean difference of the windows' NLL, whatever became of the weights."""
    nll = {}
    for bits in (8, 2):
        shutil.copytree(world[bits], tmp_path / str(bits), ignore=shutil.ignore_patterns("work"))
        lines = (world[bits] / "items" / "quantize.jsonl").read_text().splitlines()
        nll[bits] = [line["nll"] for line in map(json.loads, lines) if "window" in line]
    result = gate(tmp_path / "2", tmp_path / "8", Policy(perplexity_ratio={"max": 1.0001}))
    [check] = [check for check in result.verdict.checks if check.metric == "perplexity_ratio"]
    expected = math.exp(sum(nll[2]) / len(nll[2]) - sum(nll[8]) / len(nll[8]))
    assert check.value == pytest.approx(expected, rel=1e-9)


def test_a_bare_model_and_a_run_give_the_same_figures(world):
    """Measured here or read from the run's records: the same perplexity ratio."""
    policy = Policy(perplexity_ratio={"max": 3})
    stored = gate(world[8], world["dense"], policy)
    measured = gate(world[8] / "model", world["dense"], policy, evaluate=world["evaluate"])
    values = [
        next(check.value for check in result.verdict.checks if check.metric == "perplexity_ratio")
        for result in (stored, measured)
    ]
    assert values[1] == pytest.approx(values[0], rel=1e-6)


def test_several_baselines_are_each_compared(world):
    """The original for recovery, the accepted run for regression; bytes are about the first only."""
    policy = Policy(perplexity_ratio={"max": 3}, weight_bytes_ratio={"max": 0.9}, tasks={"margin": 0.9})
    result = gate(world[8], [world["dense"], world[8]], policy)
    compared = [(check.metric, check.baseline) for check in result.verdict.checks if check.group != "structure"]
    first, second = str(world["dense"]), str(world[8])
    assert compared == [
        ("weight_bytes_ratio", first),
        ("perplexity_ratio", first),
        ("score_drop", first),
        ("perplexity_ratio", second),
        ("score_drop", second),
    ]


def test_a_damaged_artefact_ends_the_gate_before_any_evaluation(world, tmp_path):
    """Exit 4, the file named, and no task compared."""
    damaged = tmp_path / "model"
    shutil.copytree(world[8] / "model", damaged)
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"norm_topk_prob": not config["norm_topk_prob"]}))
    result = gate(damaged, world["dense"], EASY, evaluate=world["evaluate"])
    assert result.exit_code == 4
    failed = [check for check in result.verdict.checks if check.status == "fail"]
    assert any("norm_topk_prob" in check.text for check in failed)
    assert {check.group for check in result.verdict.checks} == {"structure"}


def test_a_file_changed_after_the_run_is_an_integrity_error(world, tmp_path):
    """One byte of the report, and the manifest says so."""
    copy = tmp_path / "copy"
    shutil.copytree(world[8], copy)
    (copy / "report.md").write_text((copy / "report.md").read_text() + " ")
    with pytest.raises(IntegrityError, match=r"report\.md"):
        gate(copy, None, EASY)


def test_a_model_needs_a_baseline(world):
    """Nothing says what it came from."""
    with pytest.raises(RecipeError, match="--baseline"):
        gate(world["dense"], None, EASY)


@pytest.mark.parametrize(("on_inconclusive", "exit_code"), [("fail", 2), ("warn", 0), ("pass", 0)])
def test_what_inconclusive_means_is_the_users_choice(world, on_inconclusive, exit_code):
    """The speed was not measured, so nothing decides."""
    policy = Policy(decode_latency_ratio={"max": 1.5})
    assert gate(world[8], None, policy, on_inconclusive=on_inconclusive).exit_code == exit_code


def test_the_policy_travels_with_the_result_by_its_hash(world):
    """So that bars cannot move after the run: another margin is another hash."""
    one, other = (gate(world[8], None, Policy(tasks={"margin": m})).to_json()["policy_sha256"] for m in (0.8, 0.9))
    assert one != other
