"""Compress transformers models with recipes of passes, measured after each, exported for other people's software.

`import compressor as cx`; what a name needs is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Calibration": "calibration",
    "Distill": "passes",
    "Evaluate": "recipe",
    "Model": "models",
    "Policy": "gates",
    "Prune": "passes",
    "Quantize": "passes",
    "Report": "reports",
    "apply": "pipeline",
    "bench": "pipeline",
    "bisect": "pipeline",
    "check": "pipeline",
    "export": "pipeline",
    "gate": "pipeline",
    "generate": "pipeline",
    "load": "pipeline",
    "load_model": "models",
    "load_recipe": "recipe",
    "measure": "pipeline",
    "run": "pipeline",
    "sweep": "pipeline",
}

__all__ = ["__version__", *_WHERE]

if TYPE_CHECKING:
    from compressor.calibration import Calibration
    from compressor.gates import Policy
    from compressor.models import Model, load_model
    from compressor.passes import Distill, Prune, Quantize
    from compressor.pipeline import apply, bench, bisect, check, export, gate, generate, load, measure, run, sweep
    from compressor.recipe import Evaluate, load_recipe
    from compressor.reports import Report


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'compressor' has no attribute {name!r}")
    return getattr(import_module(f"compressor.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
