"""What the command line and training scripts call."""

from compressor.pipeline.live import Applied, apply, doctor, export, generate, load, measure
from compressor.pipeline.planning import Plan, check, make_plan
from compressor.pipeline.running import RunResult, run

__all__ = [
    "Applied",
    "Plan",
    "RunResult",
    "apply",
    "check",
    "doctor",
    "export",
    "generate",
    "load",
    "make_plan",
    "measure",
    "run",
]
