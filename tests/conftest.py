"""Tiny checkpoints that tests only read, made once for a session, and the folders that a pass writes into.

Imports stand inside the fixtures: tests of `quant` and `kernels` run on images that have torch only.
"""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def quick_collections() -> None:
    """Walks collect garbage after each block; without the objects of all imports that takes 2 ms, not 250."""
    gc.freeze()


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of Llama in bfloat16. Do not write here."""
    return _saved(tmp_path_factory.mktemp("llama"), "llama", "bfloat16")


@pytest.fixture(scope="session")
def moe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of Qwen3-MoE in bfloat16, 8 experts, top-2. Do not write here."""
    return _saved(tmp_path_factory.mktemp("moe"), "qwen3_moe", "bfloat16")


@pytest.fixture(scope="session")
def exact_moe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in float32. Do not write here."""
    return _saved(tmp_path_factory.mktemp("exact_moe"), "qwen3_moe", "float32")


@pytest.fixture
def workplace(tmp_path: Path) -> Callable[..., Any]:
    """`workplace(step)`: a place for the blocks of a pass; called again, it continues with the same files."""

    def at(step: int = 1, name: str = "work") -> Any:
        from compressor.calibration import Workplace
        from compressor.checkpoint import Journal

        root = tmp_path / name
        return Workplace(root / f"{step:02d}", Journal(root / "journal.jsonl", {"test": 1}), step)

    return at


def _saved(folder: Path, family: str, dtype: str) -> Path:
    import torch

    from tests.tiny_models import save_tiny

    return save_tiny(folder, family, dtype=getattr(torch, dtype))
