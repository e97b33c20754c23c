"""Export to ONNX: our own graph writer, which puts a model's codes and scales straight into the operators.

Encoders have a writer of their own, and decoders of families that neither knows go through torch's exporter.
"""

from compressor.exporters.onnx.encoder import FAMILIES as ENCODERS
from compressor.exporters.onnx.encoder import export_encoder
from compressor.exporters.onnx.encoder_parity import compare_encoder
from compressor.exporters.onnx.parity import compare_onnx
from compressor.exporters.onnx.rounding import Rounding
from compressor.exporters.onnx.torch_graph import compare_with_torch, export_with_torch, round_with_torch
from compressor.exporters.onnx.writer import OnnxSettings, export_onnx, refuse_onnx

__all__ = [
    "ENCODERS",
    "OnnxSettings",
    "Rounding",
    "compare_encoder",
    "compare_onnx",
    "compare_with_torch",
    "export_encoder",
    "export_onnx",
    "export_with_torch",
    "refuse_onnx",
    "round_with_torch",
]
