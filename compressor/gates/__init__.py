"""Whether a compressed model is good enough: a policy held against what was measured, and against the files."""

from compressor.gates.check import Check
from compressor.gates.policy import PRESETS, Limit, Paired, Policy, TextLimit, Waiver
from compressor.gates.verdict import EXIT_CODES, Verdict, judge, limit_checks, verdict_of

__all__ = [
    "EXIT_CODES",
    "PRESETS",
    "Check",
    "Limit",
    "Paired",
    "Policy",
    "TextLimit",
    "Verdict",
    "Waiver",
    "judge",
    "limit_checks",
    "verdict_of",
]
