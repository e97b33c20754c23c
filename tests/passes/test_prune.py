"""Prune: which weights become zero, which experts go, and what follows them."""

import json

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from compressor.calibration import Calibration, ExpertInputs, last_hidden
from compressor.errors import RecipeError, UnsupportedModel
from compressor.models import Routed, load_model, wrap_live
from compressor.passes import Context, Prune
from compressor.reports.ledger import check_complete
from tests.tiny_models import tiny_ids, tiny_model


def context(place=None):
    """Random ids; a pass that reads the text instead fails, since there is none."""
    return Context(Calibration(data="/no/text.txt"), workplace=place, ids=tiny_ids(16))


def dense_weights(model, k):
    """All weights that pruning may touch in block k, experts one by one."""
    block = model.anatomy(k)
    weights = [site.read() for site in block.sites]
    if block.experts:
        weights += [expert for stack in block.experts.read() for expert in stack]
    return weights


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("score", ["wanda", "magnitude"])
@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_every_row_loses_its_share(family, score, ratio):
    """floor(ratio * width) zeros in each row of each linear and each expert."""
    model = wrap_live(tiny_model(family))
    Prune(structure="unstructured", ratio=ratio, score=score).apply(model, context())
    for k in range(2):
        for weight in dense_weights(model, k):
            zeros = (weight == 0).sum(-1)
            assert bool((zeros == int(weight.shape[-1] * ratio)).all())


@pytest.mark.parametrize("score", ["wanda", "magnitude"])
def test_two_of_every_four_are_zero(score):
    """In every group of four neighbours, experts included."""
    model = wrap_live(tiny_model("qwen3_moe"))
    Prune(structure="2:4", score=score).apply(model, context())
    for weight in dense_weights(model, 1):
        assert bool(((weight.unflatten(-1, (-1, 4)) == 0).sum(-1) == 2).all())


def test_kept_weights_do_not_change():
    """Pruning only writes zeros."""
    model, dense = wrap_live(tiny_model("qwen3_moe")), wrap_live(tiny_model("qwen3_moe"))
    Prune(structure="unstructured").apply(model, context())
    for weight, before in zip(dense_weights(model, 0), dense_weights(dense, 0), strict=True):
        assert torch.equal(weight[weight != 0], before[weight != 0])


def test_magnitude_needs_no_data():
    """Neither ids nor text."""
    model = wrap_live(tiny_model("llama"))
    Prune(structure="2:4", score="magnitude").apply(model, Context(Calibration(data="/no/text.txt")))
    assert (model.anatomy(0).sites[0].read() == 0).float().mean() == 0.5


def test_magnitude_drops_the_smallest():
    """Each row's largest zero was smaller than its smallest weight that stayed."""
    model, before = wrap_live(tiny_model("llama")), tiny_model("llama").model.layers[0].mlp.up_proj.weight.abs()
    Prune(structure="unstructured", score="magnitude").apply(model, context())
    kept = model.anatomy(0).module.mlp.up_proj.weight != 0
    assert bool((before.masked_fill(kept, 0).amax(-1) <= before.masked_fill(~kept, torch.inf).amin(-1)).all())


def test_wanda_scores_experts_by_their_own_tokens():
    """Inputs of two kinds, each routed to its own expert: each expert drops the inputs that it never sees."""
    module = tiny_model("qwen3_moe", num_experts=2, num_experts_per_tok=1)
    model = wrap_live(module)
    stack = model.anatomy(0).experts
    hidden = torch.zeros(400, 64)
    hidden[:200, :32] = 1 + torch.rand(200, 32, generator=torch.Generator().manual_seed(0))
    hidden[200:, 32:] = 1 + torch.rand(200, 32, generator=torch.Generator().manual_seed(1))
    inputs = ExpertInputs(stack)
    inputs(Routed(hidden, (torch.arange(400) >= 200).long()[:, None], torch.ones(400, 1)))
    Prune(structure="unstructured")._mask_experts(stack, inputs.gather())
    gate_up = stack.read()[0]
    assert gate_up[0, :, 32:].count_nonzero() == 0
    assert gate_up[1, :, :32].count_nonzero() == 0
    assert gate_up[0, :, :32].count_nonzero() == gate_up[0, :, :32].numel()


@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
def test_pruned_weights_are_remembered_as_masks(structure):
    """Names of sites and stacks, so that later passes keep the zeros; not the ignored one."""
    model = wrap_live(tiny_model("qwen3_moe"))
    Prune(structure=structure, score="magnitude", ignore=("lm_head", "layers.1.self_attn.o_proj")).apply(
        model, context()
    )
    assert "model.layers.0.mlp.experts.down_proj" in model.state.pruned
    assert len(model.state.pruned) == 2 * (4 + 2) - 1


@pytest.mark.parametrize(
    ("family", "structure"), [("llama", "unstructured"), ("qwen3_moe", "unstructured"), ("qwen3_moe", "experts")]
)
def test_the_ledger_accounts_for_every_parameter(family, structure):
    """100 % of the weights as they were before the cut."""
    model = wrap_live(tiny_model(family))
    before = {name.removesuffix(".weight"): count for name, count in model.parameter_counts().items()}
    ledger = Prune(structure=structure, ratio=0.25).apply(model, context())
    assert {row.name.removesuffix(".weight"): row.parameters for row in ledger.weights} == before
    check_complete(ledger, sum(before.values()))


# -- experts --------------------------------------------------------------------------------------------------------


def masked_reference(module, kept):
    """The full model whose router gives -inf to every expert that was dropped."""
    for k, layer in enumerate(module.model.layers):

        def route(_, arguments, result, layer=layer, k=k):
            logits = torch.full_like(result[0], -torch.inf)
            logits[:, kept[k]] = result[0][:, kept[k]]
            top = torch.softmax(logits, dim=-1, dtype=torch.float).topk(layer.mlp.gate.top_k)
            return logits, top.values / top.values.sum(-1, keepdim=True), top.indices

        layer.mlp.gate.register_forward_hook(route)
    return module


def cut(folder, place, **options):
    model = load_model(str(folder))
    ledger = Prune(structure="experts", **({"ratio": 0.25} | options)).apply(model, context(place))
    model.finish_generation(place.folder)
    return model, ledger


@torch.no_grad()
def test_dropping_experts_is_masking_their_router_logits(exact_moe_folder, workplace):
    """Logits within 1e-6 of the largest logit, in float32."""
    model, _ = cut(exact_moe_folder, workplace())
    module = AutoModelForCausalLM.from_pretrained(exact_moe_folder, experts_implementation="eager")
    expected = masked_reference(module, model.state.kept_experts)(tiny_ids()).logits
    found = model.head().logits(last_hidden(model, tiny_ids()))
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_every_count_follows(exact_moe_folder, workplace):
    """Config, model, experts and router say 6 of 8, in memory and after reloading the generation."""
    place = workplace()
    model, _ = cut(exact_moe_folder, place)
    other = load_model(str(exact_moe_folder))
    other.use_generation(place.folder)
    for one in (model, other):
        assert (one.config.num_experts, one.config.num_local_experts, one.skeleton.num_experts) == (6, 6, 6)
        assert {k: len(kept) for k, kept in one.state.kept_experts.items()} == {0: 6, 1: 6}
        with one.open_block(1) as block:
            assert (block.experts.num_experts, block.experts.router.num_experts) == (6, 6)
            assert block.experts.shapes() == {"gate_up_proj": (6, 64, 64), "down_proj": (6, 64, 32)}
            assert block.experts.router.weight.shape == (6, 64)
    assert json.loads((place.folder / "config.json").read_text())["num_local_experts"] == 6


@torch.no_grad()
def test_router_logits_can_be_output_after_the_cut(exact_moe_folder, workplace):
    """`output_router_logits=True` computes the balancing loss over 6 experts; a stale count breaks it."""
    model, _ = cut(exact_moe_folder, workplace())
    with model.live() as module:
        result = module(tiny_ids(2), labels=tiny_ids(2), output_router_logits=True)
    assert result.router_logits[0].shape == (64, 6)
    assert torch.isfinite(result.aux_loss)


@torch.no_grad()
def test_a_live_model_follows_too(exact_moe_folder, workplace):
    """Cut in memory, it gives the logits of the stored cut, and its balancing loss works."""
    stored, _ = cut(exact_moe_folder, workplace())
    module = AutoModelForCausalLM.from_pretrained(exact_moe_folder, experts_implementation="eager")
    Prune(structure="experts", ratio=0.25).apply(wrap_live(module), context())
    result = module(tiny_ids(), output_router_logits=True)
    expected = stored.head().logits(last_hidden(stored, tiny_ids()))
    assert torch.equal(result.logits, expected)
    assert module.config.num_experts == 6


@torch.no_grad()
def test_reap_scores_are_those_of_the_definition(exact_moe_folder):
    """Mean over an expert's tokens of gate times output norm, from a plain forward in float64; the lowest two go."""
    model = wrap_live(AutoModelForCausalLM.from_pretrained(exact_moe_folder, experts_implementation="eager"))
    module, seen = AutoModelForCausalLM.from_pretrained(exact_moe_folder, experts_implementation="eager"), []
    module.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    module(tiny_ids(16))
    (hidden, index, gates), experts = seen[0], module.model.layers[0].mlp.experts.double()
    expected = []
    for e in range(8):
        rows, slots = torch.where(index == e)
        gate, up = (hidden[rows].double() @ experts.gate_up_proj[e].T).chunk(2, -1)
        out = (torch.nn.functional.silu(gate) * up) @ experts.down_proj[e].T
        expected.append((out.norm(dim=-1) * gates[rows, slots]).mean().item())
    ledger = Prune(structure="experts", ratio=0.25).apply(model, context())
    assert ledger.blocks[0]["scores"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    lowest = sorted(range(8), key=lambda e: expected[e])[:2]
    assert ledger.blocks[0]["kept_experts"] == [e for e in range(8) if e not in lowest]


def test_a_second_cut_counts_from_the_original_experts(exact_moe_folder, workplace):
    """After 8 -> 6 -> 4 the numbers are those of the source checkpoint."""
    model, _ = cut(exact_moe_folder, workplace(1))
    first = {k: list(kept) for k, kept in model.state.kept_experts.items()}
    place = workplace(2)
    ledger = Prune(structure="experts", ratio=0.34).apply(model, context(place))
    model.finish_generation(place.folder)
    for k in range(2):
        assert model.state.kept_experts[k] == [first[k][e] for e in ledger.blocks[k]["kept_experts"]]
    assert model.config.num_experts == 4


def test_a_stopped_cut_continues_to_the_same_model(exact_moe_folder, workplace, monkeypatch):
    """Killed in the second block, run again: the same files and the same counts."""
    whole, _ = cut(exact_moe_folder, workplace(name="whole"))
    original = Prune._cut_experts

    def killed(self, visit):
        if visit.block.index == 1:
            raise KeyboardInterrupt
        original(self, visit)

    monkeypatch.setattr(Prune, "_cut_experts", killed)
    with pytest.raises(KeyboardInterrupt):
        cut(exact_moe_folder, workplace(name="broken"))
    monkeypatch.undo()
    place = workplace(name="broken")
    resumed, _ = cut(exact_moe_folder, place)
    assert resumed.state == whole.state
    for name in ("blocks/0.safetensors", "blocks/1.safetensors", "config.json", "state.json"):
        assert (place.folder / name).read_bytes() == (whole.generation / name).read_bytes()


def test_fewer_experts_than_a_token_needs_are_refused():
    """1 of 8 would stay, top-2."""
    with pytest.raises(UnsupportedModel, match=r"prune\.ratio 0\.85: 1 of 8 experts would stay.*routed to 2"):
        Prune(structure="experts", ratio=0.85).plan(wrap_live(tiny_model("qwen3_moe")))


def test_a_ratio_that_drops_no_expert_is_refused():
    """5 % of 8 experts is none: a pass that does nothing must not look like one that did."""
    with pytest.raises(RecipeError, match=r"prune\.ratio 0\.05: .* of 8 experts"):
        Prune(structure="experts", ratio=0.05).plan(wrap_live(tiny_model("qwen3_moe")))


def test_experts_of_a_dense_model_are_refused():
    """Llama has none."""
    with pytest.raises(UnsupportedModel, match="has no experts"):
        Prune(structure="experts").plan(wrap_live(tiny_model("llama")))


def test_keeping_the_experts_of_one_layer_is_refused():
    """All layers must keep the same number."""
    with pytest.raises(RecipeError, match="same number of experts"):
        Prune(structure="experts", ratio=0.25, ignore=("layers.0.mlp.experts",)).plan(
            wrap_live(tiny_model("qwen3_moe"))
        )


def test_rows_that_four_does_not_divide_are_refused():
    """Width 30 in down_proj, said in the plan."""
    with pytest.raises(UnsupportedModel, match=r"down_proj has rows of 30"):
        Prune(structure="2:4").plan(wrap_live(tiny_model("llama", intermediate_size=30)))


@pytest.mark.parametrize(
    "options",
    [
        {"structure": "2:4", "ratio": 0.3},
        {"structure": "experts", "score": "wanda"},
        {"structure": "unstructured", "score": "reap"},
        {"structure": "unstructured", "ratio": 1.0},
        {"structure": "columns"},
        {"ratio": 0.5},
    ],
    ids=str,
)
def test_contradictions_are_refused_at_construction(options):
    """Before any model is loaded."""
    with pytest.raises(ValidationError):
        Prune(**options)


def test_experts_are_scored_by_reap_unless_told():
    """The default score follows the structure."""
    assert Prune(structure="experts").score == "reap"
    assert Prune(structure="2:4").score == "wanda"


def test_an_ignore_that_matches_nothing_is_refused():
    """RecipeError names the pattern."""
    with pytest.raises(RecipeError, match=r"'o_prj' matches no weight"):
        Prune(structure="2:4", ignore=("o_prj",)).plan(wrap_live(tiny_model("llama")))
