"""lm-evaluation-harness on a live model, where it is installed; what is said where it is not."""

import importlib.util
import json
import sys

import pytest

from compressor.calibration import Calibration
from compressor.errors import EnvironmentProblem, RecipeError
from compressor.metrics.tasks import MultipleChoice, harness, measure_tasks
from compressor.models import wrap_live
from compressor.passes import Context, Quantize
from tests.tiny_models import tiny_ids, tiny_model, tiny_tokenizer

TASK = """
task: our_choices
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
output_type: multiple_choice
test_split: train
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""

installed = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed: pip install 'compressor[eval]'"
)


def test_a_missing_harness_is_named_with_its_command(monkeypatch):
    """No lm_eval: the error says what to install."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'compressor\[eval\]'"):
        harness(tiny_model("llama"), tiny_tokenizer(), ["piqa"])


@pytest.fixture
def offline_task(tmp_path, monkeypatch):
    """A folder with a task file over a local data file of ten questions."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"query": f"Question {n}:", "choices": ["yes", "no", "maybe"], "gold": n % 3} for n in range(10)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "our_choices.yaml").write_text(TASK.format(data=data))
    return tmp_path


@installed
def test_a_task_file_over_local_data_scores_as_ours(offline_task):
    """The harness on the live packed model, in the exact layout: the accuracy of our own evaluator."""
    model = wrap_live(tiny_model("llama"), tiny_tokenizer())
    Quantize(method="rtn", group_size=32).apply(
        model, Context(Calibration(data="/no/text.txt", samples=1, length=8), ids=tiny_ids(8))
    )
    found = harness(model.skeleton, model.tokenizer, ["our_choices"], include_path=offline_task)
    ours = measure_tasks(model, [MultipleChoice(name="t", data=str(offline_task / "rows.jsonl"))])
    assert found["tasks"]["our_choices"]["acc"]["value"] == pytest.approx(ours.tasks["t"].value)
    assert [entry["acc"] for entry in found["items"]["our_choices"]] == [entry.score for entry in ours.items]
    assert all(len(entry["prompt_hash"]) == 64 for entry in found["items"]["our_choices"])


@installed
def test_an_unknown_task_is_refused(offline_task):
    """With the folder that was searched too."""
    with pytest.raises(RecipeError, match="knows no task 'our_choces', nor does"):
        harness(tiny_model("llama"), tiny_tokenizer(), ["our_choces"], include_path=offline_task)
