"""Perplexity, KL and agreement, held against float64 definitions; the model is a table of hidden states."""

import json
import math

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import IntegrityError
from compressor.metrics import accuracy
from compressor.metrics.accuracy import measure_accuracy, measure_baseline, token_agreement, token_kl, token_nll
from compressor.metrics.baseline_states import BaselineStates, TextSet, window_bytes
from compressor.reports.measurement import Measurement, worst_domain_by_kl

VOCAB, WIDTH = 50, 8


class FakeHead:
    """A linear head that remembers the most rows it was asked for."""

    def __init__(self, weight_VD: Tensor):
        self.weight_VD, self.most_rows = weight_VD, 0

    def logits(self, hidden_MD: Tensor) -> Tensor:
        self.most_rows = max(self.most_rows, len(hidden_MD))
        return hidden_MD.float() @ self.weight_VD.T


class FakeModel:
    """Hidden states by token id, plus noise of its own: a model without attention."""

    def __init__(self, noise: float = 0.0, vocab: int = VOCAB):
        generator = torch.Generator().manual_seed(0)
        self.table_VD = torch.randn(VOCAB, WIDTH, generator=generator)
        self.fake_head = FakeHead(torch.randn(vocab, WIDTH, generator=generator))
        self.table_VD = self.table_VD + noise * torch.randn(VOCAB, WIDTH, generator=generator)
        self.walks: list[list[int]] = []

    def head(self) -> FakeHead:
        return self.fake_head


def fake_last_hidden(model, ids_NT, *, batch_tokens=8192, progress=None, observe_routing=None):
    model.walks.append(list(ids_NT.shape))
    if observe_routing is not None:
        observe_routing(0, ids_NT.flatten()[:, None] % 4)
    return nn.functional.embedding(ids_NT, model.table_VD)


@pytest.fixture(autouse=True)
def _stream(monkeypatch):
    monkeypatch.setattr(accuracy, "last_hidden", fake_last_hidden)


def text(name: str = "wiki", windows: int = 6, tokens: int = 16, seed: int = 0, **more) -> TextSet:
    generator = torch.Generator().manual_seed(seed)
    return TextSet(name, torch.randint(VOCAB, (windows, tokens), generator=generator), **more)


def logits(seed: int, scale: float = 3.0, vocab: int = VOCAB) -> Tensor:
    return scale * torch.randn(40, vocab, generator=torch.Generator().manual_seed(seed))


def nll_by_definition(model: FakeModel, ids_NT: Tensor) -> Tensor:
    hidden_NTD = nn.functional.embedding(ids_NT, model.table_VD).double()
    probabilities = torch.softmax(hidden_NTD @ model.fake_head.weight_VD.double().T, -1)
    return -probabilities[:, :-1].gather(-1, ids_NT[:, 1:, None]).squeeze(-1).log()


def test_token_nll_is_minus_log_softmax():
    """The definition in float64, within float32 rounding."""
    targets = torch.arange(40)
    expected = -torch.log_softmax(logits(0).double(), -1)[targets, targets]
    torch.testing.assert_close(token_nll(logits(0), targets), expected, rtol=1e-6, atol=1e-6)


def test_token_kl_is_its_definition():
    """sum p (log p - log q) in float64."""
    p, q = torch.log_softmax(logits(0).double(), -1), torch.log_softmax(logits(1).double(), -1)
    torch.testing.assert_close(token_kl(logits(0), logits(1)), (p.exp() * (p - q)).sum(-1), rtol=1e-5, atol=1e-6)


def test_token_kl_of_a_model_with_itself_is_exactly_zero():
    """An A/A comparison shows nothing, not rounding."""
    assert token_kl(logits(0), logits(0)).eq(0).all()


def test_token_kl_leaves_its_arguments_alone():
    """It works in place on its own arrays only, also where .float() copies nothing."""
    before, after = logits(0), logits(1)
    token_kl(before, after)
    assert before.equal(logits(0))
    assert after.equal(logits(1))


def test_columns_padded_with_minus_infinity_add_nothing():
    """A vocabulary padded and masked in both models has the KL of the unpadded one."""
    padding = torch.full((40, 6), -math.inf)
    padded = token_kl(torch.cat([logits(0), padding], 1), torch.cat([logits(1), padding], 1))
    torch.testing.assert_close(padded, token_kl(logits(0), logits(1)))


def test_nan_logits_give_nan_not_zero():
    """A broken model is not mistaken for a perfect one."""
    broken = logits(1)
    broken[3, 7] = math.nan
    kl = token_kl(logits(0), broken)
    assert kl.isnan().nonzero().flatten().tolist() == [3]


def test_different_vocabularies_are_compared_on_the_common_columns():
    """Extra columns of one side are cut before the softmax."""
    wider = logits(2, vocab=VOCAB + 14)
    assert token_kl(logits(0), wider).equal(token_kl(logits(0), wider[:, :VOCAB]))
    assert token_agreement(wider, logits(0)).equal(token_agreement(wider[:, :VOCAB], logits(0)))


def test_perplexity_is_exp_of_the_mean_nll_of_predicted_tokens():
    """Each window predicts all of its tokens but the first."""
    model, wiki = FakeModel(), text()
    measured = measure_accuracy(model, [wiki], baseline=None).accuracy.perplexity["wiki"]
    assert measured.value == pytest.approx(float(nll_by_definition(model, wiki.ids).mean().exp()), rel=1e-5)
    assert measured.n == 6
    assert measured.ci95[0] < measured.value < measured.ci95[1]


def test_chunks_change_nothing_and_stay_in_their_budget(monkeypatch):
    """With room for 7 rows of logits no more are asked for, and the figures are the same."""
    whole = measure_accuracy(FakeModel(), [text()], baseline=None)
    monkeypatch.setattr(accuracy, "CHUNK_BYTES", 7 * 4 * VOCAB)
    model = FakeModel()
    parts = measure_accuracy(model, [text()], baseline=None)
    assert model.fake_head.most_rows == 7
    torch.testing.assert_close(parts.scores["wiki"].nll_N, whole.scores["wiki"].nll_N, rtol=1e-6, atol=0)


def test_a_model_against_itself_has_no_distance(tmp_path):
    """KL is 0, agreement 1 and the perplexity ratio 1, all with intervals of no width."""
    _, states = measure_baseline(FakeModel(), [text()], tmp_path)
    result = measure_accuracy(FakeModel(), [text()], baseline=states)
    assert result.accuracy.kl_mean.value == 0.0
    assert result.accuracy.kl_p99 == 0.0
    assert result.accuracy.top1_agreement.ci95 == (1.0, 1.0)
    assert result.perplexity_ratio["wiki"].ci95 == (1.0, 1.0)


def test_kl_and_agreement_equal_the_definition_over_all_texts(tmp_path):
    """Texts are pooled by token, also when their windows have different lengths."""
    texts = [text("wiki", 6, 16), text("code", 3, 40, seed=1)]
    before, after = FakeModel(), FakeModel(noise=0.3)
    _, states = measure_baseline(before, texts, tmp_path)
    measured = measure_accuracy(after, texts, baseline=states).accuracy
    kl, same = [], []
    for one in texts:
        ids = one.ids[:, :-1].flatten()
        p = torch.log_softmax(before.table_VD[ids].double() @ before.fake_head.weight_VD.double().T, -1)
        q = torch.log_softmax(after.table_VD[ids].double() @ after.fake_head.weight_VD.double().T, -1)
        kl.append((p.exp() * (p - q)).sum(-1))
        same.append((p.argmax(-1) == q.argmax(-1)).double())
    assert measured.kl_mean.value == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
    assert measured.kl_mean.n == 9
    assert measured.kl_p99 == pytest.approx(float(torch.cat(kl).quantile(0.99)), rel=1e-4)
    assert measured.kl["code"].value == pytest.approx(float(kl[1].mean()), rel=1e-4)
    assert measured.top1_agreement.value == pytest.approx(float(torch.cat(same).mean()))


def test_worst_text_is_the_one_that_moved_farthest(tmp_path):
    """Only the tokens of one text are disturbed, so that one is named."""
    low = TextSet("low", text().ids % 25)
    high = TextSet("high", 25 + text().ids % 25)
    _, states = measure_baseline(FakeModel(), [low, high], tmp_path)
    after = FakeModel()
    after.table_VD[:25] += 1.0
    result = measure_accuracy(after, [low, high], baseline=states)
    assert worst_domain_by_kl(Measurement(accuracy=result.accuracy))[0] == "low"
    assert result.accuracy.kl["high"].value == 0.0


def test_paired_ratio_is_narrower_than_the_perplexities(tmp_path):
    """Hard windows are hard for both models, so pairing cancels most of the spread."""
    easy_and_hard = TextSet("mixed", torch.cat([torch.full((4, 16), 3), text().ids]))
    _, states = measure_baseline(FakeModel(), [easy_and_hard], tmp_path)
    result = measure_accuracy(FakeModel(noise=0.02), [easy_and_hard], baseline=states)
    ratio, perplexity = result.perplexity_ratio["mixed"], result.accuracy.perplexity["mixed"]
    assert (ratio.ci95[1] - ratio.ci95[0]) / ratio.value < (perplexity.ci95[1] - perplexity.ci95[0]) / perplexity.value
    scores = result.scores["mixed"]
    assert ratio.value == pytest.approx(float((scores.nll_N - scores.baseline_nll_N).mean().exp()))


def test_texts_of_one_length_share_a_walk():
    """Blocks of a stored model are opened once for all texts with windows of the same length."""
    model = FakeModel()
    texts = [text("a", 2, 16), text("b", 3, 24), text("c", 4, 16)]
    result = measure_accuracy(model, texts, baseline=None)
    assert model.walks == [[6, 16], [3, 24]]
    assert list(result.accuracy.perplexity) == ["a", "b", "c"]


def test_routing_is_observed_on_the_way():
    """The observer is handed to the walk."""
    seen = []
    measure_accuracy(
        FakeModel(), [text()], baseline=None, observe_routing=lambda layer, index: seen.append(index.shape)
    )
    assert seen == [(96, 1)]


def test_padded_vocabularies_are_said_in_a_note(tmp_path):
    """A model with more columns than the baseline is compared on the common ones, and the report says so."""
    _, states = measure_baseline(FakeModel(), [text()], tmp_path)
    padded = FakeModel(vocab=VOCAB + 14)
    padded.fake_head.weight_VD[:VOCAB] = FakeModel().fake_head.weight_VD
    result = measure_accuracy(padded, [text()], baseline=states)
    assert "first 50" in result.accuracy.extra["notes"][0]
    assert result.accuracy.kl_mean.value == pytest.approx(0.0, abs=1e-6)
    assert result.perplexity_ratio["wiki"].value > 1.0


def test_bits_per_byte_counts_the_bytes_given():
    """NLL in bits over bytes, both summed over all windows."""
    sizes = torch.tensor([30, 50, 40, 60, 20, 70])
    model, wiki = FakeModel(), text(bytes_N=torch.tensor([30, 50, 40, 60, 20, 70]))
    measured = measure_accuracy(model, [wiki], baseline=None).accuracy.bits_per_byte["wiki"]
    expected = float(nll_by_definition(model, wiki.ids).sum()) / math.log(2) / int(sizes.sum())
    assert measured.value == pytest.approx(expected, rel=1e-5)


def test_window_bytes_leave_out_the_first_token():
    """Three tokens of 1, 2 and 3 bytes: the first is not predicted."""

    class Tokenizer:
        def decode(self, ids, clean_up_tokenization_spaces):
            return "".join("aé€"[i] for i in ids)

    assert window_bytes(torch.tensor([[0, 1, 2], [2, 0, 0]]), Tokenizer()).tolist() == [5, 2]


def test_a_broken_model_is_null_in_the_report_and_named(tmp_path):
    """NaN in one window: no perplexity, no KL, no agreement, valid JSON, and a note that names the window."""
    wiki = TextSet("wiki", text().ids % 49)
    wiki.ids[2, 5] = 49
    _, states = measure_baseline(FakeModel(), [wiki], tmp_path)
    broken = FakeModel()
    broken.table_VD[49] = math.nan
    result = measure_accuracy(broken, [wiki], baseline=states)
    document = json.loads(json.dumps(Measurement(accuracy=result.accuracy).to_json(), allow_nan=False))["accuracy"]
    assert document["perplexity"]["wiki"] is None
    assert document["kl_mean"] is None
    assert document["kl_p99"] is None
    assert document["top1_agreement"] is None
    assert "NLL is not finite in 1 of 6 windows, first in 2" in document["notes"][0]
    assert [item["nll"] is None for item in result.items()] == [False, False, True, False, False, False]


def test_without_a_baseline_the_reason_stands_in_the_report():
    """What was not compared is null with its reason."""
    document = Measurement(accuracy=measure_accuracy(FakeModel(), [text()], baseline=None).accuracy).to_json()[
        "accuracy"
    ]
    assert document["kl_mean"] is None
    assert document["kl_mean_reason"] == "no baseline was given"
    assert document["perplexity"]["wiki"]["n"] == 6


def test_items_hold_one_line_per_window_with_a_digest_of_the_ids(tmp_path):
    """Enough for a gate to pair two runs without either model."""
    _, states = measure_baseline(FakeModel(), [text()], tmp_path)
    items = list(measure_accuracy(FakeModel(), [text()], baseline=states).items())
    assert len(items) == 6
    assert items[1] == {
        "text": "wiki",
        "window": 1,
        "ids_sha256": text().sha256,
        "tokens": 15,
        "nll": items[1]["nll"],
        "kl": 0.0,
        "top1_agreement": 1.0,
    }
    json.dumps(items, allow_nan=False)


def test_states_come_back_bit_by_bit(tmp_path):
    """bf16 hidden states and float64 NLL survive the file."""
    states = BaselineStates(tmp_path / "states", FakeModel().head())
    hidden = torch.randn(6, 16, WIDTH).bfloat16()
    nll = torch.rand(6, dtype=torch.float64)
    states.keep(text(), hidden, nll)
    kept_hidden, kept_nll = states.load(text())
    assert kept_hidden.equal(hidden)
    assert kept_nll.equal(nll)
    assert states.holds(text())


def test_states_of_other_windows_are_refused(tmp_path):
    """A text that changed since the baseline was measured would give a KL between different inputs."""
    _, states = measure_baseline(FakeModel(), [text()], tmp_path)
    assert not states.holds(text(seed=5))
    with pytest.raises(IntegrityError, match="other windows"):
        measure_accuracy(FakeModel(), [text(seed=5)], baseline=states)


def test_names_that_differ_never_share_a_file(tmp_path):
    """Path separators are replaced in file names, so a digest keeps `a/b` and `a_b` apart."""
    states = BaselineStates(tmp_path, FakeModel().head())
    assert states.path(text("a/b")) != states.path(text("a_b"))
    assert states.path(text("a/b")).parent == tmp_path


def test_missing_states_are_an_error_that_names_the_file(tmp_path):
    """A text that the baseline was not measured on cannot be compared."""
    with pytest.raises(IntegrityError, match="wiki"):
        BaselineStates(tmp_path, FakeModel().head()).load(text())


def test_two_texts_of_one_name_are_refused():
    """One would overwrite the other in the report."""
    with pytest.raises(ValueError, match="names of their own"):
        measure_accuracy(FakeModel(), [text(), text(seed=1)], baseline=None)


def test_a_token_outside_the_vocabulary_is_refused():
    """Another model's tokenizer was used."""
    with pytest.raises(ValueError, match="token id 49 is outside the model's vocabulary of 40"):
        measure_accuracy(FakeModel(vocab=40), [TextSet("wiki", torch.full((2, 4), 49))], baseline=None)


@pytest.mark.parametrize("ids", [torch.zeros(3, 1, dtype=torch.int64), torch.zeros(4), torch.zeros(2, 3)])
def test_a_text_needs_windows_of_two_tokens_or_more(ids):
    """Shapes and dtype are checked where the text is made."""
    with pytest.raises(ValueError, match="windows >= 1, tokens >= 2"):
        TextSet("wiki", ids)
