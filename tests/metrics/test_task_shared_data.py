"""Every file of the shared evaluation data becomes questions: as many as its README counts, the first one right."""

import os
from pathlib import Path

import pytest

from compressor.metrics.tasks import (
    Classification,
    Cloze,
    Contexts,
    CrowsPairs,
    MinimalPairs,
    MultipleChoice,
    Winobias,
    read_task,
)

ROOT = Path(__file__).resolve().parents[2]
EVAL = Path(os.environ.get("COMPRESSOR_SHARED", ROOT.parent / "shared")) / "data" / "eval"
pytestmark = pytest.mark.skipif(not EVAL.is_dir(), reason=f"{EVAL} is not there ($COMPRESSOR_SHARED names its folder)")

MMLU = "{question}\nA. {choices[0]}\nB. {choices[1]}\nC. {choices[2]}\nD. {choices[3]}\nAnswer:"
CASES = [
    (Cloze, "lambada_openai_test.jsonl", {}, 5153, "signs"),
    (MultipleChoice, "llmfoundry_arc_easy_test.jsonl", {"query": "{query}\nAnswer:"}, 2376, "Sunlight is"),
    (MultipleChoice, "llmfoundry_piqa_valid.jsonl", {"query": "{query}Answer:"}, 1838, "Provide the guinea pig"),
    (Contexts, "llmfoundry_winogrande_valid.jsonl", {}, 1267, "Sarah was a much better surgeon than Maria so Maria"),
    (Classification, "mmlu_validation.jsonl", {"prompt": MMLU, "labels": list("ABCD"), "label": "answer"}, 1531, "A"),
    (Classification, "raw_sst2_valid.jsonl", {"prompt": "{sentence}", "labels": ["bad", "good"]}, 872, "good"),
    (MinimalPairs, "blimp_67x100.jsonl", {"slice": "UID"}, 6700, "Who should Derek hug after shocking Richard?"),
    (CrowsPairs, "crows_pairs_anonymized.csv", {}, 1508, None),
    (Winobias, "winobias", {}, 1584, None),
]


@pytest.mark.parametrize(("kind", "file", "options", "count", "answer"), CASES, ids=[case[1] for case in CASES])
def test_every_file_is_read_whole(kind, file, options, count, answer):
    """Numbers of items as stated; the right answer of the first begins as the file has it."""
    questions = read_task(kind(name="t", data=str(EVAL / file), **options))
    assert len(questions) == count
    assert len({question.item for question in questions}) == count
    assert questions[0].answer is None if answer is None else questions[0].answer.startswith(answer)


def test_minimal_pairs_have_their_67_slices():
    """A hundred sentences each."""
    questions = read_task(MinimalPairs(name="t", data=str(EVAL / "blimp_67x100.jsonl"), slice="UID"))
    counts = {name: sum(question.slice == name for question in questions) for name in {q.slice for q in questions}}
    assert set(counts.values()) == {100}
    assert len(counts) == 67
