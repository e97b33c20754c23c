"""Text in, statistics out: tokens, the walk over blocks, what is collected on the way."""

from compressor.calibration.experts import ExpertInputs, GatheredInputs
from compressor.calibration.statistics import Hessian, InputNorm
from compressor.calibration.stream import Progress, last_hidden, release_memory, through_block
from compressor.calibration.tokens import DEMO_TEXT, Calibration, calibration_windows, load_texts, windows
from compressor.calibration.walk import Visit, Workplace, walk_blocks

__all__ = [
    "DEMO_TEXT",
    "Calibration",
    "ExpertInputs",
    "GatheredInputs",
    "Hessian",
    "InputNorm",
    "Progress",
    "Visit",
    "Workplace",
    "calibration_windows",
    "last_hidden",
    "load_texts",
    "release_memory",
    "through_block",
    "walk_blocks",
    "windows",
]
