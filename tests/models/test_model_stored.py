"""A stored model, block by block, is the model that stock transformers loads."""

import gc
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.calibration import last_hidden
from compressor.models import load_model
from tests.tiny_models import save_tiny, tiny_ids

FAMILIES = ["llama", "qwen3_moe"]


@torch.no_grad()
def stock(folder, ids):
    """Hidden states before the final norm, and logits, of `from_pretrained`."""
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    seen = []
    model.model.norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    logits = model(ids).logits
    return seen[0], logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_are_those_of_from_pretrained(tmp_path, family, tied):
    """In float32, exactly."""
    folder = save_tiny(tmp_path, family, tie_word_embeddings=tied)
    model, ids = load_model(str(folder)), tiny_ids()
    _, expected = stock(folder, ids)
    assert torch.equal(model.head().logits(last_hidden(model, ids)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_in_bfloat16_are_those_of_from_pretrained(tmp_path, family):
    """Exactly, up to the head; the head's float32 logits are within bfloat16's rounding (1 %) of stock's."""
    folder = save_tiny(tmp_path, family, dtype=torch.bfloat16)
    model, ids = load_model(str(folder)), tiny_ids()
    hidden, logits = stock(folder, ids)
    ours = last_hidden(model, ids)
    assert torch.equal(ours, hidden)
    error = model.head().logits(ours) - logits.float()
    assert error.norm() / logits.float().norm() < 0.01


def test_batches_do_not_change_the_result(moe_folder):
    """One window at a time gives the bits of all windows at once, at this size."""
    model, ids = load_model(str(moe_folder)), tiny_ids()
    assert torch.equal(last_hidden(model, ids, batch_tokens=1), last_hidden(model, ids))


def test_the_last_layers_of_a_moe_may_be_dense(tmp_path):
    """`mlp_only_layers` puts an ordinary MLP in a block: it has no experts, and logits are stock's."""
    folder = save_tiny(tmp_path, "qwen3_moe", mlp_only_layers=[1])
    model, ids = load_model(str(folder)), tiny_ids()
    assert [model.anatomy(k).experts is not None for k in range(2)] == [True, False]
    assert torch.equal(model.head().logits(last_hidden(model, ids)), stock(folder, ids)[1])


def test_sharded_checkpoints_are_read(tmp_path):
    """Shards of 100 kB (three or more) give the logits of one file."""
    folder = save_tiny(tmp_path, "llama", shard="100KB")
    assert len(list(folder.glob("*.safetensors"))) >= 3
    model, ids = load_model(str(folder)), tiny_ids()
    assert torch.equal(model.head().logits(last_hidden(model, ids)), stock(folder, ids)[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_leaves_nothing_behind(tmp_path, family):
    """All its parameters are on the meta device before and after, none of them inside; and nobody keeps those."""
    model = load_model(str(save_tiny(tmp_path, family)))
    for _ in range(2):
        with model.open_block(1) as block:
            assert not any(parameter.is_meta for parameter in block.module.parameters())
            weights = [weakref.ref(parameter) for parameter in block.module.parameters()]
        assert all(parameter.is_meta for block in model.blocks for parameter in block.parameters())
        gc.collect()
        assert [weight() for weight in weights] == [None] * len(weights)


def test_a_block_leaves_nothing_behind_after_an_error(moe_folder):
    """An exception inside, after the block was changed, does not keep the changed weights."""
    model = load_model(str(moe_folder))

    def broken():
        with model.open_block(0) as block:
            block.sites[0].write(torch.zeros(block.sites[0].shape))
            block.experts.keep(torch.tensor([0, 1, 2]))
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    with model.open_block(0) as block:
        assert block.sites[0].read().count_nonzero() > 0
        assert block.experts.num_experts == block.experts.router.num_experts == 8


def test_an_inner_opening_keeps_the_block(moe_folder):
    """Opening a block that is open gives the same weights and leaves closing to the outer one."""
    model = load_model(str(moe_folder))
    with model.open_block(0) as outer:
        with model.open_block(0) as inner:
            assert inner.sites[0].read().data_ptr() == outer.sites[0].read().data_ptr()
        assert not outer.sites[0].read().is_meta


def test_live_is_the_stock_model(tmp_path):
    """`live()` gives a transformers model with stock's logits, and empties the blocks again."""
    folder = save_tiny(tmp_path, "llama")
    model, ids = load_model(str(folder)), tiny_ids()
    with model.live() as module, torch.no_grad():
        assert torch.equal(module(ids).logits, stock(folder, ids)[1])
    assert all(parameter.is_meta for block in model.blocks for parameter in block.parameters())


def test_dtype_is_the_sources_unless_asked(llama_folder):
    """`auto` keeps bfloat16; `float32` widens the same values."""
    kept, widened = load_model(str(llama_folder)), load_model(str(llama_folder), dtype="float32")
    assert (kept.dtype, widened.dtype) == (torch.bfloat16, torch.float32)
    with kept.open_block(0) as a, widened.open_block(0) as b:
        assert torch.equal(a.sites[0].read().float(), b.sites[0].read())


@pytest.mark.parametrize("tied", [True, False])
def test_llama_is_counted_by_hand(tmp_path, tied):
    """q 64x64, k and v 32x64, o 64x64, three of 128x64, two norms in each of 2 blocks; embedding, norm, head."""
    model = load_model(str(save_tiny(tmp_path, "llama", dtype=torch.bfloat16, tie_word_embeddings=tied)))
    block = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64 + 2 * 64
    expected = 2 * block + 257 * 64 + 64 + (0 if tied else 257 * 64)
    assert model.num_parameters() == expected
    assert model.weight_bytes() == 2 * expected
    assert model.bits_per_weight() == 16


def test_qwen3_moe_is_counted_by_hand(moe_folder):
    """Attention with two head norms of 16, router 8x64, 8 experts of three 32x64 in each of 2 blocks."""
    model = load_model(str(moe_folder))
    block = 2 * 64 * 64 + 2 * 32 * 64 + 2 * 16 + 8 * 64 + 8 * 3 * 32 * 64 + 2 * 64
    expected = 2 * block + 2 * 257 * 64 + 64
    assert model.num_parameters() == expected
    assert model.weight_bytes() == 2 * expected


def test_parameter_counts_use_the_names_in_memory(moe_folder):
    """Counts by name are those of the stock model's parameters."""
    module = AutoModelForCausalLM.from_pretrained(moe_folder)
    expected = {name: parameter.numel() for name, parameter in module.named_parameters()}
    assert load_model(str(moe_folder)).parameter_counts() == expected


def test_anatomy_names_sites_and_shared_inputs(moe_folder):
    """q, k and v read one input; the router is not a site; experts are one stack."""
    block = load_model(str(moe_folder)).anatomy(1)
    assert {reads: [site.path for site in sites] for reads, sites in block.shared_inputs().items()} == {
        "self_attn.q_proj+self_attn.k_proj+self_attn.v_proj": [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
        ],
        "self_attn.o_proj": ["self_attn.o_proj"],
    }
    assert block.sites[0].name == "model.layers.1.self_attn.q_proj"
    assert block.experts.shapes() == {"gate_up_proj": (8, 64, 64), "down_proj": (8, 64, 32)}
