"""Tasks on tiny models, from files to figures."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from compressor.errors import IntegrityError, RecipeError
from compressor.metrics.tasks import measuring
from compressor.metrics.tasks.encoding import Request
from compressor.metrics.tasks.judging import NOT_A_NUMBER, judge
from compressor.metrics.tasks.measuring import measure_tasks
from compressor.metrics.tasks.options import Classification, Cloze, CrowsPairs, Generation, MinimalPairs, MultipleChoice
from compressor.metrics.tasks.questions import Question
from compressor.metrics.tasks.scoring import Scored
from compressor.metrics.tasks.summary import flips, summarise
from compressor.models import load_model, wrap_live
from compressor.reports.items import PREFERENCE, TaskItem
from tests.tiny_models import save_tiny, tiny_model, tiny_tokenizer

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture
def lines(tmp_path):
    """`lines(name, rows)`: a .jsonl file."""

    def write(name, rows):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def choices(lines):
    """Twelve questions of three choices, in two slices."""
    rows = [
        {
            "query": f"{WORDS[n % 10]} and",
            "choices": [WORDS[(n + m) % 10] for m in (1, 3, 5)],
            "gold": n % 3,
            "of": n % 2,
        }
        for n in range(12)
    ]
    return MultipleChoice(name="choices", data=lines("choices", rows), slice="of")


@pytest.fixture
def live():
    return wrap_live(tiny_model("llama"), tiny_tokenizer())


def question(kind="multiple_choice", **more):
    defaults = {"continuations": (" a", " bcd"), "answers": ("a", "bcd"), "gold": 0}
    return Question(task="t", kind=kind, item=0, **defaults | more)


def asked(*logliks, tokens=(1, 2)):
    found = [Scored(value, False, -0.5, (0,) * count) for value, count in zip(logliks, tokens, strict=True)]
    requests = [Request((1,), tuple(range(count))) for count in tokens]
    return list(zip(requests, found, strict=True))


def item(n=0, score=1.0, **more):
    defaults = {"task": "t", "item": n, "sha256": "x", "prompt": "p", "prediction": "a", "answer": "a", "score": score}
    return TaskItem(**defaults | more)


@torch.no_grad()
def likelihood(module, context: str, continuation: str) -> float:
    """By the definition, in float64, one text at a time."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(context + continuation)["input_ids"]
    first = len(tokenizer(context)["input_ids"])
    logits = torch.log_softmax(module(torch.tensor([ids])).logits[0].double(), -1)
    return sum(float(logits[n - 1, ids[n]]) for n in range(first, len(ids)))


def test_the_likeliest_choice_is_taken_and_its_probabilities_are_a_softmax(choices, live):
    """Score, NLL, Brier score, confidence and margin of every item, from the definition in float64."""
    found = measure_tasks(live, [choices]).items
    rows = [json.loads(line) for line in Path(choices.data).read_text().splitlines()]
    assert [entry.item for entry in found] == list(range(12))
    for entry, row in zip(found, rows, strict=True):
        values = np.array([likelihood(live.skeleton, row["query"], f" {text}") for text in row["choices"]])
        p = np.exp(values) / np.exp(values).sum()
        truth = np.eye(3)[row["gold"]]
        best = int(values.argmax())
        assert (entry.prediction, entry.score) == (row["choices"][best], float(best == row["gold"]))
        assert entry.answer == row["choices"][row["gold"]]
        assert entry.nll == pytest.approx(-math.log(p[row["gold"]]), abs=1e-4)
        assert entry.brier == pytest.approx(((p - truth) ** 2).sum(), abs=1e-4)
        assert entry.confidence == pytest.approx(p[best], abs=1e-4)
        assert entry.margin == pytest.approx(np.sort(values)[-1] - np.sort(values)[-2], abs=1e-4)
        assert 0 < entry.noise < 1e-3


@pytest.mark.parametrize(
    ("normalise", "best", "weights"), [("none", 0, (1, 1)), ("bytes", 1, (1, 3)), ("tokens", 1, (1, 2))]
)
def test_log_likelihoods_are_divided_before_they_are_compared(normalise, best, weights):
    """-2 against -3: the longer choice wins by bytes (1, 3) and by tokens (1, 2). Margins are brought back to nats."""
    found = judge(question(normalise=normalise), asked(-2.0, -3.0), None, 0.0)
    assert found.prediction == ("a", "bcd")[best]
    values = (-2 / weights[0], -3 / weights[1])
    assert found.margin == pytest.approx(abs(values[0] - values[1]) * 2 / (1 / weights[0] + 1 / weights[1]))
    assert found.confidence == pytest.approx((1, math.exp(-1))[best] / (1 + math.exp(-1)))


def test_preferences_are_neither_right_nor_calibrated():
    """The stereotype preferred scores 1; there is no answer and no probability."""
    found = judge(question("crows_pairs"), asked(-2.0, -3.0), None, 0.0)
    assert (found.score, found.answer, found.measures) == (1.0, None, PREFERENCE)
    assert (found.nll, found.confidence) == (None, None)


def test_a_broken_model_is_wrong_and_says_why():
    """NaN gives no margin and no probability, and the note counts the items."""
    found = judge(question(), asked(math.nan, -3.0), None, 0.0)
    assert (found.score, found.prediction, found.margin, found.nll) == (0.0, NOT_A_NUMBER, None, None)
    whole = item(1, nll=1.0, brier=0.5, confidence=0.5)
    result = summarise([found, whole])
    assert result.tasks["t"].value == 0.5
    assert math.isnan(result.calibration["t"]["nll"].value)
    assert result.notes == ("t: log-likelihoods are not numbers in 1 of 2 items, first in 0",)


def test_a_cloze_is_right_when_the_model_says_it_by_itself(lines, live):
    """Of two texts one goes on as the model does; NLL and perplexity are those of the target words."""
    tokenizer = tiny_tokenizer()
    ids = live.skeleton.generate(torch.tensor([tokenizer("one two ")["input_ids"]]), max_new_tokens=3, do_sample=False)
    own = tokenizer.decode(ids[0, len("one two ") :])
    rows = [{"c": "one two", "t": "xyz"}, {"c": "one two ", "t": own}]
    task = Cloze(name="cloze", data=lines("cloze", rows), context="c", target="t")
    values = [-likelihood(live.skeleton, "one two", " xyz"), -likelihood(live.skeleton, "one two", f"  {own}")]
    result = measure_tasks(live, [task])
    assert [entry.nll for entry in result.items] == pytest.approx(values, abs=1e-4)
    assert result.perplexity["cloze"].value == pytest.approx(math.exp(np.mean(values)), rel=1e-4)
    assert result.calibration["cloze"].keys() == {"nll"}


def test_the_prediction_of_a_cloze_ends_where_the_model_goes_its_own_way():
    """Asked 5 6 7, it says 5 9: what follows was never computed."""
    scored = Scored(-4.0, False, -0.25, (5, 9, 1))
    found = judge(question("cloze", answers=("x",)), [(Request((1,), (5, 6, 7)), scored)], Spoken(), 0.0)
    assert (found.prediction, found.score, found.margin, found.nll) == ("5 9", 0.0, 0.25, 4.0)


class Spoken:
    """A tokenizer that speaks numbers."""

    @staticmethod
    def decode(tokens):
        return " ".join(map(str, tokens))


def test_figures_are_means_over_items(choices, live):
    """Accuracy, calibration, bins and slices follow from the items."""
    result = measure_tasks(live, [choices])
    scores = [entry.score for entry in result.items]
    assert result.tasks["choices"].value == pytest.approx(np.mean(scores))
    assert result.tasks["choices"].n == 12
    assert result.slices["choices"]["0"].value == pytest.approx(np.mean(scores[::2]))
    figures = result.calibration["choices"]
    gap = np.mean([entry.confidence - entry.score for entry in result.items])
    assert figures["overconfidence"].value == pytest.approx(gap)
    assert figures["brier"].value == pytest.approx(np.mean([entry.brier for entry in result.items]))
    assert sum(part.n for part in result.reliability["choices"]) == 12


def test_clusters_are_resampled_together():
    """Ten items of two passages: the interval spans from one passage's score to the other's, and n is 2."""
    items = [item(n, float(n < 8), cluster="a" if n < 8 else "b") for n in range(10)]
    found = summarise(items).tasks["t"]
    assert (found.value, found.n, found.ci95) == (pytest.approx(0.8), 2, (0.0, 1.0))


def test_scores_do_not_depend_on_the_batch_size(choices, lines, live):
    """1, 5 and 32 rows: log-likelihood figures within 1e-4, and no answer changes unless it is within the noise."""
    pairs = MinimalPairs(
        name="pairs", data=lines("pairs", [{"sentence_good": a, "sentence_bad": a[::-1]} for a in WORDS])
    )
    results = [measure_tasks(live, [choices, pairs], batch_size=size).items for size in (1, 5, 32)]
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert two.nll == pytest.approx(one.nll, abs=1e-4)
            assert one.prediction == two.prediction or max(one.margin, two.margin) <= max(one.noise, two.noise)
        assert all(count["within_noise"] >= count["right_to_wrong"] for count in flips(results[0], other).values())


def test_a_stored_model_gives_what_it_gives_live(choices, tmp_path, live):
    """Equal figures within 1e-4, from files one block at a time."""
    folder = save_tiny(tmp_path / "model", "llama")
    stored = measure_tasks(load_model(str(folder)), [choices]).items
    assert [entry.nll for entry in stored] == pytest.approx(
        [entry.nll for entry in measure_tasks(live, [choices]).items], abs=1e-4
    )


def test_perturbed_prompts_are_asked_beside_the_clean_ones(choices, lines, live):
    """Variants have scores of their own, equal seeds for equal items, and what has no prompt is named."""
    seeds = []

    def change(prompt, seed):
        seeds.append(seed)
        return prompt.upper()

    crows = CrowsPairs(name="crows", data=lines("crows", [{"sent_more": "a b", "sent_less": "b a", "bias_type": "x"}]))
    result = measure_tasks(live, [choices, crows], perturb={"upper": change})
    first = list(seeds)
    assert len(set(first)) == 12
    assert result.robustness["choices"]["upper"].n == 12
    assert result.notes == ("crows: not asked as 'upper', no prompt stands apart from the choices",)
    assert next(entry.prompt for entry in result.items if entry.variant == "upper") == "ONE AND"
    assert result.bias.keys() == {"crows"}
    assert result.tasks["choices"].n == 12
    measure_tasks(live, [choices], perturb={"upper": change})
    assert seeds[12:] == first


def test_what_a_model_writes_is_judged(lines, tmp_path):
    """A stored model writes from its own files; the answer is what it writes, for one of two items."""
    folder = save_tiny(tmp_path / "model", "llama")
    module, tokenizer = tiny_model("llama"), tiny_tokenizer()
    ids = module.generate(torch.tensor([tokenizer("Q: six\nA:")["input_ids"]]), max_new_tokens=5, do_sample=False)
    own = tokenizer.decode(ids[0, len("Q: six\nA:") :])
    task = Generation(
        name="writes", data=lines("writes", [{"q": "six", "a": own}, {"q": "two", "a": "no such text"}]),
        prompt="Q: {q}\nA:", answer="{a}", max_new_tokens=5, stop=(),
    )  # fmt: skip
    result = measure_tasks(load_model(str(folder)), [task])
    assert [entry.score for entry in result.items] == [1.0, 0.0]
    assert result.items[0].prediction == own
    assert result.calibration == {}


def test_a_model_that_cannot_be_held_leaves_written_tasks_out(lines, tmp_path, monkeypatch):
    """With the bytes needed, as a reason and not as an error; other tasks are measured."""
    model = load_model(str(save_tiny(tmp_path / "model", "llama")))
    monkeypatch.setattr(measuring, "FREE_SHARE", 0.0)
    rows = [{"text": "one two", "s": "one", "label": 0}]
    writes = Generation(name="writes", data=lines("writes", rows), prompt="{s}", answer="{s}")
    label = Classification(name="label", data=lines("label", rows), prompt="{s}", labels=["x", "y"])
    result = measure_tasks(model, [writes, label])
    needed = sum(p.numel() for p in tiny_model("llama").parameters()) * 4
    assert result.tasks.keys() == {"label"}
    assert f"{needed:,} bytes dense" in result.reasons["writes"]


def test_long_prompts_are_counted(lines, live):
    """One of two exceeds the 256 tokens of the model."""
    rows = [{"text": f"{'x ' * 200}end"}, {"text": "a short end"}]
    result = measure_tasks(live, [Cloze(name="cloze", data=lines("long", rows))])
    assert result.notes == ("cloze: 1 prompts lost tokens on the left, to fit the model",)


def test_no_tasks_need_no_tokenizer():
    """A live module without one is measured all the same: nothing was asked."""
    result = measure_tasks(wrap_live(tiny_model("llama")), [])
    assert (result.items, result.tasks, result.notes) == ([], {}, ())


def test_an_answer_longer_than_the_model_names_its_item(lines, live):
    """The second item's target is 301 tokens long, the model reads 256."""
    task = Cloze(name="cloze", data=lines("long", [{"text": "a b"}, {"text": f"a {'x' * 300}"}]))
    with pytest.raises(RecipeError, match=r"task 'cloze', item 1: .* has 301 tokens, the model reads 256"):
        measure_tasks(live, [task])


def test_tasks_of_one_name_are_refused(choices, live):
    """Their items could not be told apart."""
    with pytest.raises(RecipeError, match="names of their own, got choices, choices"):
        measure_tasks(live, [choices, choices])


def test_flips_have_a_direction():
    """One of each kind among five; a change within noise on both sides is counted as such."""
    near = {"margin": 0.01, "noise": 0.1}
    before = [item(0, 1), item(1, 0, prediction="b"), item(2, 0, prediction="b"), item(3, 1), item(4, 1, **near)]
    after = [
        item(0, 0, prediction="b"), item(1, 1), item(2, 0, prediction="c"), item(3, 1),
        item(4, 0, prediction="b", **near),
    ]  # fmt: skip
    assert flips(before, after) == {
        "t": {"right_to_wrong": 2, "wrong_to_right": 1, "wrong_to_other": 1, "within_noise": 1, "n": 5}
    }


def test_flips_leave_out_preferences_and_perturbed_prompts():
    """Only answers that can be right count."""
    sides = [
        [item(0, n), item(1, n, answer=None, measures=PREFERENCE), item(2, n, variant="typos")] for n in (1.0, 0.0)
    ]
    assert flips(*sides)["t"]["n"] == 1


def test_items_asked_differently_cannot_flip():
    """Another prompt has another hash."""
    with pytest.raises(IntegrityError, match="were asked different things"):
        flips([item(0)], [item(0, sha256="y")])
