"""What the command line and training scripts call."""

from compressor.pipeline.benching import bench
from compressor.pipeline.bisecting import bisect
from compressor.pipeline.gating import GateResult, gate, gate_self_test
from compressor.pipeline.generating import generate
from compressor.pipeline.live import Applied, apply, doctor, export, load, measure, measure_encoder
from compressor.pipeline.planning import Plan, check, make_plan
from compressor.pipeline.running import RunResult, run
from compressor.pipeline.sweeping import sweep

__all__ = [
    "Applied",
    "GateResult",
    "Plan",
    "RunResult",
    "apply",
    "bench",
    "bisect",
    "check",
    "doctor",
    "export",
    "gate",
    "gate_self_test",
    "generate",
    "load",
    "make_plan",
    "measure",
    "measure_encoder",
    "run",
    "sweep",
]
