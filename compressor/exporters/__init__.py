"""What a run leaves for other people's software: checkpoints, manifest, model card."""

from compressor.exporters.card import model_card
from compressor.exporters.manifest import verify_manifest, write_manifest
from compressor.exporters.parity import compare_reloaded
from compressor.exporters.safetensors import Exported, export_safetensors

__all__ = ["Exported", "compare_reloaded", "export_safetensors", "model_card", "verify_manifest", "write_manifest"]
