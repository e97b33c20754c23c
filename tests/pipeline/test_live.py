"""The Python API on live models, and loading what was exported."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import compressor as cx
from compressor.algorithms.losses import forward_kl
from compressor.calibration import windows
from compressor.errors import EnvironmentProblem, RecipeError
from compressor.exporters import compare_reloaded, export_safetensors
from compressor.layers import PackedExperts, PackedLinear, packed_weights
from compressor.models import load_model, wrap_live
from compressor.pipeline.planning import make_plan
from tests.tiny_models import tiny_ids, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_apply_packs_a_live_model_in_place(family):
    """All linears of the blocks are packed modules, and the model still computes."""
    model = tiny_model(family, dtype=torch.bfloat16)
    applied = cx.apply(model, [cx.Quantize(bits=4, group_size=32)], calibration=tiny_ids())
    assert applied.model is model
    assert isinstance(model.model.layers[1].self_attn.q_proj, PackedLinear)
    assert any(isinstance(m, PackedExperts) for m in model.modules()) == (family == "qwen3_moe")
    assert torch.isfinite(model(tiny_ids(1)).logits).all()


def test_apply_distils_from_the_model_as_it_was(tmp_path):
    """After pruning, training on the model's own predictions lowers the distance to them."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} green bottles hanging on the wall, " for n in range(400)))
    ids = windows(text.read_text(), tiny_tokenizer(), 64, 8)

    def distance(passes):
        model = tiny_model("llama", dtype=torch.float32)
        with torch.no_grad():
            before = model(ids).logits
            cx.apply(model, passes, calibration=ids, tokenizer=tiny_tokenizer())
            return forward_kl(before, model(ids).logits).mean()

    prune = cx.Prune(structure="unstructured", ratio=0.6)
    distill = cx.Distill(data=str(text), tokens=8192, length=64, batch_tokens=512, learning_rate=1e-3)
    assert distance([prune, distill]) < 0.8 * distance([prune])


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize(
    ("bits", "group"),
    [(4, 32), (8, "channel"), pytest.param(3, 32, marks=pytest.mark.slow), pytest.param(2, 32, marks=pytest.mark.slow)],
)
def test_exports_of_every_width_load_back_exactly(family, bits, group, tmp_path):
    """Stock transformers in a fresh process gives the live model's logits within 1e-3, and 32 equal greedy tokens."""
    model = wrap_live(tiny_model(family, dtype=torch.bfloat16), tiny_tokenizer())
    cx.apply(model.skeleton, [cx.Quantize(method="rtn", scale_search="mse", bits=bits, group_size=group)])
    export_safetensors(model, tmp_path / "model", shard_bytes=10**9)
    parity = compare_reloaded(model, tmp_path / "model", tiny_ids(2))
    assert parity["relative"] < 1e-3
    assert parity["greedy_equal"]


def test_load_keeps_an_export_packed(tmp_path):
    """cx.load holds codes, not dense weights, and computes the same as the model that was exported."""
    model = wrap_live(tiny_model("qwen3_moe", dtype=torch.bfloat16), tiny_tokenizer())
    cx.apply(model.skeleton, [cx.Quantize(bits=4, group_size=32)], calibration=tiny_ids())
    export_safetensors(model, tmp_path / "model", shard_bytes=10**9)
    loaded = cx.load(tmp_path / "model", fast=False)
    assert len(packed_weights(loaded)) == 2 * (4 + 2)
    with torch.no_grad():
        assert torch.equal(loaded(tiny_ids(2)).logits, model.skeleton(tiny_ids(2)).logits)


def test_fast_layout_stays_close_to_exact_arithmetic(tmp_path):
    """Logits through int4pack differ from exact ones by less than 2 %."""
    model = wrap_live(tiny_model("llama", dtype=torch.bfloat16), tiny_tokenizer())
    cx.apply(model.skeleton, [cx.Quantize(bits=4, group_size=32)], calibration=tiny_ids())
    export_safetensors(model, tmp_path / "model", shard_bytes=10**9)
    with torch.no_grad():
        fast = cx.load(tmp_path / "model")(tiny_ids(2)).logits.float()
        exact = cx.load(tmp_path / "model", fast=False)(tiny_ids(2)).logits.float()
    assert (fast - exact).norm() / exact.norm() < 0.02


def test_the_plan_predicts_the_exported_bytes(tmp_path):
    """Within 1 % of the folder that is written, experts pruned before included (design: `check`)."""
    path = tmp_path / "recipe.yaml"
    passes = [{"prune": {"structure": "experts", "ratio": 0.25}}, {"quantize": {"method": "rtn", "group_size": 64}}]
    path.write_text(json.dumps({"model": "demo/tiny-moe", "passes": passes}))
    recipe = cx.load_recipe(path)
    predicted = make_plan(recipe, load_model("demo/tiny-moe")).export_bytes
    model = load_model("demo/tiny-moe")
    live = wrap_live(AutoModelForCausalLM.from_pretrained(model.path), AutoTokenizer.from_pretrained(model.path))
    cx.apply(
        live.skeleton,
        [cx.Prune(structure="experts", ratio=0.25), cx.Quantize(method="rtn", scale_search="mse", group_size=64)],
        calibration=torch.arange(512).reshape(4, 128),
    )
    written = export_safetensors(live, tmp_path / "model", shard_bytes=10**9).bytes
    assert predicted == pytest.approx(written, rel=0.01)


def test_int8_keeps_the_original_logits(tmp_path):
    """demo/tiny-moe in int8: the median token moves by less than 2 %, and 95 % of the weights that count are packed."""
    source = load_model("demo/tiny-moe")
    dense = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.bfloat16)
    ids = torch.arange(256).reshape(2, 128) * 7 % 4096
    with torch.no_grad():
        original = dense.float()(ids).logits
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.bfloat16)
    passes = [cx.Quantize(method="rtn", scale_search="mse", bits=8, group_size="channel")]
    ledger = cx.apply(model, passes).report[0]
    with torch.no_grad():
        packed = torch.nn.Module.float(model)(ids).logits
    moved = (packed - original).norm(dim=-1) / original.norm(dim=-1)
    assert moved.median() < 0.02
    weights = [row for row in ledger.weights if row.reason not in ("embedding", "norm", "router", "output head")]
    assert sum(row.parameters for row in weights if row.action == "quantized") >= 0.95 * sum(
        r.parameters for r in weights
    )


def test_generate_continues_a_prompt():
    """Greedy text begins with the prompt and is the same each time."""
    first = cx.generate("demo/tiny-moe", "The king", 8)
    assert first.startswith("The king")
    assert cx.generate("demo/tiny-moe", "The king", 8) == first


def test_unfinished_runs_and_existing_folders_are_refused(tmp_path):
    """A run without model/ is not a model; an export never overwrites."""
    (tmp_path / "run" / "work").mkdir(parents=True)
    with pytest.raises(EnvironmentProblem, match="has not finished"):
        cx.load(tmp_path / "run")
    with pytest.raises(RecipeError, match="exists"):
        cx.export(tmp_path / "run", tmp_path / "run")


def test_measure_against_a_baseline_of_itself_is_exact(moe_folder, tmp_path):
    """KL of a model to itself is zero."""
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 40)
    evaluate = cx.Evaluate(text={"play": str(text)}, windows=2, length=64, latency=None)
    found = cx.measure(str(moe_folder), evaluate=evaluate, baseline=str(moe_folder))
    assert found["accuracy"]["kl_mean"]["value"] == pytest.approx(0, abs=1e-6)
