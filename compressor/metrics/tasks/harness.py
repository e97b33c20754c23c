"""lm-evaluation-harness on a live model, packed or not: its tasks, its prompts, its numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from compressor.errors import EnvironmentProblem, RecipeError

HASHES = ("doc_hash", "prompt_hash", "target_hash")


def harness(
    live_model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Scores of tasks by their names in lm-evaluation-harness, as JSON: `tasks`, `items`, `versions`, `lm_eval`.

    `include_path` is a folder of task files of one's own; tasks over local files need no network. Each item has the
    hashes of its document, prompt and target, which say whether two runs can be paired. The model computes as it is,
    with the fast ops where weights are packed. EnvironmentProblem where lm_eval is missing; RecipeError for tasks that
    it does not know.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EnvironmentProblem(
            f"the harness needs the extra `eval`: pip install 'compressor[eval]' ({error})"
        ) from None
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    known = set(manager.all_tasks)
    if unknown := [task for task in tasks if task not in known]:
        where = f", nor does {include_path}" if include_path else ""
        raise RecipeError(f"harness: lm_eval {lm_eval.__version__} knows no task {unknown[0]!r}{where}")
    model = HFLM(pretrained=live_model, tokenizer=tokenizer, batch_size=batch_size)
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=True, bootstrap_iters=1000
    )
    assert found is not None  # None on other ranks than the first; we run one process
    return {
        "lm_eval": lm_eval.__version__,
        "tasks": {task: _figures(figures) for task, figures in found["results"].items()},
        "versions": dict(found["versions"]),
        "items": {task: [_item(sample) for sample in samples] for task, samples in found["samples"].items()},
    }


def _figures(figures: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """`{"acc": {"value", "stderr"}}` from `{"acc,none": .., "acc_stderr,none": ..}`."""
    by_name: dict[str, dict[str, float | None]] = {}
    for key, value in figures.items():
        name, _, where = key.partition(",")
        if where and not name.endswith("_stderr"):
            stderr = figures.get(f"{name}_stderr,{where}")
            number = stderr if isinstance(stderr, int | float) else None
            by_name[name if where == "none" else f"{name}_{where}"] = {"value": value, "stderr": number}
    return by_name


def _item(sample: dict[str, Any]) -> dict[str, Any]:
    figures = {name: sample[name] for name in sample.get("metrics", ()) if isinstance(sample.get(name), int | float)}
    return {"item": sample["doc_id"], **{name: sample[name] for name in HASHES if name in sample}, **figures}
