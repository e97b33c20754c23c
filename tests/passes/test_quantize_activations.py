"""Quantize with int8 activations: what is asked for, what is refused, and what the model then computes."""

import pytest
import torch
from pydantic import ValidationError

from compressor.errors import UnsupportedModel
from compressor.layers import CANONICAL, CPU, relayout
from compressor.models import load_model, wrap_live
from compressor.passes import Quantize
from tests.passes.test_quantize import context, output
from tests.tiny_models import save_tiny, tiny_ids, tiny_model

W8A8 = {"bits": 8, "group_size": "channel", "activations": "int8"}


@pytest.mark.parametrize(
    "other", [{"bits": 4}, {"group_size": 64}, {"symmetric": False}, {"activations": "int4"}], ids=str
)
def test_int8_activations_need_int8_weights_with_one_scale_a_row(other):
    """Refused at construction; the error names the keys."""
    with pytest.raises(ValidationError, match=r"activations"):
        Quantize(**W8A8 | other)


def test_experts_are_refused_before_any_work():
    """Stock loaders do not know them; ignoring them is possible."""
    model = wrap_live(tiny_model("qwen3_moe"))
    with pytest.raises(UnsupportedModel, match=r"quantize\.activations: .*ignore the experts"):
        Quantize(**W8A8).plan(model)
    ledger = Quantize(**W8A8, ignore=("lm_head", "mlp.experts")).apply(model, context())
    assert sum(row.action == "quantized" for row in ledger.weights) == 2 * 4
    assert model.anatomy(0).sites[0].module.packed.spec.activation_bits == 8


def test_evaluation_rounds_the_inputs_of_quantized_layers():
    """Logits of the walk are those of the live model's exact layout, and not those of weights alone."""
    model = wrap_live(tiny_model("llama"))
    Quantize(**W8A8, method="rtn").apply(model, context())
    walked = output(model)
    with model.live(layout=CANONICAL) as module, torch.no_grad():
        live = module(tiny_ids(4, seed=9)).logits
    weights_only = wrap_live(tiny_model("llama"))
    Quantize(**W8A8 | {"activations": None}, method="rtn").apply(weights_only, context())
    other = output(weights_only)
    assert torch.allclose(walked, live, atol=1e-5)
    assert (walked - other).norm() > 1e-3 * other.norm()


def test_a_stored_model_remembers_its_activations(tmp_path, workplace):
    """Blocks written and opened again round their inputs."""
    model, place = load_model(str(save_tiny(tmp_path, "llama"))), workplace()
    Quantize(**W8A8).apply(model, context(place))
    model.finish_generation(place.folder)
    with model.open_block(1) as block:
        assert {site.module.packed.spec.activation_bits for site in block.sites} == {8}


def test_live_layouts_agree():
    """In bfloat16 the fast layout is within 3 % of the exact one (two layers, each sum rounded once or twice)."""
    module = tiny_model("llama", dtype=torch.bfloat16, initializer_range=0.05)
    Quantize(**W8A8).apply(wrap_live(module), context())
    with torch.no_grad():
        exact = module(tiny_ids(2)).logits.float()
        relayout(module, CPU)
        fast = module(tiny_ids(2)).logits.float()
    assert (fast - exact).norm() < 0.03 * exact.norm()
