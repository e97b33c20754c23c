"""Distill: a damaged model learns to predict what the model before the damage predicts."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.algorithms.losses import forward_kl
from compressor.calibration import Calibration, last_hidden
from compressor.errors import CompressorError, RecipeError
from compressor.models import load_model, wrap_live
from compressor.passes import Context, Distill, Prune
from compressor.reports.ledger import check_complete
from tests.tiny_models import tiny_ids, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Words in random order, 12,800 bytes: 200 windows of 64."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    generator = torch.Generator().manual_seed(0)
    words = ["red ", "green ", "stone ", "river ", "runs ", "falls ", "and ", "the "]
    picks = torch.randint(0, len(words), (4000,), generator=generator).tolist()
    path.write_text("".join(words[i] for i in picks)[:12800])
    return str(path)


def options(text, **more):
    return {"data": text, "tokens": 8192, "length": 64, "batch_tokens": 512, "learning_rate": 3e-3} | more


def context(folder, place=None, **more):
    return Context(Calibration(), workplace=place, reference=lambda: load_model(str(folder)), ids=tiny_ids(16), **more)


def kl(model, reference, text):
    ids = Distill(data=text, tokens=2048, length=64).windows(tiny_tokenizer())[:16]
    student, teacher = (m.head().logits(last_hidden(m, ids).flatten(0, 1)) for m in (model, reference))
    return forward_kl(teacher, student).mean().item()


def pruned(folder, place):
    """A stored model with half of its weights gone."""
    model = load_model(str(folder))
    Prune(structure="2:4", score="magnitude").apply(model, context(folder, place))
    model.finish_generation(place.folder)
    return model


@pytest.fixture(params=["llama_folder", "moe_folder"])
def folder(request):
    return request.getfixturevalue(request.param)


def test_distillation_closes_what_pruning_opened(folder, workplace, text):
    """16 steps close at least a third of the KL to the reference; the reloaded generation has it, masks included."""
    first, second = workplace(1), workplace(2)
    model, reference = pruned(folder, first), load_model(str(folder))
    before = kl(model, reference, text)
    Distill(**options(text)).apply(model, context(folder, second))
    model.finish_generation(second.folder)
    assert kl(model, reference, text) < 2 / 3 * before
    with model.open_block(1) as block:
        weights = [site.read() for site in block.sites]
        weights += [expert for stack in (block.experts.read() if block.experts else ()) for expert in stack]
    for weight in weights:
        zeros = (weight.unflatten(-1, (-1, 4)) == 0).sum(-1)
        assert bool((zeros >= 2).all())
        assert (zeros > 2).float().mean() < 0.01  # only a weight that training drove to 0 exactly


def test_the_same_seed_gives_the_same_bytes(moe_folder, workplace, text):
    """All files of the generation, twice; another seed gives others."""
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        place = workplace(name=name)
        Distill(**options(text, tokens=2048)).apply(
            pruned(moe_folder, workplace(0, name)), context(moe_folder, place, seed=seed)
        )
        files.append({path.name: path.read_bytes() for path in place.folder.rglob("*.safetensors")})
    assert sorted(files[0]) == ["0.safetensors", "1.safetensors", "rest.safetensors"]
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_the_ledger_accounts_for_every_parameter(moe_folder, workplace, text):
    """All trained, 100 % of them, with the losses of the 4 steps."""
    model = load_model(str(moe_folder))
    ledger = Distill(**options(text, tokens=2048)).apply(model, context(moe_folder, workplace()))
    assert {row.name: row.parameters for row in ledger.weights} == model.parameter_counts()
    check_complete(ledger, model.num_parameters())
    assert {row.action for row in ledger.weights} == {"trained"}
    assert len(ledger.blocks[0]["training"]["loss"]) == 4


def test_weights_keep_their_dtype_and_rotary_frequencies_theirs(moe_folder, text):
    """A live bfloat16 model is bfloat16 again; frequencies rounded to bfloat16 would shift every position for good."""
    module = AutoModelForCausalLM.from_pretrained(moe_folder)
    before = module.model.rotary_emb.inv_freq.clone()
    Distill(**options(text, tokens=512)).apply(wrap_live(module, tiny_tokenizer()), context(moe_folder))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert module.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(module.model.rotary_emb.inv_freq, before)


def test_tied_embeddings_stay_tied(text):
    """One tensor before and after, trained once."""
    module = tiny_model("llama", tie_word_embeddings=True)
    before = module.lm_head.weight.detach().clone()
    model = wrap_live(module, tiny_tokenizer())
    damaged = Prune(structure="2:4", score="magnitude")
    damaged.apply(model, Context(Calibration()))
    reference = tiny_model("llama", tie_word_embeddings=True)
    Distill(**options(text, tokens=512)).apply(model, Context(Calibration(), reference=lambda: wrap_live(reference)))
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert not torch.equal(module.lm_head.weight, before)


def test_a_loss_that_is_not_finite_stops_the_pass(moe_folder, workplace, text):
    """CompressorError with the step; nothing of the generation is written, and the blocks are closed."""
    model, place = load_model(str(moe_folder)), workplace()
    with pytest.raises(CompressorError, match=r"distill: the loss of step \d+ is nan"):
        Distill(**options(text, learning_rate=1e30)).apply(model, context(moe_folder, place))
    assert not place.folder.exists()
    assert all(parameter.is_meta for block in model.blocks for parameter in block.parameters())


def test_a_reference_is_needed(moe_folder, text):
    """RecipeError before any work."""
    with pytest.raises(RecipeError, match="reference"):
        Distill(**options(text)).apply(load_model(str(moe_folder)), Context(Calibration()))


def test_short_texts_repeat(text):
    """200 windows are there: nearly all of them are used where 1,000 were asked for."""
    found = Distill(data=text, tokens=64_000, length=64).windows(tiny_tokenizer())
    assert 150 <= len(found) <= 200


@pytest.mark.parametrize("batch_tokens", [8, 512])
def test_a_text_shorter_than_a_batch_is_refused(tmp_path, batch_tokens):
    """RecipeError that says how many windows there are, with batches smaller than a window as well."""
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(RecipeError, match="holds 0 windows of 64 tokens"):
        Distill(data=str(tmp_path / "short.txt"), length=64, tokens=640, batch_tokens=batch_tokens).windows(
            tiny_tokenizer()
        )


def test_each_round_has_an_order_of_its_own():
    """Two rounds over 8 windows in batches of 2: every window once a round, not in the same order."""
    step = Distill(length=16, batch_tokens=32)
    ids = torch.arange(8)[:, None].expand(8, 16)
    batches = step._batches(ids, torch.zeros(8, 16, 4), seed=0)
    rounds = [torch.cat([next(batches)[0][:, 0] for _ in range(4)]).tolist() for _ in range(2)]
    assert [sorted(order) for order in rounds] == [list(range(8))] * 2
    assert rounds[0] != rounds[1]
