"""Exported models run again: an ONNX folder in onnxruntime, behind the face of a transformers model."""

from compressor.runtimes.decoder import OnnxModel, open_onnx
from compressor.runtimes.encoder import OnnxEncoder, open_onnx_encoder
from compressor.runtimes.kv_cache import OnnxCache

__all__ = ["OnnxCache", "OnnxEncoder", "OnnxModel", "open_onnx", "open_onnx_encoder"]
