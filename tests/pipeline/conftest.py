"""Recipes on tiny models, written into the test's own folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture
def recipe_file(tmp_path: Path) -> Callable[..., Path]:
    """`recipe_file(model, passes, **sections)`: a recipe that calibrates and evaluates on two small texts."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} bottles of beer on the wall, {n} bottles of beer. " for n in range(200)))
    other = tmp_path / "other.txt"
    other.write_text("The quick brown fox jumps over the lazy dog while 1,2,3 sheep count themselves. " * 60)

    def write(model: Path | str, passes: list[dict[str, Any]], **sections: Any) -> Path:
        recipe = {
            "model": str(model),
            "calibration": {"data": str(text), "samples": 8, "length": 64},
            "passes": passes,
            "evaluate": {"text": {"beer": str(text), "fox": str(other)}, "windows": 4, "length": 64, "latency": False},
            "export": ["safetensors"],
        } | sections
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    return write
