"""Structural rules: whether an exported folder holds what it should, told from its content before any evaluation."""

from compressor.gates.structure.check import check_structure
from compressor.gates.structure.finding import Finding
from compressor.gates.structure.smoke import smoke

__all__ = ["Finding", "check_structure", "smoke"]
