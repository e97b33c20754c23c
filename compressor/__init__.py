"""Compress transformers models with recipes of passes, measured after each, exported for other people's software.

`import compressor as cx`; what a name needs is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Calibration": "calibration",
    "Distill": "passes",
    "Model": "models",
    "Policy": "gates",
    "Prune": "passes",
    "Quantize": "passes",
    "Report": "reports",
    "apply": "pipeline",
    "check": "pipeline",
    "export": "pipeline",
    "generate": "pipeline",
    "judge": "gates",
    "load": "pipeline",
    "load_model": "models",
    "load_recipe": "recipe",
    "measure": "pipeline",
    "run": "pipeline",
}

__all__ = ["__version__", *_WHERE]

if TYPE_CHECKING:
    from compressor.calibration import Calibration
    from compressor.gates import Policy, judge
    from compressor.models import Model, load_model
    from compressor.passes import Distill, Prune, Quantize
    from compressor.pipeline import apply, check, export, generate, load, measure, run
    from compressor.recipe import load_recipe
    from compressor.reports import Report


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'compressor' has no attribute {name!r}")
    return getattr(import_module(f"compressor.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
