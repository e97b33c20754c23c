"""Quantize: what becomes integers, what stays, and how the ledger tells it."""

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from compressor.calibration import Calibration, ExpertInputs, last_hidden, walk_blocks
from compressor.errors import RecipeError, UnsupportedModel
from compressor.models import load_model, wrap_live
from compressor.passes import Context, Distill, Prune, Quantize
from compressor.passes.quantize_experts import quantize_experts
from compressor.quant import QuantSpec
from compressor.reports.ledger import check_complete
from tests.tiny_models import save_tiny, tiny_ids, tiny_model, tiny_tokenizer


def context(place=None, ids=None, **options):
    """Calibration on random ids; a pass that reads the text instead fails, since there is none."""
    calibration = Calibration(data="/no/text.txt", samples=1, length=8)
    return Context(calibration, workplace=place, ids=tiny_ids(16) if ids is None else ids, **options)


def quantized(model, **options):
    ledger = Quantize(**({"group_size": 32} | options)).apply(model, context())
    return model, ledger


def output(model, ids=None):
    return model.head().logits(last_hidden(model, tiny_ids(4, seed=9) if ids is None else ids))


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def rows_by_name(ledger):
    return {row.name: row for row in ledger.weights}


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_the_ledger_accounts_for_every_parameter(family, method):
    """100 % of the weights before the pass, each once, and as many parameters after it."""
    model = wrap_live(tiny_model(family, dtype=torch.bfloat16))
    before = {name.removesuffix(".weight"): count for name, count in model.parameter_counts().items()}
    _, ledger = quantized(model, method=method)
    total = sum(before.values())
    assert {row.name.removesuffix(".weight"): row.parameters for row in ledger.weights} == before
    check_complete(ledger, total)
    assert model.num_parameters() == total


def test_all_projections_and_experts_are_quantized():
    """Four linears and two stacks in each of two blocks; kept rows say router, norm, embedding or output head."""
    model, ledger = quantized(wrap_live(tiny_model("qwen3_moe")))
    actions = {row.name: (row.action, row.reason) for row in ledger.weights}
    assert sum(action == "quantized" for action, _ in actions.values()) == 2 * (4 + 2)
    kept = {reason for action, reason in actions.values() if action == "kept"}
    assert kept == {"router", "norm", "embedding", "output head"}
    assert model.is_quantized


def test_router_norms_embedding_and_head_are_untouched(moe_folder, workplace):
    """Bit for bit, in a stored model."""
    model, place = load_model(str(moe_folder)), workplace()
    before = {name: tensor.clone() for name, tensor in model.rest().items()}
    with model.open_block(1) as block:
        before |= {
            name: p.clone()
            for name, p in block.module.named_parameters()
            if "norm" in name or name == "mlp.gate.weight"
        }
    Quantize(group_size=32).apply(model, context(place))
    model.finish_generation(place.folder)
    with model.open_block(1) as block:
        after = model.rest() | dict(block.module.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_group_that_does_not_divide_falls_back_and_says_so(tmp_path):
    """Rows of 96 take groups of 32 where 128 were asked for, in the plan and in the ledger; those of 128 keep 128."""
    model = wrap_live(tiny_model("llama", hidden_size=96, intermediate_size=128))
    step = Quantize(group_size=128)
    for rows in (step.plan(model), step.apply(model, context()).weights):
        found = {row.name: (row.group_size, row.reason) for row in rows if row.action == "quantized"}
        assert found["model.layers.0.self_attn.q_proj"] == (32, "group 128 does not divide the rows, 32 does")
        assert found["model.layers.0.mlp.down_proj"] == (128, "")


def test_experts_take_one_group_for_both_products():
    """Hidden 96 and expert width 64: 64 divides down's rows, but only 32 divides both."""
    model = wrap_live(tiny_model("qwen3_moe", hidden_size=96, moe_intermediate_size=64))
    _, ledger = quantized(model, group_size=64)
    groups = {row.name: row.group_size for row in ledger.weights if ".experts." in row.name}
    assert set(groups.values()) == {32}


def test_rows_that_no_group_divides_are_refused_with_the_way_out():
    """Experts of width 40: refused in the plan, and `channel` works."""
    model = wrap_live(tiny_model("qwen3_moe", moe_intermediate_size=40))
    with pytest.raises(UnsupportedModel, match=r"mlp\.experts: rows of 40, 64 .*group_size: channel"):
        Quantize(group_size=128).plan(model)
    _, ledger = quantized(model, group_size="channel")
    assert rows_by_name(ledger)["model.layers.0.mlp.experts.down_proj"].group_size is None


def test_asymmetric_experts_are_refused():
    """Stock transformers cannot load them; ignoring the experts makes it possible."""
    model = wrap_live(tiny_model("qwen3_moe"))
    with pytest.raises(UnsupportedModel, match=r"quantize\.symmetric"):
        Quantize(symmetric=False, group_size=32).plan(model)
    _, ledger = quantized(model, symmetric=False, ignore=("lm_head", "mlp.experts"))
    assert rows_by_name(ledger)["model.layers.0.mlp.experts.gate_up_proj"].reason == "ignored"


def test_asymmetric_dense_models_are_quantized():
    """Zero points and all; 8 bits err less than 2 %."""
    live = wrap_live(tiny_model("llama", initializer_range=0.05))
    dense = output(live)
    assert relative(output(quantized(live, bits=8, symmetric=False)[0]), dense) < 0.02


def test_an_ignore_that_matches_nothing_is_refused():
    """A misspelt pattern must not quantize what it names."""
    with pytest.raises(RecipeError, match=r"ignore: 'mlp\.expert' matches no weight"):
        Quantize(ignore=("lm_head", "mlp.expert")).plan(wrap_live(tiny_model("qwen3_moe")))


def test_ignored_sites_stay_as_they_are():
    """o_proj of the second layer alone is kept, with the reason."""
    live = wrap_live(tiny_model("llama"))
    weight = live.anatomy(1).module.self_attn.o_proj.weight.clone()
    _, ledger = quantized(live, ignore=("lm_head", "layers.1.self_attn.o_proj"))
    assert torch.equal(live.anatomy(1).module.self_attn.o_proj.weight, weight)
    assert {row.name: row.reason for row in ledger.weights if row.reason == "ignored"} == {
        "model.layers.1.self_attn.o_proj.weight": "ignored"
    }


def test_ignoring_experts_of_some_layers_is_refused():
    """All experts of a model share one scheme."""
    with pytest.raises(RecipeError, match="ignore those of all layers or of none"):
        Quantize(ignore=("lm_head", "layers.0.mlp.experts")).plan(wrap_live(tiny_model("qwen3_moe")))


def test_the_head_cannot_be_quantized_yet():
    """Said before any work."""
    with pytest.raises(RecipeError, match="lm_head"):
        Quantize(ignore=()).plan(wrap_live(tiny_model("llama")))


@pytest.mark.parametrize(
    "options", [{"bits": 5}, {"group_size": 48}, {"method": "awq"}, {"damping": 0}, {"bit": 4}], ids=str
)
def test_impossible_options_are_refused_at_construction(options):
    """Before any model is loaded."""
    with pytest.raises(ValidationError):
        Quantize(**options)


def test_a_quantized_model_is_refused_by_every_pass(moe_folder, workplace):
    """In the plan, for a stored model too, whose packed blocks are on the disk."""
    model, place = load_model(str(moe_folder)), workplace()
    Quantize(method="rtn", scale_search="mse", group_size=32).apply(model, context(place))
    model.finish_generation(place.folder)
    for step in (Quantize(group_size=32), Prune(structure="2:4"), Prune(structure="experts"), Distill()):
        with pytest.raises(UnsupportedModel, match="quantized already"):
            step.plan(model)


def test_starved_experts_get_a_policy_and_finite_scales():
    """8 windows of 32 tokens give each expert fewer than the 128 own tokens that it would need."""
    model = wrap_live(tiny_model("qwen3_moe", dtype=torch.bfloat16))
    ledger = Quantize(group_size=32).apply(model, context(ids=tiny_ids(8)))
    for row in ledger.experts:
        assert sum(row.tokens) == 8 * 32 * 2
        assert row.starved == tuple(e for e, tokens in enumerate(row.tokens) if tokens < 128)
        assert {row.policy[e] for e in row.starved} <= {"own and borrowed tokens", "borrowed tokens"}
        assert row.starved
    assert torch.isfinite(output(model)).all()


def silence(model, expert):
    """The router never chooses this expert: of each pair of opposite rows one logit is above its zero."""
    for layer in model.model.layers:
        rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(5))
        weight = torch.cat([rows, -rows])[torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])]
        weight[expert] = 0
        layer.mlp.gate.weight.data = weight


def test_an_expert_without_tokens_is_quantized_by_borrowed_ones():
    """Its policy says so, and its weights err no more than 4-bit rounding does (20 %)."""
    module = tiny_model("qwen3_moe")
    silence(module, 3)
    dense = module.model.layers[0].mlp.experts.gate_up_proj[3].clone()
    model, ledger = quantized(wrap_live(module))
    for row in ledger.experts:
        assert row.tokens[3] == 0
        assert row.policy[3] == "borrowed tokens"
    assert relative(model.anatomy(0).experts.module.gate_up.dequantize(torch.float32, 3), dense) < 0.2


def test_an_expert_of_zeros_does_not_cost_the_others_their_statistics():
    """Its down Hessian is zero: it alone is rounded, the ledger says so, the others get the codes they would get."""

    def solve(zero):
        model = wrap_live(tiny_model("qwen3_moe"))
        stack = model.anatomy(0).experts
        if zero:
            stack.module.gate_up_proj.data[5] = 0
        inputs = ExpertInputs(stack)
        visit = next(walk_blocks(model, tiny_ids(), {}))
        visit.observe(lambda reads, x: None, inputs)
        spec = QuantSpec(bits=4, group_size=32)
        return stack, quantize_experts(stack, inputs.gather(), Quantize(group_size=32).solve, spec, torch.float32, None)

    (with_zero, outcome), (whole, _) = solve(True), solve(False)
    codes, expected = (stack.module.down.quantized().codes for stack in (with_zero, whole))
    others = [e for e in range(8) if e != 5]
    assert torch.equal(codes[others], expected[others])
    assert outcome.reason.startswith("1 experts rounded")


def test_the_memory_budget_does_not_change_the_codes():
    """Experts one at a time or all at once: the same packed words."""

    def words(memory):
        model = wrap_live(tiny_model("qwen3_moe", dtype=torch.bfloat16))
        Quantize(group_size=32).apply(model, context(memory_bytes=memory))
        return model.anatomy(1).experts.module.down.words

    assert torch.equal(words(1), words(1 << 30))


def test_int8_channel_output_is_close_to_dense():
    """Within 2 % of the dense logits in the median over tokens, dense model and MoE."""
    for family in ("llama", "qwen3_moe"):
        live = wrap_live(tiny_model(family, initializer_range=0.05))
        dense = output(live)
        found = output(quantized(live, bits=8, group_size="channel")[0])
        assert ((found - dense).norm(dim=-1) / dense.norm(dim=-1)).median() < 0.02


def test_rounding_needs_no_data():
    """rtn with the plain scale search reads neither ids nor text, and marks no expert."""
    no_data = Context(Calibration(data="/no/text.txt"))
    model = wrap_live(tiny_model("qwen3_moe"))
    ledger = Quantize(method="rtn", scale_search="mse", group_size=32).apply(model, no_data)
    assert ledger.experts == ()
    assert all(row.error > 0 for row in ledger.weights if row.action == "quantized")


def test_passes_may_have_calibration_of_their_own(tmp_path):
    """The pass's text is read, not the recipe's."""
    (tmp_path / "own.txt").write_text("abcdefgh" * 100)
    model = wrap_live(tiny_model("llama"), tiny_tokenizer())
    step = Quantize(group_size=32, calibration={"data": str(tmp_path / "own.txt"), "samples": 4, "length": 16})
    assert step.apply(model, context()).weights


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_loses_less_than_rounding_on_correlated_inputs(bits):
    """The second block's o_proj, whose inputs are sums over few values: at most 0.9 of rounding's output error."""
    errors = {}
    for method in ("gptq", "rtn"):
        model = wrap_live(tiny_model("llama"))
        _, ledger = quantized(model, method=method, bits=bits)
        errors[method] = rows_by_name(ledger)
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"):
        assert errors["gptq"][name].error < 0.9 * errors["rtn"][name].error


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("structure", ["2:4", "unstructured"])
def test_pruned_zeros_stay_exactly_zero(moe_folder, workplace, method, structure):
    """Prune, then quantize a stored model: sites and experts keep their masks, half of each weight."""
    model, first, second = load_model(str(moe_folder)), workplace(1), workplace(2)
    Prune(structure=structure, score="magnitude").apply(model, context(first))
    model.finish_generation(first.folder)
    with model.open_block(1) as block:
        masks = {site.name: site.read() == 0 for site in block.sites}
        masks |= {name: weight == 0 for name, weight in zip(("gate_up", "down"), block.experts.read(), strict=True)}
    Quantize(method=method, group_size=32).apply(model, context(second))
    model.finish_generation(second.folder)
    with model.open_block(1, dense=True) as block:
        found = {site.name: site.read() for site in block.sites}
        found |= dict(zip(("gate_up", "down"), block.experts.read(), strict=True))
    for name, mask in masks.items():
        assert 0.45 < mask.float().mean() < 0.55
        assert found[name][mask].count_nonzero() == 0, name


def test_the_same_run_gives_the_same_bytes(moe_folder, workplace):
    """Two runs of a stored model write equal block files."""
    written = []
    for name in ("a", "b"):
        place = workplace(name=name)
        Quantize(group_size=32).apply(load_model(str(moe_folder)), context(place))
        written.append([(place.folder / "blocks" / f"{k}.safetensors").read_bytes() for k in range(2)])
    assert written[0] == written[1]


def test_an_error_inside_leaves_the_stored_model_as_it_was(moe_folder, workplace, monkeypatch):
    """The block in work is closed though the traceback is kept: a second try begins with dense weights."""
    model = load_model(str(moe_folder))
    monkeypatch.setattr("compressor.passes.quantize.quantize_experts", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError) as kept:
        Quantize(group_size=32).apply(model, context(workplace()))
    assert kept.value is not None
    assert all(parameter.is_meta for parameter in model.blocks[0].parameters())
    monkeypatch.undo()
    assert Quantize(group_size=32).apply(model, context(workplace())).weights


def test_ledger_errors_are_output_errors():
    """o_proj's error is ||(Q - W) X|| / ||W X|| over the calibration inputs, in float64."""
    live = wrap_live(tiny_model("llama"))
    weight, inputs = live.anatomy(0).module.self_attn.o_proj.weight.double(), []
    for visit in walk_blocks(live, tiny_ids(16), {}):
        visit.observe(lambda reads, x: inputs.append(x.double()) if reads == "self_attn.o_proj" else None)
        break
    _, ledger = quantized(live)
    moved = live.anatomy(0).module.self_attn.o_proj.packed.dequantize(torch.float64) - weight
    x = torch.cat(inputs)
    expected = ((x @ moved.T).norm() / (x @ weight.T).norm()).item()
    assert rows_by_name(ledger)["model.layers.0.self_attn.o_proj"].error == pytest.approx(expected, rel=1e-3)


def test_a_checkpoint_of_another_dtype_keeps_its_scales(tmp_path):
    """Scales have the model's dtype: float16 in, float16 out."""
    folder = save_tiny(tmp_path, "llama", dtype=torch.float16)
    live = wrap_live(AutoModelForCausalLM.from_pretrained(folder))
    quantized(live)
    assert live.anatomy(0).module.mlp.down_proj.packed.scales.dtype == torch.float16
