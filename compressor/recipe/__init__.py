"""What the user asks for: a YAML file, read into a Recipe of checked, frozen options."""

from compressor.recipe.loading import (
    is_recipe,
    load_evaluate,
    load_gate,
    load_policy,
    load_recipe,
    parse_export,
    parse_settings,
)
from compressor.recipe.options import EXPORTS, Evaluate, Gguf, Latency, Onnx, Recipe, Safetensors

__all__ = [
    "EXPORTS",
    "Evaluate",
    "Gguf",
    "Latency",
    "Onnx",
    "Recipe",
    "Safetensors",
    "is_recipe",
    "load_evaluate",
    "load_gate",
    "load_policy",
    "load_recipe",
    "parse_export",
    "parse_settings",
]
