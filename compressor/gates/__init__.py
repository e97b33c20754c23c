"""Whether a compressed model is good enough: a policy of limits, judged on a report."""

from compressor.gates.policy import Limit, Policy, TextLimit
from compressor.gates.verdict import Check, Verdict, judge

__all__ = ["Check", "Limit", "Policy", "TextLimit", "Verdict", "judge"]
