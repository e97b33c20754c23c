"""Everything that `evaluate` can ask, of a model against itself: nothing may have moved."""

import json

import pytest

import compressor as cx
from compressor.errors import RecipeError
from compressor.pipeline import run


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
    """All sections of `evaluate`, on small files."""
    root = tmp_path_factory.mktemp("suite")
    (root / "play.txt").write_text("to be or not to be, that is the question. " * 60)
    (root / "code.txt").write_text("def f(x): return {x: [x] for x in range(10)}  # no play\n" * 60)
    lines = [{"query": f"{n} and {n + 1} and", "choices": [str(n + 2), str(n)], "gold": n % 2} for n in range(12)]
    (root / "count.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "pairs.csv").write_text("sent_more,sent_less,bias_type\n" + "He is a nurse,She is a nurse,gender\n" * 4)
    return {
        "text": {"play": str(root / "play.txt")},
        "windows": 4,
        "length": 48,
        "latency": False,
        "tasks": [
            {"name": "count", "kind": "multiple_choice", "data": str(root / "count.jsonl")},
            {"name": "crows", "kind": "crows_pairs", "data": str(root / "pairs.csv")},
        ],
        "robustness": {"tasks": ["count"], "variants": ["typos"]},
        "ood": {"text": {"code": str(root / "code.txt")}},
        "bias": {"templates": "demo"},
        "generation": {"text": str(root / "play.txt"), "prompts": 2, "prompt_tokens": 8, "max_new_tokens": 4},
        "refusals": {"prompts": "demo", "max_new_tokens": 2},
    }


@pytest.fixture(scope="module")
def behaviour(sections, moe_folder):
    """The behaviour of a model against itself."""
    evaluate = cx.Evaluate.model_validate(sections)
    return cx.measure(str(moe_folder), evaluate=evaluate, baseline=str(moe_folder))["behaviour"]


def test_no_answer_flips(behaviour):
    """Twelve questions, and the preferences are no answers."""
    counts = {"right_to_wrong": 0, "wrong_to_right": 0, "wrong_to_other": 0, "within_noise": 0}
    assert behaviour["flips"]["count"] == counts | {"n": 12}
    assert "crows" not in behaviour["flips"]


def test_perturbed_prompts_cost_both_the_same(behaviour):
    """The gap to the baseline is zero."""
    assert behaviour["robustness"]["count"]["typos"]["value"] == 0


def test_writing_is_the_same(behaviour):
    """All greedy continuations are identical."""
    assert behaviour["generation"]["change"]["identical"]["value"] == 1


def test_foreign_text_is_as_foreign_as_before(behaviour):
    """Detection does not change; without any KL there is no ratio, and the reason says so."""
    text = json.dumps(behaviour["ood"])
    assert "code" in text
    assert "nothing to divide by" in text


def test_people_are_treated_as_before(behaviour):
    """Templates and stereotype pairs stand side by side."""
    assert behaviour["bias"].keys() >= {"templates", "preference"}


def test_refusals_are_counted(behaviour):
    """A random model refuses nothing."""
    assert behaviour["refusals"]["should_refuse"]["value"] == 0


def test_a_run_keeps_all_of_it(sections, moe_folder, tmp_path):
    """Through the journal and the report, with the items of every task."""
    recipe = {
        "model": str(moe_folder), "evaluate": sections,
        "passes": [{"quantize": {"bits": 8, "group_size": 32, "method": "rtn"}}],
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    result = run(path, tmp_path / "out")
    behaviour = result.report.steps[-1].measurement.to_json()["behaviour"]
    assert behaviour.keys() >= {"flips", "robustness", "ood", "bias", "generation", "refusals", "calibration", "slices"}
    lines = (tmp_path / "out" / "items" / "quantize.jsonl").read_text().splitlines()
    tasks = [line.get("task") for line in map(json.loads, lines)]
    assert (tasks.count("count"), tasks.count("crows"), tasks.count("refusals")) == (24, 4, 24)


def test_a_text_is_own_or_foreign(sections, moe_folder):
    """One name in both would mix their windows."""
    evaluate = cx.Evaluate.model_validate(sections | {"ood": {"text": {"play": sections["text"]["play"]}}})
    with pytest.raises(RecipeError, match="play"):
        cx.measure(str(moe_folder), evaluate=evaluate)
