"""Silent corruptions to plant into a copy of a healthy artefact, and the test that each one is caught and named."""

from compressor.gates.faults.artefact import DoesNotApply, Injected
from compressor.gates.faults.self_test import FAULTS, Fault, Trial, self_test

__all__ = ["FAULTS", "DoesNotApply", "Fault", "Injected", "Trial", "self_test"]
