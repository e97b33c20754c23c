"""Faults planted in artefacts of tiny models are found: the layer, the weight, the expert; what cannot be, is said."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import compressor as cx
from compressor.calibration import last_hidden
from compressor.checkpoint import CheckpointReader, write_safetensors
from compressor.errors import EnvironmentProblem, IntegrityError, RecipeError
from compressor.exporters import export_safetensors
from compressor.metrics import TextSet, measure_accuracy, measure_baseline
from compressor.models import load_model, wrap_live
from compressor.pipeline import exporting, run
from compressor.pipeline.bisecting import bisect
from compressor.pipeline.measuring import evaluation_texts
from compressor.pipeline.mixtures import Pair, expert_errors
from compressor.recipe import Evaluate
from tests.tiny_models import save_tiny, tiny_ids, tiny_model, tiny_tokenizer

INT8 = {"method": "rtn", "scale_search": "minmax", "bits": 8, "group_size": 32}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads that wait for each other on a busy machine took 23 s for what one does in 0.9."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    """Two small texts."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "beer.txt").write_text("".join(f"{n} bottles of beer on the wall, {n} bottles. " for n in range(200)))
    (folder / "fox.txt").write_text("The quick brown fox jumps over 1,2,3 lazy dogs. " * 60)
    texts = {name: str(folder / f"{name}.txt") for name in ("beer", "fox")}
    return Evaluate(text=texts, windows=4, length=64, latency=None)


def quantized(root: Path, family: str, layers: int, *passes) -> tuple[Path, Path]:
    """A tiny model and its int8 export, whose loss is small."""
    model = tiny_model(family, dtype=torch.bfloat16, num_hidden_layers=layers)
    dense = save_tiny(root / "dense", family, model=model)
    live = wrap_live(model, tiny_tokenizer())
    cx.apply(model, [*passes, cx.Quantize(**INT8)], calibration=tiny_ids())
    export_safetensors(live, root / "model", shard_bytes=10**9)
    return dense, root / "model"


def damaged(folder: Path, to: Path, wanted, change) -> Path:
    """A copy of a model in which the tensors whose names hold all of `wanted` were changed."""
    shutil.copytree(folder, to)
    reader = CheckpointReader(to / "model.safetensors")
    tensors = reader.tensors()
    chosen = [name for name in tensors if all(part in name for part in wanted)]
    assert chosen
    tensors |= {name: change(tensors[name]) for name in chosen}
    write_safetensors(to / "model.safetensors", tensors, reader.metadata())
    return to


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """Three layers of eight experts: dense, int8."""
    return quantized(tmp_path_factory.mktemp("moe"), "qwen3_moe", 3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Fourteen layers, more than are exchanged one by one: dense, int8."""
    return quantized(tmp_path_factory.mktemp("llama"), "llama", 14)


@pytest.fixture(scope="module")
def finished(llama_folder, evaluate, tmp_path_factory):
    """A run that prunes hard and quantizes to 8 bits."""
    root = tmp_path_factory.mktemp("finished")
    text = evaluate.text["beer"]
    recipe = {
        "model": str(llama_folder), "calibration": {"data": text, "samples": 8, "length": 64},
        "passes": [{"prune": {"structure": "unstructured", "ratio": 0.6, "score": "magnitude"}}, {"quantize": INT8}],
        "evaluate": evaluate.model_dump(mode="json"),
    }  # fmt: skip
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # that the export loads back is tested elsewhere, in a process of its own
        patch.setattr(exporting, "compare_reloaded", lambda *_, **__: {"relative": 0.0})
        return run(root / "recipe.yaml", root / "out").out


def test_a_damaged_expert_is_named(moe, evaluate, tmp_path):
    """The scales of expert 5 in layer 1 times 8: its layer and number, and KL nearly as before after restoring it."""
    dense, model = moe
    broken = damaged(model, tmp_path / "m", (".layers.1.", ".experts.5.", "weight_scale"), lambda scale: scale * 8)
    result = bisect(broken, baseline=str(dense), evaluate=evaluate)
    assert (result.blamed.layer, result.blamed.expert) == (1, 5)
    assert result.verdict.startswith("layer 1, expert 5: restoring it takes KL from ")
    best = result.parts[0] if result.parts[0].expert == 5 else result.parts[1]
    healthy = bisect(model, baseline=str(dense), evaluate=evaluate)
    assert best.restored.value == pytest.approx(healthy.whole.value, rel=0.1)
    assert best.output_error > 0.95
    assert result.units[1].share > 0.9


def test_a_damaged_layer_of_a_deep_model_is_named(llama, evaluate, tmp_path):
    """Codes of down_proj in layer 9 of 14 moved by one column: found through its range, with the weight."""
    dense, model = llama
    broken = damaged(
        model, tmp_path / "m", (".layers.9.", "down_proj.weight_packed"), lambda codes: codes.roll(1, dims=1)
    )
    result = bisect(broken, baseline=str(dense), evaluate=evaluate, windows=2)
    assert (result.blamed.layer, result.blamed.part) == (9, "mlp.down_proj")
    assert [row.name for row in result.units[:4]] == [
        "layers 0 to 3",
        "layers 4 to 7",
        "layers 8 to 11",
        "layers 12 to 13",
    ]
    assert [row.layers for row in result.units[4:]] == [(8, 8), (9, 9), (10, 10), (11, 11)]
    assert result.windows == {"beer": 2, "fox": 2}


def test_a_model_that_gives_nothing_finite_has_its_culprit(moe, evaluate, tmp_path):
    """A NaN scale in one expert: KL is not finite, and restoring that expert makes it so again."""
    dense, model = moe

    def first_nan(scale):
        return torch.where(torch.arange(scale.numel()).view_as(scale) == 0, math.nan, scale.float()).to(scale.dtype)

    broken = damaged(model, tmp_path / "m", (".layers.2.", ".experts.3.", "down_proj.weight_scale"), first_nan)
    result = bisect(broken, baseline=str(dense), evaluate=evaluate)
    assert (result.blamed.layer, result.blamed.expert) == (2, 3)
    assert "KL from not finite to 0.0" in result.verdict
    assert result.to_json()["value"] == "not finite"
    json.dumps(result.to_json(), allow_nan=False)


def test_a_damaged_expert_that_no_token_reaches_stands_out(moe, evaluate, tmp_path):
    """Its codes moved by one column change no prediction of these windows; its weights show it, and no other's do."""
    dense, model = moe
    few = evaluate.model_copy(update={"length": 8, "text": {"beer": evaluate.text["beer"]}})
    original = load_model(str(dense))
    [text] = evaluation_texts(few.text, original.tokenizer, 1, 8)
    reached = set()
    last_hidden(
        original,
        text.ids,
        observe_routing=lambda k, index: reached.update(index.flatten().tolist()) if k == 2 else None,
    )
    expert = min(set(range(8)) - reached)
    wanted = (".layers.2.", f".experts.{expert}.", "weight_packed")
    broken = damaged(model, tmp_path / "m", wanted, lambda codes: codes.roll(1, dims=1))
    result = bisect(broken, baseline=str(dense), evaluate=few, windows=1)
    assert [(one.layer, one.expert) for one in result.outliers] == [(2, expert)]
    assert f"layer 2, expert {expert} stands out: its weights moved by 1" in result.verdict
    assert bisect(model, baseline=str(dense), evaluate=few, windows=1).outliers == ()


def test_a_spread_loss_has_no_culprit(evaluate, tmp_path):
    """Every layer of an untrained model pruned alike, the loss in no one of them: the verdict says so."""
    dense = save_tiny(
        tmp_path / "dense", "llama", model=tiny_model("llama", num_hidden_layers=4, initializer_range=0.02)
    )
    model = tiny_model("llama", num_hidden_layers=4, initializer_range=0.02)
    cx.apply(model, [cx.Prune(structure="unstructured", ratio=0.5, score="magnitude")], calibration=tiny_ids())
    save_tiny(tmp_path / "pruned", "llama", model=model)
    result = bisect(tmp_path / "pruned", baseline=str(dense), evaluate=evaluate)
    assert result.verdict.startswith("no single layer: restoring the worst, ")
    assert result.blamed.layer is None
    assert result.parts == ()


def test_a_changed_head_is_named(llama_folder, evaluate, tmp_path):
    """Embedding and head count as units where they differ."""
    broken = damaged(llama_folder, tmp_path / "m", ("lm_head.weight",), lambda weight: weight * 1.5)
    result = bisect(broken, baseline=str(llama_folder), evaluate=evaluate)
    assert result.verdict.startswith("head: restoring it takes KL from ")
    assert [row.name for row in result.units] == ["layer 0", "layer 1", "head"]
    assert result.units[2].share == 1


def test_pruned_experts_are_not_exchanged_one_by_one(evaluate, tmp_path):
    """Six experts against eight: layers are exchanged, and why the experts are not is said."""
    prune = cx.Prune(structure="experts", ratio=0.25)
    dense, model = quantized(tmp_path, "qwen3_moe", 2, prune)
    result = bisect(model, baseline=str(dense), evaluate=evaluate)
    assert all(row.share is not None for row in result.units)
    assert result.blamed.layer is not None
    assert "has 6 experts, the baseline 8" in result.parts_reason
    assert all(row.expert is None for row in result.parts)


def test_a_model_of_another_depth_is_not_taken_apart(llama_folder, llama, evaluate):
    """Which layers belong together is not known."""
    result = bisect(llama[1], baseline=str(llama_folder), evaluate=evaluate)
    assert "the candidate has 14 layers, the baseline 2" in result.units_reason
    assert result.units == ()


def test_the_pass_that_lost_most_is_blamed(finished):
    """Pruning 60 % of all weights, then 8 bits: prune, by the report's KL after each, with its layer."""
    result = bisect(finished, windows=2)
    report = json.loads((finished / "report.json").read_text())
    after = [step["measurement"]["accuracy"]["kl_mean"]["value"] for step in report["steps"]]
    assert [row.growth for row in result.passes] == pytest.approx([after[0], after[1] - after[0]])
    assert result.blamed.step == "prune"
    assert "prune" in result.verdict
    assert "not what the run measured" not in result.to_text()


def test_a_model_against_itself_has_lost_nothing(llama_folder, evaluate):
    """KL 0, no culprit, and no look inside."""
    result = bisect(llama_folder, baseline=str(llama_folder), evaluate=evaluate, windows=1)
    assert result.verdict == "nothing is lost: KL 0"
    assert result.blamed.layer is None


def test_within_the_limit_there_is_nothing_to_blame(finished):
    """The model is measured, and not searched."""
    result = bisect(finished, limit=100.0, windows=2)
    assert result.verdict.startswith("nothing to blame: KL ")
    assert (result.units, result.blamed.step) == ((), None)


def test_files_that_changed_after_the_run_clear_its_passes(finished, tmp_path):
    """KL of the same windows is not what the run measured: the verdict says so, and still names the layer."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    wanted = (".layers.1.", "q_proj.weight_scale")
    damaged(finished / "model", tmp_path / "run" / "model", wanted, lambda scale: scale * 30)
    result = bisect(tmp_path / "run", windows=2)
    assert result.blamed.step is None
    assert result.verdict.startswith("no pass, since the files in ")
    assert any("changed: SHA-256" in note for note in result.notes)


def test_a_run_that_measured_only_the_end_says_how_to_know_the_pass(finished, tmp_path):
    """Without KL after each pass none is blamed."""
    shutil.copytree(finished, tmp_path / "run")
    report = json.loads((finished / "report.json").read_text())
    report["steps"][0]["measurement"]["accuracy"]["kl_mean"] = None
    (tmp_path / "run" / "report.json").write_text(json.dumps(report))
    shutil.rmtree(tmp_path / "run" / "model")
    result = bisect(tmp_path / "run")
    assert result.blamed.step is None
    assert "--set evaluate.when=each" in result.passes_reason
    assert "has no model/" in result.units_reason


def test_the_baseline_has_to_be_the_one_of_the_run(finished, llama_folder, tmp_path):
    """A source whose weights changed is refused; another one can be given on purpose."""
    shutil.copytree(finished, tmp_path / "run")
    manifest = json.loads((finished / "manifest.json").read_text())
    manifest["sources"][0]["digest"] = "0" * 64
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match="not the model that"):
        bisect(tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": "accuracy"}, RecipeError, "bisect follows kl_mean or perplexity_ratio"),
        ({}, RecipeError, "is a model, not a run: give --baseline"),
    ],
)
def test_what_is_missing_is_asked_for(options, error, message, llama_folder):
    """A metric that is known, a baseline for a bare model."""
    with pytest.raises(error, match=message):
        bisect(llama_folder, **options)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    """No run and no model."""
    with pytest.raises(EnvironmentProblem, match="there is no run and no model here"):
        bisect(tmp_path / "nowhere", baseline="x")


def test_perplexity_is_followed_on_the_text_that_suffered_most(llama, evaluate, tmp_path):
    """The ratio of the whole candidate is the larger of the two texts', as measured by the metrics."""
    dense, model = llama
    broken = damaged(model, tmp_path / "m", (".layers.0.", "down_proj.weight_scale"), lambda scale: scale * 30)
    result = bisect(broken, baseline=str(dense), evaluate=evaluate, metric="perplexity_ratio", windows=2)
    original, candidate = load_model(str(dense)), load_model(str(broken))
    sets = evaluation_texts(evaluate.text, original.tokenizer, 2, 64)
    _, states = measure_baseline(original, sets, tmp_path / "states")
    ratios = measure_accuracy(candidate, sets, baseline=states).perplexity_ratio
    assert result.whole.value == pytest.approx(max(ratio.value for ratio in ratios.values()), rel=1e-5)
    assert (result.blamed.layer, result.blamed.part) == (0, "mlp.down_proj")


def test_a_mixture_is_the_model_with_that_layer(tmp_path):
    """KL of the baseline with one layer of another model, against transformers with that layer's weights."""
    one, other = (
        tiny_model("qwen3_moe", seed=0, num_hidden_layers=3),
        tiny_model("qwen3_moe", seed=1, num_hidden_layers=3),
    )
    folders = [save_tiny(tmp_path / name, "", model=model) for name, model in (("one", one), ("other", other))]
    ids = tiny_ids(2, 16)
    pair = Pair(load_model(str(folders[0])), load_model(str(folders[1])), [TextSet("random", ids)])
    mixtures = [pair.mixture([]), pair.mixture([2])]
    losses = pair.losses(mixtures, pair.through(mixtures, pair.embeddings(mixtures), 0, 3))
    with torch.no_grad():
        before = one(ids).logits.double().log_softmax(-1)
        one.model.layers[1].load_state_dict(other.model.layers[1].state_dict())
        after = one(ids).logits.double().log_softmax(-1)
    expected = (before.exp() * (before - after)).sum(-1)[:, :-1].mean(1)
    assert torch.allclose(losses[mixtures[1]].kl_N, expected, atol=1e-5)
    assert losses[mixtures[0]].kl_N.abs().max() < 1e-6


def test_an_experts_share_is_what_restoring_it_takes_away(tmp_path):
    """Against the layer's output with that expert's weights put back, one expert after another."""
    one, other = tiny_model("qwen3_moe", seed=0), tiny_model("qwen3_moe", seed=0)
    ours, theirs = other.model.layers[0].mlp, one.model.layers[0].mlp
    torch.manual_seed(0)
    ours.experts.down_proj.data += 0.05 * torch.randn_like(ours.experts.down_proj)
    folders = [save_tiny(tmp_path / name, "", model=model) for name, model in (("one", one), ("other", other))]
    baseline, candidate = (load_model(str(folder)) for folder in folders)
    hidden = torch.randn(2, 16, 64)
    seen = []
    other.model.layers[0].mlp.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with candidate.open_block(0, dense=True) as block, baseline.open_block(0, dense=True) as dense:
        shares = expert_errors(candidate, block, dense, hidden)
    with torch.no_grad():
        rotary = other.model.rotary_emb(hidden, position_ids=torch.arange(16)[None])
        mask = torch.full((16, 16), -torch.inf).triu(1)[None, None]
        other.model.layers[0](hidden, position_embeddings=rotary, attention_mask=mask)
        x, expected, broken = seen[0], theirs(seen[0]), ours(seen[0])
        for expert, share in shares.items():
            kept = ours.experts.down_proj[expert].clone()
            ours.experts.down_proj.data[expert] = theirs.experts.down_proj[expert]
            left = (ours(x) - expected).square().sum() / (broken - expected).square().sum()
            ours.experts.down_proj.data[expert] = kept
            assert share == pytest.approx(1 - float(left), abs=1e-4)
