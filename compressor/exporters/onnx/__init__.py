"""Export to ONNX: our own graph writer, which puts a model's codes and scales straight into the operators."""

from compressor.exporters.onnx.parity import compare_onnx
from compressor.exporters.onnx.writer import OnnxSettings, export_onnx, refuse_onnx

__all__ = ["OnnxSettings", "compare_onnx", "export_onnx", "refuse_onnx"]
