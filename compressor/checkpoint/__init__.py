"""Checkpoints on the disk: read lazily, written in shards, journalled."""

from compressor.checkpoint.digest import file_sha256, folder_digests
from compressor.checkpoint.journal import Journal
from compressor.checkpoint.reader import CheckpointReader
from compressor.checkpoint.writer import ShardWriter, write_json, write_safetensors, write_text

__all__ = [
    "CheckpointReader",
    "Journal",
    "ShardWriter",
    "file_sha256",
    "folder_digests",
    "write_json",
    "write_safetensors",
    "write_text",
]
