"""GGUF: weights, tokenizer and metadata in one file, for llama.cpp and what builds on it."""

from compressor.exporters.gguf.export import Exported, export_gguf, refuse_gguf
from compressor.exporters.gguf.parity import compare_gguf
from compressor.exporters.gguf.types import TYPES

__all__ = ["TYPES", "Exported", "compare_gguf", "export_gguf", "refuse_gguf"]
