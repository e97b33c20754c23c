"""The output folder of a run: who may write there, what a killed run left, how the result appears."""

import fcntl
import hashlib
import importlib.metadata
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from compressor import __version__
from compressor.calibration import DEMO_TEXT, Workplace
from compressor.checkpoint import Journal, file_sha256
from compressor.errors import EnvironmentProblem, RecipeError
from compressor.models import Model, demo_task, demo_texts
from compressor.recipe import Recipe

WORK = "work"


class RunFolder:
    """`out/` with its `work/`: generations of blocks, kept baseline states, and the journal that says what is done."""

    def __init__(self, out: Path, key: dict[str, Any]) -> None:
        self.out, self.work = out, out / WORK
        self.journal = Journal(self.work / "journal.jsonl", key)

    def generation(self, step: int) -> Path:
        return self.work / f"{step + 1:02d}"

    def workplace(self, step: int) -> Workplace:
        folder = self.generation(step)
        folder.mkdir(parents=True, exist_ok=True)
        return Workplace(folder, self.journal, step)

    def drop_generations_before(self, step: int) -> None:
        """At most two generations stay on the disk: the one being made and the one it is made from."""
        for old in range(step - 1):
            shutil.rmtree(self.generation(old), ignore_errors=True)

    def clean(self) -> None:
        """Leave only the journal: the run is finished."""
        for path in self.work.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)


def default_out(recipe: Recipe) -> Path:
    """`runs/<recipe>-<model>`."""
    model = re.sub(r"[^\w.-]+", "-", recipe.model.removeprefix("demo/")).strip("-.")
    return Path("runs") / f"{recipe.name}-{model}"


@contextmanager
def claimed(out: Path, *, fresh: bool) -> Iterator[None]:
    """Hold the folder for this process; RecipeError if it holds something else, or another run is writing there."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / WORK).is_dir())):
        raise RecipeError(f"{out} exists and was not made by a run; give another --out")
    try:
        (out / WORK).mkdir(parents=True, exist_ok=True)
        lock = os.open(out / WORK / "lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise EnvironmentProblem(f"{out}: cannot write here: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RecipeError(f"{out}: another run is writing here") from None
        if fresh:
            for path in (*out.iterdir(), *(out / WORK).iterdir()):
                if path.name not in (WORK, "lock"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield
    finally:
        os.close(lock)


def journal_key(recipe: Recipe, model: Model, device: str) -> dict[str, Any]:
    """All that the bytes of the result depend on."""
    assert model.reader is not None
    return {
        "recipe": recipe.sha256,
        "source": model.reader.digest(),
        "texts": {name: digest for name, digest in sorted(text_digests(recipe).items())},
        "versions": {
            "compressor": __version__,
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
        },
        "threads": torch.get_num_threads(),
        "device": device,
    }


def text_digests(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of every text file that a recipe reads, by the path as written."""
    evaluate = recipe.evaluate
    wanted: list[str | dict[str, str]] = [recipe.calibration.data, evaluate.text]
    wanted += [evaluate.ood.text] if evaluate.ood else []
    wanted += [evaluate.generation.text] if evaluate.generation else []
    wanted += [_task_file(task.data) for task in evaluate.tasks if not task.data.startswith("hf:")]
    for step in recipe.passes:
        own = getattr(step, "calibration", None)
        wanted += [data for data in (getattr(step, "data", None), own.data if own else None) if data]
    return {name: digest for data in wanted for name, digest in _digests(data).items()}


def _task_file(data: str) -> str:
    return str(demo_task(data)) if data.startswith("demo/") else data


def _digests(data: str | dict[str, str]) -> dict[str, str]:
    if isinstance(data, dict):
        return {path: digest for one in data.values() for path, digest in _digests(one).items()}
    if data == DEMO_TEXT:
        files = [*demo_texts("calibration").values(), *demo_texts("held_out").values()]
        together = hashlib.sha256("".join(file_sha256(file) for file in files).encode())
        return {data: together.hexdigest()}
    path = Path(data).expanduser()
    if path.is_dir():
        return {str(file): file_sha256(file) for file in sorted(path.iterdir()) if file.is_file()}
    if not path.is_file():
        raise RecipeError(f"there is no text at {data}; possible are {DEMO_TEXT}, a .txt or .jsonl file, a folder")
    return {data: file_sha256(path)}
