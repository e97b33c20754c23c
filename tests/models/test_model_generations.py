"""What a pass wrote into a generation comes back as it was, packed and dense."""

import json

import pytest
import torch

from compressor.algorithms.rounding import round_to_nearest
from compressor.calibration import last_hidden
from compressor.errors import IntegrityError
from compressor.models import dequantized, load_model, wrap_live
from compressor.models.model import State
from compressor.quant import QuantSpec
from tests.tiny_models import save_tiny, tiny_ids, tiny_model

SPEC = QuantSpec(bits=4, group_size=32)


def write_generation(model, folder, change=lambda block: None):
    """Every block through `change` into a new generation; returns the tensors as they were written."""
    written = []
    for k in range(model.num_blocks):
        with model.open_block(k) as block:
            change(block)
            written.append({name: tensor.clone() for name, tensor in block.state()[0].items()})
            model.save_block(block, folder)
    model.finish_generation(folder)
    return written


def pack(block, spec=SPEC):
    for site in block.sites:
        site.install(round_to_nearest(site.read(), spec))
    if block.experts:
        block.experts.install(*(round_to_nearest(weight, spec) for weight in block.experts.read()))


def read_back(model):
    tensors = []
    for k in range(model.num_blocks):
        with model.open_block(k) as block:
            tensors.append(block.state()[0])
    return tensors


def assert_same(found, expected):
    assert [sorted(block) for block in found] == [sorted(block) for block in expected]
    for here, there in zip(found, expected, strict=True):
        for name, tensor in here.items():
            assert tensor.dtype == there[name].dtype
            assert torch.equal(tensor, there[name]), name


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("spec", [None, SPEC, QuantSpec(bits=3, group_size=None, symmetric=False)], ids=str)
def test_a_generation_reads_back_bit_for_bit(tmp_path, family, spec):
    """Dense, packed symmetric and packed asymmetric; a new Model that uses the generation gets the same."""
    folder = save_tiny(tmp_path / "source", family, dtype=torch.bfloat16)
    model = load_model(str(folder))
    written = write_generation(model, tmp_path / "01", lambda block: pack(block, spec) if spec else None)
    assert_same(read_back(model), written)
    other = load_model(str(folder))
    other.use_generation(tmp_path / "01")
    assert_same(read_back(other), written)


def test_a_linear_with_bias_comes_back_packed(tmp_path):
    """Biases of attention stay beside the packed weight: same output after reloading."""
    source = tiny_model("llama", attention_bias=True)
    for layer in source.model.layers:
        layer.self_attn.q_proj.bias.data.normal_()
    model, ids = load_model(str(save_tiny(tmp_path / "source", "llama", model=source))), tiny_ids()
    live = wrap_live(source)
    for k in range(2):
        with live.open_block(k) as block:
            pack(block)
    write_generation(model, tmp_path / "01", pack)
    assert torch.equal(last_hidden(model, ids), last_hidden(live, ids))


def test_packed_blocks_leave_nothing_behind(moe_folder, tmp_path):
    """Opening a packed block and leaving it gives the empty dense skeleton back."""
    model = load_model(str(moe_folder))
    write_generation(model, tmp_path / "01", pack)
    with model.open_block(0) as block:
        assert block.experts.is_packed
        assert all(site.is_packed for site in block.sites)
    assert not model.anatomy(0).experts.is_packed
    assert all(tensor.is_meta for block in model.blocks for tensor in block.state_dict().values())


def test_packed_weights_are_counted_as_what_they_stand_for(moe_folder, tmp_path):
    """Parameters stay; bytes are 4 bits a weight and a bfloat16 scale for each 32, beside the dense rest."""
    model = load_model(str(moe_folder))
    before = model.num_parameters()
    write_generation(model, tmp_path / "01", pack)
    packed = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 8 * 3 * 32 * 64)
    assert model.num_parameters() == before
    assert model.weight_bytes() == packed // 2 + packed // 32 * 2 + 2 * (before - packed)


def test_dense_opening_dequantizes_and_restores(moe_folder, tmp_path):
    """`dense=True` shows the weights that the codes stand for; afterwards the same packed modules are there."""
    model = load_model(str(moe_folder))
    write_generation(model, tmp_path / "01", pack)
    with model.open_block(0) as block:
        site, packed = block.sites[0], block.sites[0].module
        experts, expected = block.experts.module, block.experts.module.gate_up.dequantize(torch.bfloat16)
        with dequantized(block, torch.bfloat16):
            assert torch.equal(site.read(), packed.packed.dequantize(torch.bfloat16))
            assert torch.equal(block.experts.read()[0], expected)
        assert site.module is packed
        assert block.experts.module is experts
        assert not list(experts.template.parameters())


def test_dequantized_restores_after_an_error(moe_folder):
    """An exception inside does not leave the dense copy in place."""
    live = load_model(str(moe_folder))
    with live.open_block(0) as block:
        pack(block)
        with pytest.raises(KeyError), dequantized(block, torch.bfloat16):
            raise KeyError
        assert block.experts.is_packed
        assert all(site.is_packed for site in block.sites)


def test_packed_and_dequantized_blocks_compute_the_same(moe_folder):
    """In the canonical layout packed experts and linears give the bits of the dense block."""
    model = load_model(str(moe_folder))
    hidden = model.embed(tiny_ids())
    with model.open_block(0) as block:
        pack(block)
        packed = model.run_block(block, hidden)
        with dequantized(block, model.dtype):
            block.experts.module.config._experts_implementation = "eager"
            assert torch.equal(model.run_block(block, hidden), packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_measuring_live_does_not_change_packed_weights(dtype):
    """A model in memory goes to the fast layout and back with the same scales."""
    model = wrap_live(tiny_model("qwen3_moe", dtype=dtype))
    for k in range(2):
        with model.open_block(k) as block:
            pack_in = QuantSpec(bits=4, group_size=32)
            for site in block.sites:
                site.install(round_to_nearest(site.read(), pack_in, dtype=dtype))
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in read_back(model)]
    with model.live() as module, torch.no_grad():
        assert torch.isfinite(module(tiny_ids(1)).logits).all()
    assert_same(read_back(model), before)


@pytest.mark.parametrize("spec", [SPEC, QuantSpec(bits=8, group_size=None)], ids=str)
def test_a_stored_float32_model_runs_the_fast_ops(tmp_path, spec):
    """`live()` computes in the CPU layout within 2 % of exact arithmetic; the stored scales stay float32."""
    model, ids = load_model(str(save_tiny(tmp_path / "source", "llama"))), tiny_ids(2)
    written = write_generation(model, tmp_path / "01", lambda block: pack(block, spec))
    exact = model.head().logits(last_hidden(model, ids))
    with model.live() as module, torch.no_grad():
        assert module.model.layers[0].self_attn.q_proj.packed.layout == "cpu"
        assert (module(ids).logits - exact).norm() / exact.norm() < 0.02
    assert_same(read_back(model), written)


def test_the_rest_travels_with_the_generation(llama_folder, tmp_path):
    """Embedding, norm and head that a pass changed are read from the generation, and by the next one too."""
    model = load_model(str(llama_folder))
    model.skeleton.lm_head.weight.data.mul_(2)
    changed = model.skeleton.lm_head.weight.detach().clone()
    model.save_rest(tmp_path / "01")
    write_generation(model, tmp_path / "01")
    write_generation(model, tmp_path / "02")
    other = load_model(str(llama_folder))
    other.use_generation(tmp_path / "02")
    assert torch.equal(other.skeleton.lm_head.weight, changed)


def test_a_changed_tied_rest_stays_tied(tmp_path):
    """One tensor serves as embedding and head after reloading."""
    model = load_model(str(save_tiny(tmp_path / "source", "llama", tie_word_embeddings=True)))
    model.skeleton.lm_head.weight.data.mul_(2)
    changed = model.skeleton.lm_head.weight.detach().clone()
    model.save_rest(tmp_path / "01")
    write_generation(model, tmp_path / "01")
    assert model.skeleton.lm_head.weight is model.skeleton.model.embed_tokens.weight
    assert torch.equal(model.skeleton.lm_head.weight, changed)


def test_a_damaged_generation_is_an_integrity_error(llama_folder, tmp_path):
    """A block file cut in half is named."""
    model = load_model(str(llama_folder))
    write_generation(model, tmp_path / "01")
    path = tmp_path / "01" / "blocks" / "1.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(IntegrityError, match=r"1\.safetensors"), model.open_block(1):
        pass


def test_state_survives_json():
    """Masks and expert numbers come back equal, through text."""
    state = State({"model.layers.0.mlp.up_proj", "b"}, {0: [1, 3], 1: [0, 2]})
    assert State.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_state_travels_with_the_generation(llama_folder, tmp_path):
    """A resumed run knows what was pruned before."""
    model = load_model(str(llama_folder))
    model.state.pruned.add("model.layers.0.mlp.up_proj")
    write_generation(model, tmp_path / "01")
    other = load_model(str(llama_folder))
    other.use_generation(tmp_path / "01")
    assert other.state == State({"model.layers.0.mlp.up_proj"}, {})


def test_a_packed_model_knows_it_before_blocks_are_opened(moe_folder, tmp_path):
    """Plans refuse what cannot be done on packed weights before any long work."""
    model = load_model(str(moe_folder))
    assert not model.is_quantized
    write_generation(model, tmp_path / "01", pack)
    assert model.is_quantized
    live = wrap_live(tiny_model("llama"))
    assert not live.is_quantized
    with live.open_block(1) as block:
        pack(block)
    assert live.is_quantized
