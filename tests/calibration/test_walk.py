"""The walk over blocks: live or stored, in one go or resumed, it is the same walk."""

import hashlib

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.algorithms.gptq import gptq
from compressor.algorithms.rounding import round_to_nearest
from compressor.calibration import ExpertInputs, Hessian, through_block, walk_blocks
from compressor.errors import IntegrityError
from compressor.models import load_model, wrap_live
from compressor.quant import QuantSpec
from tests.tiny_models import tiny_ids

SPEC = QuantSpec(bits=3, group_size=32)


class Stop(Exception):
    """A killed run."""


def quantize(visit):
    """Every site by GPTQ on its own Hessian, experts rounded; the note holds the tokens of each expert."""
    block, hessians = visit.block, {}
    inputs = ExpertInputs(block.experts) if block.experts else None
    for reads, sites in block.shared_inputs().items():
        hessians[reads] = Hessian(sites[0].shape[1])
    visit.observe(lambda reads, x: hessians[reads].add(x), inputs)
    for site in block.sites:
        site.install(gptq(site.read(), hessians[site.reads].value, SPEC, search="minmax"))
    if inputs is not None:
        visit.note["tokens"] = inputs.gather().counts()
        block.experts.install(*(round_to_nearest(weight, SPEC, search=False) for weight in block.experts.read()))


def walk(model, place=None, stop_at=None, **options):
    """Quantize all blocks; returns the blocks visited and the notes."""
    visited, notes = [], {}
    for visit in walk_blocks(model, tiny_ids(), notes, workplace=place, **options):
        if visit.block.index == stop_at:
            raise Stop
        visited.append(visit.block.index)
        quantize(visit)
    return visited, notes


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "journal.jsonl"
    }


@pytest.fixture(params=["llama_folder", "moe_folder"])
def folder(request):
    return request.getfixturevalue(request.param)


def test_live_and_stored_walks_give_the_same_bits(folder, workplace):
    """Codes and scales of all blocks, and the notes."""
    stored, live = load_model(str(folder)), wrap_live(AutoModelForCausalLM.from_pretrained(folder))
    place = workplace()
    _, notes = walk(stored, place)
    stored.finish_generation(place.folder)
    _, live_notes = walk(live)
    assert notes == live_notes
    for k in range(2):
        with stored.open_block(k) as a, live.open_block(k) as b:
            mine, theirs = a.state(), b.state()
            assert mine[1] == theirs[1]
            assert mine[0].keys() == theirs[0].keys()
            assert all(torch.equal(tensor, theirs[0][name]) for name, tensor in mine[0].items())


@pytest.mark.parametrize("dense_stream", [False, True])
def test_a_stopped_walk_continues_with_the_same_bytes(folder, workplace, dense_stream):
    """Stopped in the second block: only that one is visited again, and all files are those of an unbroken walk."""
    whole, broken = workplace(name="whole"), workplace(name="broken")
    _, notes = walk(load_model(str(folder)), whole, dense_stream=dense_stream)
    with pytest.raises(Stop):
        walk(load_model(str(folder)), broken, stop_at=1, dense_stream=dense_stream)
    again = workplace(name="broken")
    visited, resumed_notes = walk(load_model(str(folder)), again, dense_stream=dense_stream)
    assert visited == [1]
    assert resumed_notes == notes
    assert digests(again.folder) == digests(whole.folder)
    assert len(again.journal.entries("block")) == 2


def test_a_generator_closed_early_can_be_continued(moe_folder, workplace):
    """Leaving the loop after the first block, before it was written, visits both blocks again."""
    place, notes = workplace(), {}
    model = load_model(str(moe_folder))
    steps = walk_blocks(model, tiny_ids(), notes, workplace=place)
    quantize(next(steps))
    steps.close()
    assert all(parameter.is_meta for parameter in model.blocks[0].parameters())
    assert walk(model, workplace())[0] == [0, 1]


def test_a_finished_walk_visits_nothing(moe_folder, workplace):
    """All notes come out of the journal."""
    _, notes = walk(load_model(str(moe_folder)), workplace())
    assert walk(load_model(str(moe_folder)), workplace()) == ([], notes)


def test_a_finished_walk_leaves_only_its_blocks(moe_folder, workplace):
    """Streams, which are as large as the calibration set, are gone."""
    place = workplace()
    walk(load_model(str(moe_folder)), place)
    assert sorted(digests(place.folder)) == ["blocks/0.safetensors", "blocks/1.safetensors"]


def test_steps_of_a_run_have_journals_of_their_own(moe_folder, workplace):
    """A second pass begins at its first block, though the first pass has finished."""
    model, first, second = load_model(str(moe_folder)), workplace(1), workplace(2)
    for _ in walk_blocks(model, tiny_ids(), {}, workplace=first):
        pass
    model.finish_generation(first.folder)
    assert walk(model, second)[0] == [0, 1]


def test_a_lost_stream_asks_for_a_fresh_run(moe_folder, workplace):
    """IntegrityError that names the file."""
    place = workplace()
    with pytest.raises(Stop):
        walk(load_model(str(moe_folder)), place, stop_at=1)
    place.streams_file(1).write_bytes(b"half")
    with pytest.raises(IntegrityError, match=r"streams-1\.safetensors.*--fresh"):
        walk(load_model(str(moe_folder)), workplace())


def test_a_stream_that_is_not_there_asks_for_a_fresh_run(moe_folder, workplace):
    """A block is missing from the walk, so an empty stream must not stand in for it."""
    place = workplace()
    with pytest.raises(Stop):
        walk(load_model(str(moe_folder)), place, stop_at=1)
    place.streams_file(1).unlink()
    with pytest.raises(IntegrityError, match=r"streams-1\.safetensors.*--fresh"):
        walk(load_model(str(moe_folder)), workplace())


def test_the_compressed_stream_comes_out_of_changed_blocks(folder):
    """The second block's inputs are the first block's outputs with its packed weights."""
    model, inputs = wrap_live(AutoModelForCausalLM.from_pretrained(folder)), []
    for visit in walk_blocks(model, tiny_ids(), {}):
        inputs.append(visit.inputs)
        quantize(visit)
    with model.open_block(0, dense=True) as block:
        assert torch.equal(inputs[1], through_block(model, block, inputs[0]))


def test_the_dense_stream_is_the_model_before_the_pass(folder):
    """At each block the inputs of a plain forward of the dense model, bit for bit."""
    dense = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    expected = []
    for layer in dense.model.layers:
        layer.register_forward_pre_hook(lambda _, arguments: expected.append(arguments[0]))
    with torch.no_grad():
        dense(tiny_ids())
    for k, visit in enumerate(walk_blocks(load_model(str(folder)), tiny_ids(), {}, dense_stream=True)):
        assert torch.equal(visit.dense_inputs, expected[k])
        quantize(visit)


def test_change_is_the_relative_movement_of_the_output(moe_folder):
    """Attention's output doubled: the note has ||after - before|| / ||before||, computed in float64."""
    model, notes, before, after = wrap_live(AutoModelForCausalLM.from_pretrained(moe_folder)), {}, [], []
    for visit in walk_blocks(model, tiny_ids(), notes):
        visit.observe(lambda reads, x: None)
        before.append(visit.outputs.double())
        site = next(site for site in visit.block.sites if site.path == "self_attn.o_proj")
        site.write(2 * site.read())
        after.append(through_block(model, visit.block, visit.inputs).double())
    for k in range(2):
        expected = ((after[k] - before[k]).norm() / before[k].norm()).item()
        assert notes[k]["change"] == pytest.approx(expected, rel=1e-6)
    assert notes[0]["change"] > 0.01


def test_a_block_that_nobody_observed_has_no_change(moe_folder):
    """None, not zero."""
    notes = {}
    for _ in walk_blocks(load_model(str(moe_folder)), tiny_ids(), notes):
        pass
    assert notes == {0: {"change": None}, 1: {"change": None}}


def test_observed_inputs_are_those_of_the_linears(llama_folder):
    """Each distinct input of a block once, in batches that together hold all 8 x 32 tokens."""
    seen = {}
    for visit in walk_blocks(load_model(str(llama_folder)), tiny_ids(), {}):
        visit.observe(lambda reads, x: seen.setdefault(reads, []).append(x.shape), batch_tokens=96)
        break
    assert {reads: sum(len_ for len_, _ in shapes) for reads, shapes in seen.items()} == {
        "self_attn.q_proj+self_attn.k_proj+self_attn.v_proj": 256,
        "self_attn.o_proj": 256,
        "mlp.gate_proj+mlp.up_proj": 256,
        "mlp.down_proj": 256,
    }
    assert len(seen["mlp.down_proj"]) == 3
    assert seen["mlp.down_proj"][0] == (96, 128)


def test_progress_counts_blocks(moe_folder):
    """From 0 of 2 to 2 of 2."""
    told = []
    for _ in walk_blocks(
        load_model(str(moe_folder)), tiny_ids(), {}, label="quantize", progress=lambda *what: told.append(what)
    ):
        pass
    assert told == [("quantize", 0, 2), ("quantize", 1, 2), ("quantize", 2, 2)]
