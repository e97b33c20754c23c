"""What the user asks for: a YAML file, read into a Recipe of checked, frozen options."""

from compressor.recipe.loading import is_recipe, load_evaluate, load_gate, load_policy, load_recipe, parse_export
from compressor.recipe.options import EXPORTS, Evaluate, Latency, Recipe, Safetensors

__all__ = [
    "EXPORTS",
    "Evaluate",
    "Latency",
    "Recipe",
    "Safetensors",
    "is_recipe",
    "load_evaluate",
    "load_gate",
    "load_policy",
    "load_recipe",
    "parse_export",
]
