"""Sweeps on tiny models: which runs they are made of, what is refused, what is run again, what is compared."""

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml

from compressor.errors import RecipeError
from compressor.pipeline import sweeping
from compressor.pipeline.sweep_plan import plan_sweep, split_values
from compressor.pipeline.sweeping import sweep

PRUNE = {"prune": {"structure": "unstructured", "ratio": 0.3, "score": "magnitude"}}
QUANTIZE = {"quantize": {"method": "rtn", "scale_search": "minmax", "bits": 4, "group_size": 32}}


def written(folder: Path, model: Path, passes: list, windows: int = 4) -> Path:
    """A recipe without export and speed: a run takes a second."""
    text = folder / "text.txt"
    text.write_text("".join(f"{n} bottles of beer on the wall, {n} bottles of beer. " for n in range(200)))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump({
            "model": str(model), "calibration": {"data": str(text), "samples": 8, "length": 64}, "passes": passes,
            "evaluate": {"text": {"beer": str(text)}, "windows": windows, "length": 64, "latency": False}, "export": [],
        })
    )  # fmt: skip
    return recipe


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def swept(llama_folder, tmp_path_factory):
    """4 and 8 bits on a model that is there and one that is not: recipe, options, folder, result."""
    folder = tmp_path_factory.mktemp("swept")
    recipe = written(folder, llama_folder, [QUANTIZE])
    options = {"vary": ["quantize.bits=4,8", f"model={llama_folder},{folder / 'missing'}"]}
    return recipe, options, folder / "out", sweep(recipe, folder / "out", **options)


@pytest.fixture(scope="module")
def ablated(llama_folder, tmp_path_factory):
    """Pruning and quantizing, with both, and without each."""
    folder = tmp_path_factory.mktemp("ablated")
    recipe = written(folder, llama_folder, [PRUNE, QUANTIZE])
    return folder / "out", sweep(recipe, folder / "out", ablate=True)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("2,3, 8", ["2", "3", "8"]),
        ("[1, 8],[1]", ["[1, 8]", "[1]"]),
        ("{max: 1, min: 0},null", ["{max: 1, min: 0}", "null"]),
        ("\"a,b\",'c,d'", ['"a,b"', "'c,d'"]),
        ("it's,2:4", ["it's", "2:4"]),
        ("4", ["4"]),
    ],
)
def test_values_are_split_outside_brackets_and_quotes(text, values):
    """As YAML would read them one by one."""
    assert split_values(text) == values


def test_several_vary_make_a_grid_with_seeds(tmp_path, llama_folder):
    """Two by three variants with two seeds each; folders say which, and are all different."""
    recipe = written(tmp_path, llama_folder, [QUANTIZE])
    plan = plan_sweep(recipe, vary=["quantize.bits=3,4", "quantize.group_size=32,64,channel"], seeds=[0, 7])
    assert [variant.name for variant in plan.variants][:2] == ["bits=3 group_size=32", "bits=3 group_size=64"]
    assert len(plan.variants) == 6
    runs = [one for variant in plan.variants for one in variant.runs]
    assert {(recipe.passes[0].bits, recipe.passes[0].group_size, recipe.seed) for recipe, _ in runs} == {
        (bits, group, seed) for bits in (3, 4) for group in (32, 64, "channel") for seed in (0, 7)
    }
    assert len({folder.lower() for _, folder in runs}) == 12
    assert runs[0][1] == "bits-3_group_size-32_seed-0"


def test_folder_names_stay_safe_and_different(tmp_path, llama_folder):
    """Values that differ only in what a folder name cannot hold get numbers; none leaves the sweep's folder."""
    recipe = written(tmp_path, llama_folder, [QUANTIZE])
    plan = plan_sweep(recipe, vary=["model=../a b,../a/b,.," + "x" * 300])
    folders = [folder for variant in plan.variants for _, folder in variant.runs]
    assert folders == ["model-..-a_b", "model-..-a-b", "model", f"model-{'x' * 74}"]
    plan = plan_sweep(recipe, vary=["model=a/b,a|b,A/B"])
    assert [folder for variant in plan.variants for _, folder in variant.runs] == [
        "model-a-b",
        "model-a-b-2",
        "model-A-B-3",
    ]


def test_all_that_is_misspelt_is_said_before_any_run(tmp_path, llama_folder):
    """Each wrong path with the nearest key, each wrong value, as --vary; nothing is written."""
    recipe = written(tmp_path, llama_folder, [QUANTIZE])
    with pytest.raises(RecipeError) as caught:
        sweep(recipe, tmp_path / "out", vary=["quantize.bots=3,4"])
    assert "--vary quantize.bots=3: quantize has no option 'bots'; did you mean 'bits'?" in str(caught.value)
    with pytest.raises(RecipeError, match=r"--vary quantize\.bits=5: .*\n.*--vary quantize\.bits=6: "):
        sweep(recipe, tmp_path / "out", vary=["quantize.bits=4,5,6"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing varies"),
        ({"vary": ["quantize.bits"]}, "write a path, = and values"),
        ({"vary": ["quantize.bits=3,,4"]}, "write a path, = and values"),
        ({"vary": ["quantize.bits=3,3"]}, "twice"),
        ({"vary": ["quantize.bits=3", "quantize.bits=4"]}, "given twice"),
        ({"vary": ["memory=16GB,16000MB"]}, "are the same recipe"),
        ({"vary": ["seed=1,2"], "seeds": [0]}, "both set the seed"),
        ({"vary": ["quantize.bits=3"], "seeds": [1, 1]}, "a seed is given twice"),
        ({"seeds": [-1, 0]}, "--seeds seed=-1"),
        ({"ablate": True}, "a single pass"),
    ],
)
def test_what_makes_no_sweep_is_refused(options, message, tmp_path, llama_folder):
    """Each with its own sentence."""
    with pytest.raises(RecipeError, match=message):
        plan_sweep(written(tmp_path, llama_folder, [QUANTIZE]), **options)


def test_ablation_leaves_out_one_pass_at_a_time(tmp_path, llama_folder):
    """What a setting of the missing pass would be makes no variant of its own."""
    recipe = written(tmp_path, llama_folder, [PRUNE, QUANTIZE])
    plan = plan_sweep(recipe, vary=["quantize.bits=4,8"], ablate=True)
    assert [variant.name for variant in plan.variants] == [
        "bits=4", "bits=4 without prune", "bits=4 without quantize", "bits=8", "bits=8 without prune",
    ]  # fmt: skip
    assert [len(variant.runs[0][0].passes) for variant in plan.variants] == [2, 1, 1, 2, 1]
    assert plan.pairs[-1] == ("bits=8", "quantize", "bits=4 without quantize")


def test_a_run_that_fails_is_recorded_and_the_others_go_on(swept):
    """Two runs of a model that is not there fail with their reason, and the exit code says so; two are ranked."""
    recipe, _, out, result = swept
    assert [variant.runs[0].weight_bytes is not None for variant in result.variants] == [True, True]
    assert {(failure.kind, failure.exit_code) for failure in result.failures} == {("UnsupportedModel", 3)}
    assert len(result.failures) == 2
    assert result.exit_code == 3
    assert "2 of 4 runs finished" in result.to_text()
    assert all(str(recipe.parent / "missing") in failure.message for failure in result.failures)
    assert json.loads((out / "sweep.json").read_text()) == result.to_json()


def test_more_bits_lose_less_and_take_more(swept):
    """8 bits are ranked first and told apart from 4; both are on the front, and drawn."""
    _, _, out, result = swept
    first, second = result.variants
    assert [first.settings[0], second.settings[0]] == ["quantize.bits=8", "quantize.bits=4"]
    assert (first.place.group, second.place.group) == (1, 2)
    assert first.weight_bytes > second.weight_bytes
    assert result.to_json()["pareto"]["dominated"] == {}
    circles = list(ElementTree.parse(out / "pareto.svg").iter("{http://www.w3.org/2000/svg}circle"))
    assert len(circles) == 2


def test_a_variant_is_an_ordinary_run(swept):
    """Its folder holds the report whose figures the sweep repeats, and its KL is the mean of its windows."""
    _, _, out, result = swept
    one = result.variants[0].runs[0]
    report = json.loads((out / one.folder / "report.json").read_text())
    last = report["steps"][-1]["measurement"]
    assert one.to_json()["kl_mean"] == last["accuracy"]["kl_mean"]
    assert one.weight_bytes == last["memory"]["weight_bytes"]
    assert result.variants[0].kl.value == pytest.approx(last["accuracy"]["kl_mean"]["value"], rel=1e-12)


def test_what_has_finished_is_not_run_again(swept, monkeypatch):
    """Only the runs that failed are tried, and the answer is the same."""
    recipe, options, out, result = swept
    tried = []

    def broken(one, *_, **__):
        tried.append(one.model)
        raise FileNotFoundError("a bug")

    monkeypatch.setattr(sweeping, "run", broken)
    again = sweep(recipe, out, **options)
    assert tried == [str(recipe.parent / "missing")] * 2
    assert again.to_json()["variants"] == result.to_json()["variants"]
    assert {(failure.kind, failure.exit_code) for failure in again.failures} == {("unexpected FileNotFoundError", 3)}


def test_an_interrupted_sweep_goes_on(swept, monkeypatch, tmp_path):
    """Ctrl-C in the second run: the next call runs that one, and the result is that of an unbroken sweep."""
    recipe, options, out, result = swept
    shutil.copytree(out, tmp_path / "out")
    second = next(v for v in result.variants if v.settings[0] == "quantize.bits=8").runs[0].folder
    shutil.rmtree(tmp_path / "out" / second)
    real, tried = sweeping.run, []

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeping, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(recipe, tmp_path / "out", **options)
    monkeypatch.setattr(sweeping, "run", lambda one, *a, **k: tried.append(one.model) or real(one, *a, **k))
    again = sweep(recipe, tmp_path / "out", **options)
    assert len(tried) == 3
    assert again.to_json()["variants"] == result.to_json()["variants"]


def test_a_finished_run_of_another_model_is_not_taken_for_this_one(swept, llama_folder, tmp_path, monkeypatch):
    """When the weights of the source change, the run itself is asked, and refuses."""
    recipe, options, out, _ = swept
    shutil.copytree(out, tmp_path / "out")
    monkeypatch.setattr(sweeping.CheckpointReader, "digest", lambda self: "another")
    result = sweep(recipe, tmp_path / "out", **options)
    assert len(result.failures) == 4
    assert sum("differs in source" in failure.message for failure in result.failures) == 2


def test_a_folder_of_another_sweep_or_of_anything_else_is_refused(swept, tmp_path):
    """Other values, another recipe, a folder of one's own: each is named."""
    recipe, options, out, _ = swept
    with pytest.raises(RecipeError, match="holds another sweep: it has no bits-3"):
        sweep(recipe, out, vary=["quantize.bits=3,4", options["vary"][1]])
    with pytest.raises(RecipeError, match="has another recipe"):
        sweep(recipe, out, settings=["evaluate.windows=2"], **options)
    (tmp_path / "mine.txt").write_text("text")
    with pytest.raises(RecipeError, match="was not made by a sweep"):
        sweep(recipe, tmp_path, **options)


def test_a_pass_contributes_what_the_whole_loses_without_it(ablated):
    """KL it adds is the difference of the two runs' windows, from their items; bytes are of the two runs."""
    out, result = ablated

    def window_kl(folder, step):
        lines = (out / folder / "items" / f"{step}.jsonl").read_text().splitlines()
        return np.array([json.loads(line)["kl"] for line in lines])

    by_pass = {one.step: one for one in result.ablations}
    whole = window_kl("recipe", "quantize")
    difference = whole - window_kl("without_quantize", "prune")
    assert by_pass["quantize"].kl_added.value == pytest.approx(difference.mean(), rel=1e-12)
    low, high = by_pass["quantize"].kl_added.ci95
    assert difference.min() <= low < difference.mean() < high <= difference.max()
    assert by_pass["prune"].kl_added.value == pytest.approx((whole - window_kl("without_prune", "quantize")).mean())
    assert by_pass["prune"].bytes_ratio == 1
    sizes = {run.variant: run.weight_bytes for variant in result.variants for run in variant.runs}
    assert by_pass["quantize"].bytes_ratio == sizes["recipe"] / sizes["without quantize"] < 0.6
    assert "| quantize | " in result.to_text().split("## What each pass contributes")[1]


def test_seeds_show_their_spread_beside_that_of_windows(tmp_path, llama_folder):
    """Two seeds of a recipe that draws nothing agree to the bit, and the text says so."""
    recipe = written(tmp_path, llama_folder, [QUANTIZE], windows=2)
    result = sweep(recipe, tmp_path / "out", seeds=[0, 3])
    [variant] = result.variants
    assert [run.seed for run in variant.runs] == [0, 3]
    assert variant.kl_over_seeds.ci95 == (variant.kl_over_seeds.value,) * 2
    assert variant.kl.ci95[0] < variant.kl.value < variant.kl.ci95[1]
    assert "The seeds made no difference" in result.to_text()
    assert "recipe_seed-3" in result.to_text()
